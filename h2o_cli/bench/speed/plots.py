"""Pictures of a benchmark: speed against budget with the limit, one token's timeline, where the memory goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.bench.plots import GREY, LIGHT_GREY, LIGHT_TEAL, RED, TEAL, YELLOW, frame, line, picture
from h2o_cli.bench.rows import chosen, distinct, median_of
from h2o_cli.bench.speed.engines import H2O
from h2o_cli.bench.speed.rows import Setup, SpeedRow, Timeline, setups
from runtime.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {H2O: RED, "llama.cpp mmap": TEAL, "llama.cpp direct-io": YELLOW}
MARKERS = {"llama.cpp mmap": "s", "llama.cpp direct-io": "D"}
READ, WAIT, COMPUTE = TEAL, LIGHT_GREY, RED
PARTS = {
    "resident_bytes": TEAL,
    "window_bytes": LIGHT_TEAL,
    "process_bytes": RED,
    "kv_bytes": YELLOW,
    "compute_bytes": "#8d6a9f",
    "embedding_bytes": "#c9a66b",
    "sampler_bytes": "#8a9b68",
    "margin_bytes": "#cccccc",
}
_OOM_STEP = 0.025  # of the height, between the crosses of two engines


def draw(rows: Sequence[SpeedRow], timelines: Sequence[Timeline], folder: Path) -> list[Path]:
    """Draw every picture there is data for; the files written. Raises UsageError without matplotlib."""
    drawn = []
    budgets = chosen(rows, suite="budgets")
    for setup in setups(budgets):
        at = setup.of(budgets)
        drawn.append(picture(folder / f"speed-{setup.stem}.png", partial(draw_speed, rows=at, disk=setup.disk)))
        if any(row.ledger for row in at):
            drawn.append(picture(folder / f"memory-{setup.stem}.png", partial(draw_memory, rows=at)))
    for timeline in timelines:
        setup = Setup(timeline.model, timeline.read_bytes_per_s)
        fill = partial(draw_timeline, timeline=timeline, disk=setup.disk)
        drawn.append(picture(folder / f"timeline-{setup.stem}.png", fill))
    return drawn


def draw_speed(axes: Axes, rows: Sequence[SpeedRow], disk: str) -> None:
    """Tokens per second against the budget, a line per engine, and the limit of h2o's plans."""
    row = rows[0]
    engines = sorted(distinct(row.engine for row in rows), key=lambda name: name != H2O)
    for i, engine in enumerate(engines):
        of_engine = chosen(rows, engine=engine)
        points = _points(of_engine, lambda row: row.ms_per_token)
        ends = sorted({row.budget_bytes / 1e6 for row in of_engine if row.status != "ok"})
        colour, marker = COLOURS.get(engine, GREY), MARKERS.get(engine, "o")
        name = engine if points else f"{engine}: does not run"
        speeds = [(size, 1000 / ms) for size, ms in points]
        line(axes, speeds, f"{marker}-", color=colour, label=name)
        heights = [_OOM_STEP * (i + 1)] * len(ends)
        axes.plot(ends, heights, "x", color=colour, transform=axes.get_xaxis_transform())
    limit = _points(rows, lambda row: row.limit_ms_per_token)
    speeds = [(size, 1000 / ms) for size, ms in limit]
    line(axes, speeds, "k--", linewidth=1.2, label="limit of h2o's plan")
    if row.read_bytes_per_s:
        _draw_ideal(axes, rows)
    axes.axvline(row.file_bytes / 1e6, color=GREY, linewidth=0.8, linestyle=":")
    axes.annotate(
        "model file", (row.file_bytes / 1e6, 0.5), xycoords=("data", "axes fraction"), rotation=90, ha="right"
    )
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.15 * max((1000 / r.ms_per_token for r in rows if r.ms_per_token), default=1.0))
    title = f"{row.model} ({format_size(row.file_bytes)}), {disk}; x: out of memory"
    frame(axes, title, "memory budget of the process, MB", "tokens per second")


