"""From the section [requests] to the requests, the room for KV blocks beside the experts, and a server for each run.

Nothing here runs: what can never be served is refused before the clock starts.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ...bounded import read_json
from ...errors import InputError
from ...units import bytes_words
from ...words import shown
from ...workloads.batches import Step
from ...workloads.model import Model
from ...workloads.requests.arrivals import CLOSED, TRACE, Closed, Open, Process, Source, arrival_instants
from ...workloads.requests.kv_blocks import KvBlocks, PrefixBlocks
from ...workloads.requests.lengths import OUTPUTS, PROMPTS, Lengths, draw_lengths
from ...workloads.requests.queue import Queue, Swapping
from ...workloads.requests.replicas import Routed, Turns
from ...workloads.requests.request import Request, RequestStep
from ...workloads.requests.rows import RequestRows
from ...workloads.requests.server import Server
from ...workloads.requests.speculation import Speculation
from ...workloads.requests.traces import RequestTrace, read_requests
from ...workloads.trace import RoutingTrace
from ..policies.router import ROUTERS
from ..policies.scheduler import SCHEDULERS, Chunked, ExpertsOf, Limits
from ..scenario.amounts import AMOUNT, ScenarioError, parse_budget, parse_bytes
from ..scenario.sections_requests import (
    RequestsSection,
    SchedulerSection,
    SpeculationSection,
    TokenCount,
    blocks_of,
    edge_requests,
)

#: What is served where nothing says how many, and how long prompts and outputs are.
DEFAULT_COUNT, DEFAULT_PROMPT, DEFAULT_OUTPUT = 100, 512, 128
#: Room without end, for a model whose positions take no bytes.
_ENDLESS_BLOCKS = 1 << 40


@dataclass(frozen=True)
class KvRoom:
    """So many KV blocks of so many positions and bytes each; `host_blocks` fit where they are swapped to."""

    blocks: int
    block_tokens: int
    block_bytes: int
    host_blocks: int = 0

    @property
    def kv_bytes(self) -> int:
        """What all blocks take."""
        return 0 if self.blocks == _ENDLESS_BLOCKS else self.blocks * self.block_bytes


@dataclass(frozen=True)
class RequestLoad:
    """What is served, by whom, and where; `server()` makes a fresh one for each run. `failed` of a trace are left out.

    `room_bytes` are left for experts and KV blocks together; None where nobody says so.
    """

    section: RequestsSection
    requests: list[Request]
    rows: RequestRows
    trace: RoutingTrace
    room: KvRoom
    seed: int
    speculation: Speculation | None = None
    room_bytes: int | None = None
    failed: int = 0

    @property
    def schedule_ns(self) -> int:
        """What making a step takes the host, drafting included."""
        drafting = 0.0 if self.section.speculation is None else self.section.speculation.draft_us
        return round((self.section.scheduler.step_us + drafting) * 1000)

    @property
    def drafts(self) -> int:
        """How many drafts a step verifies of a request."""
        return 0 if self.speculation is None else self.speculation.drafts

    @property
    def most_tokens(self) -> int:
        """The most rows that a step may have."""
        scheduler = self.section.scheduler
        if issubclass(SCHEDULERS[scheduler.name], Chunked):
            return scheduler.max_num_batched_tokens
        # Each row has a place in the KV cache, and each request is there once.
        longest = heapq.nlargest(scheduler.max_num_seqs, (one.most_positions + self.drafts for one in self.requests))
        return min(sum(longest), self.room.blocks * self.room.block_tokens)

    def server(self) -> Server:
        """Returns a server that has served nobody yet."""
        return self._server_of(self._source())

    def servers(self) -> tuple[Turns, list[Server]]:
        """Returns a server for each replica, none of which has served anybody yet, and what lets them run in turns."""
        turns = Turns(self.section.replicas)
        router = ROUTERS[self.section.router](turns.count)
        return turns, [self._server_of(share) for share in Routed(self.requests, router, turns).shares]

    def _server_of(self, source: Source) -> Server:
        section, room = self.section, self.room
        kv = (PrefixBlocks if section.kv.prefix_caching else KvBlocks)(room.blocks, room.block_tokens)
        queue = Queue(kv, self.drafts, Swapping(room.host_blocks, room.block_bytes))
        scheduler = SCHEDULERS[section.scheduler.name](_limits(section.scheduler), _experts_of(self.rows, self.trace))
        return Server(source, queue, scheduler, self.rows, self.speculation)

    def _source(self) -> Source:
        section = self.section
        if section.arrivals == CLOSED:
            return Closed(self.requests, section.users, round(section.think_s * 1e9), self.seed)
        return Open(self.requests)

    def expert_bytes(self, most_bytes: int) -> int:
        """Returns the room for experts, `most_bytes` at most, beside all KV blocks, or none if the boundary moves."""
        if self.room_bytes is None:
            return most_bytes
        kept = 0 if self.section.kv.boundary == "moving" else self.room.kv_bytes
        return min(most_bytes, self.room_bytes - kept)

    def budget_of(self, most_bytes: int) -> Callable[[Step], int] | None:
        """Returns what says the room for experts in a step, where the boundary to the KV blocks moves."""
        room_bytes, block_bytes = self.room_bytes, self.room.block_bytes
        if self.section.kv.boundary != "moving" or room_bytes is None:
            return None

        def budget_bytes(step: Step) -> int:
            kv_blocks = step.kv_blocks if isinstance(step, RequestStep) else self.room.blocks
            return min(most_bytes, room_bytes - kv_blocks * block_bytes)

        return budget_bytes


def load_requests(
    section: RequestsSection, model: Model, trace: RoutingTrace, seed: int, room_bytes: int | None, *, total: bool
) -> RequestLoad:
    """Load what [requests] names; `room_bytes` are left on the GPU for experts and KV blocks, None if nobody knows.

    `total` says whether that is of memory.total_bytes, from which both take their part. Raises ScenarioError, also for
    requests that have more positions than there are KV blocks for.
    """
    try:
        speculation = _speculation(section.speculation, seed)
        requests, failed = _requests(section, seed)
        rows = RequestRows(trace.sequence, trace.phase, seed)
    except ScenarioError:
        raise
    except InputError as error:
        raise ScenarioError(f"requests.{error}") from None
    _check_window(section, len(requests))
    room = _kv_room(section, model, room_bytes)
    load = RequestLoad(
        section, requests, rows, trace, room, seed, speculation, room_bytes if total else None, failed
    )  # fmt: skip
    _check_fits(load)
    return load


def position_bytes(model: Model) -> int:
    """Returns what a position of a sequence takes in the KV cache: in every layer, also beyond a layer's window."""
    if not model.caches:
        return model.kv_bytes_per_token
    return sum(each.bytes_per_token for layer in model.caches for each in layer)


