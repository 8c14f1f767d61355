"""One row per measured figure of `h2o bench kv`, as JSON lines."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

from profiler.model_profile import DeviceInfo
from runtime.errors import UsageError

Suite = Literal["accuracy", "divergence", "data", "speed"]


class KvRow(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A method on a task (accuracy, data), on held-out text (divergence), or at a context (speed).

    keep: part of the prompt's rows in sparse layers. kv_share: part of all keys and values of the prompt that a decode
    pass attends to. right of n answers; `lost` answers were right with full attention and are not here, `gained` ones
    the other way round. score: mean over n of a task's own measure, 0 to 1. kl, nll: nats per token over n tokens.
    ms_per_token: median of a decode pass; faster: than full attention, in turns in one process,
    with the same token again and again, and both with one thread instead of `threads`; kv_bytes: keys and
    values in memory, anonymous_bytes: the process's memory after decoding, read_bytes: from a disk store per token.
    """

    suite: Suite
    model: str
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
    machine: DeviceInfo | None = None
    versions: dict[str, str] = {}
    at: str = ""


def append_row(path: Path, row: KvRow) -> None:
    """Add a row to a file of JSON lines, at once."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(row) + b"\n")
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[KvRow]:
    """The rows of a file. Raises UsageError on anything else."""
    try:
        lines = path.read_bytes().splitlines()
        return [msgspec.json.decode(line, type=KvRow) for line in lines if line.strip()]
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", "give the rows.jsonl of `h2o bench kv`") from None
    except msgspec.DecodeError as error:
        raise UsageError(f"{path} holds something else than rows: {error}", "make it with `h2o bench kv`") from None
