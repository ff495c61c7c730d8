"""Hardware profiles, one JSON file each."""
