"""The cost model and policy search of a source system for batches (FlexGen, experimental/cost_model.py).

Y. Sheng and others, "FlexGen: High-Throughput Generative Inference of Large Language Models with a Single GPU", ICML
2023, section 4.3, in the form of its code: three tiers (GPU, CPU, disk), a model whose layers are OPT's, and constants
that were fitted to a T4. Weights, cache and hidden states are 16 bits wide. Every time and every need of memory is
affine in the shares of a placement, so that the best placement of a batch is the solution of a linear program.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from runtime.errors import BudgetError, UsageError

GB = 2**30  # as the source system counts them
T = 1e12


@dataclass(frozen=True)
class Shape:
    """A model and the lengths of prompts and answers in tokens. hidden, inner: widths of a layer (h1, h2)."""

    layers: int
    hidden: int
    inner: int
    heads: int
    prompt: int = 512
    answer: int = 32

    @property
    def layer_bytes(self) -> int:
        """Weights of a layer."""
        return 8 * self.hidden**2 + 4 * self.hidden * self.inner


@dataclass(frozen=True)
class Machine:
    """Bytes of each tier, bytes per second between them, operations per second; the defaults are the T4's.

    to_gpu: from the CPU. cache_, hidden_from_gpu: from the GPU to the CPU. from_disk: to the CPU. cache_to_disk,
    to_disk: from it, in prompts and in decoding. product, attention: of the GPU, in prompts and in decoding.
    usable: the part of each tier that is used. slower: for small batches and narrow layers the CPU is slower.
    """

    gpu_bytes: float = 15 * GB
    cpu_bytes: float = 204 * GB
    disk_bytes: float = 1500 * GB
    to_gpu: float = 12.89 * GB
    cache_from_gpu: float = 0.97 * GB
    hidden_from_gpu: float = 4.82 * GB
    from_disk: float = 0.473 * GB
    cache_to_disk: float = 0.746 * GB
    to_disk: float = 2.015 * GB
    product_prompt: float = 21.24 * T
    product: float = 4.3 * T
    attention_prompt: float = 9.97 * T
    attention: float = 0.079 * T
    cpu: float = 0.0123 * T
    slower: tuple[float, float, float] = (0.0168, 0.0328, 0.0621)
    weights_from_disk: float = 0.95  # of from_disk, in decoding
    usable: float = 0.8


class Placement(NamedTuple):
    """Shares of weights (w), cache (c) and hidden states (h) on GPU (g), CPU (c) and disk (n). Each kind sums to 1;
    no hidden states are on disk."""

    wg: float
    wc: float
    wn: float
    cg: float
    cc: float
    cn: float
    hg: float
    hc: float

    @property
    def percents(self) -> tuple[int, int, int, int, int, int]:
        """As --percent of the source system has them, rounded."""
        wg, wc, cg, cc, hg, hc = (round(100 * x) for x in (self.wg, self.wc, self.cg, self.cc, self.hg, self.hc))
        return wg, wc, cg, cc, hg, hc


class Batch(NamedTuple):
    """Texts of a batch on the GPU, and of a block of batches (a multiple of it)."""

    gpu: int
    block: int


class Times(NamedTuple):
    """Seconds of a layer: transfers CPU to GPU, GPU to CPU, disk to CPU, CPU to disk, and computing."""

    ctog: float
    gtoc: float
    dtoc: float
    ctod: float
    comp: float


def prompt_times(shape: Shape, machine: Machine, batch: Batch, p: Placement) -> Times:
    """Of a layer over the prompts of a block."""
    s, h, block = shape.prompt, shape.hidden, batch.block
    hidden, cache = 2 * s * h * block, 4 * (s + 1) * h * block
    multiply = block * (8 * s * h**2 + 4 * s * h * shape.inner) / machine.product_prompt
    return Times(
        ctog=(shape.layer_bytes * (p.wc + p.wn) + hidden * p.hc) / machine.to_gpu,
        gtoc=cache * (p.cc + p.cn) / machine.cache_from_gpu + hidden * p.hc / machine.hidden_from_gpu,
        dtoc=shape.layer_bytes * p.wn / machine.from_disk,
        ctod=cache * p.cn / machine.cache_to_disk,
        comp=multiply + 4 * block * s**2 * h / machine.attention_prompt,
    )


def decode_times(shape: Shape, machine: Machine, batch: Batch, p: Placement) -> Times:
    """Of a layer over one token of each text of a block, in the middle of the answer."""
    h, block = shape.hidden, batch.block
    hidden, cache = 2 * h * block, 4 * block * (shape.prompt + shape.answer / 2) * h
    multiply = block * (8 * h**2 + 4 * h * shape.inner) / machine.product
    attend = cache * p.cg / machine.attention + cache * (p.cc + p.cn) / cpu_speed(shape, machine, batch.gpu)
    weights_s = shape.layer_bytes * p.wn / (machine.weights_from_disk * machine.from_disk)
    return Times(
        ctog=(shape.layer_bytes * (p.wc + p.wn) + hidden * p.hc) / machine.to_gpu,
        gtoc=hidden * p.hc / machine.hidden_from_gpu,
        dtoc=cache * p.cn / machine.from_disk + weights_s,
        ctod=4 * block * h * p.cn / machine.to_disk,
        comp=multiply + attend,
    )


def cpu_speed(shape: Shape, machine: Machine, gpu_batch: int) -> float:
    """Operations per second of the CPU's attention."""
    few, narrow = max(0.0, math.log2(64 / gpu_batch)), max(0.0, math.log2(4096 / shape.hidden))
    both, one, other = machine.slower
    return machine.cpu * max(0.1, 1 + both * few * narrow - one * few - other * narrow)


