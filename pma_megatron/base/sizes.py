"""Sizes in bytes, as typed and as shown."""

from __future__ import annotations

import re

from pma_megatron.errors import UsageError

_UNITS_BYTES = {
    "": 1,
    **{f"{letter}b": 1000 ** (n + 1) for n, letter in enumerate("kmgt")},
    **{f"{letter}ib": 1024 ** (n + 1) for n, letter in enumerate("kmgt")},
}
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*((?:[kmgt]i?b)?)", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes in a size such as `5GB`, `500MiB`, `1000`.

    Raises:
        UsageError: not a size, or none at all.

    >>> parse_size("5GB"), parse_size("1.5 KiB")
    (5000000000, 1536)
    """
    match = _SIZE.fullmatch(text.strip())
    nbytes = round(float(match[1]) * _UNITS_BYTES[match[2].lower()]) if match else 0
    if nbytes <= 0:
        raise UsageError(f"{text!r} is not a size: give bytes, or 500MB, 5GB, 2GiB")
    return nbytes


def sized(nbytes: float) -> str:
    """A size as messages show it.

    >>> sized(100), sized(1536), sized(3 << 40)
    ('100 B', '1.50 KiB', '3.00 TiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} {unit}" if unit == "B" else f"{nbytes:.2f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.2f} TiB"
