"""What came out: figures of the recorded traces, the parts of them that are shipped, and the tables of the docs.

    python -m prestage.workloads.training.report --recorded DIR     what `train` wrote -> workloads/data
    python -m prestage.workloads.training.report --docs FILE        the tables, into a page between its two marks

Without an option the tables are printed. All figures of a report are of the whole recording, not of the shipped part.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ...files import write_file
from ..statistics import SUMMARY_SHARES, lru_hit_rates, normalized_entropy, popularity, reuse
from ..trace import RoutingTrace, by_sequence
from . import run_command

Report = dict[str, Any]

#: How many tokens apart reuse is measured.
LAGS = (1, 2, 4, 8, 16, 64)
#: How many guesses of a list are counted.
LISTED = (1, 2, 4, 6, 8, 16)
BEGIN, END = "<!-- begin prestage.workloads.training.report -->", "<!-- end -->"


class Part(NamedTuple):
    """What is shipped of a recording: its first sequences, the first tokens of each, the best guesses of each list."""

    sequences: int
    tokens_each: int
    guesses: int


#: By model. Sequences come in turns of nine domains; both files together are about 4 MB.
SHIPPED = {"guide": Part(36, 512, 2), "topk": Part(9, 256, 6)}


def specialization(trace: RoutingTrace) -> dict[str, Any]:
    """Say how far the domains of a text, `extra["domain"]` by sequence, use experts of their own.

    `information` is the mutual information of domain and expert over log(domains), the domains weighing the same,
    by layer: 0 where all domains use the experts alike, 1 where an expert tells the domain. `distance` is the total
    variation between what a domain uses and what all use, mean of the layers, by domain.
    """
    domain = trace.extra["domain"][trace.sequence]
    names = trace.meta["domains"]
    counts = np.stack([popularity(trace.select(domain == number)) for number in range(len(names))])
    own = counts / counts.sum(axis=-1, keepdims=True)
    everyone = own.mean(axis=0)
    ratio = np.divide(own, everyone, out=np.ones_like(own), where=own > 0)
    information = (own * np.log(ratio)).sum(axis=-1).mean(axis=0) / math.log(len(names))
    distance = np.abs(own - everyone).sum(axis=-1).mean(axis=-1) / 2
    return {"information": _rounded(information), "distance": dict(zip(names, _rounded(distance), strict=True))}


def guess_recall(trace: RoutingTrace) -> dict[str, dict[str, list[float]]]:
    """Returns which share of the true experts `predictions` list among the first n, by horizon, for n in LISTED.

    Apart for targets in the guessing token itself (`same_token`) and in its sequence's next one (`next_token`).
    Raises ValueError for a trace without predictions.
    """
    if trace.predictions is None:
        raise InputError("the trace has no predictions: nothing was guessed")
    order = by_sequence(trace.sequence)
    layers, horizons, listed = trace.predictions.shape[1:]
    visits = trace.experts[order].reshape(-1, trace.k)
    guesses = trace.predictions[order].reshape(-1, horizons, listed)
    sequence = np.repeat(trace.sequence[order], layers)
    layer = np.tile(np.arange(layers), trace.tokens)
    result: dict[str, dict[str, list[float]]] = {"same_token": {}, "next_token": {}}
    for ahead in range(1, horizons + 1):
        hit = (visits[ahead:, :, None] == guesses[:-ahead, None, ahead - 1]).any(axis=1)
        there = sequence[ahead:] == sequence[:-ahead]
        same = layer[:-ahead] + ahead < layers
        for name, rows in (("same_token", there & same), ("next_token", there & ~same)):
            recall = hit[rows].sum(axis=0).cumsum() / (rows.sum() * trace.k)
            result[name][str(ahead)] = _rounded(recall[np.minimum(LISTED, listed) - 1])
    return result


def describe(trace: RoutingTrace, with_guesses: RoutingTrace, facts: Report) -> Report:
    """Returns a model's report: the facts of its training, and figures of its recorded traces, ready for JSON."""
    figures = {
        "recorded_tokens": trace.tokens,
        "recorded_sequences": len(np.unique(trace.sequence)),
        "normalized_entropy": _rounded(normalized_entropy(popularity(trace))),
        "reuse_by_chance": trace.k / trace.num_experts,
        "reuse_by_lag": {str(lag): _rounded(reuse(trace, lag)) for lag in LAGS},
        "specialization": specialization(trace),
        "guessed_tokens": with_guesses.tokens,
        "listed": list(LISTED),
        "guess_recall": guess_recall(with_guesses),
        "lru_hit_rate": {
            f"{share:.0%}": None if math.isnan(rate) else round(float(rate), 4)
            for share, rate in zip(SUMMARY_SHARES, lru_hit_rates(with_guesses, SUMMARY_SHARES), strict=True)
        },
    }
    return {**facts, "routing": figures}


