"""Pictures of filtered keys and values: similarity of layers, accuracy, divergence, speed and memory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from profiler.bench.plots import picture
from profiler.kv_eval.layers_file import LayerChoice

if TYPE_CHECKING:
    from matplotlib.axes import Axes


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
