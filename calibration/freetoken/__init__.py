"""FreeToken itself: whole runs of it on random weights, and what they took."""
