"""Results as tables for the terminal, a file for each kind of result."""
