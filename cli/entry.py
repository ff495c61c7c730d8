"""Where the command line begins: the table of all commands, and how errors in them are shown.

To add a command: write a function in the file of its family and name it here; those of a group are named where they
are written. Help lists commands in this order.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Annotated, Any, cast

import typer
from typer.main import get_command

from ..errors import InputError
from . import calibrate, machine, model, predictor, timeline, trace
from .advise import advise
from .console import stop_status
from .decode import calibrate_decode, calibrate_served
from .doctor import doctor
from .experiments import breakeven, compare, suite, sweep
from .guide import reproduce
from .lists import list_names
from .observe import calibrate_observe
from .pictures import plot, report, topology
from .requests import capacity
from .run import compile_engine, mrc, replay, run
from .show import show

app = typer.Typer(
    help="""Simulate Mixture-of-Experts inference with expert offloading and prefetching.

    Start with `prestage run --out prestage-out`; every command's --help has examples.
    """,
    pretty_exceptions_enable=False,
)
_COMMANDS: tuple[Callable[..., None], ...] = (
    run, advise, show, sweep, suite, plot, report, topology, compare, breakeven, capacity, replay, reproduce, mrc,
)  # fmt: skip
for _command in _COMMANDS:
    app.command()(_command)
app.command("compile")(compile_engine)
app.command("list")(list_names)
app.command()(doctor)
app.add_typer(machine.app, name="machine")
app.add_typer(trace.app, name="trace")
app.add_typer(model.app, name="model")
calibrate.app.command("decode")(calibrate_decode)
calibrate.app.command("served")(calibrate_served)
calibrate.app.command("observe")(calibrate_observe)
app.add_typer(calibrate.app, name="calibrate")
app.add_typer(calibrate.benchmark_app, name="benchmark")
app.add_typer(predictor.app, name="predictor")
app.add_typer(timeline.app, name="timeline")


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("prestage"))
        raise typer.Exit


@app.callback()
def _options(
    _: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and stop.")
    ] = False,
    _plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", metavar="FILE.py", help="Load a policy, predictor, … of your own; with any command."),
    ] = None,
) -> None:
    pass


# A missing argument, an unknown option and a bad value are all of the class that BadParameter is made from; typer
# gives it no name of its own.
_UsageError = cast("type[typer.BadParameter]", typer.BadParameter.__base__)


def main() -> None:
    """Run the command line; what is refused is one line and exit status 2 (terminal.py has the others)."""
    from . import terminal

    terminal.prepare()
    sys.exit(terminal.flushed(_status(sys.argv[1:] or ["--help"])))


def _plugged(arguments: list[str]) -> list[str]:
    """Load what `--plugin` names, wherever it stands, and what is installed; returns the other arguments."""
    from .. import plugins

    plugins.load_asked()
    others: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        if argument == "--":
            return [*others, argument, *waiting]
        if argument.partition("=")[0] != "--plugin":
            others.append(argument)
            continue
        name = argument.partition("=")[2] or next(waiting, "")
        if not name:
            raise InputError("--plugin: name a Python file or a module; `prestage --help` tells more")
        plugins.load_plugin(name)
    return others


@cache
def _group() -> Any:
    """Returns typer's group of all commands, made once a process: most of what a short command takes."""
    return get_command(app)


def _status(arguments: list[str]) -> int:
    """Run a command and return its exit status."""
    from . import terminal

    try:
        for argument in arguments:
            if any("\ud800" <= character <= "\udfff" for character in argument):
                raise InputError(f"{argument!r}: not UTF-8: results and messages are, so give it another name")
        arguments = _plugged(arguments)
        return int(_group()(args=arguments, prog_name="prestage", standalone_mode=False) or 0)
    except _UsageError as error:
        from .usage import usage_words

        return terminal.refuse(usage_words(error, arguments))
    except InputError as error:
        return terminal.refuse(str(error))
    except BrokenPipeError:
        return terminal.BROKEN_PIPE
    except OSError as error:
        return terminal.refuse(terminal.os_words(error))
    except MemoryError as error:
        return terminal.refuse(f"out of memory: {str(error) or 'ask for less, or use a larger machine'}")
    except SystemExit as left:
        # Typer makes one of a pipe that nobody reads.
        return terminal.BROKEN_PIPE if isinstance(left.__context__, BrokenPipeError) else stop_status(left)
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except Exception:
        return terminal.report_fault()