def compact(trace: RoutingTrace, part: Part, facts: Report) -> RoutingTrace:
    """Returns the shipped part of a recorded trace with predictions, its origin in `meta`."""
    if trace.predictions is None:
        raise InputError("the trace has no predictions: nothing was guessed")
    sequences = np.unique(trace.sequence)[: part.sequences]
    kept = trace.select(np.isin(trace.sequence, sequences) & (trace.position < part.tokens_each))
    assert kept.predictions is not None
    meta = {
        **kept.meta,
        "date": facts["date"],
        "device": facts["device"],
        "seed": facts["training"]["seed"],
        "steps": facts["steps_done"],
        "text": {each["domain"]: f"{each['package']} {each['version']}, {each['licence']}"
                 for each in facts["corpus"]["sources"]},
        "predictions": "the routers of the layers ahead, given this layer's hidden state",
    }  # fmt: skip
    return replace(
        kept,
        predictions=kept.predictions[..., : part.guesses],
        meta=meta,
        extra={"domain": trace.extra["domain"][sequences]},
    )


def _rounded(values: npt.ArrayLike) -> list[float]:
    return [round(float(value), 4) for value in np.asarray(values)]


def write_json(path: Path, value: Report) -> None:
    """Write a report, whole or not at all."""
    content = (json.dumps(value, indent=1) + "\n").encode()
    write_file(path, content)


def shipped_reports() -> dict[str, Report]:
    """Returns the reports of the shipped traces, by model."""
    folder = resources.files("prestage") / "workloads" / "data"
    return {name: json.loads((folder / f"{name}.json").read_text("utf-8")) for name in SHIPPED}


def tables(reports: dict[str, Report]) -> str:
    """Returns the reports as Markdown."""
    return "\n\n".join(f"**{title}**\n\n{table(reports)}" for title, table in _TABLES.items())


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_model(rows: dict[str, Callable[[Report], str]], reports: dict[str, Report]) -> str:
    return _grid(["", *reports], [[name, *(cell(each) for each in reports.values())] for name, cell in rows.items()])


def _models(reports: dict[str, Report]) -> str:
    return _by_model(
        {
            "MoE layers": lambda r: str(r["model"]["layers"]),
            "experts, chosen": lambda r: f"{r['model']['experts']}, top-{r['model']['top_k']}",
            "width, of an expert": lambda r: f"{r['model']['width']}, {r['model']['expert_width']}",
            "parameters": lambda r: f"{r['parameters'] / 1e6:.0f} M",
            "balancing": lambda r: f"{_BALANCE[r['model']['balance']]}, {r['model']['balance_rate']}",
            "tokens trained on": lambda r: f"{r['tokens_seen'] / 1e6:.1f} M in {r['steps_done']:,} steps",
            "training time": lambda r: f"{r['training_seconds']:.0f} s",
            "device, date": lambda r: f"{r['device']}, {r['date']}",
            "choices dropped in training, step 100 and last": lambda r: (
                f"{r['curve'][0]['dropped']:.1%}, {r['curve'][-1]['dropped']:.2%}"
            ),
            "tokens recorded (with guesses)": lambda r: (
                f"{r['routing']['recorded_tokens']:,} ({r['routing']['guessed_tokens']:,})"
            ),
            "tokens shipped": lambda r: f"{SHIPPED[r['name']].sequences * SHIPPED[r['name']].tokens_each:,}",
        },
        reports,
    )


_BALANCE = {"aux_loss": "Switch loss", "bias": "DeepSeek bias"}


