"""Dtypes: the bits of a weight in each, and the other names that people write for them.

A dtype may stand in a model's file, in a scenario and in a profile; all read it here, so that a name that is not known
is refused everywhere, and one that is known by several is the same everywhere. Besides the names of the tables there
are two forms: `int4_g128`, integers of 2, 3, 4 or 8 bits with a scale and a zero point a group of weights, and
`4.85bpw`, bits per weight where nothing else is known.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from fractions import Fraction
from functools import cache

from .errors import InputError

#: Bits per weight, exact. mxfp4 holds 4 bits and shares one 8-bit scale among 32 weights (OCP Microscaling Formats
#: 1.0, 2023), nvfp4 one among 16 (NVIDIA 2025; its one float32 a tensor is left out). The others hold the weights
#: alone: DeepSeek-V3's float8 scales, one float32 per 128 x 128 block, would add 0.02 %. q4_k and q6_k are
#: llama.cpp's: 144 and 210 bytes for 256 weights, scales included (ggml-common.h).
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


def _block(weights: int, size_bytes: int) -> Fraction:
    return Fraction(8 * size_bytes, weights)


#: More types, by their blocks of weights: those of GGUF (ggml-common.h) and, last, of its fork ik_llama.cpp, whose
#: scales a row are left out; nf4 is that of bitsandbytes, a float32 for 64 weights.
BLOCK_TYPES: dict[str, Fraction] = {
    "nvfp4": _block(16, 9),
    "mxfp8": _block(32, 33),
    "nf4": _block(64, 36),
    "q4_0": _block(32, 18),
    "q4_1": _block(32, 20),
    "q5_0": _block(32, 22),
    "q5_1": _block(32, 24),
    "q8_0": _block(32, 34),
    "q1_0": _block(128, 18),
    "q2_k": _block(256, 84),
    "q3_k": _block(256, 110),
    "q5_k": _block(256, 176),
    "q8_k": _block(256, 292),
    "iq1_s": _block(256, 50),
    "iq1_m": _block(256, 56),
    "iq2_xxs": _block(256, 66),
    "iq2_xs": _block(256, 74),
    "iq2_s": _block(256, 82),
    "iq3_xxs": _block(256, 98),
    "iq3_s": _block(256, 110),
    "iq4_nl": _block(32, 18),
    "iq4_xs": _block(256, 136),
    "tq1_0": _block(256, 54),
    "tq2_0": _block(256, 66),
    "iq2_ks": _block(256, 70),
    "iq2_k": _block(256, 76),
    "iq3_k": _block(256, 110),
    "iq4_ks": _block(256, 136),
    "iq4_k": _block(256, 144),
    "iq5_ks": _block(256, 168),
    "iq5_k": _block(256, 176),
    "iq6_k": _block(256, 212),
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
#: Bits, and the weights that share a scale of 16 bits and a zero point of as many bits as a weight: GPTQ and AWQ.
_GROUPED = re.compile(r"int(2|3|4|8)_g(16|32|64|128|256|512|1024)")
_PER_WEIGHT = re.compile(r"(\d{1,2}(?:\.\d{1,4})?) ?(?:bpw|bits?)")
_MOST_BITS = 64


@cache
def dtype_of(name: str) -> str:
    """Returns the dtype that a name stands for, in any case and with or without `torch.` before it.

    Raises InputError, which says what there is and what was probably meant.
    """
    plain = name.strip().lower().removeprefix("torch.")
    dtype = ALIASES.get(plain, plain)
    if dtype in DTYPES or dtype in BLOCK_TYPES or _GROUPED.fullmatch(dtype):
        return dtype
    if (match := _PER_WEIGHT.fullmatch(dtype)) and 0 < Fraction(match[1]) <= _MOST_BITS:
        return f"{float(match[1]):g}bpw"
    near = get_close_matches(plain, [*DTYPES, *BLOCK_TYPES, *ALIASES], 1)
    hint = f" (did you mean {ALIASES.get(near[0], near[0])!r}?)" if near else ""
    raise InputError(f"choose one of {', '.join(DTYPES)}, {', '.join(BLOCK_TYPES)}, int4_g128, 4.85bpw{hint}")


@cache
def bits_of(dtype: str) -> Fraction:
    """Returns the bits of a weight of a dtype, exact, its scales included. Raises InputError as `dtype_of` does."""
    dtype = dtype_of(dtype)
    if match := _GROUPED.fullmatch(dtype):
        bits, group = int(match[1]), int(match[2])
        return bits + Fraction(16 + bits, group)
    if match := _PER_WEIGHT.fullmatch(dtype):
        return Fraction(match[1])
    return DTYPES[dtype] if dtype in DTYPES else BLOCK_TYPES[dtype]
