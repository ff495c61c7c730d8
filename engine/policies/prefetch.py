"""Prefetch policies: which of the predictor's guesses to fetch, and in which order.

A policy sees the ranked guesses of one layer visit, one list per horizon, nearest first, and says what to fetch;
the dispatcher asks the memory manager for room and drops what finds none. To add one: write a class with `choose`,
name it in PREFETCH, describe it in tests/test_prefetch.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np


class Gauge:
    """What a policy that declares `uses_clock` may read off the running machine; all zero where there is no clock."""

    def __init__(self) -> None:
        self.now_ns: Callable[[], int] = lambda: 0
        #: Copy time queued on the link, in ns.
        self.backlog_ns: Callable[[], int] = lambda: 0
        #: How long copies to the GPU have kept their lanes busy since the run began, in ns.
        self.link_busy_ns: Callable[[], int] = lambda: 0


@dataclass
class Moment:
    """What is known at one layer visit besides the guesses.

    `confidences` lie beside the guesses, or are None where the predictor gives none. `unused_share` is the share of
    the expert budget that prefetched experts hold which nobody has used yet. `misses_per_visit` is cumulative.
    `assigned` are the experts in memory or on their way there: a guess of one of them makes no copy.
    """

    visit: int = 0
    layer: int = 0
    confidences: Sequence[Sequence[float]] | None = None
    unused_share: float = 0.0
    misses_per_visit: float = 0.0
    gauge: Gauge = field(default_factory=Gauge)
    assigned: Collection[int] = ()


@dataclass(frozen=True)
class Options:
    """What a policy is made with; each uses what it needs.

    `k` guesses a token and horizon, for `lookahead` layers; `threshold` of confidence; `decay` of confidence a layer;
    the model's `layers` and `experts` of a layer, the most where each has its own (`by_layer`); `copy_ns`, what the
    copy of one expert takes; `stream_pairs`, from how many (token, expert) pairs of a visit on layers stream.
    """

    k: int
    lookahead: int
    threshold: float = 0.5
    decay: float = 0.7
    layers: int = 1
    experts: int = 1
    by_layer: Sequence[int] = ()
    copy_ns: int = 0
    stream_pairs: int = 1 << 30


class Prefetch:
    """What the dispatcher asks of a prefetch policy. `uses_clock` exempts it from counting as the replay does."""

    uses_clock = False
    #: Whether it reads anything of the moment but the layer; what it does not read is not kept up.
    reads_moment = True
    #: Whether it can do without a predictor, and without confidences.
    needs_guesses = True
    needs_confidences = False

    def __init__(self, options: Options) -> None:
        self.options = options
        #: How many layers ahead it fetches, and how many ranked guesses it wants for each token and horizon.
        self.horizons = options.lookahead
        self.guesses = options.k if self.needs_guesses else 0

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns what to fetch for each layer ahead, nearest first, the experts of each in the order of fetching.

        `ranked[h - 1]` holds the experts guessed for h layers ahead, best first; those of the batch's tokens lie
        rank by rank; -1 means no guess, here and in what is returned. An expert may come twice, or be in memory: the
        dispatcher merges what is chosen and fetches what is absent.
        """
        raise NotImplementedError

    def observe(self, experts: Sequence[int], tokens: Sequence[int]) -> None:
        """Take note of a visit's experts and how many tokens chose each, before `choose`."""


class NoPrefetch(Prefetch):
    """Fetch nothing ahead of demand."""

    needs_guesses = False
    reads_moment = False

    def __init__(self, options: Options | None = None) -> None:
        super().__init__(Options(0, 0))

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns nothing."""
        return ()


class TopK(Prefetch):
    """Fetch each token's k best guesses for every layer from the next one to `lookahead` layers ahead."""

    reads_moment = False

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns all guesses."""
        return ranked


class MultiStep(Prefetch):
    """Fetch guesses whose confidence, less a factor `decay` for each layer beyond the next, reaches `threshold`.

    The farther ahead, the less a guess is worth: decay ** (horizon - 1) discounts it as a Markov chain would.
    """

    needs_confidences = True

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns the guesses of enough confidence."""
        assert moment.confidences is not None
        least = self.options.threshold
        chosen = []
        for experts, confidences in zip(ranked, moment.confidences, strict=True):
            chosen.append([expert for expert, sure in zip(experts, confidences, strict=True) if sure >= least])
            least /= self.options.decay
        return chosen


class Threshold(MultiStep):
    """Fetch guesses whose confidence reaches `threshold`, however far ahead."""

    def __init__(self, options: Options) -> None:
        super().__init__(Options(options.k, options.lookahead, options.threshold, decay=1.0))


class AdaptiveMemory(TopK):
    """Fetch fewer of the k guesses the more of the memory is held by prefetched experts that nobody has used yet."""

    reads_moment = True

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns the first ceil(k (1 - share held unused)) ranks."""
        return super().choose(_first(ranked, self.options.k, 1.0 - moment.unused_share), moment)


class AdaptiveLink(TopK):
    """Fetch fewer of the k guesses the more copies wait on the link: none once k of them do."""

    uses_clock = True
    reads_moment = True

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns the first ceil(k - copies waiting) ranks."""
        options = self.options
        waiting = moment.gauge.backlog_ns() / options.copy_ns if options.copy_ns else 0.0
        return super().choose(_first(ranked, options.k, 1.0 - waiting / options.k), moment)