def prompt_bounds(times: Times) -> tuple[float, ...]:
    """What a layer takes in a prompt is the largest of these."""
    return times.ctog + times.dtoc, times.gtoc + times.ctod, times.comp


def decode_bounds(times: Times) -> tuple[float, ...]:
    """What a layer takes in decoding is the largest of these."""
    return tuple(times.ctog + other for other in (times.gtoc, times.dtoc, times.ctod, times.comp))


def memory(shape: Shape, batch: Batch, p: Placement) -> tuple[float, float, float, float, float]:
    """Bytes: GPU in prompts and in decoding, CPU in prompts and in decoding, disk."""
    s, n, h, inner, layers = shape.prompt, shape.answer, shape.hidden, shape.inner, shape.layers
    gbs, block, weights = batch.gpu, batch.block, shape.layer_bytes
    cache = 4 * (s + n) * h * block * layers
    working = gbs * (8 * s * h + 2 * s * h + 2 * shape.heads * s**2 + 2 * s * h + 4 * s * h + 2 * s * inner + 2 * s * h)
    gpu_prompt = weights * layers * p.wg + 2 * s * h * block * p.hg + cache * p.cg
    gpu_prompt += 2 * weights * (1 - p.wg) + 2 * s * h * gbs * (1 - p.hg) + working
    working = gbs * (8 * h + 4 * h + 2 * inner + 2 * h)
    attending = gbs * (4 * h + 4 * (s + n) * h + 2 * shape.heads * (s + n)) * p.cg
    gpu_decode = weights * layers * p.wg + 2 * h * block * p.hg + cache * p.cg
    gpu_decode += 2 * weights * (1 - p.wg) + 2 * h * gbs * (1 - p.hg) + 4 * gbs * (s + n) * h * p.cg
    gpu_decode += working + attending
    cpu_prompt = weights * layers * p.wc + 2 * s * h * block * p.hc + 4 * s * h * block * layers * p.cc
    cpu_prompt += weights * (1 - p.wg) + 2 * s * h * gbs * (1 - p.hg)
    cpu_decode = weights * layers * p.wc + 2 * h * block * p.hc + cache * p.cc
    cpu_decode += weights * p.wn + 8 * (s + n) * h * gbs * p.cn + 2 * shape.heads * (s + n) * gbs + 2 * h * gbs
    return gpu_prompt, gpu_decode, cpu_prompt, cpu_decode, weights * layers * p.wn + cache * p.cn


