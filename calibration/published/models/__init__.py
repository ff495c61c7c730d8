"""Models that published runs used and nothing else here does."""
