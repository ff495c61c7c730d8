"""Statements and branches that tests run are counted by folder."""

from coverage_by_folder import by_folder


def test_coverage_is_counted_by_folder() -> None:
    def summary(*counts: int) -> dict[str, int]:
        return dict(zip(("num_statements", "covered_lines", "num_branches", "covered_branches"), counts, strict=True))

    files = {
        "errors.py": summary(10, 9, 0, 0),
        "cli/run.py": summary(30, 15, 4, 1),
        "engine/timing/host.py": summary(50, 40, 8, 6),
        "engine/timing/deep/er.py": summary(50, 50, 0, 0),
        "engine/run.py": summary(1, 1, 2, 2),
    }
    assert by_folder(files).splitlines()[2:] == [
        "| `(front door and root)` | 10 | 90% | 0 |  |",
        "| `cli` | 30 | 50% | 4 | 25% |",
        "| `engine` | 1 | 100% | 2 | 100% |",
        "| `engine/timing` | 100 | 90% | 8 | 75% |",
        "| all | 141 | 82% | 14 | 64% |",
    ]