def _draw_ideal(axes: Axes, rows: Sequence[SpeedRow]) -> None:
    """The limit of a process that takes no memory for anything but weights, up to the fastest token that was seen."""
    row = rows[0]
    most = max((1000 / r.ms_per_token for r in rows if r.ms_per_token), default=0.0)
    least_bytes = row.read_bytes_per_s / most if most else 0.0
    sizes = [row.file_bytes * i / 100 for i in range(101) if row.file_bytes * (100 - i) / 100 > least_bytes / 2]
    speeds = [(size / 1e6, row.read_bytes_per_s / (row.file_bytes - size)) for size in sizes]
    line(axes, speeds, ":", color=GREY, label="limit if all memory held weights")


def _points(rows: Sequence[SpeedRow], quantity: Callable[[SpeedRow], float | None]) -> list[tuple[float, float]]:
    """(budget in MB, median) where there is one, by budget."""
    found = []
    for size in sorted({row.budget_bytes for row in rows}):
        median = median_of(chosen(rows, budget_bytes=size), quantity)
        if median and median.value > 0:
            found.append((size / 1e6, median.value))
    return found


def draw_memory(axes: Axes, rows: Sequence[SpeedRow]) -> None:
    """Where each budget goes, by the run's own ledger, and the peak that was measured."""
    by_size = {row.budget_bytes: row for row in rows if row.ledger}
    shown = [by_size[size] for size in sorted(by_size)]
    names = [
        f"{row.budget}\n{row.budget_bytes / 1e6:.0f} MB"
        if row.budget != f"{row.budget_bytes / 1e6:.0f}"
        else f"\n{row.budget} MB"
        for row in shown
    ]
    below = [0.0] * len(shown)
    for part in distinct([*PARTS, *(part for row in shown for part in row.ledger or {})]):
        heights = [max(0, (row.ledger or {}).get(part, 0)) / 1e6 for row in shown]
        if any(heights):
            label = part.removesuffix("_bytes").replace("_", " ")
            axes.bar(names, heights, bottom=below, label=label, color=PARTS.get(part), width=0.7)
            below = [low + height for low, height in zip(below, heights, strict=True)]
    ends = [row.budget_bytes / 1e6 for row in shown]
    axes.hlines(ends, [i - 0.4 for i in range(len(shown))], [i + 0.4 for i in range(len(shown))], "k", label="budget")
    peaks = [median_of(chosen(rows, engine=H2O, budget=row.budget), lambda r: r.peak_bytes / 1e6) for row in shown]
    axes.plot(names, [peak.value if peak else 0.0 for peak in peaks], "kv", markersize=6, label="peak, measured")
    frame(axes, f"{rows[0].model}: where the budget goes", "", "MB", legend="upper left", grid=False)


def draw_timeline(axes: Axes, timeline: Timeline, disk: str) -> None:
    """One token: a line per layer, its reads above, its waits and computing below."""
    for read in timeline.reads:
        axes.broken_barh(
            [(1e3 * read.begin_s, 1e3 * (read.end_s - read.begin_s))], (read.layer + 0.05, 0.4), color=READ
        )
    for span in timeline.spans:
        wait_ms, all_ms = 1e3 * span.wait_s, 1e3 * (span.end_s - span.begin_s)
        axes.broken_barh([(1e3 * span.begin_s, wait_ms)], (span.layer + 0.5, 0.45), color=WAIT)
        axes.broken_barh([(1e3 * span.begin_s + wait_ms, all_ms - wait_ms)], (span.layer + 0.5, 0.45), color=COMPUTE)
    for colour, name in ((READ, "reads"), (WAIT, "waiting for reads"), (COMPUTE, "computing")):
        axes.broken_barh([(0, 0)], (0, 0), color=colour, label=name)
    axes.set_xlim(0, 1e3 * timeline.pass_s)
    axes.set_ylim(timeline.n_layers + 1, 0)
    ticks = [*range(0, timeline.n_layers, max(1, timeline.n_layers // 8)), timeline.n_layers]
    axes.set_yticks([tick + 0.5 for tick in ticks], [*map(str, ticks[:-1]), "head"])
    size, ms = format_size(timeline.budget_bytes), 1e3 * timeline.pass_s
    title = f"One token of {timeline.model} in {size}, {disk}: {ms:.0f} ms"
    x = "ms since the pass began (reads may begin before it)"
    frame(axes, title, x, "layer", legend="upper right", grid=False)
