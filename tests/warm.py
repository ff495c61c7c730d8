"""`prestage ARGUMENTS…` of a shell, each command in a process of its own that has everything imported already.

A server imports the package once and forks a process for each command: arguments, folder, environment and standard
streams are the shell's, and so is the status. What a command pays in a process begun anew, for imports and for loading
machine code, is most of what a command of a page takes. Commands that begin anew are tested by test_readme.py,
test_read_only.py, test_terminal.py and test_cli.py.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import os
import pkgutil
import select
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path
from typing import NoReturn

HERE = Path(__file__)
#: What the shell runs: it hands everything over and ends as the command does. Isolated and without site, for speed.
_CLIENT = """
import os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    variables = [f"{name}={value}" for name, value in os.environ.items()]
    said = "\\0".join([os.getcwd(), str(len(sys.argv) - 2), *sys.argv[2:], *variables])
    socket.send_fds(server, [b"%12d" % len(os.fsencode(said))], [0, 1, 2])
    server.sendall(os.fsencode(said))
    status = server.recv(8)
sys.exit(int(status) if status else "the process of the command was lost")
"""
_SERVER = "import sys; sys.path[0] = sys.argv[1]; import warm; warm.serve(sys.argv[2])"


@cache
def shell_function() -> str:
    """Returns the lines that make `warm_prestage ARGUMENTS…` a command of bash; starts the server that it asks."""
    folder = tempfile.TemporaryDirectory(prefix="warm-")
    address = Path(folder.name) / "s"
    command = [sys.executable, "-c", _SERVER, str(HERE.parent), str(address)]
    environment = {**os.environ, "MPLBACKEND": "Agg"}
    server = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert server.stdin is not None and server.stdout is not None

    def end() -> None:
        with server, folder:  # its standard input ends, and so does it
            pass

    atexit.register(end)
    assert server.stdout.readline() == b"ready\n"
    client = Path(folder.name) / "client.py"
    client.write_text(_CLIENT, encoding="utf-8")
    return f'warm_prestage() {{ {sys.executable!r} -I -S {str(client)!r} {str(address)!r} "$@"; }}\n'


def serve(address: str) -> None:
    """Import the package, then fork a process for whoever connects, until standard input ends."""
    import prestage
    from prestage.engine.timing.ready import make_ready

    make_ready()
    names = [module.name for module in pkgutil.walk_packages(prestage.__path__, "prestage.")]
    for name in [*names, "matplotlib.pyplot", "torch"]:
        if not name.startswith(("prestage.tests", "prestage.__main__")):
            with contextlib.suppress(ImportError):  # of an extra that is not here
                importlib.import_module(name)
    gc.freeze()
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(address)
    listening.listen()
    os.write(1, b"ready\n")
    while listening.fileno() in select.select([listening.fileno(), 0], [], [])[0]:
        with listening.accept()[0] as asked:
            if not os.fork():
                _answer(asked)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _answer(asked: socket.socket) -> NoReturn:
    """Run a command in a process of its own, and say the status with which it ended."""
    head, streams, _, _ = socket.recv_fds(asked, 12, 3)
    with asked.makefile("rb") as rest:
        folder, count, *words = os.fsdecode(rest.read(int(head))).split("\0")
    command = os.fork()
    if not command:
        asked.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        variables = dict(word.split("=", 1) for word in words[int(count) :])
        os._exit(_run(words[: int(count)], folder, variables))
    for stream in streams:
        os.close(stream)
    asked.sendall(b"%d" % os.waitstatus_to_exitcode(os.waitpid(command, 0)[1]))
    os._exit(0)


def _run(arguments: list[str], folder: str, variables: dict[str, str]) -> int:
    """Returns the status of a command; all that a process does at its end is done, but for freeing what it holds."""
    sys.stdin, sys.stdout = open(0, closefd=False), open(1, "w", closefd=False)  # noqa: SIM115 - as long as it lives
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace", closefd=False)  # noqa: SIM115
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    sys.argv, sys.path[0] = ["prestage", *arguments], folder
    from prestage.cli import main

    status: object = 0
    try:
        main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    return status if isinstance(status, int) else 1
