"""What trained predictors get and give: windows of the last ids, and classes that are turned back into ids."""

from __future__ import annotations

from collections.abc import Sequence


def windows(ids: Sequence[int], size: int, begin: int, end: int) -> tuple[list[list[int]], list[int]]:
    """The `size` ids before each swap-in from begin to end (without end), oldest first, and that swap-in's id.

    Swap-ins with fewer before them are left out.
    """
    labels = range(max(begin, size), end)
    return [list(ids[i - size : i]) for i in labels], [ids[i] for i in labels]


def nearest_id(residue: int, last: int, mod: int) -> int:
    """The id with this residue that is nearest to the last one and not negative; of two, the smaller."""
    below = last - (last - residue) % mod
    above = below + mod
    return below if below >= 0 and last - below <= above - last else above
