"""Pictures of filtered keys and values: similarity of layers, accuracy, divergence, speed and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.bench.kv.methods import COMPARED, EVERYWHERE, FULL, HEAVY, OMNIKV, OTHERS, RANDOM, SINKS
from h2o_cli.bench.kv.rows import KvRow, accuracy_of, share_of
from h2o_cli.bench.plots import BLACK, GREY, RED, TEAL, YELLOW, frame, line, picture
from h2o_cli.bench.rows import chosen, distinct
from profiler.kv_eval.layers_file import LayerChoice

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {FULL: BLACK, OMNIKV: RED, SINKS: TEAL, EVERYWHERE: "#66b2b2", HEAVY: YELLOW, RANDOM: "#30638e"}


def draw_choice(found: LayerChoice, path: Path) -> Path:
    """The curves of a model and its filter layers. Raises UsageError without matplotlib."""

    def fill(axes: Axes) -> None:
        for n, curve in sorted(found.curves.items()):
            points = zip(found.layer_numbers, curve, strict=True)
            line(axes, points, markersize=3, label=f"next {n} layers")
        for i, layer in enumerate(found.layers):
            axes.axvline(layer, color=RED, linestyle="--", linewidth=1, label=None if i else "filter layers")
        axes.set_ylim(0, 1)
        title = f"{found.model}: how well a layer's best {found.keep:.0%} of the rows serve the layers from it on"
        frame(axes, title, "layer", "mean similarity")

    return picture(path, fill)


def draw_rows(rows: Sequence[KvRow], folder: Path) -> list[Path]:
    """Every picture there is data for; the files written. Raises UsageError without matplotlib."""
    drawn = []
    accuracy = chosen(rows, suite="accuracy")
    for task in distinct(row.task for row in accuracy):
        of_task = chosen(accuracy, task=task)
        drawn.append(picture(folder / f"accuracy-{task}.png", partial(_draw_accuracy, rows=of_task)))
        drawn.append(picture(folder / f"depth-{task}.png", partial(_draw_depth, rows=of_task)))
    divergence = chosen(rows, suite="divergence")
    if divergence:
        drawn.append(picture(folder / "divergence.png", partial(_draw_divergence, rows=divergence)))
    speed = chosen(rows, suite="speed")
    if speed:
        drawn.append(picture(folder / "speed.png", partial(_draw_speed, rows=speed)))
        drawn.append(picture(folder / "memory.png", partial(_draw_memory, rows=speed)))
    return drawn


def _colour(method: str) -> str:
    return COLOURS.get(method, GREY)


def _length(rows: Sequence[KvRow]) -> int:
    """The length at which most methods were asked, the longest of them."""
    return max({row.length for row in rows}, key=lambda n: (len({r.label for r in rows if r.length == n}), n))


def _draw_accuracy(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Right answers against the part of all keys and values, all depths together, at the length most were asked."""
    length = _length(rows)
    rows = chosen(rows, length=length)
    for method in distinct(row.method for row in rows):
        points = []
        for label in distinct(row.label for row in rows if row.method == method):
            own = chosen(rows, label=label)
            points.append((100 * share_of(own), 100 * (accuracy_of(own) or 0.0)))
        if method == FULL:
            axes.axhline(points[0][1], color=_colour(method), linestyle="--", linewidth=1, label=method)
        else:
            line(axes, sorted(points), "o" if method == OTHERS else "o-", color=_colour(method), label=method)
    axes.set_ylim(-3, 103)
    title = f"{rows[0].model}: {rows[0].task}, {length} tokens, all depths"
    frame(axes, title, "keys and values attended to, % of all", "right answers, %")


def _draw_depth(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Right answers against depth, at the length most were asked and the compared budget."""
    length = _length(rows)
    at = [row for row in chosen(rows, length=length) if row.method == FULL or row.keep == COMPARED]
    for label in distinct(row.label for row in at):
        own = chosen(at, label=label)
        points = sorted((100 * row.depth, 100 * row.right / row.n) for row in own)
        line(axes, points, color=_colour(own[0].method), label=label)
    axes.set_ylim(-3, 103)
    title = f"{rows[0].model}: {rows[0].task}, {length} tokens, {COMPARED:.0%} kept"
    frame(axes, title, "depth of the fact, %", "right answers, %")


def _draw_divergence(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Divergence against the budget, at the longest length."""
    longest = max(row.length for row in rows)
    at = [row for row in chosen(rows, length=longest) if row.method != FULL and row.keep < 1]
    for method in distinct(row.method for row in at):
        points = sorted((100 * row.keep, max(row.kl or 0.0, 1e-6)) for row in chosen(at, method=method))
        line(axes, points, color=_colour(method), label=method)
    axes.set_yscale("log")
    title = f"{rows[0].model}: divergence from full attention, {longest} tokens"
    frame(axes, title, "rows kept in sparse layers, %", "nats per token")


def _draw_speed(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Time of a decode pass against the context."""
    _by_context(axes, rows, lambda row: row.ms_per_token or 0.0)
    frame(axes, f"{rows[0].model}: one token", "tokens of the prompt", "ms")


def _draw_memory(axes: Axes, rows: Sequence[KvRow]) -> None:
    """Keys and values in memory against the context."""
    _by_context(axes, rows, lambda row: (row.kv_bytes or 0) / 1e6)
    frame(axes, f"{rows[0].model}: keys and values in memory", "tokens of the prompt", "MB")


def _by_context(axes: Axes, rows: Sequence[KvRow], quantity: Callable[[KvRow], float]) -> None:
    """A line per method, from zero on."""
    for i, label in enumerate(distinct(row.label for row in rows)):
        points = sorted((row.length, quantity(row)) for row in chosen(rows, label=label))
        line(axes, points, color=f"C{i}", label=label)
    axes.set_ylim(bottom=0)
