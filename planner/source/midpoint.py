"""The placement rules of a source system for batches (FlexGen): whole tensors by their midpoints, whole sequences.

Tiers are numbered GPU 0, CPU 1, disk 2, and percents given as (GPU, CPU); disk has the rest.
"""

from __future__ import annotations

from collections.abc import Sequence

GPU, CPU, DISK = range(3)


def place(sizes: Sequence[int], percents: tuple[float, float]) -> list[int]:
    """The tier of each tensor of a list of one layer (sizes: elements), in its order.

    A tensor goes where the middle of it lies, first disk, then CPU, then GPU: the last tensors are on the GPU. So whole
    tensors are placed, and what a tier gets may be far from what was asked.
    """
    gpu, cpu = percents
    ends = ((DISK, 100 - gpu - cpu), (CPU, 100 - gpu), (GPU, 100.0))
    total, before, tiers = sum(sizes), 0, []
    for size in sizes:
        middle = (before + size / 2) / total * 100
        tiers.append(next((tier for tier, end in ends if middle < end), GPU))
        before += size
    return tiers


def real_percents(lists: Sequence[Sequence[int]], percents: tuple[float, float]) -> tuple[float, float, float]:
    """What GPU, CPU and disk get of all elements, in percent, where every list is placed alone."""
    found = [0, 0, 0]
    for sizes in lists:
        for size, tier in zip(sizes, place(sizes, percents), strict=True):
            found[tier] += size
    gpu, cpu, disk = (100 * n / sum(found) for n in found)
    return gpu, cpu, disk


def cache_segments(n_sequences: int, n_heads: int, percents: tuple[float, float]) -> tuple[int, int, int]:
    """How many of the n_sequences * n_heads rows of keys and values lie on GPU, CPU and disk: whole sequences.

    The last tier that has a share gets what rounding leaves.
    """
    gpu, cpu = percents
    rows = n_sequences * n_heads

    def whole(percent: float) -> int:
        return int(rows * percent / 100) // n_heads * n_heads

    if gpu + cpu < 100:
        on_gpu, on_cpu = whole(gpu), whole(cpu)
        return on_gpu, on_cpu, rows - on_gpu - on_cpu
    if cpu:
        return whole(gpu), rows - whole(gpu), 0
    return rows, 0, 0
