"""Arms: the plans that fit the memory. The planner chooses among them.

An arm of this program fixes the layout and w. It pins every byte that the window leaves, because more pinned bytes
never make a token slower (see exact.py). Its bytes count as they are: 0 means no bytes. In a plan file 0 means "as k
and w say"; in_bytes translates. An arm of the source system is any (k, w) of its formulas, without bytes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from planner.footprint import streamable_bytes
from planner.source.profile import SourceProfile
from profiler.model_profile import ModelProfile
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import in_huge_pages, overlapping_window, whole_layers


def tie_order(arm: Plan, token_ms: float) -> tuple[float, int, int]:
    """Sort key, best first: the faster arm. Among equals (to a nanosecond) it is larger k+w, then larger k."""
    return (round(token_ms, 6), -(arm.k + arm.w), -arm.k)


def pinned_per_unit(profile: ModelProfile, arm: Plan) -> list[int]:
    """Resident bytes of every layer, then of the head, under an arm. Together they are at most arm.pinned_bytes.

    Balanced: the same share of each. Else whole layers come first, then the head, then the other layers in order.
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


def filled(profile: ModelProfile, arm: Plan, available_bytes: int) -> Plan:
    """The arm where a process leaves available_bytes for weights: the same window, and what that leaves is pinned.

    k is the largest number of whole layers that fits into the pinned bytes; balanced: of mean layers.
    """
    sizes = tuple(layer.bytes for layer in profile.layers)
    window = min(arm.window_bytes, available_bytes)
    pinned = min(available_bytes - window, streamable_bytes(profile))
    if arm.layout == Layout.BALANCED:
        k = min(len(sizes), pinned * len(sizes) // sum(sizes))
    else:
        k = max(k for k, n_bytes in enumerate(_bytes_of_k(sizes, arm.layout)) if n_bytes <= pinned)
    return replace(arm, k=k, pinned_bytes=pinned, window_bytes=window)


def when_full(profile: ModelProfile, arm: Plan, available_bytes: int) -> Plan:
    """The arm when a full context leaves available_bytes: weights have made room, and the window is the same.

    Where everything was in memory until then, the window is the one that w stands for.
    """
    if arm.window_bytes or available_bytes >= streamable_bytes(profile):
        return filled(profile, arm, available_bytes)
    window = in_bytes(profile, replace(arm, k=0, pinned_bytes=0)).window_bytes
    return filled(profile, replace(arm, window_bytes=window), available_bytes)


@cache
def _bytes_of_k(sizes: tuple[int, ...], layout: Layout) -> list[int]:
    """Bytes of k whole layers, for every k."""
    return [sum(sizes[i] for i in whole_layers(len(sizes), k, layout)) for k in range(len(sizes) + 1)]


def h2o_arms(profile: ModelProfile, available_bytes: int, layouts: tuple[Layout, ...] = tuple(Layout)) -> list[Plan]:
    """Every arm that fits in available_bytes: one per layout and w, with all that the window leaves pinned.

    window_bytes + pinned_bytes is at most available_bytes. w counts in the largest layer (balanced: in what is streamed
    of it; one more arm has the narrowest window). Where not even one layer fits, w is 1 and the window is all there is.
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
    """Bytes of the smallest window that is worth having: reads and computation overlap in it.

    It is smaller where that would take more than half of what there is.
    """
    least = profile.memory.min_window_bytes
    wanted = overlapping_window(least, profile.disk.bytes_per_s.mean)
    return min(available_bytes, max(least, min(wanted, available_bytes // 2)))


def _balanced_arms(profile: ModelProfile, available_bytes: int, windows: range) -> list[Plan]:
    """The balanced arms: the one with the narrowest window, and one for each w.

    With a share f of every byte pinned, f * total + w * (1 - f) * largest = available; solved for f * total.
    """
    sizes, rate = [layer.bytes for layer in profile.layers], profile.disk.bytes_per_s.mean
    total = streamable_bytes(profile)
    narrowest = narrowest_window(profile, available_bytes)
    w_of = {narrowest: 1}
    for w in windows:
        window_full = w * max(sizes)
        pinned = (available_bytes - window_full) * total // (total - window_full)
        w_of[max(narrowest, in_huge_pages(available_bytes - pinned, rate))] = w
    return [filled(profile, Plan(0, w, Layout.BALANCED, 0, window), available_bytes) for window, w in w_of.items()]


def _whole_layer_arms(profile: ModelProfile, available_bytes: int, layout: Layout, windows: range) -> list[Plan]:
    """Arms with whole layers resident, one for each w.

    Where every layer fits, one more arm streams only the head, through the narrowest window.
    """
    sizes, rate = [layer.bytes for layer in profile.layers], profile.disk.bytes_per_s.mean
    narrowest = narrowest_window(profile, available_bytes)
    needs = [(w, max(in_huge_pages(w * max(sizes), rate), narrowest)) for w in windows]
    if sum(sizes) + narrowest <= available_bytes:
        needs.append((1, narrowest))
    return [filled(profile, Plan(0, w, layout, 0, window), available_bytes) for w, window in needs]


def source_layer_max(source: SourceProfile, memory_mib: float) -> int:
    """The source system's largest k + w: so many first layers fit in memory_mib (its "MB")."""
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
