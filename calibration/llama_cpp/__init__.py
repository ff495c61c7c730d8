"""llama.cpp itself: built from source, run on files of random weights, and what it took."""
