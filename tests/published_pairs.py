"""How often the setting that we say is faster is the one that won in a published run:

    python tests/published_pairs.py

A pair is two rows of one source and group, of one model, machine, prompt and context, that differ in what a user can
set (which layers or experts lie where, cache, policy, micro-batch). Predictions are those of the committed table, where
no row was fitted. Where we see less than advice's noise between the two, it would not recommend either.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from published_tables import NOW, rows_of

from prestage.calibration.published.rows import Predicted, load_source, source_names
from prestage.output.markdown import table

#: Sections whose keys users set to be faster; a pair may differ in no other.
SET = ("memory", "miss", "copy", "prefetch", "dispatch", "tiers")
#: Units of which more is better.
RATES = ("tokens/s", "prompt tokens/s")
#: What advice does not recommend for (`advice_sure`): a gain of less than this.
NOISE = 0.01
#: Why we are wrong, by the two rows.
_SCATTER = (
    "the source's 37.2 tokens/s with 30 layers lies out of its own row (34: 38.7, 24: 46.6), and it measured one "
    "setting 13 % apart on two days (R11-first, R11-later)"
)
WHY = {
    frozenset(("R11c-36", "R11c-30")): _SCATTER,
    frozenset(("R11c-34", "R11c-30")): _SCATTER,
    frozenset(("R15-fetch", "R15-share")): (
        "shared, it took 1.63 ms a layer, of which 3.19 experts on the CPU and 1.07 over the link explain .16 and .12 "
        "ms at the rates that the source measured; what the rest is it does not say. The same setting on an RTX "
        "3090 (R15b-share) is predicted within 10 %"
    ),
}

Pair = tuple[Predicted, Predicted]


def pairs() -> Iterator[Pair]:
    """Yields the pairs of all sources whose rows have both been predicted, the one that won first."""
    settings = {row.id: source.settings for source in map(load_source, source_names()) for row in source.rows}
    known = [each for each in rows_of(NOW) if each.value is not None and each.row.group and each.row.unit in RATES]
    for one, other in combinations(known, 2):
        if one.source == other.source and _alike(one, other, settings) and one.row.measured != other.row.measured:
            yield (one, other) if one.row.measured > other.row.measured else (other, one)


def _alike(one: Predicted, other: Predicted, settings: dict[str, tuple[str, ...]]) -> bool:
    """Whether two rows are of the same work, and differ in what can be set alone."""
    a, b = one.row, other.row
    same = ("group", "unit", "prompt", "runtime", "alone", "on_cpu")
    if any(getattr(a, name) != getattr(b, name) for name in same):
        return False
    changed = {*settings[a.id], *a.settings} ^ {*settings[b.id], *b.settings}
    placed = a.cpu_layers != b.cpu_layers or a.micro_batch != b.micro_batch
    return all(setting.split(".")[0] in SET for setting in changed) and bool(changed or placed)


def verdict(pair: Pair) -> str:
    """Returns `agrees`, `disagrees` or `no advice` of a pair, the one that won first."""
    won, lost = (each.value for each in pair)
    assert won is not None and lost is not None
    if abs(won / lost - 1) < NOISE:
        return "no advice"
    return "agrees" if won > lost else "disagrees"


def published_pairs() -> str:
    """Returns the pairs by source, and of every one that is not agreed on why, in Markdown."""
    found = [(pair, verdict(pair)) for pair in pairs()]
    rows = []
    for source in [*dict.fromkeys(pair[0].source for pair, _ in found), "all"]:
        here = [said for pair, said in found if source in (pair[0].source, "all")]
        counts = [here.count(said) for said in ("agrees", "disagrees", "no advice")]
        rows.append([source, str(len(here)), *map(str, counts), f"{counts[0] / len(here):.0%}"])
    lines = [table(["source", "pairs", "agrees", "disagrees", "no advice", "agreement"], rows), ""]
    for (won, lost), said in found:
        if said != "agrees":
            measured, ours = won.row.measured / lost.row.measured - 1, (won.value or 0.0) / (lost.value or 1.0) - 1
            why = WHY.get(frozenset((won.row.id, lost.row.id)), "not explained")
            lines.append(f"- {won.row.id} over {lost.row.id}: measured {measured:+.1%}, ours {ours:+.1%}: {why}")
    return "\n".join(lines)


if __name__ == "__main__":
    print(published_pairs())
