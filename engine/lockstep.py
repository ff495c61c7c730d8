"""Expert-parallel decoding: GPUs that share a layer's experts, in lockstep, in SimPy's time.

Each GPU runs the dense part of its own tokens. Where tokens move, all GPUs meet twice in a visit: tokens go to the
owners of their experts (dispatch) once the last GPU has its choice, and back (combine) after the last expert. Who
serves what is decided by `placed`, in order; `gpu` knows what the calls on one GPU take.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import simpy

from ..resources.lane import Completion, CoupledLane, FifoLane, after_all, later, wait_for
from ..resources.network import Network
from ..resources.timeline import COMBINE, DENSE, DISPATCH, EXPERT, HEAD, PEER
from ..resources.topology import Route, Topology
from ..workloads.batches import Step
from .costs.costs import KernelCost
from .decide.memory_manager import Admission
from .decoder import collector_off
from .gpu import Decoded, Gpu
from .links import Links, PeerCosts, peer_lane
from .placed import PlacedVisit, Store

#: The title of the lane of copies from another GPU.
COPIES_FROM = "copy engine from {}"


class AllToAll:
    """What it takes to send every token to the GPUs that have its experts, or back.

    An h-relation as Valiant prices it ("A bridging model for parallel computation", CACM 33(8), 1990), for every link:
    the longest latency of a route + the most of bytes / bytes a second over the links. Where each GPU has a port to a
    switch that blocks nothing, that is the most that one GPU sends or receives.
    """

    rule = "the longest latency of a route + the most of bytes / bytes a second over the links of the machine's graph"

    def __init__(self, routes: Mapping[tuple[int, int], Route], topology: Topology, token_bytes: int) -> None:
        """Take the way from each GPU to each other one."""
        gpus = 1 + max((gpu for pair in routes for gpu in pair), default=0)
        rates = topology.capacities()
        number = {link: index for index, link in enumerate(rates)}
        passes = np.zeros((len(rates), gpus * gpus), dtype=np.int64)
        for (source, target), route in routes.items():
            for link in route.links:
                passes[number[link], source * gpus + target] += 1
        used = passes.any(axis=1)
        self._passed_bytes = passes[used] * token_bytes
        self._bytes_per_second = np.array(list(rates.values()), dtype=np.int64)[used]
        self._latency_ns = max((route.latency_ns for route in routes.values()), default=0)

    def ns(self, traffic: npt.NDArray[Any]) -> int:
        """Return the time of an exchange, in ns, `traffic[a, b]` tokens from GPU a to GPU b; 0 if none moves."""
        size_bytes = self._passed_bytes @ traffic.ravel()
        if not size_bytes.any():
            return 0
        return self._latency_ns - int((-size_bytes * 10**9 // self._bytes_per_second).min())

    def all_ns(self, traffic: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return the time of each of some exchanges, in ns (exchanges,), as `ns` does; `traffic` (exchanges, …)."""
        size_bytes = traffic.reshape(len(traffic), -1) @ self._passed_bytes.T
        ns = self._latency_ns - (-size_bytes * 10**9 // self._bytes_per_second).min(axis=1, initial=0)
        return np.where(size_bytes.any(axis=1), ns, 0)


class PlacedGpu(Gpu):
    """A GPU that exchanges tokens with others that own experts of the same layers."""

    __slots__ = ("_exchange", "_gpus", "_held", "_moved", "_sizes", "_visit", "number")

    def __init__(self, *args: Any, number: int, gpus: int, expert_bytes: Sequence[int], **options: Any) -> None:
        """Make the lanes of GPU `number` of `gpus` as `Gpu` does; `expert_bytes` (layers,) are those of an expert."""
        super().__init__(*args, **options)
        self.number, self._gpus, self._sizes = number, gpus, expert_bytes
        exchange = self.timeline.add_lane(f"gpu{number}", "peer", "all-to-all")
        self._exchange = FifoLane(self.timeline, exchange)
        self._visit: PlacedVisit | None = None
        self._moved = self.spool.column("sent", np.int32)  # the tokens sent to each GPU, exchange by exchange
        self._held: Completion = 0  # what the next kernel waits for besides
        if self.coupled:
            self._submit_kernel = self._submit_held

    def recorded(self) -> Decoded:
        """Return what was recorded, tokens sent included."""
        return replace(super().recorded(), sent=self._moved.array().reshape(-1, self._gpus))

    def note_sent(self, tokens: npt.NDArray[Any]) -> None:
        """Note the tokens that go to each GPU (GPUs,) in an exchange."""
        self._moved.buffer.frombytes(tokens.astype(np.int32).tobytes())

    def exchange(self, ns: int, issued_ns: int, after: Completion, kind: int) -> Completion:
        """Send and receive tokens; all GPUs do it at once, so they are given the same arguments."""
        return self._exchange.submit(ns, ns, issued_ns, after, kind, -1, self.visit)

    def wait_for_tokens(self, kind: int, arrival: Completion) -> None:
        """Let the compute stream wait for tokens; the next kernel, of this kind, is the first behind them."""
        self.expect(kind, arrival)
        if isinstance(arrival, int) and isinstance(self._compute, FifoLane) and not self.coupled:
            self._compute.hold(arrival)
        else:
            self._held = arrival

    def _submit_held(self, ns: int, alone_ns: int, issued_ns: int, after: Completion, *rest: Any, **named: Any) -> Any:
        """Submit a kernel, the first one behind what the stream waits for."""
        if self._held:
            after, self._held = later(after, self._held), 0
        return self._compute.submit(ns, alone_ns, issued_ns, after, *rest, **named)

    def serve_placed(self, visit: PlacedVisit, chosen: Completion) -> Generator[simpy.Event, Any, Completion]:
        """Serve this GPU's part of a visit as `serve` does, experts coming from other GPUs and leaving for them."""
        self._visit = visit
        return (yield from self.serve(visit.visits[self.number], chosen))


class LendingGpu(PlacedGpu):
    """A GPU that copies experts from others, too, and lets them copy its own, or keep what it evicts."""

    __slots__ = ("_landed", "_lent", "_links", "_network", "_others", "_peers", "_shelf")

    def __init__(self, *args: Any, **options: Any) -> None:
        """Make it as `PlacedGpu` is made; `lend` names the others before it runs."""
        super().__init__(*args, **options)
        self._peers: dict[int, FifoLane | CoupledLane] = {}
        # When each copy's bytes are there and, if others have read them, when they were done. Of what lies in its spare
        # memory, by number: when it was last written or read.
        self._landed: dict[int, Completion] = {}
        self._lent: dict[int, Completion] = {}
        self._shelf: dict[int, Completion] = {}

    def lend(self, gpus: Sequence[LendingGpu], links: Links, network: Network | None) -> None:
        """Name all GPUs of the run, by number, which copy experts from one another over these links.

        Copies from one to another are in order; those of other pairs run beside them and share links by the network.
        """
        self._others, self._links, self._network = gpus, links, network

    def _copy(self, lane: Any, admission: Admission, kind: int, predicted: Completion, target: int) -> Completion:
        """Enqueue a copy, from the host or from another GPU, once what lay there has been stored elsewhere."""
        visit = self._visit
        assert visit is not None
        stores, source = visit.stores[self.number], visit.sources[self.number].get(admission.copy)
        for copy in admission.former:
            if copy in stores:
                self._store(copy, stores[copy])
        if source is None:
            end = super()._copy(lane, admission, kind, predicted, target)
        else:
            end = self._fetch(admission, self._others[source[0]], source[1], predicted)
        self._landed[admission.copy] = end
        return end

    def _store(self, copy: int, store: Store) -> None:
        """Copy an evicted expert into the spare memory of another GPU."""
        other = self._others[store.gpu]
        free = other._shelf.pop(store.former, 0)
        end = self._move(self, other, store.expert, -1, [self._landed.get(copy, 0), free])
        self._lent[copy] = other._shelf[store.number] = end

    def _fetch(self, admission: Admission, other: LendingGpu, number: int, predicted: Completion) -> Completion:
        """Copy an expert from another GPU: what it stores in spare memory, or what its own copy brought."""
        if admission.former:
            self.now_ns += self._wait_ns
        free = self._after_former(admission, predicted)
        ends = other._shelf if number in other._shelf else other._landed
        end = self._move(other, self, admission.expert, admission.copy, [free, ends.get(number, 0)])
        if ends is other._shelf:
            ends[number] = end
        else:
            other._lent[number] = later(end, other._lent.get(number, 0))
        self._arriving[admission.copy] = end
        return end

    def _move(
        self, source: LendingGpu, target: LendingGpu, expert: int, copy: int, after: list[Completion]
    ) -> Completion:
        """Enqueue a copy from one GPU to another, by this one's host thread, behind all of `after`; return its end."""
        costs, size_bytes = self._links.peer(source.number, target.number), self._sizes[expert // self._experts]
        lane = target._lane_from(source, costs)
        self.now_ns += costs.host_ns
        return lane.submit(
            costs.queued_ns(size_bytes), costs.alone_ns(size_bytes), self.now_ns + costs.latency_ns,
            after_all(after), PEER, expert, self.visit, copy, transfer=costs.transfer(size_bytes),
        )  # fmt: skip

    def _lane_from(self, source: LendingGpu, costs: PeerCosts) -> FifoLane | CoupledLane:
        """Return the lane of copies from another GPU to this one."""
        if source.number not in self._peers:
            title = COPIES_FROM.format(f"gpu{source.number}")
            self._peers[source.number] = peer_lane(
                self.env, self.timeline, f"gpu{self.number}", title, costs.lags, self._network
            )
        return self._peers[source.number]

    def _last_use(self, copy: int) -> Completion:
        """Forget an evicted copy and return the end of its last reader, which may be a copy to another GPU."""
        end = super()._last_use(copy)
        self._landed.pop(copy, None)
        lent = self._lent.pop(copy, 0)
        return later(end, lent) if lent else end


def decode_placed(
    visits: Iterator[PlacedVisit],
    steps: Sequence[Step],
    homes: Sequence[npt.NDArray[Any]],
    gpus: Sequence[PlacedGpu],
    exchange: AllToAll,
    *,
    one_thread: bool = False,
) -> list[Decoded]:
    """Run the visits of steps on the lanes of several GPUs and return what each recorded; `homes` as of `Placed`.

    `one_thread`: one host thread dispatches to all of them, GPU by GPU; else each has its own, and they meet at every
    choice, when the last of them knows it.
    """
    env = gpus[0].env
    env.process(_Lockstep(gpus, exchange, one_thread).run(visits, steps, homes))
    with collector_off():
        env.run()
    return [gpu.recorded() for gpu in gpus]


class _Lockstep:
    """The host threads of several GPUs, which go through every layer together."""

    def __init__(self, gpus: Sequence[PlacedGpu], exchange: AllToAll, one_thread: bool) -> None:
        self._gpus, self._exchange, self._one = gpus, exchange, one_thread and len(gpus) > 1
        self._env = gpus[0].env
        self._coupled = any(gpu.coupled for gpu in gpus)
        self._now_ns = 0  # of the one thread
        self._back: list[Completion] = [0] * len(gpus)  # when each has its tokens back; 0 if none went

    def run(
        self, visits: Iterator[PlacedVisit], steps: Sequence[Step], homes: Sequence[npt.NDArray[Any]]
    ) -> Generator[simpy.Event, Any, None]:
        """Dispatch every step: dense parts, the choice, tokens there and back, experts, then the heads."""
        layers = range(len(self._gpus[0].dense_costs))
        for step, home in zip(steps, homes, strict=True):
            tokens = np.bincount(home, minlength=len(self._gpus)).tolist()
            for gpu in self._gpus:
                gpu.begin_step(step.phase)
            for layer in layers:
                dense = yield from self._dense(layer, tokens)
                chosen = yield from self._know(dense)
                yield from self._catch_up(layer)
                visit = next(visits)
                moves_ns = 0 if visit.traffic is None else self._exchange.ns(visit.traffic)
                self._send(visit, moves_ns, dense)
                ends = yield from self._serve(visit, chosen)
                self._back = self._meet(COMBINE, moves_ns, ends) if moves_ns else [0] * len(self._gpus)
            yield from self._heads([min(count, step.sampled) for count in tokens])
            for gpu in self._gpus:
                gpu.spool.flush()
        for gpu in self._gpus:
            gpu.end_busy()

    def _turns(self) -> Iterator[PlacedGpu]:
        """Yield the GPUs, each with its thread on it."""
        for gpu in self._gpus:
            if self._one:
                gpu.take_over(self._now_ns)
            yield gpu
            if self._one:
                gpu.end_busy()
                self._now_ns = gpu.now_ns

    def _dense(self, layer: int, tokens: list[int]) -> Generator[simpy.Event, Any, list[Completion | None]]:
        """Launch the dense part of each GPU's tokens and return the ends; None of one that has no tokens."""
        ends: list[Completion | None] = []
        for gpu, count, back in zip(self._turns(), tokens, self._back, strict=True):
            gpu.visit += 1
            ends.append((yield from self._launch(gpu, gpu.dense_costs[layer][count], DENSE, back)) if count else None)
        return ends

    def _launch(
        self, gpu: PlacedGpu, cost: KernelCost, kind: int, back: Completion
    ) -> Generator[simpy.Event, Any, Completion]:
        """Launch what needs a GPU's tokens back from the others, if any went."""
        if gpu.watch_queue:
            yield from gpu.wait_for_queue(cost.launches)
        if back:
            gpu.wait_for_tokens(kind, back)
        return gpu.launch(cost, kind)

    def _know(self, dense: list[Completion | None]) -> Generator[simpy.Event, Any, int]:
        """Bring every GPU's choice to the host and wait for the last; return when that has come."""
        choices = [gpu.read_back(end) for gpu, end in zip(self._turns(), dense, strict=True) if end is not None]
        last = after_all(choices)
        last_ns = last if isinstance(last, int) else (yield from wait_for(self._env, last))
        for gpu in self._turns():
            gpu.notice(last_ns)
        return last_ns

    def _catch_up(self, layer: int) -> Generator[simpy.Event, Any, None]:
        """Let SimPy's clock come up to the first of the host's, where lanes run in its time; else once a step."""
        now_ns = min(gpu.now_ns for gpu in self._gpus)
        if (self._coupled or not layer) and now_ns > self._env.now:
            yield self._env.timeout(now_ns - self._env.now)

    def _send(self, visit: PlacedVisit, ns: int, dense: list[Completion | None]) -> None:
        """Note what was decided, and let tokens go to the GPUs that have their experts."""
        for gpu, own in zip(self._turns(), visit.visits, strict=True):
            gpu.begin(own)
        if not ns or visit.traffic is None:
            return
        for gpu, tokens in zip(self._gpus, visit.traffic, strict=True):
            gpu.note_sent(tokens)
        arrivals = self._meet(DISPATCH, ns, [end for end in dense if end is not None])
        for gpu, own, arrival in zip(self._turns(), visit.visits, arrivals, strict=True):
            if own.accesses.experts:
                gpu.wait_for_tokens(EXPERT, arrival)

    def _meet(self, kind: int, ns: int, ends: list[Completion]) -> list[Completion]:
        """Exchange tokens once everything has ended that is named, and return when each GPU has its own."""
        for gpu in self._turns():
            gpu.now_ns += gpu.costs.launch_ns
        issued_ns, after = max(gpu.now_ns for gpu in self._gpus), after_all(ends)
        return [gpu.exchange(ns, issued_ns, after, kind) for gpu in self._gpus]

    def _serve(self, visit: PlacedVisit, chosen_ns: int) -> Generator[simpy.Event, Any, list[Completion]]:
        """Serve every GPU's part and return when its last expert ends."""
        ends: list[Completion] = []
        if not self._one and any(gpu.awaits_guesses for gpu in self._gpus):
            # Each has a thread of its own: none waits for another's guesses.
            threads = [self._env.process(gpu.serve_placed(visit, chosen_ns)) for gpu in self._gpus]
            done: Any = yield self._env.all_of(threads)
            return [done[thread] for thread in threads]
        for gpu in self._turns():
            ends.append((yield from gpu.serve_placed(visit, chosen_ns)))
        return ends

    def _heads(self, tokens: list[int]) -> Generator[simpy.Event, Any, None]:
        """Launch the head of each GPU over so many positions."""
        for gpu, count, back in zip(self._turns(), tokens, self._back, strict=True):
            if count:
                yield from self._launch(gpu, gpu.costs.head(count), HEAD, back)
        self._back = [0] * len(self._gpus)
