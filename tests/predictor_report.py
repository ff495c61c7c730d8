"""How well predictors do on real routing: docs/predictors.json, the page made of it, and the weights that are shipped.

    python tests/predictor_report.py --work DIR --gpt-oss FILE --guide FILE

trains on one part of each trace's sequences and scores the others. `--gpt-oss` is gpt-oss-20b.npz; `--guide` the whole
recording of our own top-1 model (`prestage.workloads.training`), of which the first sequences are shipped: its
predictor is trained on the second half alone. Weights in DIR from an earlier run are used again; without them it takes
about half an hour on two cores. Without a trace it writes docs/predictors.md anew from docs/predictors.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

from prestage.workloads.learned import WEIGHTS_FILE, Learned, Weights, load_weights
from prestage.workloads.predictor_scores import BOUND_KNOWLEDGE, ONLINE, evaluate
from prestage.workloads.predictor_training import Settings, train
from prestage.workloads.predictors import make_predictor
from prestage.workloads.trace import RoutingTrace

ROOT = Path(__file__).parent.parent
REPORT = ROOT / "docs" / "predictors.json"
PAGE = ROOT / "docs" / "predictors.md"
SHIPPED = ROOT / "workloads" / "data" / "guide-predictor.safetensors"
#: Sequences to train on and to score, and the k of recall@k.
SPLITS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "gpt-oss-20b": (":61", "61:", (1, 4, 8)),
    "guide": ("216:", ":72", (1, 5, 10)),
}
#: Contexts are compared with fewer epochs, and on fewer sequences to train on and to score.
CONTEXTS, CONTEXT_EPOCHS = range(1, 7), 3
CONTEXT_SPLITS = {"gpt-oss-20b": (":61", "61:82"), "guide": ("216:288", ":18")}


#: The k that the tables show.
SHOWN = {"gpt-oss-20b": "4", "guide": "10"}
INTRODUCTION = """# Predictors on real routing

How well each predictor names the experts that a layer will use, on two real traces. The predictor `learned` was trained
on one part of each trace's sequences ([training one](train-a-predictor.md)). All predictors are scored on another part.
The other predictors learn while they run. Before they are scored they run over all other sequences, those that
`learned` was trained on among them.

- *Top-1*: how often the first guess is an expert that the next layer uses.
- *Recall*: the share of the experts used that are among the first guesses, of which `@4` counts four. *1 ahead* is the
  next layer. Behind the last layer come the first layers of the next token.
- *Miscalibration*: how far the confidence in a guess is from how often such guesses are right, for the next layer
  (expected calibration error). A dash stands where a predictor states no confidence.

`python tests/predictor_report.py` makes this page from `docs/predictors.json`. Given the traces, it makes that too.
"""
BOUNDS_EXPLAINED = """These bounds hold for predictors that know the target layer and what the second column says, but
nothing else. *Hindsight* is what the best fixed answer to each such context gets on this very trace. *Fano* is Fano's
inequality, which needs the entropy of the choices alone, and is never below hindsight. Where a token uses several
experts, it reaches 100% long before the choice is certain. A context that occurs seldom looks more certain than it
is, so both bounds are rather too high than too low. The trained predictor knows more than these contexts, and may
exceed them.

"""
CONTEXT_EXPLAINED = """The trained predictor again, by how many tokens it looks back. Each was trained for three epochs
and scored on fewer sequences than above; for `guide` it was also trained on fewer. So compare these rows with each
other only.

"""
LAYERS_EXPLAINED = """Recall of the trained predictor by target layer. In brackets: the points by which it exceeds the
best of the other predictors there, and which that is.

