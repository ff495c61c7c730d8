"""What is done on a CUDA device, and how it is timed."""
