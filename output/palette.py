"""The palette: one color and one label for each thing that a figure shows, in print and on the page alike.

Colors of Okabe and Ito, "Color Universal Design" (2008), which people with any color vision tell apart, with a few
more where these run out. They hold on white and on the dark page. Each table stands in the order of its legend.
"""

from __future__ import annotations

#: Color and label by name.
Palette = dict[str, tuple[str, str]]

#: Of the kinds of spans: copies are warm, kernels cool, the host gray.
COLORS: Palette = {
    "launch": ("#8c8c8c", "host dispatches"),
    "predict": ("#cc79a7", "predictor"),
    "demand": ("#d55e00", "copy on demand"),
    "prefetch": ("#f0a830", "prefetch"),
    "readback": ("#8060c0", "choice to host"),
    "guesses": ("#b39ddb", "guesses to host"),
    "swap": ("#aa7700", "KV blocks swapped"),
    "demotion": ("#6a3d9a", "evicted expert to host"),
    "dense": ("#0072b2", "dense part"),
    "expert": ("#56b4e9", "expert"),
    "head": ("#009e73", "head"),
    "activation": ("#b8860b", "activations"),
    "dispatch": ("#a0522d", "all-to-all, dispatch"),
    "combine": ("#7f4f24", "all-to-all, combine"),
    "peer": ("#e377c2", "copy from a peer"),
    "cpu_expert": ("#117733", "expert on the CPU"),
    "decompress": ("#88ccee", "decompression"),
    "read": ("#882255", "read from NVMe"),
    "kernel": ("#4477aa", "kernel"),
    "copy": ("#ee7733", "copy"),
    "collective": ("#aa4499", "communication"),
}
#: Of what an access can turn out to be.
OUTCOME_COLORS: Palette = {
    "prefetch_hit": ("#009e73", "prefetch hit"),
    "cache_hit": ("#56b4e9", "cache hit"),
    "late": ("#f0a830", "late"),
    "miss": ("#d55e00", "miss"),
}
#: Of how a prefetch can end.
FATE_COLORS: Palette = {
    "useful": ("#009e73", "useful"),
    "late": ("#f0a830", "late"),
    "wasted": ("#d55e00", "evicted unused"),
    "unused": ("#8c8c8c", "unused at the end"),
    "cancelled": ("#cc79a7", "cancelled"),
}
#: Of the parts of a makespan.
PART_COLORS: Palette = {
    "compute": ("#0072b2", "compute"),
    "stall": ("#d55e00", "stall: an expert missing"),
    "host": ("#8c8c8c", "host"),
    "predictor": ("#cc79a7", "predictor"),
    "bubble": ("#b8860b", "bubble: another GPU"),
    "drain": ("#56b4e9", "drain"),
    "idle": ("#c8c8c8", "idle: nothing to serve"),
}
#: Of what a request under load goes through.
REQUEST_COLORS: Palette = {
    "waits": ("#8c8c8c", "waits"),
    "prompt": ("#f0a830", "until its first token"),
    "tokens": ("#0072b2", "tokens"),
}
#: Of several of one kind, such as GPUs.
SERIES_COLORS = ("#0072b2", "#009e73", "#cc79a7", "#f0a830", "#56b4e9", "#8c8c8c", "#8060c0", "#b8860b")
#: What no lane did, and a limit.
IDLE_COLOR, LIMIT_COLOR = "#8c8c8c", "#d55e00"
#: What is written on a color.
DARK_INK, LIGHT_INK = "#1b1f24", "#ffffff"


def ink_on(color: str) -> str:
    """Returns which ink is read better on a color: by its relative luminance (WCAG 2, without the gamma)."""
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return DARK_INK if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.5 else LIGHT_INK
