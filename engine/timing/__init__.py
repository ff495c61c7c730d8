"""Where time passes: the commands of a run, interpreted by SimPy processes."""
