"""Five ways of new users, each from beginning to end as they would type it: a hobbyist, an engineer with eight GPUs, a
researcher with a policy of her own, a user of notebooks, a reader of timelines. Over few tokens; each within its time.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from warm import shell_function

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
#: The longest that any of them may take, in seconds: without compiling, on a machine that others use, too.
MOST_S = 180

HOBBYIST = """
prestage doctor
prestage show gpt-oss-120b --gpu rtx4090 --ram "64GB DDR5-5600"
prestage run gpt-oss-120b --gpu rtx4090 --ram "64GB DDR5-5600" --set workload.tokens=10 --no-baselines --out mine
prestage run gpt-oss-20b --gpu rtx4060 --ram "32GB DDR5-5600" --runtime llama.cpp --set memory.cpu_layers=15 --bench
prestage report mine -o mine.html
test -s mine.html
"""
ENGINEER = """
prestage topology h200-hgx-x8 -o machine.svg
prestage run placement-8 --set workload.tokens=2 --no-baselines
SERVED="--set requests.count=10 --set requests.rate=20 --set requests.output_tokens=4 --set requests.prompt_tokens=16"
prestage run synthetic --set model.layers=4 $SERVED --no-baselines
FEW="--set workload.tokens=4 --no-baselines"
prestage sweep pipeline-2 --grid parallel.micro_batches=1,2 $FEW --workers 1 -o stages.jsonl
KEY=$(head -1 stages.jsonl | sed 's/.*"key":"\\([0-9a-f]*\\)".*/\\1/')
prestage run "stages.jsonl#$KEY" --no-baselines
"""
RESEARCHER = """
cat > mine.py <<'END'
from prestage.engine.policies.eviction import EVICTION, Lru


class Mine(Lru):
    \"\"\"Evict the expert that came last: bad, and mine.\"\"\"

    def victims(self):
        return reversed(list(super().victims()))


EVICTION["mine"] = Mine
END
prestage run guide --plugin mine.py --set memory.eviction=mine --set workload.tokens=8 --no-baselines
prestage mrc topk --plugin mine.py --policies lru,mine,belady --points 2
FEW="--set workload.tokens=4 --no-baselines"
prestage sweep guide --plugin mine.py --grid memory.eviction=lru,mine $FEW --workers 2 -o m.jsonl
prestage plot lines m.jsonl --x memory.eviction -o lines.png
! prestage run guide --set memory.eviction=mine 2> refused.txt
grep -q "memory.eviction = 'mine'" refused.txt
"""
TIMELINES = """
prestage run --set workload.tokens=4 --no-baselines --out first
prestage run --set workload.tokens=4 --set prefetch.lookahead=0 --no-baselines --out second
prestage timeline summary first/timeline.json.gz second/timeline.json.gz
prestage plot waterfall first second -o fall.svg
prestage plot timeline first -o timeline.pdf
prestage plot timeline first second -o both.png
prestage report first second -o both.html
"""
#: A notebook's cells, run in order.
NOTEBOOK = f"""
python - <<'END'
import json
from pathlib import Path

for notebook in sorted(Path({str(ROOT / "docs" / "notebooks")!r}).glob("*.ipynb")):
    names = {{}}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
END
"""
#: Who goes which way; the notebook's cells are also tested one by one below.
WAYS = {
    "a hobbyist with one card": HOBBYIST,
    "an engineer with eight GPUs and load": ENGINEER,
    "a researcher with a policy of her own": RESEARCHER,
    "a user of notebooks": NOTEBOOK,
    "a reader of timelines": TIMELINES,
}


def walked(script: str, folder: Path, most_s: float = MOST_S, *, warm: bool = False) -> str:
    """Run a script in an empty folder, as a shell would; returns what it prints, and refuses a slow one.

    `warm`: each command in a process that has everything imported already.
    """
    command = "warm_prestage" if warm else "python -m prestage"
    shell = shell_function() if warm else ""
    shell += f'python() {{ {sys.executable!r} "$@"; }}\nprestage() {{ {command} "$@"; }}\nset -euo pipefail\n'
    environment = {**os.environ, "MPLBACKEND": "Agg", "COLUMNS": "80"}
    began = time.monotonic()
    done = subprocess.run(["bash", "-c", shell + script], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < most_s
    return done.stdout


@pytest.mark.process
@pytest.mark.docs
def test_a_hobbyist_knows_whether_it_fits_how_fast_it_is_and_what_llama_bench_would_say(tmp_path: Path) -> None:
    said = walked(HOBBYIST, tmp_path, warm=True)
    assert "gpu0" in said and "tokens per second" in said and "| tg128 |" in said
    assert max(len(line.rstrip()) for line in said.splitlines() if not line.startswith("|")) <= 80


@pytest.mark.process
@pytest.mark.docs
def test_an_engineer_with_eight_gpus_sees_each_of_them_requests_and_a_row_again(tmp_path: Path) -> None:
    said = walked(ENGINEER, tmp_path, warm=True)
    assert "Each GPU" in said and "requests/s" in said and "The 2 fastest" in said


@pytest.mark.process
@pytest.mark.docs
def test_a_researcher_runs_a_policy_from_outside_everywhere(tmp_path: Path) -> None:
    said = walked(RESEARCHER, tmp_path, warm=True)
    assert "mine, misses are copied" in " ".join(said.split()) and re.search("lru +mine +belady", said)


@pytest.mark.docs
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names: dict[str, Any] = {}
    began = time.monotonic()
    for cell in cells:
        assert not cell.get("outputs")
        if cell["cell_type"] == "code":
            exec(compile(cell["source"], path.name, "exec"), names)
    assert time.monotonic() - began < MOST_S
    assert "tokens per second" in names["result"]._repr_html_()


@pytest.mark.process
@pytest.mark.docs
def test_a_reader_of_timelines_compares_two(tmp_path: Path) -> None:
    said = walked(TIMELINES, tmp_path, warm=True)
    assert "gpu0: kernels" in said and (tmp_path / "both.html").stat().st_size > 100_000
