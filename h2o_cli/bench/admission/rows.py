"""The rows of the benchmark of admission: one per model and way to admit, with all of its runs."""

from __future__ import annotations

import csv
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import msgspec

from h2o_cli.bench.rows import Row

Suite = Literal[
    "admission sweep",
    "admission fresh",
    "admission known",
    "admission bandit",
    "admission check",
    "admission engine",
    "admission twice",
]
SWEEP: Final = "admission sweep"
FRESH: Final = "admission fresh"
KNOWN: Final = "admission known"
BANDIT: Final = "admission bandit"
CHECK: Final = "admission check"
ENGINE: Final = "admission engine"
TWICE: Final = "admission twice"
# Student's t, two sides, 95 %: by degrees of freedom, 1 and more
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
_T_OF_MANY = 2.13


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """What answering the texts of a seed took; swaps and blocks are those of the whole run. swap_s: of its seconds."""

    seed: int
    seconds: float
    swap_s: float
    n_passes: int
    n_tokens: int
    n_prompt_tokens: int
    n_refused: int
    swaps_in: int
    swaps_out: int
    blocks_in: int
    blocks_out: int

    @property
    def out_per_s(self) -> float:
        """Chosen tokens per second."""
        return self.n_tokens / self.seconds

    @property
    def in_per_s(self) -> float:
        """Tokens of prompts per second."""
        return self.n_prompt_tokens / self.seconds


class AdmissionRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """Runs of one way to admit. fast: blocks of the pool. runs: simulated, a seed each.

    Of a check, runs are the engine's, all with the same texts; `simulated` are a simulator's that was fitted to the
    same round. "admission engine" and "admission twice" (with twice the pool) are the engine's, a seed each. With
    "admission known" every answer's length is known beforehand. costs: seconds (planner/pool_simulator.py). Of a
    bandit, `policy` is what it chose among, and n_plays how many simulated runs it took.
    """

    suite: Suite
    admission: str
    policy: str
    value: float
    fast: int
    slow: int
    batch_size: int
    n_texts: int
    runs: tuple[Run, ...] = ()
    simulated: tuple[Run, ...] = ()
    n_plays: int = 0
    costs: dict[str, float] | None = None


class Mean(NamedTuple):
    """A mean, and half of its interval (95 %, Student's t); infinite for one value."""

    value: float
    half: float

    def text(self, digits: int = 1) -> str:
        """With its interval."""
        return f"{self.value:.{digits}f} ± {self.half:.{digits}f}"

    @property
    def is_apart(self) -> bool:
        """Whether the interval leaves 0 out."""
        return abs(self.value) > self.half


def mean(values: Sequence[float]) -> Mean:
    """The mean of one value or more."""
    n = len(values)
    if n == 1:
        return Mean(values[0], math.inf)
    t = _T[n - 2] if n - 2 < len(_T) else _T_OF_MANY
    return Mean(statistics.fmean(values), t * statistics.stdev(values) / math.sqrt(n))


def mean_of(row: AdmissionRow, quantity: Callable[[Run], float]) -> Mean:
    """The mean over the runs of a row."""
    return mean([quantity(run) for run in row.runs])


def gain(row: AdmissionRow, other: AdmissionRow) -> Mean:
    """How much faster than another row, in percent: the mean over the seeds, each compared with itself."""
    pairs = zip(row.runs, other.runs, strict=True)
    return mean([100 * (run.out_per_s / base.out_per_s - 1) for run, base in pairs])


def off_by(check: AdmissionRow) -> Mean:
    """How much faster the simulator is than the engine, in percent: the mean over the rounds, each with itself."""
    pairs = zip(check.simulated, check.runs, strict=True)
    return mean([100 * (simulated.out_per_s / run.out_per_s - 1) for simulated, run in pairs])


def write_csv(rows: Sequence[AdmissionRow], path: Path) -> None:
    """A line for each run, of the engine too."""
    counters = ("blk_in_count", "blk_out_count", "swap_in_count", "swap_out_count", "in_spd", "out_spd")
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("suite", "model", "admission", "policy", "factor", "seed", *counters, "seconds", "passes"))
        for row in rows:
            for run in row.runs:
                swapped = run.blocks_in, run.blocks_out, run.swaps_in, run.swaps_out
                speeds = round(run.in_per_s, 3), round(run.out_per_s, 3), round(run.seconds, 6), run.n_passes
                what = row.suite, row.model, row.admission, row.policy, row.value, run.seed
                writer.writerow((*what, *swapped, *speeds))
