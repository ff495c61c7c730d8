"""Usage errors: one line that says what was not understood, and what would be right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

#: What people type who look for something that is called otherwise.
_MEANT = {
    "bench": "prestage run --bench",
    "help": "prestage --help",
    "info": "prestage doctor",
    "simulate": "prestage run",
    "version": "prestage --version",
}
#: Options that people give for several GPUs.
_GPUS = ("--gpus", "--num-gpus", "--n-gpus", "--ngpus")
#: What typer says of a value, in words of a library's.
_WHOLE = re.compile(r"Input should be a valid integer.*|'.*' is not a valid int(?:eger)?.*")
_LEAST = re.compile("Input should be greater than or equal to")
_MOST = re.compile("Input should be less than or equal to")
_NUMBER = re.compile(r"Input should be a valid number.*|'.*' is not a valid float.*")


def usage_words(error: Any, arguments: Sequence[str]) -> str:
    """Returns the line for one of typer's usage errors: what is wrong, what it may have meant, where help is."""
    text = str(error.format_message()).rstrip(".?") or "Missing command"
    command = error.ctx.command_path if error.ctx else "prestage"
    text = _LEAST.sub("must be at least", _MOST.sub("must be at most", text))
    text = _WHOLE.sub("must be a whole number", _NUMBER.sub("must be a number", text))
    given = _given(getattr(getattr(error, "param", None), "opts", ()), arguments)
    if given is not None and given not in text:
        text += f", not {given!r}"
    meant = _gpus_hint(error, arguments) or _key_hint(error) or _command_hint(text)
    if meant:
        text = text.partition(" (Possible")[0]
    return f"{text}{meant}; `{command} --help` tells more"


def _given(options: Sequence[str], arguments: Sequence[str]) -> str | None:
    """Returns what was given to an option; None if it is none, or was given nothing."""
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in options:
            return value if equals else next(iter(arguments[number + 1 : number + 2]), None)
    return None


def _gpus_hint(error: Any, arguments: Sequence[str]) -> str:
    """Returns what to write for several GPUs, of which two keys tell: what there is, and what is done with them."""
    option = getattr(error, "option_name", "")
    if option not in _GPUS or not _takes_settings(error):
        return ""
    count = _given([option], arguments) or "N"
    return (
        f": write `--gpu '{count}x rtx4090' --ram '128GB DDR5-5600'`, or `--set machine.gpus={count}` of a machine of "
        f"parts, and each has some of the layers; with `--set parallel.gpus={count}` too, some experts of every layer"
    )


def _takes_settings(error: Any) -> bool:
    return error.ctx is not None and any("--set" in option.opts for option in error.ctx.command.params)


def _key_hint(error: Any) -> str:
    """Returns how a key is set that somebody took for an option of a command that runs scenarios."""
    name = getattr(error, "option_name", "").lstrip("-").replace("-", "_")
    if not name or not _takes_settings(error):
        return ""
    from ..engine.scenario.scenario import keys_named

    keys = keys_named(name)
    return ": " + " or ".join(f"`--set {key}=…`" for key in keys) + " sets it" if keys else ""


def _command_hint(text: str) -> str:
    found = re.fullmatch(r"No such command '(.*)'", text)
    return f": `{_MEANT[found[1]]}` is it" if found and found[1] in _MEANT else ""
