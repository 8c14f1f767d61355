"""The report of `h2o bench kv`: Markdown tables from rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from h2o_cli.bench.kv.methods import HEAVY, OTHERS
from h2o_cli.bench.kv.rows import KvRow

Table = list[list[str]]


def report(rows: Sequence[KvRow], pictures: Sequence[str] = ()) -> str:
    """All of the report; pictures: names of files that lie beside it."""
    parts = ["# Filtered keys and values", *_conditions(rows)]
    for model in distinct(row.model for row in rows if row.suite != "speed"):
        of_model = [row for row in rows if row.model == model]
        parts.append(f"## {model}")
        parts += _accuracy(chosen(of_model, "accuracy"))
        parts += _divergence(chosen(of_model, "divergence"))
        parts += _data(chosen(of_model, "data"))
    speed = chosen(rows, "speed")
    if speed:
        parts += ["## Speed and memory", *_speed(speed)]
    if pictures:
        parts += ["## Pictures", *(f"![{name}]({name})" for name in pictures)]
    return "\n\n".join(parts) + "\n"


def distinct(values: Iterable[str]) -> list[str]:
    """Every value once, in order of appearance."""
    return list(dict.fromkeys(values))


def chosen(rows: Sequence[KvRow], suite: str) -> list[KvRow]:
    """The rows of a suite."""
    return [row for row in rows if row.suite == suite]


def markdown(rows: Table) -> str:
    """A table; the first row is its head, all columns but the first are right-aligned."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|---|" + "---:|" * (len(rows[0]) - 1))
    return "\n".join(lines)


def accuracy_of(rows: Iterable[KvRow]) -> float | None:
    """Right answers of all answers; None without any."""
    rows = list(rows)
    n = sum(row.n for row in rows)
    return sum(row.right for row in rows) / n if n else None


def _conditions(rows: Sequence[KvRow]) -> list[str]:
    first = rows[0]
    lines = ["Made by `h2o bench kv`; the rows are in rows.jsonl, the method in docs/kv-eval.md."]
    if first.machine:
        lines.append(f"Machine: {first.machine.cpu}, {first.machine.n_cores} cores.")
    if first.versions:
        lines.append(
            "Versions: " + ", ".join(f"{name} {v}" for name, v in first.versions.items() if v[0].isdigit()) + "."
        )
    own = next((row for row in rows if row.method == "omnikv"), None)
    if own:
        layers = ", ".join(map(str, own.layers))
        lines.append(
            f"Filter layers {layers}, wait {own.wait}, selector {own.select}. The percentage behind a method is the "
            "part of the prompt's rows that sparse layers attend to; KV is the part over all layers."
        )
    if any(row.method == OTHERS for row in rows):
        lines.append("Other filter layers were tried with the same wait and selector.")
    return [" ".join(lines)]


def _accuracy(rows: list[KvRow]) -> list[str]:
    if not rows:
        return []
    parts = ["### Right answers, %", _by_length(rows)]
    for task in distinct(row.task for row in rows):
        longest = max(row.length for row in rows if row.task == task)
        at = [row for row in rows if row.task == task and row.length == longest]
        depths = sorted({row.depth for row in at})
        table = [["method", *(f"depth {depth:.0%}" for depth in depths)]]
        for label in distinct(row.label for row in at):
            cells = [accuracy_of(r for r in at if r.label == label and r.depth == depth) for depth in depths]
            table.append([label, *(_percent(cell) for cell in cells)])
        parts += [f"By depth: {task}, {longest} tokens, {at[0].n} answers per cell of full attention", markdown(table)]
    return parts


