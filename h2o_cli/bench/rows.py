"""The rows of all benchmarks: JSON lines in a file, each with what was measured, how, where and when.

Every benchmark has a row class of its own that adds its figures to Row. Its suites are a Literal, so that the rows of
another benchmark are not taken for its own.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from h2o_cli.bench.commands import this_command
from h2o_cli.output import note, versions
from profiler.device import device_info
from profiler.model_profile import DeviceInfo
from runtime.errors import UsageError


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every row has. machine, versions: where it was measured, and with which programs.

    commands made this row, in order; bench is the user's command that started them all. at: UTC, ISO 8601.
    """

    suite: str
    model: str
    machine: DeviceInfo | None = None
    versions: dict[str, str] = {}
    commands: tuple[str, ...] = ()
    bench: str = ""
    at: str = ""


def circumstances(model: Path) -> dict[str, Any]:
    """The fields of a row that say where, with what and when it is measured; model: a file on the disk in use."""
    return {
        "machine": device_info(model),
        "versions": versions(),
        "bench": this_command(),
        "at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# --- files -----------------------------------------------------------------------------------------------------------

_Line = TypeVar("_Line", bound=msgspec.Struct)


def append_line(path: Path, line: msgspec.Struct) -> None:
    """Add a line to a file of JSON lines, at once. A torn line at its end stays a line of its own."""
    with path.open("a+b") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(msgspec.json.encode(line) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_lines(path: Path, kind: type[_Line], told: Callable[[str], None] = note) -> list[_Line]:
    """The lines of this kind in a file. Torn lines and lines of another kind are left out, and `told` says so.

    Raises UsageError where the file cannot be read, and where all of its lines would be left out.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "give the folder of a benchmark") from None
    found, wrong = [], []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                found.append(msgspec.json.decode(line, type=kind))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                wrong.append(f"line {number}: {error}")
    if wrong and not found:
        raise UsageError(f"{path} holds something else than results: {wrong[0]}", "make it again with `h2o bench`")
    if wrong:
        told(f"{len(wrong)} of {len(found) + len(wrong)} lines of {path} are left out, the first is {wrong[0]}")
    return found


# --- choosing --------------------------------------------------------------------------------------------------------

_Row = TypeVar("_Row", bound=Row)
_Value = TypeVar("_Value")


def chosen(rows: Iterable[_Row], **wanted: object) -> list[_Row]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


def distinct(values: Iterable[_Value]) -> list[_Value]:
    """Every value once, in order of appearance."""
    return list(dict.fromkeys(values))


class Median(msgspec.Struct, frozen=True):
    """The median of a quantity over its repeats, with the least and the most."""

    value: float
    least: float
    most: float
    n: int


def median_of(rows: Sequence[_Row], quantity: Callable[[_Row], float | None]) -> Median | None:
    """The median over the rows that have the figure; None where none has it."""
    values = [value for value in map(quantity, rows) if value is not None]
    if not values:
        return None
    return Median(statistics.median(values), min(values), max(values), len(values))
