"""How often a method is right, how sure that is, and whether it is better than another on the same swap-ins."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

Z = 1.959964  # standard deviations to each side that hold 95 % of a normal distribution


class Interval(NamedTuple):
    """Where a share lies with 95 % confidence, from 0 to 1."""

    low: float
    high: float


def wilson(hits: int, n: int, z: float = Z) -> Interval:
    """The interval of a share of which hits of n were seen (Wilson, 1927); all of 0 to 1 where n is 0."""
    if not n:
        return Interval(0.0, 1.0)
    share, square = hits / n, z * z / n
    middle = (share + square / 2) / (1 + square)
    half = z * math.sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    return Interval(max(0.0, middle - half) if hits else 0.0, min(1.0, middle + half) if hits < n else 1.0)


def won_and_lost(right: Sequence[bool], other: Sequence[bool]) -> tuple[int, int]:
    """How often only this method was right, and how often only the other one was, on the same swap-ins."""
    return (
        sum(a and not b for a, b in zip(right, other, strict=True)),
        sum(b and not a for a, b in zip(right, other, strict=True)),
    )


def verdict(won: int, lost: int) -> str:
    """better, worse or not told apart: where just one of two was right, is it this one in more than half the cases?

    The exact 95 % interval of that share (Clopper and Pearson, 1934) has to leave out one half: with as few cases as
    there may be here Wilson's would be too short. It does where the smaller count has at most 2.5 % in fair tosses.
    """
    n, fewer = won + lost, min(won, lost)
    if sum(math.comb(n, k) for k in range(fewer + 1)) * 40 > 2**n:
        return "not told apart"
    return "better" if won > lost else "worse"
