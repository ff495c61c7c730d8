"""From a scenario to inputs that can be run: loaded, and checked as a whole."""
