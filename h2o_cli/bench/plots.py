"""Pictures of one diagram each: size and file, the frame of the axes, lines, and the colours that mean the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from runtime.errors import UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT, DPI = 8.0, 5.0, 120
RED, TEAL, LIGHT_TEAL, YELLOW = "#d1495b", "#00798c", "#66b2bd", "#edae49"
Place = Literal["best", "upper left", "upper right"]
GREY, LIGHT_GREY, BLACK = "#888888", "#d8d8d8", "#222222"


def picture(path: Path, fill: Callable[[Axes], None]) -> Path:
    """Write a PNG with one diagram. Raises UsageError without matplotlib."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError(
            "the plots need the Python package matplotlib", "in the project's folder: pip install '.[bench]'"
        ) from error
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    fill(figure.add_subplot())
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def line(axes: Axes, points: Iterable[tuple[float, float]], style: str = "o-", **look: Any) -> None:
    """A line through points (x, y); style as in matplotlib's plot."""
    points = list(points)
    axes.plot([x for x, _ in points], [y for _, y in points], style, **look)


def frame(axes: Axes, title: str, x: str, y: str, *, legend: Place = "best", grid: bool = True) -> None:
    """Title, names of the axes, grid and legend."""
    axes.set(title=title, xlabel=x, ylabel=y)
    if grid:
        axes.grid(alpha=0.3)
    axes.legend(loc=legend)
