"""Sizes as people write them."""

from __future__ import annotations

import re

_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,6})?)\s*([KMGT]i?)?B?", re.IGNORECASE)
_UNITS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}


def parse_size(text: str) -> int | None:
    """Bytes of `2GiB`, `2Gi`, `1.5 GB`, `4096`; None if it is no size."""
    size = _SIZE.fullmatch(text.strip())
    if size is None:
        return None
    number, unit = size.groups()
    return int(float(number) * _UNITS[unit.lower()]) if unit else int(float(number))