def _limits(section: SchedulerSection) -> Limits:
    return Limits(**section.model_dump(exclude={"name", "step_us"}))


def _experts_of(rows: RequestRows, trace: RoutingTrace) -> ExpertsOf:
    """Returns what tells the experts of a request's sequence, bool (layers * experts,)."""
    known: dict[int, npt.NDArray[np.bool_]] = {}

    def experts_of(request: int) -> npt.NDArray[np.bool_]:
        own = rows.sequence_of(request)
        if int(own[0]) not in known:
            there = np.zeros((trace.layers, trace.num_experts), dtype=bool)
            made = slice(None) if trace.made is None else trace.made[own]
            layers = np.broadcast_to(np.arange(trace.layers)[None, :, None], trace.experts[own].shape)
            there[layers[made], trace.experts[own][made]] = True
            known[int(own[0])] = there.ravel()
        return known[int(own[0])]

    return experts_of


def _requests(section: RequestsSection, seed: int) -> tuple[list[Request], int]:
    """Returns the requests in order of arrival, and how many of a trace are left out as failed."""
    trace = None if section.trace is None else read_requests(Path(section.trace), section.format)
    count = section.count or (DEFAULT_COUNT if trace is None else len(trace))
    if trace is not None and count > len(trace):
        raise ScenarioError(f"requests.count = {count}: {section.trace} has {len(trace)} requests: give that at most")
    if section.arrivals == TRACE:
        assert trace is not None
        if trace.arrival_ns is None:
            raise ScenarioError(
                f"requests.arrivals = 'trace': {section.trace} does not say when its requests came: choose another"
            )
        arrival_ns = trace.arrival_ns[:count]
    elif section.arrivals == CLOSED:
        arrival_ns = np.zeros(count, dtype=np.int64)
    else:
        process = Process(section.rate, section.cv, section.on_s, section.off_s)
        arrival_ns = arrival_instants(section.arrivals, process, count, seed)
    if trace is None:
        prompts = draw_lengths(_lengths(section.prompt_tokens, DEFAULT_PROMPT), count, seed, PROMPTS)
        outputs = draw_lengths(_lengths(section.output_tokens, DEFAULT_OUTPUT), count, seed, OUTPUTS)
    else:
        prompts, outputs = trace.prompt_tokens[:count], trace.output_tokens[:count]
    columns = zip(arrival_ns.tolist(), prompts.tolist(), outputs.tolist(), strict=True)
    requests = [Request(number, *shape) for number, shape in enumerate(columns)]
    if trace is not None and trace.hashes is not None:
        requests = _hashed(requests, trace)
    return requests, 0 if trace is None else trace.failed


