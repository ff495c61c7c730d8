"""The command line, a file for each family of commands.

Each command imports what it needs when it runs, so that `--help` is quick. Whatever goes wrong with the input ends in
one line on standard error and exit status 2; `--json` prints one JSON object on standard output and nothing else there.
"""

from .entry import app as app
from .entry import main as main
