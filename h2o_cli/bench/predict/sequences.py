"""Which sequences were swapped in, in that order: from a trace of `h2o batch` or a table of the source's form."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.answer.pool import ALLOCATE, SWAP_IN, SWAP_OUT
from runtime.answer.pool_trace import check, read_trace
from runtime.errors import H2OError, UsageError

FEWEST = 16  # swap-ins: what fewer say is nothing
_COLUMN = "sequence_id"


@dataclass(frozen=True)
class Waiting:
    """Who was swapped out at a moment: in the order of leaving, and who of them had arrived first."""

    sequences: tuple[int, ...] = ()
    first_arrived: int | None = None


@dataclass(frozen=True)
class SwapIns:
    """The ids of all swap-ins in order. Where a trace tells, for each of them who waited.

    before: just after the swap-in before it (the first: at the beginning). at: just before it, so it is one of them.
    """

    ids: tuple[int, ...]
    before: tuple[Waiting, ...] = ()
    at: tuple[Waiting, ...] = ()


def first_of_test(n: int) -> int:
    """Where the last quarter of n swap-ins begins: the test. All before it may be learnt from."""
    return n - n // 4


def from_trace(lines: Iterable[Mapping[str, Any]]) -> SwapIns:
    """The swap-ins of a trace that has been checked."""
    arrived: dict[int, int] = {}
    out: dict[int, None] = {}
    ids: list[int] = []
    before, at = [Waiting()], []

    def waiting() -> Waiting:
        return Waiting(tuple(out), min(out, key=lambda sequence: arrived[sequence], default=None))

    for line in lines:
        kind, sequence = line["event"], line.get("sequence", -1)
        if kind == ALLOCATE:
            arrived[sequence] = len(arrived)
        elif kind == SWAP_OUT:
            out[sequence] = None
        elif kind == SWAP_IN:
            at.append(waiting())
            ids.append(sequence)
            del out[sequence]
            before.append(waiting())
        else:
            out.pop(sequence, None)
    return SwapIns(tuple(ids), tuple(before[:-1]), tuple(at))


def from_table(lines: Iterable[str]) -> SwapIns:
    """The swap-ins of a CSV table: its column sequence_id, or the first one where nothing is named so.

    Raises ValueError where that holds something else than numbers from 0 on.
    """
    rows = [row for row in csv.reader(lines) if row]
    column = rows[0].index(_COLUMN) if rows and _COLUMN in rows[0] else 0
    if rows and not rows[0][column].strip().lstrip("-").isdecimal():
        rows = rows[1:]
    ids = tuple(int(row[column]) if column < len(row) else -1 for row in rows)
    if any(number < 0 for number in ids):
        raise ValueError("a row without a number from 0 on")
    return SwapIns(ids)


def read_swap_ins(path: Path) -> SwapIns:
    """The swap-ins of a file of either form. Raises H2OError, also where there are too few of them."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise H2OError(f"{path} cannot be read: {reason}", "give another file") from None
    if lines and lines[0].lstrip().startswith("{"):
        trace = list(read_trace(lines))
        check(trace, whole=False)
        found = from_trace(trace)
    else:
        try:
            found = from_table(lines)
        except (ValueError, csv.Error):
            raise H2OError(
                f"{path} is no list of swap-ins", "give a trace of `h2o batch --trace`, or a pure_sequence.csv"
            ) from None
    if len(found.ids) < FEWEST:
        raise UsageError(f"{path} has {len(found.ids)} swap-ins, fewer than {FEWEST}", "trace a batch under pressure")
    return found
