"""Numbers of bytes as people write and read them."""

from __future__ import annotations

import math
import re

from .errors import UsageError

UNITS = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip


def parse_size(value: str | int | float, option: str) -> int:
    """Bytes of ``24GB`` or ``24G`` (10^9 each), ``24GiB`` (2^30 each), ``500 MB`` or a number of bytes.

    Raises:
        UsageError: no size, or one that cannot be meant.
    """
    count, has_unit = 0.0, False
    if isinstance(value, str):
        found = re.fullmatch(r"\s*(-?[0-9]*\.?[0-9]+)\s*(B|[KMGT](?:I?B)?)\s*", value.upper())
        if found:
            count, has_unit = float(found[1]) * UNITS[found[2].removesuffix("B") + "B"], True
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        count = float(value)
    if 10**6 <= count < 1e15:
        return int(count)
    if has_unit:
        raise UsageError(f"{option} {value}: it has to be at least 1MB, and less than 1000TB.")
    raise UsageError(f"{option} {value} is no size; write it with its unit, as in 24GB.")  # 24 for 24 GB


def size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.1f} {unit}"
    return f"{count} B"


def rounded_up(count: int) -> str:
    """Bytes in GB, rounded up to three digits, so that as much is enough."""
    digit = _third_digit(count)
    return _in_gb(-(-count // digit) * digit)


def rounded_down(count: int) -> str:
    """Bytes in GB, rounded down to three digits: what is too little never looks like what would be enough."""
    digit = _third_digit(count)
    return _in_gb(count // digit * digit)


def as_option(count: int) -> str:
    """As much, rounded up, as one writes it behind an option."""
    return rounded_up(count).replace(" ", "")


def _third_digit(count: int) -> int:
    return 10 ** max(0, int(math.log10(max(count, 1))) - 2)


def _in_gb(count: int) -> str:
    return f"{count / 1e9:.6g} GB"  # three digits are left, and a thousand GB are no 1e+03
