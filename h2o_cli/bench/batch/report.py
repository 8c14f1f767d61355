"""The report of the benchmark of batches: a table per budget, the log of all runs, and the summary for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from h2o_cli.bench.batch.plots import draw
from h2o_cli.bench.batch.rows import BatchRow
from h2o_cli.bench.report import commands, document, images, machines, started_by
from h2o_cli.bench.results import Kind
from h2o_cli.bench.rows import chosen, distinct
from h2o_cli.bench.speed.engines import H2O, LLAMA_CPP
from h2o_cli.bench.tables import NONE, markdown_table, millions, number
from h2o_cli.output import duration, table
from runtime.sizes import format_size

_METHOD = (
    "Memory limited to the budget (page cache included), caches cold. All prompts are computed first, then one token "
    "of every text in each step. **Decode** counts from the second token on. **Gain**: against one text at once in the "
    "same budget. **Predicted**: by `h2o plan --batch`, from a profile measured on the same disk. Figures with ~ are "
    "projected: fewer tokens were made (cut-gen-len), and those that follow take the mean of all but the first two."
)


def _breakdown(row: BatchRow) -> str:
    return " / ".join(number(value, 1) for value in row.breakdown.values()) if row.breakdown else NONE


_COLUMNS: tuple[tuple[str, Callable[[BatchRow], str]], ...] = (
    ("prompt-len", lambda row: str(row.prompt_len)),
    ("gen-len", lambda row: str(row.gen_len)),
    ("cut-gen-len", lambda row: str(row.cut_gen_len or NONE)),
    ("prefill, s", lambda row: number(row.prefill_s, 2)),
    ("tokens/s", lambda row: number(row.prefill_tokens_per_s, 1)),
    ("decode, s", lambda row: _about(row, row.decode_s, 2)),
    ("tokens/s", lambda row: _about(row, row.decode_tokens_per_s, 2)),
    ("total, s", lambda row: _about(row, row.total_s, 2)),
    ("tokens/s", lambda row: _about(row, row.total_tokens_per_s, 2)),
    ("step, ms", lambda row: number(row.latency_ms, 1)),
    ("wait / compute / choose, ms", _breakdown),
    ("read, MB/step", lambda row: millions(row.bytes_per_step, 1)),
    ("peak, MB", lambda row: millions(row.peak_bytes or None)),
)


def report(rows: Sequence[BatchRow], pictures: Sequence[str] = ()) -> str:
    """All of the report; names of pictures beside it."""
    parts = [machines(rows), _METHOD, started_by(rows)] if rows else ["No runs."]
    for model in distinct(row.model for row in rows):
        at = chosen(rows, model=model)
        parts += [f"## {model}, {format_size(at[0].file_bytes)}{_disk(at[0])}", markdown_table(table_rows(at), (0, 1))]
        parts += images(name for name in pictures if name.endswith(f"-{model.replace('/', '-')}.png"))
        parts += ["### All runs", _log(at), commands(at, _name)]
    return document("Batches", parts)


def table_rows(rows: Sequence[BatchRow]) -> list[list[str]]:
    """A line per budget, batch size and engine, the head first."""
    lines = [
        ["budget", "engine", "texts", "decode, tokens/s", "gain", f"x {LLAMA_CPP}", "predicted", "ms/token", "peak MB"]
    ]
    for budget, n_streams in distinct((row.budget_bytes, row.n_streams) for row in rows):
        at = chosen(rows, budget_bytes=budget, n_streams=n_streams)
        for row in sorted(at, key=lambda row: row.engine != H2O):
            one = chosen(rows, budget_bytes=budget, n_streams=1, engine=row.engine)
            speed = row.decode_tokens_per_s
            cells = [_about(row, speed, 2), _times(speed, one), NONE, number(row.predicted_decode_tokens_per_s, 2)]
            cells.append(number(row.latency_ms, 1))
            if row.engine == H2O:
                cells[2] = _times(speed, [other for other in at if other.engine != H2O], 2)
            if row.status != "ok":
                cells[0] = {"oom": "OOM"}.get(row.status, row.status)
            lines.append([_budget(row), row.engine, str(n_streams), *cells, millions(row.peak_bytes or None)])
    return lines


def told(row: BatchRow) -> str:
    """A finished run in one line."""
    if row.status != "ok":
        return f"{_name(row)}: {row.status} ({row.note})"
    speed = f"{number(row.decode_tokens_per_s, 2)} tokens/s"
    return f"{_name(row)}: {speed}{' (projected)' if row.projected else ''} ({duration(row.wall_s)})"


def _log(rows: Sequence[BatchRow]) -> str:
    lines = [["budget", "engine", "texts", *(name for name, _ in _COLUMNS)]]
    lines += [
        [_budget(row), row.engine, str(row.n_streams), *(cell(row) for _, cell in _COLUMNS)]
        for row in rows
        if row.status == "ok"
    ]
    return markdown_table(lines, (0, 1))


def _times(speed: float | None, others: Sequence[BatchRow], digits: int = 1) -> str:
    """How many times the speed of another row this is."""
    other = others[-1].decode_tokens_per_s if others else None
    return f"{speed / other:.{digits}f} x" if speed and other else NONE


def _about(row: BatchRow, value: float | None, digits: int) -> str:
    return ("~" if row.projected and value is not None else "") + number(value, digits)


def _budget(row: BatchRow) -> str:
    size = f"{row.budget_bytes / 1e6:.0f} MB"
    return size if row.budget in size else f"{row.budget} ({size})"


def _disk(row: BatchRow) -> str:
    return f", disk at {row.read_bytes_per_s / 1e6:.0f} MB/s" if row.read_bytes_per_s else ""


def _name(row: BatchRow) -> str:
    return f"{row.model}, {_budget(row)}, {row.n_streams} texts, {row.engine}"


def _summary(rows: Sequence[BatchRow]) -> str:
    return table(table_rows(rows), right=range(2, 9))


BATCH = Kind(BatchRow, report, _summary, told, draw, rows="batch.jsonl", report="batch.md")