def _by_length(rows: list[KvRow]) -> str:
    """A line per method, a column per task and length."""
    columns = [(task, length) for task in distinct(r.task for r in rows) for length in sorted({r.length for r in rows})]
    table = [["method", "KV", *(f"{task} {length}" for task, length in columns), "all", "lost", "gained"]]
    for label in distinct(row.label for row in rows):
        own = [row for row in rows if row.label == label]
        cells = [accuracy_of(r for r in own if (r.task, r.length) == column) for column in columns]
        share = sum(row.kv_share for row in own) / len(own)
        changes = [sum(row.lost or 0 for row in own), sum(row.gained or 0 for row in own)]
        counts = ["-", "-"] if all(row.lost is None for row in own) else [str(change) for change in changes]
        table.append([label, f"{share:.0%}", *(_percent(cell) for cell in cells), _percent(accuracy_of(own)), *counts])
    first = [row for row in rows if row.label == rows[0].label]
    asked = [f"{task} {length}: {_count(first, task, length)}" for task, length in columns]
    heavy = " (heavy hitters: a fifth of them)" if any(row.method == HEAVY for row in rows) else ""
    return (
        f"{markdown(table)}\n\nAnswers per cell{heavy}: {', '.join(asked)}. Lost: answers of all cells that are right "
        "with full attention and not here; gained: the other way round."
    )


def _count(rows: list[KvRow], task: str, length: int) -> int:
    return sum(row.n for row in rows if (row.task, row.length) == (task, length))


def _divergence(rows: list[KvRow]) -> list[str]:
    if not rows:
        return []
    lengths = sorted({row.length for row in rows})
    head = ["method", *(f"{name} {length}" for length in lengths for name in ("KL", "perplexity"))]
    table = [head]
    for label in distinct(row.label for row in rows):
        cells = []
        for length in lengths:
            row = next((r for r in rows if r.label == label and r.length == length), None)
            perplexity = math.exp(row.nll) if row and row.nll is not None else None
            cells += [_number(row.kl if row else None, 4), _number(perplexity, 3)]
        table.append([label, *cells])
    n = max(row.n for row in rows)
    text = f"### Held-out text: divergence from full attention (nats per token) and perplexity, {n} tokens"
    return [text, markdown(table)]


def _data(rows: list[KvRow]) -> list[str]:
    if not rows:
        return []
    tasks = distinct(row.task for row in rows)
    table = [["method", "KV", *tasks]]
    for label in distinct(row.label for row in rows):
        own = {row.task: row for row in rows if row.label == label}
        share = sum(row.kv_share for row in own.values()) / len(own)
        table.append([label, f"{share:.0%}", *(_percent(own[task].score if task in own else None) for task in tasks)])
    return ["### Scores on files, %", markdown(table)]


def _speed(rows: list[KvRow]) -> list[str]:
    """A table for every context."""
    titles: dict[str, Callable[[KvRow], str]] = {
        "ms": lambda row: _number(row.ms_per_token, 1),
        "least": lambda row: _number(row.ms_least, 1),
        "times faster": lambda row: f"{_number(row.faster, 2)} ({_number(row.faster_again, 2)})",
        "one thread": lambda row: f"{_number(row.faster_one_thread, 2)} ({_number(row.faster_again_one_thread, 2)})",
        "KV MB": lambda row: _number(row.kv_bytes and row.kv_bytes / 1e6, 0),
        "anonymous MB": lambda row: _number(row.anonymous_bytes and row.anonymous_bytes / 1e6, 0),
        "MB read": lambda row: _number(row.read_bytes and row.read_bytes / 1e6, 1),
    }
    parts = [
        f"{rows[0].model}, random weights, all of them in memory, {rows[0].threads} threads, one process per line: ms "
        f"of a decode pass (median and least of {rows[0].n}), keys and values in memory, anonymous memory of the "
        "process, bytes read per token. Times faster: than full attention, both in one further process, one token of "
        "each in turns (median of the ratios), with another token every time, which makes nearly all chosen rows new "
        "ones here; in brackets with the same token again and again, where most rows stay chosen, as in trained "
        "models. The prompt's own attention saw its first 256 rows only, to have the rows quickly."
    ]
    for context in sorted({row.length for row in rows}):
        at = [row for row in rows if row.length == context]
        table = [["method", *titles], *([row.label, *(cell(row) for cell in titles.values())] for row in at)]
        parts += [f"### Behind {context} tokens", markdown(table)]
    return parts


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