def _routing(reports: dict[str, Report]) -> str:
    def mean(values: Sequence[float]) -> str:
        return f"{np.mean(values):.3f}"

    def reuse_at(lag: str, report: Report) -> str:
        return mean(report["routing"]["reuse_by_lag"][lag])

    def hit_rate_at(share: str, report: Report) -> str:
        rate = report["routing"]["lru_hit_rate"][share]
        return "" if rate is None else f"{rate:.1%}"

    rows: dict[str, Callable[[Report], str]] = {
        "entropy of the experts' use, 1 = even": lambda r: mean(r["routing"]["normalized_entropy"]),
        "what an expert tells of the domain, 1 = all": lambda r: mean(r["routing"]["specialization"]["information"]),
        "reuse by chance": lambda r: f"{r['routing']['reuse_by_chance']:.3f}",
    }
    rows |= {f"reuse, {lag} tokens on": partial(reuse_at, str(lag)) for lag in LAGS}
    rows |= {
        f"LRU hit rate, {share:.0%} of all experts": partial(hit_rate_at, f"{share:.0%}") for share in SUMMARY_SHARES
    }
    return _by_model(rows, reports)


def _domains(reports: dict[str, Report]) -> str:
    rows = []
    sources = next(iter(reports.values()))["corpus"]["sources"]
    for source in sources:
        name = source["domain"]
        cells = [f"{source['training_tokens'] / 1e6:.2f} M"]
        for report in reports.values():
            distance = report["routing"]["specialization"]["distance"][name]
            loss, bits = report["held_out_loss_nats"][name], report["held_out_bits_per_byte"][name]
            cells += [f"{loss:.2f} ({bits:.2f})", f"{distance:.2f}"]
        rows.append([name, f"{source['package']} {source['version']}", source["licence"], *cells])
    header = ["domain", "package", "licence", "tokens"]
    for name in reports:
        header += [f"{name}: loss (bits/byte)", f"{name}: distance"]
    return _grid(header, rows)


def _guesses(reports: dict[str, Report]) -> str:
    rows = []
    for name, report in reports.items():
        for where, recalls in report["routing"]["guess_recall"].items():
            for ahead, values in recalls.items():
                rows.append([name, where.replace("_", " "), ahead, *(f"{value:.1%}" for value in values)])
    return _grid(["model", "target in the", "layers ahead", *(f"first {n}" for n in LISTED)], rows)


_TABLES: dict[str, Callable[[dict[str, Report]], str]] = {
    "The models, how they were trained and what was recorded": _models,
    "Their routing over held-out text (means over layers)": _routing,
    "The text, the loss on what was held out of it, and how far its use of experts is from the average": _domains,
    "Recall of the next layers' routers on this layer's hidden state": _guesses,
}


def write_tables(page: Path) -> None:
    """Put the tables between the marks of a page. Raises ValueError if it lacks them."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{page}: must have the marks {BEGIN} and {END}")
    filled = f"{before}{BEGIN}\n{tables(shipped_reports())}\n{END}{after}"
    write_file(page, filled.encode())


def ship(recorded: Path, data: Path) -> None:
    """Write the shipped part and the report of every model recorded in a folder."""
    for name, part in SHIPPED.items():
        facts = json.loads((recorded / f"{name}-training.json").read_text(encoding="utf-8"))
        with_guesses = RoutingTrace.load(recorded / f"{name}-guesses.safetensors")
        report = describe(RoutingTrace.load(recorded / f"{name}.safetensors"), with_guesses, facts)
        write_json(data / f"{name}.json", report)
        compact(with_guesses, part, facts).save(data / f"{name}.safetensors")


def main(arguments: list[str] | None = None) -> None:
    """Write the shipped files, or the tables."""
    parser = argparse.ArgumentParser(description="Report on the recorded traces and cut out what is shipped.")
    parser.add_argument("--recorded", type=Path, help="the folder that training.train wrote to")
    parser.add_argument("--data", type=Path, default=Path(__file__).parent.parent / "data", help="where to ship to")
    parser.add_argument("--docs", type=Path, help="the page to put the tables into")
    given = parser.parse_args(arguments)
    if given.recorded:
        ship(given.recorded, given.data)
    if given.docs:
        write_tables(given.docs)
    if not given.recorded and not given.docs:
        print(tables(shipped_reports()))


if __name__ == "__main__":
    run_command(main)
