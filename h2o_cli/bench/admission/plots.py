"""Pictures of the sweeps: blocks and texts swapped in, tokens in and out per second, against the factor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.bench.admission.rows import SWEEP, AdmissionRow, Run, mean_of
from h2o_cli.bench.plots import GREY, LIGHT_TEAL, RED, TEAL, YELLOW, frame, line, picture
from h2o_cli.bench.rows import chosen, distinct
from runtime.answer.admission import AVERAGE, NONE, RESERVE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Quantity = Callable[[Run], float]
QUANTITIES: dict[str, tuple[str, Quantity]] = {
    "blocks-in": ("blocks swapped in", lambda run: run.blocks_in),
    "swaps-in": ("texts swapped in", lambda run: run.swaps_in),
    "in": ("tokens of prompts per second", lambda run: run.in_per_s),
    "out": ("tokens of answers per second", lambda run: run.out_per_s),
}
FACTORS = {RESERVE: "o: blocks kept for each text that begins one", AVERAGE: "a: least blocks for each text"}
_COLOURS = (TEAL, RED, YELLOW, LIGHT_TEAL, GREY)


def draw(rows: Sequence[AdmissionRow], folder: Path) -> list[Path]:
    """Four pictures for each model and sweep, one of all models; the files. Raises UsageError without matplotlib."""
    drawn, sweeps = [], chosen(rows, suite=SWEEP)
    for policy, factor in FACTORS.items():
        models = distinct(row.model for row in chosen(sweeps, policy=policy))
        for name, (title, quantity) in QUANTITIES.items():
            for model in models:
                fill = partial(
                    _draw, rows=chosen(sweeps, model=model), policy=policy, quantity=quantity, x=factor, y=title
                )
                stem = model.replace("/", "-")
                drawn.append(picture(folder / f"admission-{policy}-{name}-{stem}.png", fill))
        if len(models) > 1:
            fill = partial(_overlay, rows=sweeps, policy=policy, x=factor)
            drawn.append(picture(folder / f"admission-{policy}-models.png", fill))
    return drawn


def _draw(axes: Axes, rows: Sequence[AdmissionRow], policy: str, quantity: Quantity, x: str, y: str) -> None:
    """The means of a sweep in their intervals, and no admission beside them."""
    at = sorted(chosen(rows, policy=policy), key=lambda row: row.value)
    means = [(row.value, mean_of(row, quantity)) for row in at]
    line(axes, [(value, found.value) for value, found in means], "o-", color=TEAL, markersize=3, label=policy)
    if len(at[0].runs) > 1:
        low, high = zip(*[(found.value - found.half, found.value + found.half) for _, found in means], strict=True)
        axes.fill_between([value for value, _ in means], low, high, color=TEAL, alpha=0.15, label="95 %")
    for none in chosen(rows, policy=NONE):
        axes.axhline(mean_of(none, quantity).value, color=GREY, linestyle="--", label=NONE)
    frame(axes, f"{at[0].model}, {at[0].fast} blocks, {at[0].batch_size} texts at most, simulated", x, y)


def _overlay(axes: Axes, rows: Sequence[AdmissionRow], policy: str, x: str) -> None:
    """Tokens of answers per second of all models, each as a share of its own without admission."""
    for colour, model in zip(_COLOURS, distinct(row.model for row in rows), strict=False):
        of_model = chosen(rows, model=model)
        base = mean_of(chosen(of_model, policy=NONE)[0], lambda run: run.out_per_s).value
        at = sorted(chosen(of_model, policy=policy), key=lambda row: row.value)
        points = [(row.value, mean_of(row, lambda run: run.out_per_s).value / base) for row in at]
        line(axes, points, "o-", color=colour, markersize=3, label=model)
    axes.axhline(1, color=GREY, linestyle="--", label=NONE)
    frame(axes, "All models, simulated", x, "tokens of answers per second, none = 1")
