"""The rows of the benchmark of batches: one per engine, budget and batch size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from h2o_cli.bench.rows import Row

_FIRST = 2  # steps that are not like the others


class BatchRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """One run: the prompts of n_streams texts together, then steps of one token of each.

    Lengths in tokens. cut_gen_len: the tokens that were really made, where the figures of gen_len are projected (0:
    all were). Rates are of all streams together; decode counts from the second token on. latency_ms: of a step, median.
    breakdown: ms of a step, function by function. predicted: by `h2o plan --batch`, before the run. None: not known.
    """

    suite: Literal["batch"]
    file_bytes: int
    budget: str
    budget_bytes: int
    read_bytes_per_s: int
    engine: str
    n_streams: int
    prompt_len: int
    gen_len: int
    cut_gen_len: int = 0
    status: str = ""
    note: str = ""
    prefill_s: float | None = None
    prefill_tokens_per_s: float | None = None
    decode_s: float | None = None
    decode_tokens_per_s: float | None = None
    total_s: float | None = None
    total_tokens_per_s: float | None = None
    predicted_decode_tokens_per_s: float | None = None
    latency_ms: float | None = None
    breakdown: dict[str, float] | None = None
    bytes_per_step: float | None = None
    peak_bytes: int = 0
    wall_s: float = 0.0
    ledger: dict[str, int] | None = None

    @property
    def projected(self) -> bool:
        """Whether fewer tokens were made than the figures are for."""
        return bool(self.cut_gen_len)


class Figures(msgspec.Struct, frozen=True):
    """What a side prints. Seconds; those of wait, compute and choose are of all steps together."""

    prefill_s: float
    steps_s: tuple[float, ...]
    bytes_read_per_step: float
    wait_s: float | None = None
    compute_s: float | None = None
    choose_s: float | None = None
    ledger: dict[str, int] | None = None


def projected_s(steps_s: Sequence[float], n_steps: int) -> float:
    """Seconds of n_steps steps, the first of which took steps_s: those that follow take the mean of the later ones."""
    if n_steps <= len(steps_s):
        return sum(steps_s[:n_steps])
    later = steps_s[_FIRST:] or steps_s
    return sum(steps_s) + (n_steps - len(steps_s)) * sum(later) / len(later)


def with_figures(row: BatchRow, found: Figures) -> BatchRow:
    """The row with what was measured."""
    n, steps = len(found.steps_s), sorted(found.steps_s)
    decode_s = projected_s(found.steps_s, row.gen_len - 1)
    total_s = found.prefill_s + decode_s
    functions = {"wait": found.wait_s, "compute": found.compute_s, "choose": found.choose_s}
    breakdown = {name: 1000 * seconds / n for name, seconds in functions.items() if seconds is not None}
    return msgspec.structs.replace(
        row,
        prefill_s=found.prefill_s,
        prefill_tokens_per_s=row.n_streams * row.prompt_len / found.prefill_s,
        decode_s=decode_s,
        decode_tokens_per_s=row.n_streams * (row.gen_len - 1) / decode_s,
        total_s=total_s,
        total_tokens_per_s=row.n_streams * row.gen_len / total_s,
        latency_ms=1000 * (steps[n // 2] + steps[(n - 1) // 2]) / 2,
        breakdown=breakdown or None,
        bytes_per_step=found.bytes_read_per_step,
        ledger=found.ledger,
    )
