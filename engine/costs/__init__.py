"""What each command takes: machine, model and runtime, and how far that may be off."""
