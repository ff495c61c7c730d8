"""What each piece of one run takes, in ns: the machine's profile applied to a model's shapes.

Measured points are used as they stand, and straight lines between them. A shape that was not measured, or more
tokens than were, is put together from the profile's surface of single kernels, or estimated by its rule where there is
none, and every estimate in use is named in `estimates`, which goes into the result. Points and surfaces of another
device are estimates too, and a rule of this machine's own goes before them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import numpy as np

from ...dtypes import bits_of
from ...resources.from_peer import from_peer
from ...resources.lags import Lags
from ...resources.profile import Profile
from ...resources.profile_costs import ComputeCosts, CopyCosts, ExpertPoint, HostCosts, KernelPoint, ProfileError
from ...units import FLOPS, RATES, rate_words
from ...workloads.batches import DECODE, PREFILL
from ..scenario.scenario import Scenario
from .attention import Added, Attention
from .beside_costs import beside_costs
from .grouped_kernels import GROUPED_BY_SURFACE, GroupedKernels
from .points import Point, between
from .runtime_costs import RuntimeCosts, launched_model, pieces_of, token_bucket
from .surface_costs import (
    DENSE_PRODUCTS,
    Kernels,
    SurfaceCosts,
    dense_kernels,
    expert_kernels,
    further_launches,
    head_kernels,
)
from .tiled_products import TiledProducts
from .values import CopyCost, KernelCost, ReadCost, ReadCosts

if TYPE_CHECKING:
    from ..scenario.inputs import Inputs
    from .scatter import Scatter


class ByTokens(dict[int, KernelCost]):
    """What something costs over so many tokens, asked for once."""

    def __init__(self, cost: Callable[[int], KernelCost]) -> None:
        self._cost = cost

    def __missing__(self, tokens: int) -> KernelCost:
        cost = self[tokens] = self._cost(tokens)
        return cost


class Costs:
    """The costs of one run on one GPU; every method is a table look-up after the first call.

    They are made of what the run was loaded as, for a scenario alone does not say what its predictor takes: that may
    have been measured with its weights. `timed`: every kernel group and copy is timed, as in an execution: the host
    puts an event before it too. Raises ProfileError if the profile lacks what the scenario needs.
    """

    def __init__(self, inputs: Inputs, *, timed: bool = False, scatter: Scatter | None = None) -> None:
        #: What each event takes more or less than these costs; None where all take what they say.
        self.scatter = scatter
        model, profile, scenario = inputs.model, inputs.profile, inputs.scenario
        if scenario.copy_.source == "peer":
            profile = from_peer(profile)
        model = self.model = launched_model(model, inputs.runtime)
        self.profile = profile
        self.own = inputs.runtime
        #: A thread that serves all stages has begun a pass when it comes to those behind the first.
        begun = inputs.first_layer > 0 and scenario.parallel.dispatch_threads == "one"
        self.runtime = RuntimeCosts(inputs.runtime, free=scenario.dispatch.mode == "free", begun=begun)
        #: What the copy of an expert of each layer moves.
        self.expert_bytes: Sequence[int] = [scenario.compression.copied_bytes(size) for size in model.expert_bytes]
        self._tiled = TiledProducts(inputs.runtime.costs.gpu_products, profile.device, inputs.steps)
        self._rule = profile.compute.rule
        self._groups = scenario.dispatch.expert_kernel == "grouped"
        self._grouped = profile.compute.grouped if self._groups else None
        self._mode = scenario.dispatch.mode
        self._chunk_bytes = scenario.copy_.chunk_bytes
        self.by_priority = scenario.copy_.by_rank
        #: By what it is, its weights' bytes, which may be the same in many layers, and tokens.
        self._known: dict[tuple[str, int, int], KernelCost] = {}
        #: By the bytes of an expert, its layer's experts and their width, tokens and phase.
        self._known_experts: dict[tuple[int, ...], KernelCost] = {}
        self.estimates: dict[str, str] = {}
        self._set_heads(scenario)
        memory = profile.copied_from(scenario.copy_.host_memory)
        self.h2d = h2d = profile.h2d[memory]
        self.copies_hold_host = memory == "pageable" or self.runtime.holds_host
        self.copy_slowdown = profile.contention.copy_beside_compute.factor if profile.contention else 1.0
        #: How many times as long copies of several streams that share a link take together as one after the other.
        self.copies_sharing = 1.0
        if scenario.copy_.contention and profile.contention and profile.contention.copies_sharing:
            self.copies_sharing = profile.contention.copies_sharing.factor
        self.copies_take_turns = profile.contention is not None and profile.contention.copies_take_turns
        self.interruptions = profile.compute.interruptions
        self.predict_ns = round(inputs.predictor.latency_us * 1000)
        self._set_host_costs(profile.host, records=2 if timed else 1)
        self.copy_latency_ns = 0 if self._mode == "free" else h2d.launch_latency.ns
        self.copies: Sequence[CopyCost] = [self.copy(size_bytes) for size_bytes in self.expert_bytes]
        self.reads = self._reads(profile, scenario)
        self._set_lags(profile, h2d)
        self._set_readback(profile)
        self.beside = beside_costs(self, profile.host, free=self._mode == "free")
        self._set_measured(profile.compute)
        dispatch = "eager" if self._mode == "eager" else "graph"
        #: What attention adds to the dense parts with what is cached, by step.
        own = self.runtime.attention_of(self.model)
        self.attention = Attention(inputs, profile, self._surface, dispatch, own)
        self._attends_ns = self._attention_call_ns(profile.host)
        self.predict = KernelCost(self.predict_ns, 1.0, 1, self.launch_ns + self.records_ns, self._latency_ns)
        if self.copies_hold_host and scenario.prefetch.issued_by == "gpu":
            raise ProfileError(
                "prefetch.issued_by = 'gpu': here the host waits for every copy (pageable memory, or a runtime that "
                "synchronizes): set 'host'"
            )

    def _set_heads(self, scenario: Scenario) -> None:
        """Note how often a step runs the head: for its own tokens, and for the drafts of each draft layer."""
        self._heads = 1 + (0 if scenario.requests is None else scenario.requests.draft_layers)
        if self._heads > 1:
            self.estimates["draft layers"] = "each as the last layer, routed as that one routes the tokens ahead"

    def _set_lags(self, profile: Profile, h2d: CopyCosts) -> None:
        """Set how long the lanes take from a cause to a start; where dispatch is free, only copies have gaps."""
        compute, gap_ns = profile.compute, h2d.gap.ns
        if self._mode == "free":
            self.kernel_lags, self.copy_lags = Lags(), Lags(gap_ns)
            return
        gap = compute.graph_gap if self._mode == "graph" else compute.eager_gap
        wait, latency = compute.event_wait_gap, compute.launch_latency
        issue_longer_ns = 0 if latency.beside_copy_ns is None else latency.beside_copy_ns - latency.ns
        own = self.runtime.gap_factor
        self.kernel_lags = Lags(
            round(gap.ns * own), round((gap.disturbed_ns - gap.ns) * own), wait.ns, wait.disturbed_ns - wait.ns,
            issue_longer_ns,
        )  # fmt: skip
        if self.by_priority:  # the host enqueues a copy when it has noticed the end of the one before
            gap_ns = max(0, self.synchronize_ns + self.enqueue_ns + self.records_ns + h2d.launch_latency.ns)
        self.copy_lags = Lags(gap_ns, 0, h2d.event_wait_gap.ns)

    def _set_readback(self, profile: Profile) -> None:
        """Set what the choice takes to the host, quiet and beside copies, and where it is asked for late."""
        readback, late = profile.host.readback, profile.host.readback_late
        self.readback_ns = profile.d2h.alone.ns(0) if readback is None else readback.ns
        self.readback_slowdown = 1.0
        if readback is not None and readback.ns:
            self.readback_slowdown = readback.disturbed_ns / readback.ns
        self.readback_latency_ns = 0 if late is None or self._mode == "free" else late.ns - self.readback_ns

    def _set_host_costs(self, host: HostCosts, records: int) -> None:
        """Set what the host thread's calls take; `records` events go with every kernel group and every copy."""
        free, eager = self._mode == "free", self._mode == "eager"
        launch = host.launch if eager else host.graph_launch
        self.launch_ns = 0 if free else launch.ns
        self._product_launch_ns = {
            dtype: 0 if free else product.ns for dtype, product in host.product_launches.items() if eager
        }
        self._further_launch_ns = 0 if free else host.further_launch.ns
        self.records_ns = 0 if free else records * host.event_record.ns
        self.wait_ns = 0 if free else host.event_wait.ns
        self.enqueue_ns = 0 if free else host.copy_enqueue.ns
        readback = host.readback_enqueue or host.copy_enqueue
        self.readback_enqueue_ns = 0 if free else readback.ns + host.event_record.ns
        self.turn_ns = 0 if free else host.turn.ns
        self.resume_ns = 0 if free else host.resume.ns
        self.copy_resume_ns = 0 if free else host.copy_resume.ns
        self.synchronize_ns = 0 if free else host.synchronize.ns
        self.synchronize_beside_copy_ns = 0 if free else host.synchronize.disturbed_ns

    def _set_measured(self, compute: ComputeCosts) -> None:
        """Pick out the measured points of this model's shapes, by their size: inner width, or weight bytes."""
        model, surface = self.model, compute.surface
        if surface is not None and surface.device is not None and self._rule.device is None:
            surface = None
        starts, fewer = self.runtime.gap_factor, not self.runtime.own_kernels
        self._surface = None if surface is None else SurfaceCosts(surface, self._mode, starts, low_bit=fewer)
        #: What calls of the library's products launch; kernels of a runtime's own are no calls of these.
        self._launched = compute.surface.launches if compute.surface is not None and fewer else ()
        by_surface = self._groups and self._grouped is None and self._surface is not None
        price = partial(self._kernel, "expert", ())
        self._by_surface = GroupedKernels(model, self._expert_kernels, price) if by_surface else None
        self._latency_ns = 0 if self._mode == "free" else compute.launch_latency.ns
        dispatch = "eager" if self._mode == "eager" else "graph"
        self._expert_points: dict[int, list[Point]] = {}
        for expert in compute.experts:
            if (expert.hidden, expert.dtype, expert.dispatch) == (model.hidden, model.expert_dtype, dispatch):
                self._expert_points.setdefault(expert.expert_ff, []).append(self._point(expert))
        self._dense_points = self._of_weights(compute.dense, dispatch, model.dense_kernels)
        self._head_points = self._of_weights(compute.heads, dispatch, 1)
        for table in (self._expert_points, self._dense_points, self._head_points):
            for shape, points in table.items():
                table[shape] = sorted(self._standing_in(points))

    def _standing_in(self, points: list[Point]) -> list[Point]:
        """Returns the points of this machine; if there are none, nor a rule of its own, those of another."""
        ours = [point for point in points if not point.device]
        return ours if ours or self._rule.device is None else points

    def _of_weights(self, measured: Iterable[KernelPoint], dispatch: str, kernels: int) -> dict[int, list[Point]]:
        shape = (self.model.hidden, self.model.dense_dtype, dispatch, kernels)
        points: dict[int, list[Point]] = {}
        for kernel in measured:
            # What attention adds with the context is `Attention`'s.
            if (kernel.hidden, kernel.dtype, kernel.dispatch, kernel.kernels) == shape and not kernel.context:
                points.setdefault(kernel.weight_bytes, []).append(self._point(kernel))
        return points

    def _point(self, kernel: ExpertPoint | KernelPoint) -> Point:
        latency_ns = self._latency_ns if kernel.launch_latency_ns is None else kernel.launch_latency_ns
        latency_ns = 0 if self._mode == "free" else latency_ns
        return Point(kernel.tokens, kernel.ns, kernel.beside_copy_ns, latency_ns, kernel.device or "")

    def copy(self, size_bytes: int) -> CopyCost:
        """Returns the copy of an expert of so many bytes to the GPU."""
        h2d = self.h2d
        pieces = max(pieces_of(size_bytes, self._chunk_bytes), self.runtime.copies.per_expert)
        piece_bytes = -(-size_bytes // pieces)
        alone_ns = self.runtime.copy_ns(h2d.alone, piece_bytes)
        queued_ns = alone_ns if self.by_priority else self.runtime.copy_ns(h2d.queued, piece_bytes)
        rest_ns = (pieces - 1) * (queued_ns + h2d.gap.ns)
        if self.runtime.copies.synchronized:  # the next is ordered once the host has noticed this one's end
            order_ns = self.enqueue_ns + self.runtime.copy_call_ns + self.copy_latency_ns
            queued_ns = alone_ns = alone_ns + self.synchronize_ns
            rest_ns = (pieces - 1) * (alone_ns + order_ns)
        # By priority, every piece is enqueued by itself and has its own events.
        records = pieces if self.by_priority else 1
        calls = 1 if self.runtime.copies.synchronized else pieces  # the others are within the copy's time
        host_ns = calls * (self.enqueue_ns + self.runtime.copy_call_ns) + records * self.records_ns
        return CopyCost(queued_ns + rest_ns, alone_ns + rest_ns, queued_ns, alone_ns, pieces, host_ns)

    def _reads(self, profile: Profile, scenario: Scenario) -> ReadCosts | None:
        """Returns what reads from the drive take; None where host memory holds every expert."""
        tiers, nvme = scenario.tiers, profile.nvme
        if tiers.host_budget == "all":
            return None
        if nvme is None:
            raise ProfileError(
                f"tiers.host_budget = {tiers.host_budget!r}: profile {profile.name} has no nvme to read the other "
                f"experts from: choose one that has, or set tiers.host_budget = 'all'"
            )
        lanes = tiers.io_lanes or nvme.lanes
        costs = []
        for size_bytes in self.expert_bytes:
            requests = pieces_of(size_bytes, tiers.chunk_bytes)
            request_ns = nvme.read.ns(-(-size_bytes // requests))
            order_ns, back_ns = 0 if self._mode == "free" else nvme.order.ns, profile.d2h.alone.ns(size_bytes)
            costs.append(ReadCost(requests, request_ns, order_ns, back_ns))
        return ReadCosts(costs, [nvme.times_as_long(reads) for reads in range(1, lanes + 1)])

    @cached_property
    def by_layer(self) -> dict[int, tuple[list[ByTokens], list[ByTokens]]]:
        """By phase of a step: what each layer's dense part, and an expert of it, takes by tokens."""
        layers = range(self.model.layers)
        return {
            phase: (
                [ByTokens(partial(self.dense, layer, phase=phase)) for layer in layers],
                [ByTokens(partial(self.expert, layer, phase=phase)) for layer in layers],
            )
            for phase in (PREFILL, DECODE)
        }

    @cached_property
    def size_of(self) -> list[int]:
        """The bytes of every expert (layers * experts,), where a layer's are of one size."""
        sizes: list[int] = np.repeat(self.model.expert_bytes, self.model.experts).tolist()
        return sizes

    def run_tokens(self, tokens: int, phase: int) -> int:
        """Returns over how many tokens kernels run that serve so many: a graph of a decode step is padded."""
        return token_bucket(tokens) if self._mode == "graph" and phase == DECODE else tokens

    def dense(self, layer: int, tokens: int, phase: int = DECODE) -> KernelCost:
        """Returns the dense part of one layer over `tokens` tokens of a step of a phase, but for `attending`."""
        cost = self._dense_part(layer, self.run_tokens(tokens, phase))
        attends_ns = len(self.model.attention_of(layer)) * self._attends_ns
        return replace(cost, host_ns=cost.host_ns + attends_ns) if attends_ns else cost

    def _attention_call_ns(self, host: HostCosts) -> int:
        """Returns what attention's call takes longer than a small kernel's; a runtime's own costs have it in them."""
        if self._mode != "eager" or not self.attention.counts or self.own.costs.given():
            return 0
        call = host.attention_launch
        return max(0, (self._product_launch(self.model.dense_dtype) if call is None else call.ns) - self.launch_ns)

    def attending(self, cost: KernelCost, layer: int, step: int) -> KernelCost:
        """Returns what a layer's dense part costs with what attention adds in a step."""
        if not self.attention.counts:
            return cost
        added = self.attention_in(step)[self.attention.kind_of[layer]]
        if not added.ns:
            return cost
        ns = cost.ns + added.ns
        slowdown = max(1.0, (cost.ns * cost.slowdown + added.beside_copy_ns) / ns)
        return replace(cost, ns=ns, long_ns=added.ns, slowdown=slowdown)

    def attention_in(self, step: int) -> list[Added]:
        """Returns what attention adds in a step, by kind of layer, and names how that is estimated."""
        found = self.attention.by_kind(step)
        for added, layer in zip(found, self.attention.firsts, strict=True):
            if added.ns and (words := self.attention.words(layer)):
                self.estimates["attention over the context"] = words
        return found

    def _dense_part(self, layer: int, tokens: int) -> KernelCost:
        """Returns the dense part of one layer over so many tokens, without what attention adds with the context."""
        model, size = self.model, self.model.dense_bytes[layer]
        cost = self._known.get(("dense", size, tokens))
        if cost is None:
            kernels = dense_kernels(model.hidden, model.dense_dtype, model.dense_kernels, size)
            cost = self._kernel("dense part", self._dense_points.get(size, ()), kernels, tokens)
            cost = _at_least(cost, self._tiled.least_ns(model.dense_dtype, size, tokens))
            self._known["dense", size, tokens] = cost
        return cost

    def head(self, tokens: int) -> KernelCost:
        """Returns the head over `tokens` positions, one for each sequence of a step (`Step.sampled`)."""
        tokens = self.run_tokens(tokens, DECODE)  # a prefill step has one position: there is nothing to pad
        model, size = self.model, self.model.head_bytes
        cost = self._known.get(("head", size, tokens))
        if cost is None:
            kernels = head_kernels(model.hidden, model.dense_dtype, size)
            cost = self._kernel("head", self._head_points.get(size, ()), kernels, tokens)
            if self._heads > 1:
                ns, launches, host_ns = (self._heads * each for each in (cost.ns, cost.launches, cost.host_ns))
                cost = replace(cost, ns=ns, launches=launches, host_ns=host_ns)
            self._known["head", size, tokens] = cost
        return cost

    def expert(self, layer: int, tokens: int, phase: int = DECODE) -> KernelCost:
        """Returns one expert's kernels over `tokens` tokens of a step of a phase."""
        tokens = self.run_tokens(tokens, phase)
        size, (experts, _, width) = self.model.expert_bytes[layer], self.model.routed(layer)
        key = (size, experts, width, tokens, phase)
        cost = self._known_experts.get(key)
        if cost is None:
            points = self._expert_points.get(width, ())
            if self._by_surface is not None:
                cost = self._by_surface.expert(layer, tokens)
                self.estimates["grouped expert kernel"] = GROUPED_BY_SURFACE
                if points and not points[0].device:  # the surface was measured as well as these
                    self.estimates.pop("expert", None)
            else:
                cost = self._kernel("expert", points, self._expert_kernels(layer), tokens)
            if self._grouped is not None:  # a kernel of several pays the constant once, see `grouped`
                ns = self.runtime.kernel_ns("expert", self._grouped.ns(size))
                cost = replace(cost, ns=round(ns), slowdown=self._grouped.beside_copy_factor)
            least_ns = self._tiled.least_ns(self.model.expert_dtype, size, tokens, phase)
            if least_ns:
                cost = _at_least(cost, least_ns + self.grouped_saved_ns)
            self._known_experts[key] = cost
        return cost

    def _expert_kernels(self, layer: int) -> Kernels:
        """Returns what an expert of a layer launches."""
        model, width = self.model, self.model.routed(layer).expert_ff
        return expert_kernels(
            model.hidden, width, model.expert_dtype, model.expert_matrices, model.expert_kernels,
            model.expert_bytes[layer],
        )  # fmt: skip

    def most_launches(self, tokens: int) -> int:
        """Returns the most launches of one layer visit with so many tokens, the head and a prediction included."""
        model = self.model
        experts = min(model.experts, tokens * model.top_k)
        # So many kernels more than one may a product's call launch.
        further = max([1, *(max(table.kernels) for table in self._launched)]) - 1
        dense = self._launches(model.dense_kernels + DENSE_PRODUCTS * further)
        expert = self._launches(model.expert_kernels + model.expert_matrices * further)
        return dense + experts * expert + self._heads * self._launches(1 + further) + 1

    def grouped(self, layer: int, tokens: list[int], phase: int = DECODE) -> KernelCost:
        """Returns one grouped kernel over several experts: measured, or their sum with the constant of one."""
        costs = [self.expert(layer, count, phase) for count in tokens]
        ns = sum(cost.ns for cost in costs) - (len(costs) - 1) * self.grouped_saved_ns
        ns = max(ns, max(cost.ns for cost in costs))
        if self._grouped is None and self._by_surface is None:
            self.estimates["grouped expert kernel"] = "the sum of each expert's kernels, with the constant of one"
        return KernelCost(ns, max(cost.slowdown for cost in costs), costs[0].launches, costs[0].host_ns)

    @cached_property
    def grouped_saved_ns(self) -> int:
        """What each expert beyond the first takes less in a grouped kernel: the constant."""
        if self._grouped is not None:
            return self._grouped.constant_ns
        if self._by_surface is not None:
            return self._by_surface.constant_ns
        return self._rule_constant_ns(self._expert_kernels(0))

    @property
    def expert_constant_ns(self) -> int:
        """What an expert's kernels take whatever their weights."""
        if self._grouped is not None or self._by_surface is not None:
            return self.grouped_saved_ns
        kernels = self._expert_kernels(0)
        if self._surface is None or self._expert_points.get(self.model.expert_ff):
            return self._rule_constant_ns(kernels)
        return round(self._surface.constant_ns(kernels))

    @property
    def slowed_beside_copies(self) -> bool:
        """Whether this machine's kernels take longer beside a copy, or start later."""
        tables = (self._expert_points, self._dense_points, self._head_points)
        measured = (point for table in tables for points in table.values() for point in points)
        return (
            self._rule.beside_copy_factor > 1
            or self._surface is not None
            or self.kernel_lags.gap_longer_ns > 0
            or any(point.beside_copy_ns > point.ns for point in measured)
        )

    def _kernel(self, what: str, points: Sequence[Point], kernels: Kernels, tokens: int) -> KernelCost:
        """Returns a group of kernels over `tokens` tokens.

        Measured, or between two measured; fewer tokens than were measured cost as much as the fewest, more cost what
        the surface or the rule says they add.
        """
        if not points:
            ns, beside_ns, latency_ns = self._estimated(what, kernels, tokens)
        elif tokens > points[-1].tokens:
            last = points[-1]
            more_ns = self._estimated(what, kernels, tokens)[0] - self._estimated(what, kernels, last.tokens)[0]
            ns, latency_ns = last.ns + more_ns, last.latency_ns
            beside_ns = ns * last.beside_copy_ns / last.ns
        else:
            ns, beside_ns, latency_ns = between(points, tokens)
        if points and points[0].device:
            beyond = " and, beyond their tokens, by its rule" if tokens > points[-1].tokens else ""
            self.estimates[what] = f"as measured on {points[0].device}{beyond}, not on this machine"
        ns, beside_ns = self.runtime.kernel_ns(what, ns), self.runtime.kernel_ns(what, beside_ns)
        launches, host_ns = 1, self.launch_ns + self.records_ns
        if self._mode == "eager":
            products, further = len(kernels.products), further_launches(self._launched, kernels, tokens)
            launches = kernels.launches + further
            host_ns = self.records_ns + products * self._product_launch(kernels.dtype)
            host_ns += (kernels.launches - products) * self.launch_ns + further * self._further_launch_ns
        host_ns = self.runtime.launch_ns(what, host_ns)
        return KernelCost(round(ns), beside_ns / ns if ns else 1.0, launches, host_ns, latency_ns)

    def _product_launch(self, dtype: str) -> int:
        """Returns the host's time to launch a product, of another dtype of as many bits where there is none of this."""
        alike = [ns for other, ns in self._product_launch_ns.items() if bits_of(other) == bits_of(dtype)]
        return self._product_launch_ns.get(dtype, alike[0] if alike else self.launch_ns)

    def _estimated(self, what: str, kernels: Kernels, tokens: int) -> tuple[float, float, int]:
        """Returns duration, duration beside a copy and latency, in ns, of what was not measured; name the estimate."""
        if self._surface is None:
            return *self._by_rule(what, kernels, tokens), self._latency_ns
        time = self._surface.time(kernels, tokens)
        self.estimates[what] = self._surface.described(kernels)
        return time.ns, time.beside_copy_ns, 0 if self._mode == "free" else time.latency_ns

    def _rule_constant_ns(self, kernels: Kernels) -> int:
        """Returns what the profile's rule says that a group of kernels takes whatever their weights, in ns."""
        return self._rule.group_ns(kernels.launches, len(kernels.products), eager=self._mode == "eager")

    def _by_rule(self, what: str, kernels: Kernels, tokens: int) -> tuple[float, float]:
        """Returns what the profile's rule says of kernels, quiet and beside a copy, in ns; and name the estimate."""
        weight_bytes, group_ns = kernels.weight_bytes, self._rule_constant_ns(kernels)
        rule = self._rule
        dtype_bits = self.model.dtype_bits("expert" if what == "expert" else "dense")
        flops = 2 * tokens * (weight_bytes * 8 / dtype_bits)
        part_ns = rule.part_ns(weight_bytes, flops)
        self.estimates[what] = (
            f"{group_ns / 1e3:g} us + max(weight bytes / {rate_words(rule.bytes_per_second, RATES)}, "
            f"2 x weights x tokens / {rate_words(rule.flops_per_second, FLOPS)}) ({rule.provenance})"
        )
        return group_ns + part_ns, group_ns + part_ns * rule.beside_copy_factor

    def _launches(self, kernels: int) -> int:
        return kernels if self._mode == "eager" else 1


def _at_least(cost: KernelCost, ns: float) -> KernelCost:
    """Returns a cost that takes at least so long."""
    return cost if cost.ns >= ns else replace(cost, ns=round(ns))


def part_costs(inputs: Inputs, *, timed: bool = False) -> list[Costs]:
    """Returns the costs of each GPU of a run; `timed` as `Costs` takes it.

    GPUs that are charged alike have the same object, which is asked for everything once.
    """
    made: dict[tuple[int, ...], Costs] = {}
    found = []
    for part in inputs.parts:
        same = tuple(map(id, (part.model, part.profile, part.scenario, part.runtime, part.predictor, part.steps)))
        if same not in made or made[same].attention.counts:  # which differs by the tokens that live there
            made[same] = Costs(part, timed=timed)
        found.append(made[same])
    return found