def _hashed(requests: list[Request], trace: RequestTrace) -> list[Request]:
    hashes = trace.hashes or []
    return [replace(one, hashes=hashes[one.number], hash_tokens=trace.hash_tokens) for one in requests]


def _lengths(given: TokenCount | None, default: int) -> Lengths:
    if given is None or isinstance(given, int):
        return Lengths(default if given is None else given)
    return given.lengths()


def _speculation(section: SpeculationSection | None, seed: int) -> Speculation | None:
    if section is None:
        return None
    acceptance = section.acceptance
    if isinstance(acceptance, str):
        return Speculation(section.drafts, (), section.overlap, seed, _recorded(Path(acceptance)))
    shares = (acceptance,) * section.drafts if isinstance(acceptance, float) else tuple(acceptance)
    return Speculation(section.drafts, shares, section.overlap, seed)


def _recorded(path: Path) -> tuple[int, ...]:
    """Returns how many drafts were accepted in the steps of a file, a JSON list."""
    key = "speculation.acceptance"
    try:
        found = json.loads(read_json(path))
    except OSError as error:
        raise InputError(f"{key} = {str(path)!r}: cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{key} = {str(path)!r}: {error}: must be JSON") from None
    if not isinstance(found, list) or not found or not all(type(one) is int for one in found):
        raise InputError(f"{key} = {str(path)!r}: {shown(found)}: must be a list of integers, accepted drafts of steps")
    return tuple(found)


def _kv_room(section: RequestsSection, model: Model, room_bytes: int | None) -> KvRoom:
    """Returns the KV blocks of a scenario; ScenarioError if there is no room for one."""
    kv, key = section.kv, "requests.kv.budget"
    block_bytes = position_bytes(model) * kv.block_tokens
    host_bytes = _parsed("requests.kv.swap_budget", kv.swap_budget, parse_bytes)
    host_blocks = host_bytes // block_bytes if block_bytes else 0
    counted = blocks_of(kv.budget)
    match = AMOUNT.fullmatch(kv.budget)
    if counted is None and (match is None or match[2] == "experts"):
        raise ScenarioError(f"{key} = {kv.budget!r}: write it as '20%', '8GiB' or '2000blocks'")
    if counted is not None:
        blocks = counted
    elif not block_bytes:
        blocks = _ENDLESS_BLOCKS
    elif match is not None and match[2] == "%":
        if room_bytes is None:
            raise ScenarioError(
                f"{key} = {kv.budget!r}: how much memory the GPU has is not known: give bytes or blocks"
            )
        blocks = _parsed(key, kv.budget, lambda text: parse_budget(text, [max(0, room_bytes)], 1)) // block_bytes
    else:
        blocks = _parsed(key, kv.budget, parse_bytes) // block_bytes
    if blocks < 1:
        raise ScenarioError(
            f"{key} = {kv.budget!r}: less than a block of {kv.block_tokens} positions, "
            f"{bytes_words(block_bytes)}: give more"
        )
    return KvRoom(blocks, kv.block_tokens, block_bytes, host_blocks)


def _parsed(key: str, text: str, parse: Callable[[str], int]) -> int:
    try:
        return parse(text)
    except ScenarioError as error:
        raise ScenarioError(f"{key}: {error}") from None


def _check_window(section: RequestsSection, count: int) -> None:
    """Refuse a window that leaves out every request."""
    edges = edge_requests(section.warmup, count), edge_requests(section.cooldown, count)
    if sum(edges) >= count:
        raise ScenarioError(
            f"requests.warmup = {section.warmup!r} and cooldown = {section.cooldown!r}: {edges[0]:,} and {edges[1]:,} "
            f"leave none of {count:,} requests to measure: give less, or serve more (count)"
        )


def _check_fits(load: RequestLoad) -> None:
    """Refuse requests that can never be served, however long one waits."""
    room = load.room.blocks * load.room.block_tokens
    # Blocks are whole: a request of one position more takes one more.
    over = [one for one in load.requests if one.most_positions + load.drafts > room]
    if over:
        longest = max(over, key=lambda one: one.most_positions)
        wants = f"{longest.prompt_tokens:,} + {longest.output_tokens:,} tokens"
        raise ScenarioError(
            f"requests.kv.budget = {load.section.kv.budget!r}: {len(over):,} of {len(load.requests):,} requests can "
            f"never be served: request {longest.number} has {wants}, "
            f"and there are KV blocks for {room:,} positions: give more, or cut the lengths"
        )
