"""Waits of the serving loop against the Pollaczek-Khinchine formula, as closely as 2 % of it.

    python tests/queueing_theory.py [--all]

prints a row for each of 20 cells: theory, mean, half-width of its 95 % interval, and whether theory lies inside. Each
cell is of independent runs, so many that the half-width is expected to be under 2 % of theory, by a pilot of twenty,
and a tenth more as long as it is not. The mean is corrected by what the runs drew of services and gaps, whose means are
known (control variates: Lavenberg and Welch, "A perspective on the use of control variables to increase the efficiency
of Monte Carlo simulations", Management Science 27(3), 1981).

The loop serves three runs of each pilot, every wait of which must be that of Lindley's recursion to the nanosecond; the
others are made by the recursion, all in a minute. With --all the loop serves every counted run, which takes twenty.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

from prestage.engine.policies.scheduler import Static
from prestage.testing import serve, tiny_server
from prestage.workloads.requests.arrivals import Process, arrival_instants
from prestage.workloads.requests.lengths import PROMPTS, Lengths, draw_lengths
from prestage.workloads.requests.request import Request, RequestStep

Instants = npt.NDArray[np.int64]

#: Tokens of a prompt in the mean, and what each takes: a request is a prompt, and its step gives its one token.
TOKENS, TOKEN_NS = 100, 1000
#: Services by their name and coefficient of variation.
SERVICES = {
    "constant": (Lengths(TOKENS), 0.0),
    "uniform": (Lengths(TOKENS, "uniform", cv=0.5), 0.5),
    "exponential": (Lengths(TOKENS, "exponential"), 1.0),
    "log-normal": (Lengths(TOKENS, "lognormal", cv=0.7), 0.7),
}
LOADS = (0.3, 0.45, 0.6, 0.75, 0.9)
#: Requests of a run, the first of which are left out; runs of a pilot; how narrow the interval is meant to be; fewest
#: runs, and how wide the interval may be at most; how many of a cell's pilot the loop serves, too.
COUNT, WARMUP, PILOT, WANTED = 12_000, 2_000, 20, 0.016
LEAST, MOST, LOOPED = 20, 0.02, 3
#: Quantiles at 97.5 %: of the normal distribution, and of Student's for a pilot and the fewest runs.
NORMAL, STUDENT_17 = 1.96, 2.110


@dataclass(frozen=True)
class Cell:
    """One service at one load: waits in services."""

    service: str
    load: float
    theory: float
    mean: float
    half_width: float
    runs: int

    @property
    def inside(self) -> bool:
        """Whether theory lies in the interval."""
        return abs(self.mean - self.theory) <= self.half_width


def one_run(lengths: Lengths, load: float, seed: int, *, by_loop: bool) -> tuple[float, float, float]:
    """The mean wait of a run in services, and what it drew: mean service and mean gap over what they are to be."""
    gap_ns = TOKENS * TOKEN_NS / load
    prompts = draw_lengths(lengths, COUNT, seed, PROMPTS)
    arrivals = arrival_instants("poisson", Process(1e9 / gap_ns), COUNT, seed)
    waits_ns = lindley(arrivals, prompts * TOKEN_NS)
    if by_loop:
        assert (served(arrivals, prompts) == waits_ns).all(), f"seed {seed}: the loop's waits are not the recursion's"
    waits = waits_ns[WARMUP:] / (TOKENS * TOKEN_NS)
    gaps = np.diff(arrivals[WARMUP - 1 :])
    return float(waits.mean()), float(prompts[WARMUP:].mean()) / TOKENS, float(gaps.mean()) / gap_ns


def lindley(arrivals_ns: Instants, services_ns: Instants) -> Instants:
    """How long each waits: what the one before it waited and was served, less the gap, and no less than nothing.

    D. V. Lindley, "The theory of queues with a single server", Mathematical Proceedings of the Cambridge Philosophical
    Society 48(2), 1952.
    """
    sums = np.concatenate([[0], np.cumsum(services_ns[:-1] - np.diff(arrivals_ns))])
    waits: Instants = sums - np.minimum.accumulate(np.minimum(sums, 0))
    return waits


def served(arrivals_ns: Instants, prompts: Instants) -> Instants:
    """How long each waits in the serving loop, where a request is a prompt of one step and one token."""
    columns = zip(arrivals_ns.tolist(), prompts.tolist(), strict=True)
    requests = [Request(number, at, length, 1) for number, (at, length) in enumerate(columns)]
    server = tiny_server(requests, Static, max_num_seqs=1)
    serve(server, _step_ns)
    done = server.log.requests
    waits: Instants = done["started_ns"] - done["arrival_ns"]
    return waits


def _step_ns(step: RequestStep) -> int:
    return step.parts[0].tokens * TOKEN_NS


def corrected(runs: npt.NDArray[np.float64], constant: bool) -> tuple[float, float]:
    """The mean wait over runs (runs, 3) and its standard error, corrected by the controls, whose means are 1."""
    controls = runs[:, 2:] if constant else runs[:, 1:]
    matrix = np.column_stack([np.ones(len(runs)), controls - 1])
    found, *_ = np.linalg.lstsq(matrix, runs[:, 0], rcond=None)
    left = runs[:, 0] - matrix @ found
    variance = float(left @ left) / (len(runs) - matrix.shape[1])
    return float(found[0]), float(np.sqrt(variance * np.linalg.inv(matrix.T @ matrix)[0, 0]))


def cell(service: str, load: float, *, by_loop: bool = False) -> Cell:
    """One cell: a pilot says how many runs there are, and they are other runs than it."""
    lengths, cv = SERVICES[service]
    theory = load * (1 + cv**2) / (2 * (1 - load))
    first = 1000 * round(100 * load)
    pilot = np.array([one_run(lengths, load, first + number, by_loop=number < LOOPED) for number in range(PILOT)])
    error = corrected(pilot, not cv)[1] * PILOT**0.5
    wanted = max(LEAST, int(np.ceil((STUDENT_17 * error / (WANTED * theory)) ** 2)))
    found: list[tuple[float, float, float]] = []
    while True:
        seeds = range(first + PILOT + len(found), first + PILOT + wanted)
        found += [one_run(lengths, load, seed, by_loop=by_loop) for seed in seeds]
        mean, error = corrected(np.array(found), not cv)
        half_width = (NORMAL if len(found) > 60 else STUDENT_17) * error
        if half_width <= MOST * theory:
            return Cell(service, load, theory, mean, half_width, len(found))
        wanted += max(1, len(found) // 10)


def cells(*, by_loop: bool = False) -> Iterator[Cell]:
    """All cells."""
    for service in SERVICES:
        for load in LOADS:
            yield cell(service, load, by_loop=by_loop)


if __name__ == "__main__":
    for one in cells(by_loop="--all" in sys.argv):
        print(json.dumps({**asdict(one), "inside": one.inside, "relative": one.half_width / one.theory}), flush=True)
