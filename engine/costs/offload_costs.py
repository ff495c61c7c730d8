"""Costs of alternatives to copying an expert as it is: computed on the CPU, in low precision, compressed.

Measured points are used as they stand; a shape that was not measured is estimated by a stated rule, which is named in
the `estimates` of the run's costs, or refused where the profile says nothing of the CPU.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from ...dtypes import bits_of
from ...resources.profile_costs import CpuExpertPoint, KernelRule, ProfileError
from ...workloads.batches import DECODE
from ..scenario.scenario import Scenario
from .costs import Costs
from .cpu_streams import TOKENS_A_PASS, CpuStream, cpu_stream
from .values import KernelCost

#: Matrices of an expert as the CPU's are measured (gate, up, down).
_MATRICES = 3


class CpuCosts:
    """Experts on the CPU, by the measured points of a run's profile, or what is read of its memory."""

    def __init__(self, costs: Costs, scenario: Scenario) -> None:
        self._costs, self._model = costs, costs.model
        profile, miss = costs.profile, scenario.miss
        self._stream = cpu_stream(costs.own, profile, miss)
        self._rule = None if profile.compute.cpu_experts else profile.compute.cpu_rule
        self._known: dict[tuple[int, int], KernelCost] = {}
        contention = profile.contention if scenario.copy_.contention else None
        beside = contention.copy_beside_cpu_experts if contention is not None else None
        #: How many times as long a copy takes beside an expert on the CPU: they share the host's memory.
        self.copy_slowdown = 1.0 if beside is None else beside.factor
        #: How many times as long an expert takes beside a copy, where the stream says so.
        self._beside_copy = 1.0
        if self._stream is not None and scenario.copy_.contention:
            self.copy_slowdown = self._beside_copy = self._shared_memory(self._stream)
        elif beside is None and scenario.copy_.contention:
            costs.estimates["copies beside experts on the CPU"] = "not measured: neither slows the other down"
        if self._stream is None and self._rule is None:
            self._choose_points(miss.cpu_threads)

    def _choose_points(self, threads: int | None) -> None:
        """Pick out the measured points of so many threads, and those of this model's shape."""
        model, profile = self._model, self._costs.profile
        measured = [point for point in profile.compute.cpu_experts if point.device is None]
        measured = measured or list(profile.compute.cpu_experts)
        known = sorted({point.threads for point in measured})
        if not known:
            or_else = "choose a profile that was measured with it"
            if profile.name.startswith("gpu="):
                or_else = "name the machine's memory (machine.ram = '2x DDR5-5600', --ram)"
            raise ProfileError(
                f"miss.policy uses the CPU, and profile {profile.name} has no compute.cpu_experts: set "
                f"miss.cpu_gb_per_s to what the CPU reads of host memory, or {or_else}"
            )
        threads = known[-1] if threads is None else threads
        if threads not in known:
            raise ProfileError(f"miss.cpu_threads = {threads}: profile {profile.name} has {', '.join(map(str, known))}")
        self._of_threads = [point for point in measured if point.threads == threads]
        self._device = measured[0].device
        shape = (model.hidden, model.expert_dtype)
        points = [point for point in self._of_threads if (point.hidden, point.dtype) == shape]
        self._points = sorted(points, key=lambda point: point.tokens)

    def expert(self, layer: int, tokens: int) -> KernelCost:
        """Returns one expert's work over `tokens` tokens, with its slowdown beside a copy to the GPU."""
        cost = self._known.get((layer, tokens))
        if cost is None:
            cost = self._known[layer, tokens] = self._expert(layer, tokens)
        return cost

    def _expert(self, layer: int, tokens: int) -> KernelCost:
        estimates, weight_bytes = self._costs.estimates, self._model.expert_bytes[layer]
        if self._stream is not None:
            return self._by_stream(self._stream, weight_bytes, tokens)
        if self._rule is not None:
            return self._by_rule(self._rule, weight_bytes, tokens)
        points = [point for point in self._points if point.expert_ff == self._model.routed(layer).expert_ff]
        if not points:
            return self._by_line(weight_bytes, tokens)
        last = points[-1]
        beyond_them = (
            f"in proportion beyond the {last.tokens} tokens that were measured" if tokens > last.tokens else ""
        )
        if beyond_them or self._device is not None:
            estimates["expert on the CPU"] = self._of_device(beyond_them)
        counts = [point.tokens for point in points]
        beyond = max(1.0, tokens / last.tokens)
        ns = float(np.interp(tokens, counts, [point.ns for point in points])) * beyond
        beside_ns = float(np.interp(tokens, counts, [point.beside_copy_ns for point in points])) * beyond
        return KernelCost(round(ns), max(1.0, beside_ns / ns), 1, 0)

    def _by_stream(self, stream: CpuStream, weight_bytes: int, tokens: int) -> KernelCost:
        """Returns an expert at the share of STREAM that the runtime reaches, or as long as its operations take."""
        rate, words = stream.rate(self._model.expert_dtype, weight_bytes, tokens)
        if stream.by_thread:
            self._costs.estimates["expert on the CPU"] = f"weight bytes / {rate / 1e9:.1f} GB/s: {words}"
            return KernelCost(round(weight_bytes * 1e9 / rate), self._beside_copy, 1, 0)
        rule = self._costs.profile.compute.cpu_rule
        read_ns, computed_ns = weight_bytes * 1e9 / rate, 0.0
        if (computed := stream.computed(self._model.expert_dtype, tokens)) is not None:
            computed_ns = weight_bytes * 1e9 / computed
            beyond = f"or / {computed / 1e9:.1f} GB/s, what threads compute over {tokens} tokens, if that is longer"
        elif rule is not None:
            computed_ns = 2 * tokens * weight_bytes * 8 / self._model.dtype_bits("expert") * 1e9 / rule.flops_per_second
            beyond = f"or 2 x weights x tokens / {rule.flops_per_second / 1e9:,.0f} GFLOP/s if that is longer"
        else:
            read_ns *= max(1.0, tokens / TOKENS_A_PASS)
            beyond = f"in proportion beyond {TOKENS_A_PASS} tokens"
        self._costs.estimates["expert on the CPU"] = f"weight bytes / {rate / 1e9:.1f} GB/s: {words}; {beyond}"
        return KernelCost(round(max(read_ns, computed_ns)), self._beside_copy, 1, 0)

    def _shared_memory(self, stream: CpuStream) -> float:
        """Returns how many times as long copies and experts on the CPU take beside each other: the largest of them."""
        model, copied = self._model, self._costs.expert_bytes
        largest = max(range(model.layers), key=copied.__getitem__)
        rate, _ = stream.rate(model.expert_dtype, model.expert_bytes[largest], 1)
        copies = copied[largest] * 1e9 / max(1, self._costs.copies[largest].queued_ns)
        factor = round(stream.beside(rate, copies), 3)
        self._costs.estimates["copies beside experts on the CPU"] = (
            f"both take {factor:g} times as long: {rate / 1e9:.1f} and {copies / 1e9:.1f} GB/s alone, of one memory"
        )
        return factor

    def _by_rule(self, rule: KernelRule, weight_bytes: int, tokens: int) -> KernelCost:
        """Returns what the profile's rule for the CPU says of an expert."""
        flops = 2 * tokens * weight_bytes * 8 / self._model.dtype_bits("expert")
        part_ns = rule.part_ns(weight_bytes, flops)
        self._costs.estimates["expert on the CPU"] = (
            f"{rule.constant_ns} ns + max(weight bytes / {rule.bytes_per_second / 1e9:.1f} GB/s, "
            f"2 x weights x tokens / {rule.flops_per_second / 1e9:,.0f} GFLOP/s) ({rule.provenance})"
        )
        ns, beside_ns = (rule.constant_ns + part_ns * factor for factor in (1.0, rule.beside_copy_factor))
        return KernelCost(round(ns), beside_ns / ns if ns else 1.0, 1, 0)

    def _by_line(self, weight_bytes: int, tokens: int) -> KernelCost:
        """Estimate a shape: a line through the measured shapes of one token, in proportion beyond the most tokens."""
        single = [point for point in self._of_threads if point.tokens == 1]
        sizes, times = [_weight_bytes(point) for point in single], [point.ns for point in single]
        slope, constant_ns = np.polyfit(sizes, times, 1).tolist() if len(set(sizes)) > 1 else (0.0, 0.0)
        if slope <= 0:
            raise ProfileError(
                f"miss.policy uses the CPU: profile {self._costs.profile.name} has no compute.cpu_experts of one token "
                f"that say how model {self._model.name}'s, of another shape, go with their size; set miss.cpu_gb_per_s"
            )
        constant_ns = max(0.0, constant_ns)
        most = max(point.tokens for point in self._of_threads)
        slowdown = sum(point.beside_copy_ns for point in single) / sum(times)
        self._costs.estimates["expert on the CPU"] = self._of_device(
            f"{constant_ns:.0f} ns + weight bytes / {1 / slope:.1f} GB/s, a line through the profile's "
            f"{len(single)} shapes of one token; in proportion beyond {most} tokens"
        )
        ns = (constant_ns + slope * weight_bytes) * max(1.0, tokens / most)
        return KernelCost(round(ns), max(1.0, slowdown), 1, 0)

    def _of_device(self, estimate: str) -> str:
        """Returns an estimate, in words, and whose measurements it rests on if they are another machine's."""
        of = None if self._device is None else f"as measured on {self._device}, not on this machine"
        return "; ".join(filter(None, (of, estimate)))

    def activations_ns(self, tokens: int) -> int:
        """Returns the copy of so many tokens' activations to the host."""
        return self._costs.profile.d2h.alone.ns(self._model.activation_bytes(tokens))

    def there_and_back_ns(self, tokens: int) -> int:
        """Returns the way of so many tokens to the host, which has to notice that they came, and of their results."""
        return self.activations_ns(tokens) + self._costs.synchronize_ns + self.results_ns(tokens)

    def results_ns(self, tokens: int) -> int:
        """Returns the copy of so many tokens' results to the GPU."""
        return self._costs.h2d.alone.ns(self._model.activation_bytes(tokens))