"""


def part(trace: RoutingTrace, sequences: str) -> RoutingTrace:
    return trace.slice(sequences=trace.sequences_in(sequences))


def trained(trace: RoutingTrace, settings: Settings, folder: Path) -> Weights:
    """The weights in the folder, or new ones."""
    if not (folder / WEIGHTS_FILE).is_file():
        train(trace, settings, progress).save(folder)
    return load_weights(folder)


def progress(what: str, done: int, total: int) -> None:
    if done == total or done % 500 == 0:
        print(f"{what}: {done} of {total}", file=sys.stderr, flush=True)


def compared(trace: RoutingTrace, name: str, work: Path) -> dict[str, Any]:
    """Every predictor on the scored sequences."""
    learn, score, lengths = SPLITS[name]
    weights = trained(part(trace, learn), Settings(), work / name)
    predictors = {online: make_predictor(online) for online in ONLINE} | {"learned": Learned(weights)}
    data = evaluate(trace, predictors, lengths=lengths, sequences=score, progress=progress)
    return {"trained_on": learn, "scored_on": score, "training": weights.made, **data}


def contexts(trace: RoutingTrace, name: str, work: Path) -> dict[str, Any]:
    """The trained predictor by how many tokens it looks back."""
    learn, score = CONTEXT_SPLITS[name]
    scored, lengths = part(trace, score), SPLITS[name][2]
    found = {}
    for context in CONTEXTS:
        settings = Settings(context=context, epochs=CONTEXT_EPOCHS)
        weights = trained(part(trace, learn), settings, work / f"{name}-context-{context}")
        data = evaluate(scored, {"learned": Learned(weights)}, lengths=lengths)
        found[str(context)] = {"memory_bytes": weights.memory_bytes, **data["predictors"][0]}
    return {"epochs": CONTEXT_EPOCHS, "trained_on": learn, "scored_on": score, "context": found}


def read_report() -> dict[str, Any]:
    """What docs/predictors.json holds; nothing before it is there."""
    found: dict[str, Any] = json.loads(REPORT.read_text(encoding="utf-8")) if REPORT.is_file() else {}
    return found


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def predictors_table() -> str:
    """Every predictor on every trace, all layers together."""
    report, rows = read_report(), []
    for trace, k in SHOWN.items():
        for entry in report[trace]["predictors"]:
            at = entry["horizons"]
            recalls = [f"{ahead['recall'][k]:.1%}" for ahead in at]
            error = at[0]["calibration_error"]
            calibrated = "-" if error is None else f"{error:.3f}"
            rows.append([trace, entry["name"], f"{at[0]['top1']:.1%}", f"@{k}", *recalls, calibrated])
    return markdown(["trace", "predictor", "top-1", "recall", "1 ahead", "2 ahead", "3 ahead", "miscalibration"], rows)


def bounds_table() -> str:
    """What top-1, one layer ahead, cannot exceed on each trace, beside the best that is."""
    report, rows = read_report(), []
    for trace in SHOWN:
        best = max(entry["horizons"][0]["top1"] for entry in report[trace]["predictors"])
        knowing = report[trace]["top1_bounds"][0]["knowing"]
        for knows in BOUND_KNOWLEDGE:
            bound = knowing[knows]
            shares = [f"{bound[key]:.1%}" for key in ("fano", "hindsight")]
            rows.append([trace, knows, f"{bound['entropy_bits']:.2f}", *shares, f"{best:.1%}"])
    return markdown(["trace", "who knows", "entropy, bits", "Fano", "hindsight", "best predictor"], rows)


def contexts_table() -> str:
    """The trained predictor by how many tokens it looks back."""
    report, rows = read_report(), []
    for trace, k in SHOWN.items():
        for context, entry in report.get(f"{trace} contexts", {"context": {}})["context"].items():
            at = entry["horizons"]
            recalls = [f"{ahead['recall'][k]:.2%}" for ahead in at]
            rows.append([trace, context, f"{at[0]['top1']:.2%}", f"@{k}", *recalls])
    return markdown(["trace", "context, tokens", "top-1", "recall", "1 ahead", "2 ahead", "3 ahead"], rows)


def layers_table(trace: str) -> str:
    """What training adds to the best of the others, by target layer, in points of recall."""
    k, entries = SHOWN[trace], {e["name"]: e["horizons"] for e in read_report()[trace]["predictors"]}
    learned = entries.pop("learned")
    rows = []
    for layer in range(len(learned[0]["layers"]["top1"])):
        cells = [str(layer)]
        for ahead, at in enumerate(learned):
            recall = at["layers"]["recall"][k][layer]
            others = {name: counted[ahead]["layers"]["recall"][k][layer] for name, counted in entries.items()}
            best = max(others, key=lambda name: others[name])
            cells.append(f"{recall:.1%} (+{(recall - others[best]) * 100:.1f} on {best})".replace("+-", "-"))
        rows.append(cells)
    return markdown(["target layer", *(f"recall@{k}, {ahead + 1} ahead" for ahead in range(len(learned)))], rows)


def page() -> str:
    """The whole of docs/predictors.md."""
    parts = [
        ("All layers together", predictors_table()),
        ("Bounds on top-1, one layer ahead", BOUNDS_EXPLAINED + bounds_table()),
        ("Context length", CONTEXT_EXPLAINED + contexts_table()),
        *((f"By layer: {trace}", LAYERS_EXPLAINED + layers_table(trace)) for trace in SHOWN),
    ]
    return INTRODUCTION + "".join(f"\n## {title}\n\n{table}\n" for title, table in parts)


def main() -> None:
    """Fill in what the given traces allow, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("predictors"))
    parser.add_argument("--gpt-oss", type=Path)
    parser.add_argument("--guide", type=Path)
    given = parser.parse_args()
    report = read_report()
    for name, file in (("gpt-oss-20b", given.gpt_oss), ("guide", given.guide)):
        if file:
            trace = RoutingTrace.load(file)
            report[name] = compared(trace, name, given.work)
            report[f"{name} contexts"] = contexts(trace, name, given.work)
    if given.guide:
        shutil.copyfile(given.work / "guide" / WEIGHTS_FILE, SHIPPED)
    rounded = json.loads(json.dumps(report), parse_float=lambda text: round(float(text), 5))
    REPORT.write_text(json.dumps(rounded, sort_keys=True) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