@dataclass(frozen=True)
class Policy:
    """A placement for a batch; seconds of all layers for the prompts, and for all tokens behind the first."""

    batch: Batch
    placement: Placement
    prompt_s: float
    decode_s: float
    tokens_per_s: float


def cost(shape: Shape, machine: Machine, batch: Batch, p: Placement) -> Policy:
    """What a placement costs, whether it fits or not."""
    prompt_s = shape.layers * max(prompt_bounds(prompt_times(shape, machine, batch, p)))
    step_s = shape.layers * max(decode_bounds(decode_times(shape, machine, batch, p)))
    decode_s = step_s * (shape.answer - 1)
    return Policy(batch, p, prompt_s, decode_s, batch.block * shape.answer / (prompt_s + decode_s))


def best_placement(shape: Shape, machine: Machine, batch: Batch) -> Policy | None:
    """The fastest placement of a batch, by a linear program (HiGHS); None where none fits. Raises UsageError."""
    try:
        from scipy.optimize import linprog
    except ImportError:
        raise UsageError(
            "this search needs the Python package scipy", "in the project's folder: pip install '.[policy]'"
        ) from None
    zero, n = Placement(*[0.0] * 8), len(Placement._fields)
    units = [Placement(*[float(i == j) for j in range(n)]) for i in range(n)]

    def rows(values: Callable[[Placement], tuple[float, ...]]) -> tuple[list[list[float]], list[float]]:
        at_zero, at_units = values(zero), [values(unit) for unit in units]
        return [[at[k] - at_zero[k] for at in at_units] for k in range(len(at_zero))], list(at_zero)

    prompt_rows, prompt_0 = rows(lambda p: prompt_bounds(prompt_times(shape, machine, batch, p)))
    decode_rows, decode_0 = rows(lambda p: decode_bounds(decode_times(shape, machine, batch, p)))
    memory_rows, memory_0 = rows(lambda p: memory(shape, batch, p))
    tiers = (machine.gpu_bytes, machine.gpu_bytes, machine.cpu_bytes, machine.cpu_bytes, machine.disk_bytes)
    upper = [[*row, -1.0, 0.0] for row in prompt_rows] + [[*row, 0.0, -1.0] for row in decode_rows]
    limits = [-x for x in (*prompt_0, *decode_0)]
    for row, at_zero, tier in zip(memory_rows, memory_0, tiers, strict=True):
        upper.append([*(x / GB for x in row), 0.0, 0.0])
        limits.append((machine.usable * tier - at_zero) / GB)
    kinds = [[float(i in kind) for i in range(n + 2)] for kind in ((0, 1, 2), (3, 4, 5), (6, 7))]
    goal = [0.0] * n + [1.0, shape.answer - 1.0]
    found = linprog(goal, A_ub=upper, b_ub=limits, A_eq=kinds, b_eq=[1.0] * 3, method="highs")
    return cost(shape, machine, batch, Placement(*map(float, found.x[:n]))) if found.status == 0 else None


def search(shape: Shape, machine: Machine) -> Policy:
    """The source system's search: batches on the GPU of 1, 2, 3, 4, 8, 16 ...; for each, blocks of more and more
    batches until the throughput falls. Raises BudgetError where nothing fits, UsageError without scipy.
    """
    best: Policy | None = None
    gpu = 1
    while most := _most_batches(shape, machine, gpu):
        last = 0.0
        for n_batches in range(1, most + 1):
            policy = best_placement(shape, machine, Batch(gpu, gpu * n_batches))
            if policy is None or policy.tokens_per_s < last:
                break
            last = policy.tokens_per_s
            if best is None or last > best.tokens_per_s:
                best = policy
        gpu = gpu + 1 if gpu < 4 else 2 * gpu
    if best is None:
        raise BudgetError("no placement of one text fits the source system's machine", "raise -m")
    return best


def _most_batches(shape: Shape, machine: Machine, gpu: int) -> int:
    """Batches of the largest block that fits: by doubling, then bisection."""

    def fits(n: int) -> bool:
        return best_placement(shape, machine, Batch(gpu, gpu * n)) is not None

    above = 1
    while fits(above):
        above *= 2
    below = above // 2
    while above - below > 1:
        middle = (above + below) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below
