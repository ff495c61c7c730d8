"""How commands behave in a terminal: streams that take any text, clean-up on signals, a last line, an exit status.

Exit statuses: 0, it went well; 1, a fault of Prestage, whose traceback is shown (and `calibrate validate` beyond its
tolerance); 2, what was given cannot be used, said in one line; 130, 143 and 141, as shells have it, after Ctrl-C, a
signal to end (128 + its number) and a reader of the output that has left.
"""

from __future__ import annotations

import codecs
import errno
import io
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from typing import Any, TextIO

FAULT, REFUSED, BROKEN_PIPE = 1, 2, 141
#: The longest line that refuses something: what was given may be a whole file.
LONGEST_LINE = 2000
#: How characters are written that a stream's encoding lacks; any other is escaped.
_PLAIN = {"…": "...", "µ": "u", "·": "-"}
_OF_OUTPUT = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF}
_HANDLER = "prestage.plain"


def prepare() -> None:
    """Make the standard streams take any text, also if they are closed, and the signals to end clean up first."""
    codecs.register_error(_HANDLER, _plainly)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # closed: otherwise the next file that is opened would get its number, and all that is printed
            os.open(os.devnull, os.O_RDWR)
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("r" if name == "stdin" else "w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper) and name != "stdin":
            stream.reconfigure(errors=_HANDLER)
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):
            ending = getattr(signal, name, None)  # a system may have no SIGHUP
            if ending is not None and signal.getsignal(ending) is signal.SIG_DFL:
                signal.signal(ending, _end)


def refuse(message: str) -> int:
    """Say in one line on standard error why what was given cannot be used; return the status."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in " ".join(message.split()))
    if len(line) > LONGEST_LINE:
        line = f"{line[: LONGEST_LINE // 2]} … {line[-LONGEST_LINE // 2 :]}"
    return _say(f"prestage: {line}\n", REFUSED)


def report_fault() -> int:
    """Show where the exception under way arose and ask for a report; return the status."""
    from .. import plugins

    return _say(f"{traceback.format_exc()}prestage: this is {plugins.whose_fault()}\n", FAULT)


def flushed(status: int) -> int:
    """Write out what was printed and return the status: another one if that fails."""
    error = _flush(sys.stdout)
    if isinstance(error, BrokenPipeError):
        status = BROKEN_PIPE
    elif error is not None:
        status = refuse(os_words(error))
    _flush(sys.stderr)
    return status


def os_words(error: OSError) -> str:
    """Returns what the operating system says, and of what: errors of full disks name their file, but for the output."""
    if error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return f"standard output: {error.strerror}" if error.errno in _OF_OUTPUT else str(error)


def print_bytes(content: bytes) -> None:
    """Write bytes to standard output, whatever its encoding."""
    sys.stdout.flush()
    binary: Any = getattr(sys.stdout, "buffer", None)
    if binary is None:  # a stream of text alone, which a program may have put there
        sys.stdout.write(content.decode())
    else:
        binary.write(content)


def _say(text: str, status: int) -> int:
    try:
        sys.stderr.write(text)
    except OSError:  # nobody reads it
        _flush(sys.stderr)
    return status


def _flush(stream: TextIO) -> OSError | None:
    """Flush a stream; if that fails, drop what it holds, which would fail again at the end, and return the error."""
    try:
        stream.flush()
    except OSError as error:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        return error
    return None


def _end(number: int, _: object) -> None:
    raise SystemExit(128 + number)


def _plainly(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    character = error.object[error.start]
    if character in _PLAIN:
        return _PLAIN[character], error.start + 1
    one = UnicodeEncodeError(error.encoding, error.object, error.start, error.start + 1, error.reason)
    return codecs.backslashreplace_errors(one)
