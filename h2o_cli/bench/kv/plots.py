"""Pictures of filtered keys and values: similarity of layers, accuracy, divergence, speed and memory."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.bench.kv.methods import COMPARED, EVERYWHERE, FULL, HEAVY, OMNIKV, OTHERS, RANDOM, SINKS
from h2o_cli.bench.kv.report import accuracy_of, chosen, distinct
from h2o_cli.bench.kv.rows import KvRow
from h2o_cli.bench.speed.plots import picture
from profiler.kv_eval.layers_file import LayerChoice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {
    FULL: "#222222",
    OMNIKV: "#d1495b",
    SINKS: "#00798c",
    EVERYWHERE: "#66b2b2",
    HEAVY: "#edae49",
    RANDOM: "#30638e",
}


def draw_choice(found: LayerChoice, path: Path) -> Path:
    """The curves of a model and its filter layers. Raises UsageError without matplotlib."""

    def fill(axes: Axes) -> None:
        for n, curve in sorted(found.curves.items()):
            axes.plot(found.layer_numbers, curve, marker="o", markersize=3, label=f"next {n} layers")
        for i, layer in enumerate(found.layers):
            axes.axvline(layer, color="#d1495b", linestyle="--", linewidth=1, label=None if i else "filter layers")
        axes.set(
            title=f"{found.model}: how well a layer's best {found.keep:.0%} of the rows serve the layers from it on"
        )
        axes.set(xlabel="layer", ylabel="mean similarity")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.3)
        axes.legend()

    return picture(path, fill)


def draw_rows(rows: Sequence[KvRow], folder: Path) -> list[Path]:
    """Every picture there is data for; the files written. Raises UsageError without matplotlib."""
    drawn = []
    accuracy = chosen(rows, "accuracy")
    for task in distinct(row.task for row in accuracy):
        of_task = [row for row in accuracy if row.task == task]
        drawn.append(picture(folder / f"accuracy-{task}.png", partial(_draw_accuracy, rows=of_task)))
        drawn.append(picture(folder / f"depth-{task}.png", partial(_draw_depth, rows=of_task)))
    divergence = chosen(rows, "divergence")
    if divergence:
        drawn.append(picture(folder / "divergence.png", partial(_draw_divergence, rows=divergence)))
    speed = chosen(rows, "speed")
    if speed:
        drawn.append(picture(folder / "speed.png", partial(_draw_speed, rows=speed)))
        drawn.append(picture(folder / "memory.png", partial(_draw_memory, rows=speed)))
    return drawn


def _colour(method: str) -> str:
    return COLOURS.get(method, "#888888")


def _length(rows: Sequence[KvRow]) -> int:
    """The length at which most methods were asked, the longest of them."""
    return max({row.length for row in rows}, key=lambda n: (len({r.label for r in rows if r.length == n}), n))


def _draw_accuracy(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Right answers against the part of all keys and values, all depths together, at the length most were asked."""
    length = _length(rows)
    rows = [row for row in rows if row.length == length]
    for method in distinct(row.method for row in rows):
        points = []
        for label in distinct(row.label for row in rows if row.method == method):
            own = [row for row in rows if row.label == label]
            share = sum(row.kv_share for row in own) / len(own)
            points.append((100 * share, 100 * (accuracy_of(own) or 0.0)))
        points.sort()
        if method == FULL:
            axes.axhline(points[0][1], color=_colour(method), linestyle="--", linewidth=1, label=method)
        else:
            line = "" if method == OTHERS else "-"
            axes.plot(*zip(*points, strict=True), marker="o", linestyle=line, color=_colour(method), label=method)
    axes.set(title=f"{rows[0].model}: {rows[0].task}, {length} tokens, all depths")
    axes.set(xlabel="keys and values attended to, % of all", ylabel="right answers, %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_depth(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Right answers against depth, at the length most were asked and the compared budget."""
    length = _length(rows)
    at = [row for row in rows if row.length == length and (row.method == FULL or row.keep == COMPARED)]
    for label in distinct(row.label for row in at):
        own = sorted((row for row in at if row.label == label), key=lambda row: row.depth)
        points = [(100 * row.depth, 100 * row.right / row.n) for row in own]
        axes.plot(*zip(*points, strict=True), marker="o", color=_colour(own[0].method), label=label)
    axes.set(title=f"{rows[0].model}: {rows[0].task}, {length} tokens, {COMPARED:.0%} kept")
    axes.set(xlabel="depth of the fact, %", ylabel="right answers, %")
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_divergence(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Divergence against the budget, at the longest length."""
    longest = max(row.length for row in rows)
    at = [row for row in rows if row.length == longest and row.method != FULL and row.keep < 1]
    for method in distinct(row.method for row in at):
        own = sorted((row for row in at if row.method == method), key=lambda row: row.keep)
        points = [(100 * row.keep, max(row.kl or 0.0, 1e-6)) for row in own]
        axes.plot(*zip(*points, strict=True), marker="o", color=_colour(method), label=method)
    axes.set(title=f"{rows[0].model}: divergence from full attention, {longest} tokens", yscale="log")
    axes.set(xlabel="rows kept in sparse layers, %", ylabel="nats per token")
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_speed(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Time of a decode pass against the context."""
    for i, label in enumerate(distinct(row.label for row in rows)):
        own = sorted((row for row in rows if row.label == label), key=lambda row: row.length)
        axes.plot([r.length for r in own], [r.ms_per_token or 0.0 for r in own], marker="o", color=f"C{i}", label=label)
    axes.set(title=f"{rows[0].model}: one token", xlabel="tokens of the prompt", ylabel="ms")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_memory(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Keys and values in memory against the context."""
    for i, label in enumerate(distinct(row.label for row in rows)):
        own = sorted((row for row in rows if row.label == label), key=lambda row: row.length)
        points = [(row.length, (row.kv_bytes or 0) / 1e6) for row in own]
        axes.plot(*zip(*points, strict=True), marker="o", color=f"C{i}", label=label)
    axes.set(title=f"{rows[0].model}: keys and values in memory", xlabel="tokens of the prompt", ylabel="MB")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
