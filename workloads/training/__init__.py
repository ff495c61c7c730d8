"""How the shipped traces were made: text, two small Mixture-of-Experts language models, their training and recording.

Run it as modules, in this order (docs/our-models.md has the commands and what came out):

    python -m prestage.workloads.training.corpus   unpacked packages -> tokens
    python -m prestage.workloads.training.train    tokens -> trained model -> recorded traces and a report
    python -m prestage.workloads.training.report   recorded traces -> the parts that are shipped, the tables of the docs

Nothing here is needed to simulate. Only `moe_lm`, `record` and `train` import torch, and nobody else imports them.
"""

import sys
from collections.abc import Callable

from ...errors import InputError


def run_command(main: Callable[[], None]) -> None:
    """Run a module's command; bad input is one line and exit status 2, as with `prestage`."""
    try:
        main()
    except (InputError, OSError) as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)