def _weight_bytes(point: CpuExpertPoint) -> float:
    return float(_MATRICES * point.hidden * point.expert_ff * bits_of(point.dtype) / 8)


class ShrunkCosts:
    """Experts of fewer bytes on the GPU: their kernels in low precision, and decompressing them."""

    def __init__(self, costs: Costs, scenario: Scenario) -> None:
        self._costs, self._model, self._rule = costs, costs.model, costs.profile.compute.rule
        self._compression = scenario.compression

    def expert(self, layer: int, tokens: int, size_bytes: int, phase: int = DECODE) -> KernelCost:
        """Returns an expert's kernels if its weights are `size_bytes`: as much less as the profile's rule says.

        Fewer bytes are read; there are as many operations.
        """
        cost, whole_bytes = self._costs.expert(layer, tokens, phase), self._model.expert_bytes[layer]
        if size_bytes == whole_bytes:
            return cost
        self._costs.estimates["expert in low precision"] = "the expert's own, as much less as the profile's rule says"
        flops = 2 * self._costs.run_tokens(tokens, phase) * (whole_bytes * 8 / self._model.dtype_bits("expert"))
        constant_ns = self._costs.expert_constant_ns
        whole_ns, ns = (constant_ns + self._rule.part_ns(each, flops) for each in (whole_bytes, size_bytes))
        return replace(cost, ns=round(cost.ns * ns / whole_ns)) if whole_ns else cost

    def decompress(self, layer: int) -> KernelCost:
        """Returns decompressing one expert: the constant, and its whole bytes at the rate that the scenario gives."""
        compression, size_bytes = self._compression, self._model.expert_bytes[layer]
        assert compression.decompress_gb_per_s is not None
        if compression.decompress_us is None:
            constant_ns = self._rule.group_ns(1, 0, eager=False)
            self._costs.estimates["decompression"] = f"{constant_ns} ns, the profile's rule, + bytes at the rate given"
        else:
            constant_ns = round(compression.decompress_us * 1000)
        ns = constant_ns - int(-size_bytes // compression.decompress_gb_per_s)
        host_ns = self._costs.launch_ns + self._costs.records_ns
        return KernelCost(ns, self._rule.beside_copy_factor, 1, host_ns)
