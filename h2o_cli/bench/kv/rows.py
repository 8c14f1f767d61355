"""The rows of `h2o bench kv`: one per measured figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from h2o_cli.bench.rows import Row

Suite = Literal["accuracy", "divergence", "data", "speed"]


class KvRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """A method on a task (accuracy, data), on held-out text (divergence), or at a context (speed).

    keep: part of the prompt's rows in sparse layers. kv_share: part of all keys and values of the prompt that a decode
    pass attends to. right of n answers; `lost` answers were right with full attention and are not here, `gained` ones
    the other way round. score: mean over n of a task's own measure, 0 to 1. kl, nll: nats per token over n tokens.
    ms_per_token: median of a decode pass. faster: how many times faster than full attention, in turns in one process;
    faster_again: with the same token again and again; both also with one thread instead of `threads`. kv_bytes: keys
    and values in memory; anonymous_bytes: the process's memory after decoding; read_bytes: from a disk store per token.
    """

    suite: Suite
    method: str
    label: str
    layers: tuple[int, ...] = ()
    wait: int = 0
    select: str = ""
    store: str = ""
    strategy: str = ""
    keep: float = 1.0
    kv_share: float = 1.0
    task: str = ""
    length: int = 0
    depth: float = 0.0
    n: int = 0
    right: int = 0
    lost: int | None = None
    gained: int | None = None
    score: float | None = None
    kl: float | None = None
    nll: float | None = None
    ms_per_token: float | None = None
    ms_least: float | None = None
    threads: int = 0
    faster: float | None = None
    faster_again: float | None = None
    faster_one_thread: float | None = None
    faster_again_one_thread: float | None = None
    prefill_s: float | None = None
    kv_bytes: int | None = None
    anonymous_bytes: int | None = None
    read_bytes: int | None = None
    seed: int = 0


def accuracy_of(rows: Sequence[KvRow]) -> float | None:
    """Right answers of all answers; None without any."""
    n = sum(row.n for row in rows)
    return sum(row.right for row in rows) / n if n else None


def share_of(rows: Sequence[KvRow]) -> float:
    """The part of all keys and values that is attended to, mean over the rows."""
    return sum(row.kv_share for row in rows) / len(rows)
