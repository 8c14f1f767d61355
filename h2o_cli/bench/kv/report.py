"""The report of `h2o bench kv`: Markdown tables from rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from h2o_cli.bench.kv.methods import HEAVY, OMNIKV, OTHERS
from h2o_cli.bench.kv.plots import draw_rows
from h2o_cli.bench.kv.rows import KvRow, accuracy_of, share_of
from h2o_cli.bench.report import commands, document, images, machines, started_by
from h2o_cli.bench.results import Kind
from h2o_cli.bench.rows import chosen, distinct
from h2o_cli.bench.tables import NONE, markdown_table, millions, number, percent


def report(rows: Sequence[KvRow], pictures: Sequence[str] = ()) -> str:
    """All of the report; pictures: names of files that lie beside it."""
    parts = [machines(rows), _method(rows), started_by(rows)]
    for model in distinct(row.model for row in rows if row.suite != "speed"):
        of_model = chosen(rows, model=model)
        parts.append(f"## {model}")
        parts += _accuracy(chosen(of_model, suite="accuracy"))
        parts += _divergence(chosen(of_model, suite="divergence"))
        parts += _data(chosen(of_model, suite="data"))
    speed = chosen(rows, suite="speed")
    if speed:
        parts += ["## Speed and memory", *_speed(speed)]
        parts.append(commands(speed, lambda row: f"{row.label}, {row.length} tokens"))
    if pictures:
        parts += ["## Pictures", *images(pictures)]
    return document("Filtered keys and values", parts)


def _method(rows: Sequence[KvRow]) -> str:
    lines = ["Made by `h2o bench kv`; the rows are in rows.jsonl, the method in docs/kv-eval.md."]
    own = next((row for row in rows if row.method == OMNIKV), None)
    if own:
        layers = ", ".join(map(str, own.layers))
        lines.append(
            f"Filter layers {layers}, wait {own.wait}, selector {own.select}. The percentage after a method's name is "
            "the part of the prompt's rows that sparse layers attend to; KV is the part over all layers."
        )
    if any(row.method == OTHERS for row in rows):
        lines.append("Other filter layers were tried with the same wait and selector.")
    return " ".join(lines)


def _accuracy(rows: list[KvRow]) -> list[str]:
    if not rows:
        return []
    parts = ["### Right answers, %", _by_length(rows)]
    for task in distinct(row.task for row in rows):
        longest = max(row.length for row in rows if row.task == task)
        at = chosen(rows, task=task, length=longest)
        depths = sorted({row.depth for row in at})
        table = [["method", *(f"depth {depth:.0%}" for depth in depths)]]
        for label in distinct(row.label for row in at):
            cells = [percent(accuracy_of(chosen(at, label=label, depth=depth))) for depth in depths]
            table.append([label, *cells])
        parts += [
            f"By depth: {task}, {longest} tokens, {at[0].n} answers per cell of full attention",
            markdown_table(table),
        ]
    return parts


def _by_length(rows: list[KvRow]) -> str:
    """A line per method, a column per task and length."""
    columns = [(task, length) for task in distinct(r.task for r in rows) for length in sorted({r.length for r in rows})]
    table = [["method", "KV", *(f"{task} {length}" for task, length in columns), "all", "lost", "gained"]]
    for label in distinct(row.label for row in rows):
        own = chosen(rows, label=label)
        cells = [percent(accuracy_of(chosen(own, task=task, length=length))) for task, length in columns]
        changes = [sum(row.lost or 0 for row in own), sum(row.gained or 0 for row in own)]
        counts = [NONE, NONE] if all(row.lost is None for row in own) else [str(change) for change in changes]
        table.append([label, f"{share_of(own):.0%}", *cells, percent(accuracy_of(own)), *counts])
    first = chosen(rows, label=rows[0].label)
    asked = [
        f"{task} {length}: {sum(row.n for row in chosen(first, task=task, length=length))}" for task, length in columns
    ]
    heavy = " (heavy hitters: a fifth of them)" if any(row.method == HEAVY for row in rows) else ""
    return (
        f"{markdown_table(table)}\n\nAnswers per cell{heavy}: {', '.join(asked)}. Lost: answers of all cells that are "
        "right with full attention and not here; gained: the other way round."
    )


def _divergence(rows: list[KvRow]) -> list[str]:
    if not rows:
        return []
    lengths = sorted({row.length for row in rows})
    table = [["method", *(f"{name} {length}" for length in lengths for name in ("KL", "perplexity"))]]
    for label in distinct(row.label for row in rows):
        cells = []
        for length in lengths:
            row = next(iter(chosen(rows, label=label, length=length)), None)
            perplexity = math.exp(row.nll) if row and row.nll is not None else None
            cells += [number(row.kl if row else None, 4), number(perplexity, 3)]
        table.append([label, *cells])
    n = max(row.n for row in rows)
    text = f"### Held-out text: divergence from full attention (nats per token) and perplexity, {n} tokens"
    return [text, markdown_table(table)]


def _data(rows: list[KvRow]) -> list[str]:
    if not rows:
        return []
    tasks = distinct(row.task for row in rows)
    table = [["method", "KV", *tasks]]
    for label in distinct(row.label for row in rows):
        own = chosen(rows, label=label)
        scores = {row.task: row.score for row in own}
        table.append([label, f"{share_of(own):.0%}", *(percent(scores.get(task)) for task in tasks)])
    return ["### Scores on files, %", markdown_table(table)]


def _speed(rows: list[KvRow]) -> list[str]:
    """A table for every context."""
    titles: dict[str, Callable[[KvRow], str]] = {
        "ms": lambda row: number(row.ms_per_token, 1),
        "least": lambda row: number(row.ms_least, 1),
        "times faster": lambda row: f"{number(row.faster, 2)} ({number(row.faster_again, 2)})",
        "one thread": lambda row: f"{number(row.faster_one_thread, 2)} ({number(row.faster_again_one_thread, 2)})",
        "KV MB": lambda row: millions(row.kv_bytes),
        "anonymous MB": lambda row: millions(row.anonymous_bytes),
        "MB read": lambda row: millions(row.read_bytes, 1),
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
        at = chosen(rows, length=context)
        table = [["method", *titles], *([row.label, *(cell(row) for cell in titles.values())] for row in at)]
        parts += [f"### After {context} tokens", markdown_table(table)]
    return parts


KV = Kind(KvRow, report, report, draw=draw_rows)
