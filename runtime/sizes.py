"""Sizes as people write them: bare numbers are MB (10^6 bytes), K, M and G are KB, MB and GB."""

from __future__ import annotations

import os
import re

from runtime.errors import UsageError

UNITS = {
    "": 10**6,
    "B": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
PAGE = max(4096, os.sysconf("SC_PAGE_SIZE"))  # of this system's memory, and at least what direct reads need
MB = 10**6
MIB = 2**20
MOST_BYTES = 2**60


def parse_size(text: str) -> int:
    """Bytes in "400", "1.5GB" or "512MiB". Raises UsageError on anything else, and on sizes that are not positive."""
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]*)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match.group(2).upper()) if match else None
    if match is None or unit is None:
        is_model = text.lower().endswith(".gguf")
        step = "the model is an argument: h2o run FILE.gguf" if is_model else "write a number of MB such as 400"
        raise UsageError(f"{text!r} is not a size of memory", f"{step} (-m is the memory: 400, 1.5GB, 512MiB)")
    size = float(match.group(1)) * unit
    if size > MOST_BYTES:
        raise UsageError(f"{text!r} is more than any computer has", "write a number of MB such as 400")
    n_bytes = int(size)
    if n_bytes <= 0:
        raise UsageError(f"{text!r} is not a positive size", "write a number of MB such as 400")
    return n_bytes


def format_size(n_bytes: float) -> str:
    """Bytes in decimal units, as -m reads them: "29.8 MB"."""
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if abs(n_bytes) >= size:
            return f"{n_bytes / size:.{2 if unit == 'GB' else 1}f} {unit}"
    return f"{n_bytes:.0f} B"


def page_down(n: int) -> int:
    """n rounded down to a whole page."""
    return n // PAGE * PAGE


def page_up(n: int) -> int:
    """n rounded up to a whole page."""
    return -(-n // PAGE) * PAGE
