"""Where a model's name leads: by the name itself, and by what is found in a folder."""

from __future__ import annotations

from pathlib import Path

#: What a model's folder keeps its shapes in.
CONFIG = "config.json"


def is_config(name: str) -> bool:
    """Whether a name is that of a JSON file, or of a folder with a config.json."""
    return name.endswith(".json") or (Path(name) / CONFIG).is_file()


def is_gguf(name: str) -> bool:
    """Whether a name is that of a GGUF file, or of a folder with some and without a config.json."""
    path = Path(name)
    return name.endswith(".gguf") or (path.is_dir() and not is_config(name) and any(path.glob("*.gguf")))
