"""Which layers attend to everything and which to a selection: pure functions of layer numbers.

The roles are those of OmniKV (Hao et al., "OmniKV: Dynamic Context Selection for Efficient Long-Context LLMs",
ICLR 2025): all layers before the first filter layer, every filter layer and the wait layers behind it are dense; the
rest are sparse and use the selection of the nearest filter layer before them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from runtime.errors import UsageError

_FEW = 3  # layers: two dense ones in front and a filter


@dataclass(frozen=True)
class Segment:
    """A filter layer and the sparse layers that use its selection, in order."""

    filter: int
    sparse: tuple[int, ...]


@dataclass(frozen=True)
class Roles:
    """The segments in order; every other layer is dense."""

    segments: tuple[Segment, ...]

    @property
    def filters(self) -> tuple[int, ...]:
        """The filter layers, in order."""
        return tuple(segment.filter for segment in self.segments)

    @property
    def sparse(self) -> tuple[int, ...]:
        """All sparse layers, in order."""
        return tuple(layer for segment in self.segments for layer in segment.sparse)


def default_filters(layers: Sequence[int], wait: int) -> tuple[int, ...]:
    """Filter layers for a model nothing is known of: often enough that only one layer in wait + 2 is sparse.

    Which layers look things up differs from model to model, and a layer that does must not get its rows from one far
    before it. In a model too small for that the first one filters.
    """
    n = len(layers)
    places = range(2, n - 1, wait + 2) if n > wait + _FEW else range(1)
    return tuple(layers[place] for place in places)


def layer_roles(n_layers: int, filters: Sequence[int], wait: int, filterable: Collection[int] | None = None) -> Roles:
    """The roles for a rising list of filter layers. filterable: layers that see all positions (None: all of them).

    A wait layer is one of the next `wait` layers by number, whatever its kind. Raises UsageError where a filter layer
    is not in the model or has a sliding window, and where no layer is left to be sparse.
    """
    usable = sorted(range(n_layers) if filterable is None else filterable)
    for layer in filters:
        if not 0 <= layer < n_layers:
            raise UsageError(f"there is no layer {layer}: the model has {n_layers}", "change --kv-layers")
        if layer not in usable:
            known = ", ".join(map(str, usable))
            raise UsageError(f"layer {layer} has a sliding window and cannot filter", f"choose from {known}")
    ends = [*filters[1:], n_layers]
    segments = tuple(
        Segment(start, tuple(layer for layer in usable if start + wait < layer < end))
        for start, end in zip(filters, ends, strict=True)
    )
    if not any(segment.sparse for segment in segments):
        raise UsageError(
            f"filter layers {', '.join(map(str, filters))} and {wait} wait layers leave no layer to filter",
            "choose earlier or fewer --kv-layers, or a smaller --kv-wait",
        )
    return Roles(segments)
