"""What commands print: JSON, lines about files, and how far things are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Timer
from time import monotonic
from typing import Any

import typer

#: For so long a command may be silent at a terminal.
SILENT_S = 1.0


def print_json(data: dict[str, Any]) -> None:
    """Print one JSON object on standard output."""
    import orjson

    from .terminal import print_bytes

    print_bytes(orjson.dumps(data, option=orjson.OPT_INDENT_2 | orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def say_replaced(path: Path, what: str) -> None:
    """Tell, on standard error, that what was made before is lost."""
    typer.echo(f"{path}: has a {what} already, which this one replaces", err=True)


def stop_status(left: KeyboardInterrupt | SystemExit) -> int:
    """Returns the exit status of what was told to stop."""
    return left.code if isinstance(left, SystemExit) and isinstance(left.code, int) else 130


@contextmanager
def progress_shown(
    log_every_s: float | None = None, *, doing: str = "loading"
) -> Iterator[Callable[[str, int, int], None] | None]:
    """Show on standard error how far things are; yield what moves it.

    A person at a terminal sees a bar with an estimate; if nothing is told for a second, what is being done. Elsewhere
    a line is written every `log_every_s`, or nothing.
    """
    if not sys.stderr.isatty():
        yield None if log_every_s is None else _logged(log_every_s)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bars:
        tasks: dict[str, Any] = {}
        unknown = bars.add_task(escape(doing), total=None, visible=False)
        waiting = Timer(SILENT_S, bars.update, (unknown,), {"visible": True})
        waiting.daemon = True
        waiting.start()

        def move(what: str, done: int, total: int) -> None:
            if what not in tasks:
                waiting.cancel()
                bars.update(unknown, visible=False)
                tasks[what] = bars.add_task(escape(what), total=total)
            bars.update(tasks[what], completed=done)

        try:
            yield move
        finally:
            waiting.cancel()


def _logged(every_s: float) -> Callable[[str, int, int], None]:
    """Returns what writes a line on standard error now and then, with an estimate of the time that is left."""
    began: dict[str, tuple[float, int]] = {}
    told = monotonic()

    def move(what: str, done: int, total: int) -> None:
        nonlocal told
        now = monotonic()
        since, before = began.setdefault(what, (now, done))
        if now - told >= every_s and done > before:
            told = now
            left_s = (now - since) / (done - before) * (total - done)
            typer.echo(f"{what}: {done:,} of {total:,}, about {left_s / 60:,.1f} min left", err=True)

    return move
