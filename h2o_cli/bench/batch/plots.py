"""Pictures of the benchmark of batches: tokens per second and latency against the batch size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.bench.batch.rows import BatchRow
from h2o_cli.bench.plots import GREY, LIGHT_TEAL, RED, TEAL, YELLOW, frame, line, picture
from h2o_cli.bench.rows import chosen, distinct
from h2o_cli.bench.speed.engines import H2O
from runtime.sizes import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOURS = (RED, TEAL, YELLOW, LIGHT_TEAL, GREY)


def draw(rows: Sequence[BatchRow], folder: Path) -> list[Path]:
    """The pictures of each model; the files written. Raises UsageError without matplotlib."""
    drawn = []
    quantities: dict[str, tuple[str, Callable[[BatchRow], float | None]]] = {
        "speed": ("decode, tokens per second", lambda row: row.decode_tokens_per_s),
        "latency": ("ms per token of a text", lambda row: row.latency_ms),
    }
    for model in distinct(row.model for row in rows):
        of_model = chosen(rows, model=model)
        stem = model.replace("/", "-")
        for name, (title, quantity) in quantities.items():
            fill = partial(draw_lines, rows=of_model, y=title, quantity=quantity)
            drawn.append(picture(folder / f"batch-{name}-{stem}.png", fill))
    return drawn


def draw_lines(axes: Axes, rows: Sequence[BatchRow], y: str, quantity: Callable[[BatchRow], float | None]) -> None:
    """A line per engine and budget."""
    for colour, budget in zip(_COLOURS, distinct(row.budget_bytes for row in rows), strict=False):
        for engine in distinct(row.engine for row in rows):
            at = chosen(rows, budget_bytes=budget, engine=engine)
            points = sorted((row.n_streams, value) for row in at if (value := quantity(row)) is not None)
            if points:
                style = "o-" if engine == H2O else "s--"
                line(axes, points, style, color=colour, label=f"{engine}, {format_size(budget)}")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    sizes = sorted(distinct(row.n_streams for row in rows))
    axes.set_xticks(sizes, [str(n) for n in sizes])
    row = rows[0]
    disk = f", disk at {row.read_bytes_per_s / 1e6:.0f} MB/s" if row.read_bytes_per_s else ""
    frame(axes, f"{row.model} ({format_size(row.file_bytes)}){disk}", "texts at once", y)
