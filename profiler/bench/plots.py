"""Pictures of a benchmark: speed against budget with the limit, one token's timeline, where the memory goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profiler.bench.engines import H2O
from profiler.bench.rows import Row, Timeline, chosen, distinct, median_of
from runtime.errors import UsageError
from runtime.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI = 8.0, 5.0, 120
COLOURS = {
    H2O: "#d1495b",
    "llama.cpp mmap": "#00798c",
    "llama.cpp direct-io": "#edae49",
    "llama.cpp default": "#30638e",
}
READ, WAIT, COMPUTE = "#00798c", "#e0e0e0", "#d1495b"
PARTS = ("resident_bytes", "window_bytes", "process_bytes", "kv_bytes", "compute_bytes", "margin_bytes", "free_bytes")
_OTHER = "#888888"


def draw(rows: Sequence[Row], timelines: Sequence[Timeline], folder: Path) -> list[Path]:
    """Draw every picture there is data for; the files written. Raises UsageError without matplotlib."""
    drawn = []
    for model in distinct(row.model for row in chosen(rows, suite="budgets")):
        of_model = chosen(rows, suite="budgets", model=model)
        stem = model.replace("/", "-")
        drawn.append(_picture(folder / f"speed-{stem}.png", partial(draw_speed, rows=of_model)))
        if any(row.ledger for row in of_model):
            drawn.append(_picture(folder / f"memory-{stem}.png", partial(draw_memory, rows=of_model)))
    for timeline in timelines:
        stem = Path(timeline.model).stem
        drawn.append(_picture(folder / f"timeline-{stem}.png", partial(draw_timeline, timeline=timeline)))
    return drawn


def _picture(path: Path, fill: Callable[[Axes], None]) -> Path:
    """One picture of one diagram."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "the plots need the Python package matplotlib", 'install it with: pip install "h2o-llm[bench]"'
        ) from error
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure.add_subplot())
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def draw_speed(axes: Axes, rows: Sequence[Row]) -> None:
    """Tokens per second against the budget, a line per engine, and the limit of h2o's plans."""
    for engine in distinct(row.engine for row in rows):
        points = _points(chosen(rows, engine=engine), lambda row: row.ms_per_token)
        if points:
            style: dict[str, Any] = {"marker": "o", "color": COLOURS.get(engine, _OTHER), "label": engine}
            axes.plot([x for x, _ in points], [1000 / ms for _, ms in points], **style)
        for row in {row.budget_bytes: row for row in chosen(rows, engine=engine, status="oom")}.values():
            axes.plot(row.budget_bytes / 1e6, 0, marker="x", color=COLOURS.get(engine, _OTHER), clip_on=False)
    limit = _points(rows, lambda row: row.limit_ms_per_token)
    axes.plot([x for x, _ in limit], [1000 / ms for _, ms in limit], "k--", linewidth=1, label="limit")
    row = rows[0]
    if row.read_bytes_per_s:
        _draw_ideal(axes, rows)
    axes.axvline(row.file_bytes / 1e6, color=_OTHER, linewidth=0.8, linestyle=":")
    axes.annotate("file", (row.file_bytes / 1e6, 1), xycoords=("data", "axes fraction"), ha="right", va="top")
    disk = f", disk {row.read_bytes_per_s / 1e6:.0f} MB/s" if row.read_bytes_per_s else ""
    axes.set(title=f"{row.model} ({format_size(row.file_bytes)}){disk}; x: out of memory")
    axes.set(xlabel="memory budget of the process, MB", ylabel="tokens per second")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()


def _draw_ideal(axes: Axes, rows: Sequence[Row]) -> None:
    """The limit of a process that takes no memory for anything but weights, up to the fastest token that was seen."""
    row = rows[0]
    most = max((1000 / r.ms_per_token for r in rows if r.ms_per_token), default=0.0)
    least_bytes = row.read_bytes_per_s / most if most else 0.0
    sizes = [row.file_bytes * i / 100 for i in range(101) if row.file_bytes * (100 - i) / 100 > least_bytes / 2]
    speeds = [row.read_bytes_per_s / (row.file_bytes - size) for size in sizes]
    axes.plot([size / 1e6 for size in sizes], speeds, ":", color=_OTHER, label="limit if all memory held weights")


def _points(rows: Sequence[Row], quantity: Callable[[Row], float | None]) -> list[tuple[float, float]]:
    """(budget in MB, median) where there is one, by budget."""
    found = []
    for size in sorted({row.budget_bytes for row in rows}):
        median = median_of(chosen(rows, budget_bytes=size), quantity)
        if median and median.value > 0:
            found.append((size / 1e6, median.value))
    return found


def draw_memory(axes: Axes, rows: Sequence[Row]) -> None:
    """Where each budget goes, by the planner's ledger, and the peak that was measured."""
    by_size = {row.budget_bytes: row for row in rows if row.ledger}
    planned = [by_size[size] for size in sorted(by_size)]
    names = [f"{row.budget}\n{row.budget_bytes / 1e6:.0f} MB" for row in planned]
    below = [0.0] * len(planned)
    parts = distinct([*PARTS, *(part for row in planned for part in row.ledger or {})])
    for part in parts:
        heights = [max(0, (row.ledger or {}).get(part, 0)) / 1e6 for row in planned]
        if any(heights):
            axes.bar(names, heights, bottom=below, label=part.removesuffix("_bytes").replace("_", " "))
            below = [low + height for low, height in zip(below, heights, strict=True)]
    peaks = [median_of(chosen(rows, engine=H2O, budget=row.budget), lambda r: r.peak_bytes / 1e6) for row in planned]
    axes.plot(names, [peak.value if peak else 0.0 for peak in peaks], "k_", markersize=40, label="peak, measured")
    axes.set(title=f"{rows[0].model}: where the budget goes", ylabel="MB")
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))


def draw_timeline(axes: Axes, timeline: Timeline) -> None:
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
    axes.set(
        title=f"One token of {timeline.model} in {format_size(timeline.budget_bytes)}: {1e3 * timeline.pass_s:.0f} ms"
    )
    axes.set(xlabel="ms", ylabel=f"layer ({timeline.n_layers}: head)")
    axes.legend(loc="upper right")
