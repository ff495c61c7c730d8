"""Dtypes: the bits of a weight in each, and the other names that people write for them.

A dtype may stand in a model's file, in a scenario and in a profile; all read it here, so that a name that is not known
is refused everywhere, and one that is known by several is the same everywhere.
"""

from __future__ import annotations

from difflib import get_close_matches
from fractions import Fraction
from functools import cache

from .errors import InputError

#: Bits per weight, exact. mxfp4 holds 4 bits and shares one 8-bit scale among 32 weights (OCP Microscaling Formats
#: 1.0, 2023). The others hold the weights alone: DeepSeek-V3's float8 scales, one float32 per 128 x 128 block, would
#: add 0.02 %. q4_k and q6_k are llama.cpp's: 144 and 210 bytes for 256 weights, scales included (ggml-common.h).
DTYPES: dict[str, Fraction] = {
    "float32": Fraction(32),
    "bfloat16": Fraction(16),
    "float16": Fraction(16),
    "float8": Fraction(8),
    "int8": Fraction(8),
    "mxfp4": Fraction(17, 4),
    "q6_k": Fraction(105, 16),
    "q4_k": Fraction(9, 2),
    "int4": Fraction(4),
}
#: What PyTorch, safetensors, vLLM and llama.cpp call the same, in lower case.
ALIASES: dict[str, str] = {
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "bf16": "bfloat16",
    "fp16": "float16",
    "f16": "float16",
    "half": "float16",
    "fp8": "float8",
    "f8_e4m3": "float8",
    "f8_e5m2": "float8",
    "fp8_e4m3": "float8",
    "fp8_e5m2": "float8",
    "float8_e4m3": "float8",
    "float8_e4m3fn": "float8",
    "float8_e5m2": "float8",
    "i8": "int8",
    "i4": "int4",
}


@cache
def dtype_of(name: str) -> str:
    """Return the dtype that a name stands for, in any case and with or without `torch.` before it.

    Raises InputError, which says what there is and what was probably meant.
    """
    plain = name.strip().lower().removeprefix("torch.")
    dtype = ALIASES.get(plain, plain)
    if dtype not in DTYPES:
        near = get_close_matches(plain, [*DTYPES, *ALIASES], 1)
        hint = f" (did you mean {ALIASES.get(near[0], near[0])!r}?)" if near else ""
        raise InputError(f"choose one of {', '.join(DTYPES)}{hint}")
    return dtype
