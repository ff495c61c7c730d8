"""`python -m prestage`."""

from .cli import main

main()
