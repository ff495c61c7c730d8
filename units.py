"""Sizes and rates as people write them, '24GiB' and '55.3GB/s', beside the plain numbers that every key takes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction

from .errors import InputError

BYTES = {
    "B": 1,
    **{f"{prefix}iB": 2 ** (10 * power) for power, prefix in enumerate("KMGTP", 1)},
    **{f"{prefix}B": 10 ** (3 * power) for power, prefix in enumerate("KMGTP", 1)},
}
_BINARY = tuple(unit for unit in BYTES if "i" in unit)
RATES = {f"{unit}/s": factor for unit, factor in BYTES.items()}
FLOPS = {"FLOP/s": 1, **{f"{prefix}FLOP/s": 10 ** (3 * power) for power, prefix in enumerate("KMGTP", 1)}}
#: A number as people write it; no longer than any real one is.
NUMBER = r"[0-9]{1,24}(?:\.[0-9]{1,24})?"


def amount(text: str, units: Mapping[str, int]) -> Fraction | None:
    """Returns the number with one of these units that a text is, in the smallest; None if it is none."""
    match = re.fullmatch(rf"\s*({NUMBER})\s*({'|'.join(map(re.escape, units))})\s*", text)
    return None if match is None else Fraction(match[1]) * units[match[2]]


def whole_bytes(value: object) -> object:
    """Returns the bytes of '24GiB', rounded down, and of a float that is whole; what is no text or float as it is."""
    return _whole(value, BYTES, "a whole number of bytes, or as '24GiB'")


def whole_rate(value: object) -> object:
    """Returns the bytes a second of '55.3GB/s', as `whole_bytes` does."""
    return _whole(value, RATES, "a whole number of bytes a second, or as '55.3GB/s'")


def whole_flops(value: object) -> object:
    """Returns the operations a second of '756TFLOP/s', as `whole_bytes` does."""
    return _whole(value, FLOPS, "a whole number of operations a second, or as '756TFLOP/s'")


def rate_words(value: float, units: Mapping[str, int]) -> str:
    """Returns a rate in four digits and the greatest unit of thousands that it reaches: '4.2 TB/s', '790 TFLOP/s'."""
    reached = {unit: size for unit, size in units.items() if size <= max(value, 1) and "iB" not in unit}
    unit = max(reached, key=reached.__getitem__)
    return f"{value / units[unit]:.4g} {unit}"


def binary_unit(size_bytes: float) -> tuple[int, str]:
    """Returns the greatest binary unit that a number of bytes reaches, (2**20, 'MiB'); (1, 'B') below a KiB."""
    power = min((int(abs(size_bytes)).bit_length() - 1) // 10, len(_BINARY)) if abs(size_bytes) >= 1 else 0
    return 1024**power, _BINARY[power - 1] if power else "B"


def bytes_words(size_bytes: int) -> str:
    """Returns a number of bytes for a sentence: '12.62 MiB', '-3.05 GiB', '20 bytes'. Tables have `layout.size_of`."""
    unit_bytes, unit = binary_unit(size_bytes)
    if unit_bytes > 1:
        return f"{size_bytes / unit_bytes:,.2f} {unit}"
    return f"{size_bytes} byte" if abs(size_bytes) == 1 else f"{size_bytes:,} bytes"


def option_bytes(option: str, text: str) -> int:
    """Returns the bytes that an option of the command line gives; InputError names the option and the text."""
    try:
        found = whole_bytes(text)
    except InputError as error:
        raise InputError(f"{option} = {text!r}: {error}") from None
    assert isinstance(found, int)
    return found


def gb_per_s(value: object) -> object:
    """Returns the GB/s of '55.3GB/s'; what is no text as it is. Raises InputError for another text."""
    if not isinstance(value, str):
        return value
    found = amount(value, RATES)
    if found is None:
        raise InputError("write it as a number of GB/s, or as '55.3GB/s'")
    return float(found / 10**9)


def written_bytes(value: object) -> object:
    """Returns '1024B' for 1024: for keys whose bytes are kept as they were written. What is no whole number stays."""
    whole = whole_bytes(value) if isinstance(value, float) else value
    return f"{whole}B" if type(whole) is int and whole >= 0 else value


def _whole(value: object, units: Mapping[str, int], how: str) -> object:
    if isinstance(value, str):
        found = amount(value, {**units, "": 1})
        if found is None:
            raise InputError(f"write it as {how}")
        return int(found)
    return int(value) if isinstance(value, float) and value.is_integer() else value
