"""Arms: the plans that fit the memory. The planner chooses among them.

An arm of this program fixes the layout and w. It pins every byte that the window leaves, because more pinned bytes
never make a token slower (see exact.py). Its bytes count as they are: 0 means no bytes. In a plan file 0 means "as k
and w say"; in_bytes translates. An arm of the source system is any (k, w) of its formulas, without bytes.
"""

from __future__ import annotations

from dataclasses import replace

from planner.footprint import streamable_bytes
from planner.source.profile import SourceProfile
from profiler.model_profile import ModelProfile
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import overlapping_window, whole_layers


def tie_order(arm: Plan, token_ms: float) -> tuple[float, int, int]:
    """Sort key, best first: the faster arm; among equals (to a nanosecond) larger k+w, then larger k."""
    return (round(token_ms, 6), -(arm.k + arm.w), -arm.k)


def pinned_per_unit(profile: ModelProfile, arm: Plan) -> list[int]:
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
    for i in dict.fromkeys([*whole_layers(n_layers, arm.k, arm.layout), n_layers, *range(n_layers)]):
        pinned[i] = min(room, sizes[i])
        room -= pinned[i]
    return pinned


def in_bytes(profile: ModelProfile, plan: Plan) -> Plan:
    """A plan with the bytes that k and w stand for, where it does not say them.

    That is exactly k layers' worth (balanced: k mean layers), and a window of w times the largest layer.
    """
    if plan.pinned_bytes or plan.window_bytes:
        return plan
    sizes = [layer.bytes for layer in profile.layers]
    k = min(plan.k, len(sizes))
    if plan.layout == Layout.BALANCED:
        pinned = sum(sizes) * k // len(sizes)
    else:
        pinned = sum(sizes[i] for i in whole_layers(len(sizes), k, plan.layout))
    window = max(plan.w * max(sizes), profile.memory.min_window_bytes)
    window = min(window, streamable_bytes(profile) - pinned)
    return replace(plan, k=k, pinned_bytes=pinned, window_bytes=window)


def h2o_arms(profile: ModelProfile, available_bytes: int, layouts: tuple[Layout, ...] = tuple(Layout)) -> list[Plan]:
    """Every arm that fits in available_bytes: one per layout and w, with all that the window leaves pinned.

    window_bytes + pinned_bytes = available_bytes, at most. w counts in the largest layer (balanced: what is streamed
    of it; one arm more has the narrowest window). When not even one layer fits, w is 1 and the window is what there is.
    """
    n_layers = len(profile.layers)
    total = streamable_bytes(profile)
    if total <= available_bytes:
        return [Plan(n_layers, 1, layouts[0], total, 0)]
    largest = max(layer.bytes for layer in profile.layers)
    windows = range(1, min(n_layers, available_bytes // largest) + 1)
    arms: list[Plan] = []
    for layout in layouts:
        if layout == Layout.BALANCED:
            arms += _balanced_arms(profile, available_bytes, windows)
        elif not windows:
            arms.append(Plan(0, 1, layout, 0, available_bytes))
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


def _balanced_arms(profile: ModelProfile, available_bytes: int, windows: range) -> list[Plan]:
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
        Plan(min(len(sizes), pinned * len(sizes) // sum(sizes)), w, Layout.BALANCED, pinned, window)
        for window, w in w_of.items()
        for pinned in (available_bytes - window,)
    ]


def _whole_layer_arms(profile: ModelProfile, available_bytes: int, layout: Layout, windows: range) -> list[Plan]:
    """Arms with whole layers resident, for each w the largest k that fits.

    Where every layer fits, one more arm streams only from the head, through the narrowest window.
    """
    sizes = [layer.bytes for layer in profile.layers]
    n_layers = len(sizes)
    narrowest = narrowest_window(profile, available_bytes)
    bytes_of_k = [sum(sizes[i] for i in whole_layers(n_layers, k, layout)) for k in range(n_layers + 1)]
    needs = [(w, max(w * max(sizes), narrowest)) for w in windows]
    if bytes_of_k[n_layers] + narrowest <= available_bytes:
        needs.append((1, narrowest))
    arms = []
    for w, window in needs:
        pinned = available_bytes - window
        k = max(k for k in range(n_layers + 1) if bytes_of_k[k] <= pinned)
        arms.append(Plan(k, w, layout, pinned, window))
    return arms


def source_layer_max(source: SourceProfile, memory_mib: float) -> int:
    """The source system's largest k + w: the longest prefix of layers that fits in memory_mib (its "MB")."""
    cumulative = 0
    for i, size in enumerate(source.layer_sizes):
        cumulative += size
        if cumulative > memory_mib:
            return i
    return source.n_layers


def source_arms(source: SourceProfile, memory_mib: float) -> list[Plan]:
    """The source system's arms in its order: k from 0, and for each k, w from 1, with k + w <= layer_max."""
    layer_max = source_layer_max(source, memory_mib)
    return [Plan(k, w) for k in range(layer_max) for w in range(1, layer_max - k + 1)]
