"""Which CUDA GPUs there are, or why there is none: for `prestage doctor` and the like."""

from __future__ import annotations

from typing import Any


def found_cuda() -> dict[str, Any]:
    """Returns the CUDA GPUs that PyTorch sees, and its CUDA version; why not, where it sees none."""
    try:
        import torch
    except ImportError:
        return {"gpus": [], "version": None, "why": "torch is not installed"}
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = "this torch is built without CUDA" if built is None else "no GPU, or no driver for it"
        return {"gpus": [], "version": built, "why": why}
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {"gpus": names, "version": torch.version.cuda, "why": None}
