"""Arms: the plans that fit the memory, among which the planner chooses.

An arm of this program fixes the layout and w; every byte the window leaves is pinned, as more pinned bytes never
make a token slower (see exact.py). An arm of the source system is any (k, w) of its formulas.
"""

from __future__ import annotations

from dataclasses import dataclass

from planner.footprint import streamable_bytes
from planner.source.profile import SourceProfile
from profiler.model_profile import ModelProfile
from runtime.plans.plan import Layout
from runtime.plans.residency import overlapping_window


@dataclass(frozen=True)
class Arm:
    """k, w and layout as in Plan, with the bytes pinned and the bytes of the window (0 in source arms)."""

    k: int
    w: int
    layout: Layout = Layout.PREFIX
    pinned_bytes: int = 0
    window_bytes: int = 0


def tie_order(arm: Arm, token_ms: float) -> tuple[float, int, int]:
    """Sort key, best first: the faster arm; among equals (to a nanosecond) larger k+w, then larger k."""
    return (round(token_ms, 6), -(arm.k + arm.w), -arm.k)


def whole_layers(layout: Layout, k: int, n_layers: int) -> list[int]:
    """Which k layers are resident whole, as the runtime picks them: the first k, or k spread evenly.

    Spread evenly means the layers at (i + 1/2) * n_layers / k, rounded down. The balanced layout has no whole layers.
    """
    if layout == Layout.BALANCED:
        return []
    if layout == Layout.PREFIX:
        return list(range(k))
    return [(2 * i + 1) * n_layers // (2 * k) for i in range(k)]


def pinned_per_unit(profile: ModelProfile, arm: Arm) -> list[int]:
    """Resident bytes of every layer, then of the head, under an arm; together at most arm.pinned_bytes.

    Balanced: the same share of each. Else the whole layers, then the head, then the other layers in order.
    """
    sizes = [*(layer.bytes for layer in profile.layers), profile.head.bytes]
    total = sum(sizes)
    if arm.pinned_bytes >= total:
        return sizes
    if arm.layout == Layout.BALANCED:
        return [size * arm.pinned_bytes // total for size in sizes]
    n_layers = len(profile.layers)
    pinned = [0] * len(sizes)
    room = arm.pinned_bytes
    for i in dict.fromkeys([*whole_layers(arm.layout, arm.k, n_layers), n_layers, *range(n_layers)]):
        pinned[i] = min(room, sizes[i])
        room -= pinned[i]
    return pinned


def set_arm(profile: ModelProfile, k: int, w: int, layout: Layout) -> Arm:
    """The arm of a (k, w) given by hand: exactly k layers' worth pinned (balanced: k mean layers), a window of w
    times the largest layer."""
    sizes = [layer.bytes for layer in profile.layers]
    k = min(k, len(sizes))
    if layout == Layout.BALANCED:
        pinned = sum(sizes) * k // len(sizes)
    else:
        pinned = sum(sizes[i] for i in whole_layers(layout, k, len(sizes)))
    streamed = streamable_bytes(profile) - pinned
    return Arm(k, w, layout, pinned, min(streamed, max(w * max(sizes), profile.memory.min_window_bytes)))


def h2o_arms(profile: ModelProfile, available_bytes: int, layouts: tuple[Layout, ...] = tuple(Layout)) -> list[Arm]:
    """Every arm that fits in available_bytes: one per layout and w, with all that the window leaves pinned.

    window_bytes + pinned_bytes = available_bytes, at most. w counts in the largest layer (balanced: what is streamed
    of it; one arm more has the narrowest window). When not even one layer fits, w is 1 and the window is what there is.
    """
    n_layers = len(profile.layers)
    total = streamable_bytes(profile)
    if total <= available_bytes:
        return [Arm(n_layers, 1, layouts[0], total, 0)]
    largest = max(layer.bytes for layer in profile.layers)
    windows = range(1, min(n_layers, available_bytes // largest) + 1)
    arms: list[Arm] = []
    for layout in layouts:
        if layout == Layout.BALANCED:
            arms += _balanced_arms(profile, available_bytes, windows)
        elif not windows:
            arms.append(Arm(0, 1, layout, 0, available_bytes))
        else:
            arms += _whole_layer_arms(profile, available_bytes, layout, windows)
    return arms


def narrowest_window(profile: ModelProfile, available_bytes: int) -> int:
    """Bytes of the smallest window worth having: one in which reads and computation overlap; less where that would
    take more than half of what there is."""
    least = profile.memory.min_window_bytes
    streamed = streamable_bytes(profile) - available_bytes
    wanted = overlapping_window(least, streamed, profile.disk.bytes_per_s.mean)
    return min(available_bytes, max(least, min(wanted, available_bytes // 2)))


def _balanced_arms(profile: ModelProfile, available_bytes: int, windows: range) -> list[Arm]:
    """The balanced arms: the one with the narrowest window, and one for each w.

    With a share f of every byte pinned, f * total + w * (1 - f) * largest = available; solved for f * total. k is how
    many mean layers the pinned bytes are worth.
    """
    sizes = [layer.bytes for layer in profile.layers]
    total = streamable_bytes(profile)
    narrowest = narrowest_window(profile, available_bytes)
    w_of = {narrowest: 1}
    for w in windows:
        window_full = w * max(sizes)
        pinned = (available_bytes - window_full) * total // (total - window_full)
        w_of[max(narrowest, available_bytes - pinned)] = w
    return [
        Arm(min(len(sizes), pinned * len(sizes) // sum(sizes)), w, Layout.BALANCED, pinned, window)
        for window, w in w_of.items()
        for pinned in (available_bytes - window,)
    ]


def _whole_layer_arms(profile: ModelProfile, available_bytes: int, layout: Layout, windows: range) -> list[Arm]:
    """Arms with whole layers resident, for each w the largest k that fits.

    Where every layer fits, one more arm streams only from the head, through the narrowest window.
    """
    sizes = [layer.bytes for layer in profile.layers]
    n_layers = len(sizes)
    narrowest = narrowest_window(profile, available_bytes)
    bytes_of_k = [sum(sizes[i] for i in whole_layers(layout, k, n_layers)) for k in range(n_layers + 1)]
    needs = [(w, max(w * max(sizes), narrowest)) for w in windows]
    if bytes_of_k[n_layers] + narrowest <= available_bytes:
        needs.append((1, narrowest))
    arms = []
    for w, window in needs:
        pinned = available_bytes - window
        k = max(k for k in range(n_layers + 1) if bytes_of_k[k] <= pinned)
        arms.append(Arm(k, w, layout, pinned, window))
    return arms


def source_layer_max(source: SourceProfile, memory_mib: float) -> int:
    """The source system's largest k + w: the longest prefix of layers that fits in memory_mib (its "MB")."""
    cumulative = 0
    for i, size in enumerate(source.layer_sizes):
        cumulative += size
        if cumulative > memory_mib:
            return i
    return source.n_layers


def source_arms(source: SourceProfile, memory_mib: float) -> list[Arm]:
    """The source system's arms in its order: k from 0, and for each k, w from 1, with k + w <= layer_max."""
    layer_max = source_layer_max(source, memory_mib)
    return [Arm(k, w) for k in range(layer_max) for w in range(1, layer_max - k + 1)]
