"""The cache alone, without time: replays in Python and compiled, and miss-ratio curves."""
