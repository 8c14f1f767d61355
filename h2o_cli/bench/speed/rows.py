"""The rows of the speed benchmark: one per run, or per pair of engines in turns; and the timeline of one token."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from h2o_cli.bench.rows import Row, chosen, distinct, read_lines

Suite = Literal["budgets", "resident", "first token"]


class Rounds(msgspec.Struct, frozen=True):
    """Rounds of n_tokens in turns: median speeds, and how many times llama.cpp's speed h2o's is, pair by pair.

    ratio is the median over the pairs, quartiles are those of the ratios; pairs: seconds of (h2o, llama.cpp).
    """

    n_tokens: int
    h2o_tokens_per_s: float
    llama_cpp_tokens_per_s: float
    ratio: float
    quartiles: tuple[float, float]
    pairs: tuple[tuple[float, float], ...]


class InTurns(msgspec.Struct, frozen=True, kw_only=True):
    """h2o and llama.cpp with its own defaults in turns, everything in memory."""

    decode: Rounds
    prefill: Rounds
    llama_cpp_peak_bytes: int
    llama_cpp_tokens_hash: str


class SpeedRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """One run of one engine; where everything is resident, one of h2o and llama.cpp in turns (in_turns).

    Times are in s or ms as named; None: not known, or the run gave no such figure. budget_bytes 0: no memory limit.
    limit_ms_per_token and the yield are for the bytes that this run streamed; predicted_ms_per_token is the planner's,
    made before the run. tokens_hash is of all tokens of the answer. Its commands are the plan and the answer, or the
    two engines that took turns.
    """

    suite: Suite
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
    in_turns: InTurns | None = None
    plan: dict[str, Any] | None = None
    ledger: dict[str, int] | None = None


class Setup(NamedTuple):
    """What the rows of one table and one picture have in common: a model, and the disk's rate (0: as it is)."""

    model: str
    read_bytes_per_s: int

    @property
    def disk(self) -> str:
        """The disk, for people."""
        return f"disk at {self.read_bytes_per_s / 1e6:.0f} MB/s" if self.read_bytes_per_s else "disk at its own speed"

    @property
    def stem(self) -> str:
        """The beginning of a file name."""
        disk = f"{self.read_bytes_per_s / 1e6:.0f}MBps" if self.read_bytes_per_s else "unthrottled"
        return f"{self.model.replace('/', '-')}-{disk}"

    def of(self, rows: Sequence[SpeedRow]) -> list[SpeedRow]:
        """The rows of this setup."""
        return chosen(rows, model=self.model, read_bytes_per_s=self.read_bytes_per_s)


def setups(rows: Sequence[SpeedRow]) -> list[Setup]:
    """The setups of rows, in order of appearance."""
    return distinct(Setup(row.model, row.read_bytes_per_s) for row in rows)


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
    """The last decode pass of a short run. pass_s: how long it took; read_bytes_per_s 0: the disk as it is."""

    model: str
    budget_bytes: int
    n_layers: int
    pass_s: float
    spans: tuple[Span, ...]
    reads: tuple[Read, ...]
    read_bytes_per_s: int = 0


def read_timelines(path: Path) -> list[Timeline]:
    """The timelines in a file, the newest of each device; none where there is no file. Raises UsageError."""
    found = read_lines(path, Timeline) if path.exists() else []
    return list({(line.model, line.budget_bytes, line.read_bytes_per_s): line for line in found}.values())
