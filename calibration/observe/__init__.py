"""From what a real runtime took to a runtime file: its logs read, a few costs fitted, each with its uncertainty."""