class NextLayer(Prefetch):
    """Fetch every expert of the coming layers, whatever the predictor says (layer-wise offloading)."""

    needs_guesses = False

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns all experts of the layers, by index."""
        options = self.options
        ahead = [(moment.layer + far) % options.layers for far in range(1, options.lookahead + 1)]
        counts = options.by_layer or [options.experts] * options.layers
        return [range(layer * options.experts, layer * options.experts + counts[layer]) for layer in ahead]


class StreamPrefill(Prefetch):
    """Fetch every expert of the coming layers in steps of many tokens, and in others each token's k best guesses.

    Layers stream through the memory while a prompt is computed: with `lookahead` 1 and room for two layers, one is
    computed and one filled. As KTransformers' layerwise prefill, which copies a layer's experts to the GPU from so
    many tokens on (`--kt-gpu-prefill-token-threshold`), and FlexGen's overlapped layers (Sheng et al. 2023,
    arXiv:2303.06865). A step has many where its visit has `stream_pairs` (token, expert) pairs.
    """

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._layers, self._pairs = NextLayer(options), 0

    def observe(self, experts: Sequence[int], tokens: Sequence[int]) -> None:
        """Count the visit's pairs."""
        self._pairs = sum(tokens)

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns whole layers, or all guesses."""
        return self._layers.choose(ranked, moment) if self._pairs >= self.options.stream_pairs else ranked


class Popularity(Prefetch):
    """Fetch the k experts of each coming layer that most tokens have chosen so far; ties to the lower index."""

    needs_guesses = False

    def __init__(self, options: Options) -> None:
        super().__init__(options)
        self._chosen = np.zeros((options.layers, options.experts), dtype=np.int64)

    def observe(self, experts: Sequence[int], tokens: Sequence[int]) -> None:
        """Count the tokens of each expert."""
        np.add.at(self._chosen.reshape(-1), experts, tokens)

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns the most popular first; an expert never chosen is not fetched."""
        options = self.options
        popular = []
        for ahead in range(1, options.lookahead + 1):
            layer = (moment.layer + ahead) % options.layers
            chosen = self._chosen[layer]
            order = np.argsort(-chosen, kind="stable")[: options.k]
            popular.append((layer * options.experts + order[chosen[order] > 0]).tolist())
        return popular


class CostAware(Prefetch):
    """Fetch a guess only if the stall that it saves is expected to exceed the stall that it causes on the link.

    With confidence c, b ns of copies queued, a copy of p ns and t ns until the target visit (horizon times the mean
    time of a visit so far): a right guess saves min(p, max(0, t - b)), what of its copy is hidden; a wrong one holds up
    the demand copies behind it by p, and a visit makes m demand copies on average (at most one waits for this one).
    So it is fetched if c min(p, max(0, t - b)) > (1 - c) min(1, m) p; what is fetched adds p to the queue, once: other
    guesses of it are free. A guess of what is in memory makes no copy and is passed over.
    """

    uses_clock = True
    needs_confidences = True

    def choose(self, ranked: Sequence[Sequence[int]], moment: Moment) -> Sequence[Sequence[int]]:
        """Returns the guesses whose copy pays."""
        assert moment.confidences is not None
        copy_ns = self.options.copy_ns
        backlog_ns = moment.gauge.backlog_ns()
        visit_ns = moment.gauge.now_ns() / max(1, moment.visit)
        harm_ns = min(1.0, moment.misses_per_visit) * copy_ns
        fetched: set[int] = set()
        chosen: list[list[int]] = []
        for horizon, (experts, confidences) in enumerate(zip(ranked, moment.confidences, strict=True), 1):
            chosen.append([])
            for expert, confidence in zip(experts, confidences, strict=True):
                if expert in fetched:
                    chosen[-1].append(expert)
                if expert < 0 or expert in moment.assigned or expert in fetched:
                    continue
                hidden_ns = min(copy_ns, max(0.0, horizon * visit_ns - backlog_ns))
                if confidence * hidden_ns > (1.0 - confidence) * harm_ns:
                    backlog_ns += copy_ns
                    fetched.add(expert)
                    chosen[-1].append(expert)
        return chosen


def _first(ranked: Sequence[Sequence[int]], k: int, share: float) -> list[Sequence[int]]:
    """Returns the first ceil(k * share) ranks of each horizon; k ranks of every token lie rank by rank."""
    ranks = max(0, -int(-k * share // 1))
    return [experts[: len(experts) * ranks // k] for experts in ranked]


PREFETCH: dict[str, Callable[[Options], Prefetch]] = {
    "none": NoPrefetch,
    "top-k": TopK,
    "threshold": Threshold,
    "multi-step": MultiStep,
    "adaptive-memory": AdaptiveMemory,
    "adaptive-link": AdaptiveLink,
    "next-layer": NextLayer,
    "stream-prefill": StreamPrefill,
    "popularity": Popularity,
    "cost-aware": CostAware,
}
