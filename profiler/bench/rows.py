"""One row per run of the benchmark, as JSON lines."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from profiler.model_profile import DeviceInfo
from runtime.errors import UsageError

Suite = Literal["budgets", "resident", "first token"]


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run of one engine. Times in s or ms as named; None: not known, or the run gave no such figure.

    budget_bytes 0: no memory limit. limit_ms_per_token and the yield are for the bytes this run streamed,
    predicted_ms_per_token is the planner's, made before the run. tokens_hash is of all tokens of the answer.
    """

    suite: Suite
    model: str
    file_bytes: int
    budget: str
    budget_bytes: int
    read_bytes_per_s: int
    engine: str
    repeat: int
    status: str
    note: str = ""
    n_prompt_tokens: int = 0
    n_tokens: int = 0
    ttft_s: float | None = None
    ms_per_token: float | None = None
    prefill_tokens_per_s: float | None = None
    bytes_per_token: float | None = None
    disk_wait_ms_per_token: float | None = None
    peak_bytes: int = 0
    bytes_read: int = 0
    wall_s: float = 0.0
    tokens_hash: str = ""
    predicted_ms_per_token: float | None = None
    limit_ms_per_token: float | None = None
    yield_: float | None = msgspec.field(default=None, name="yield")
    first_token_limit_s: float | None = None
    plan: dict[str, Any] | None = None
    ledger: dict[str, int] | None = None
    machine: DeviceInfo | None = None
    versions: dict[str, str] = {}
    command: tuple[str, ...] = ()
    at: str = ""


def append_row(path: Path, row: Row) -> None:
    """Add a row to a file of JSON lines, at once."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file. Raises UsageError on anything else."""
    try:
        lines = path.read_bytes().splitlines()
        return [msgspec.json.decode(line, type=Row) for line in lines if line.strip()]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "give the rows.jsonl of a benchmark") from None
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} holds something else than rows: {error}", "make it again with `h2o bench`") from None


class Median(msgspec.Struct, frozen=True):
    """The median of a quantity over its repeats, with the least and the most."""

    value: float
    least: float
    most: float
    n: int


def median_of(rows: Iterable[Row], quantity: Callable[[Row], float | None]) -> Median | None:
    """The median over the runs that gave the figure; None where none did."""
    values = [value for value in map(quantity, rows) if value is not None]
    if not values:
        return None
    return Median(statistics.median(values), min(values), max(values), len(values))


def distinct(values: Iterable[str]) -> list[str]:
    """Every value once, in order of appearance."""
    return list(dict.fromkeys(values))


def chosen(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """The rows whose fields have these values."""
    return [row for row in rows if all(getattr(row, key) == value for key, value in wanted.items())]


# --- one token -------------------------------------------------------------------------------------------------------


class Span(msgspec.Struct, frozen=True):
    """One layer (the head's number is n_layers) of the pass: seconds from its beginning, and the waits within."""

    layer: int
    begin_s: float
    end_s: float
    wait_s: float


class Read(msgspec.Struct, frozen=True):
    """One read request for a layer, in the seconds of the spans; it may have begun before the pass."""

    layer: int
    n_bytes: int
    begin_s: float
    end_s: float


class Timeline(msgspec.Struct, frozen=True):
    """The last decode pass of a short run. pass_s: how long it took."""

    model: str
    budget_bytes: int
    n_layers: int
    pass_s: float
    spans: tuple[Span, ...]
    reads: tuple[Read, ...]
