"""The source system's cost model of batches: values computed by hand from its formulas, and its search."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.source.cost_model import (
    GB,
    Batch,
    Machine,
    Placement,
    Shape,
    best_placement,
    cost,
    cpu_speed,
    decode_bounds,
    decode_times,
    memory,
    prompt_bounds,
    prompt_times,
    search,
)
from runtime.errors import BudgetError

SMALL = Shape(layers=2, hidden=10, inner=40, heads=2, prompt=4, answer=3)
UNIT = Machine(1e9, 1e9, 1e9, 10.0, 20.0, 40.0, 5.0, 8.0, 16.0, 1000.0, 500.0, 250.0, 100.0, 50.0)
BATCH = Batch(gpu=2, block=6)
MIXED = Placement(0.25, 0.5, 0.25, 0.5, 0.25, 0.25, 0.0, 1.0)


def test_a_layer_of_weights():
    assert SMALL.layer_bytes == 8 * 100 + 4 * 400 == 2400
    assert Shape(96, 12288, 49152, 96).layer_bytes == 3_623_878_656  # 175B: 324 GB in all


def test_prompt_times():
    times = prompt_times(SMALL, UNIT, BATCH, MIXED)
    assert times.ctog == pytest.approx((2400 * 0.75 + 2 * 4 * 10 * 6) / 10)  # 228
    assert times.gtoc == pytest.approx(4 * 5 * 10 * 6 * 0.5 / 20 + 480 / 40)  # 42
    assert times.dtoc == pytest.approx(2400 * 0.25 / 5)  # 120
    assert times.ctod == pytest.approx(4 * 6 * 5 * 10 * 0.25 / 8)  # 37.5
    assert times.comp == pytest.approx(6 * (8 * 4 * 100 + 4 * 4 * 400) / 1000 + 4 * 6 * 16 * 10 / 250)  # 72.96
    assert prompt_bounds(times) == pytest.approx((348, 79.5, 72.96))


def test_decode_times():
    times = decode_times(SMALL, UNIT, BATCH, MIXED)
    cache = 4 * 6 * 5.5 * 10
    assert times.ctog == pytest.approx((1800 + 120) / 10)
    assert times.gtoc == pytest.approx(120 / 40)
    assert times.dtoc == pytest.approx(cache * 0.25 / 5 + 600 / 4.75)
    assert times.ctod == pytest.approx(4 * 6 * 10 * 0.25 / 16)
    cpu = cpu_speed(SMALL, UNIT, 2)
    assert times.comp == pytest.approx(6 * 2400 / 500 + cache * 0.5 / 100 + cache * 0.5 / cpu)
    assert decode_bounds(times)[0] == times.ctog + times.gtoc and len(decode_bounds(times)) == 4


def test_the_cpu_is_slower_for_small_batches_of_narrow_layers():
    assert cpu_speed(Shape(1, 4096, 1, 1), UNIT, 64) == 50.0
    assert cpu_speed(Shape(1, 2048, 1, 1), UNIT, 16) == pytest.approx(50 * (1 + 0.0168 * 2 - 0.0328 * 2 - 0.0621))
    assert cpu_speed(Shape(1, 1, 1, 1), UNIT, 64) == pytest.approx(50 * (1 - 0.0621 * 12))


def test_memory():
    gpu_prompt, gpu_decode, cpu_prompt, cpu_decode, disk = memory(SMALL, BATCH, MIXED)
    cache = 4 * 7 * 10 * 6 * 2
    working = 2 * (8 * 40 + 2 * 40 + 2 * 2 * 16 + 2 * 40 + 4 * 40 + 2 * 4 * 40 + 2 * 40)
    assert gpu_prompt == pytest.approx(1200 + cache / 2 + 2 * 2400 * 0.75 + 2 * 40 * 2 + working)
    working = 2 * (80 + 40 + 80 + 20) + 2 * (40 + 4 * 70 + 2 * 2 * 7) * 0.5
    assert gpu_decode == pytest.approx(1200 + cache / 2 + 3600 + 40 + 4 * 2 * 70 * 0.5 + working)
    assert cpu_prompt == pytest.approx(2400 + 480 + 4 * 40 * 6 * 2 * 0.25 + 1800 + 160)
    assert cpu_decode == pytest.approx(2400 + 120 + cache / 4 + 600 + 8 * 70 * 2 * 0.25 + 2 * 2 * 7 * 2 + 40)
    assert disk == pytest.approx(2 * 2400 * 0.25 + cache / 4)


def test_the_cost_is_that_of_all_layers_and_tokens():
    found = cost(SMALL, UNIT, BATCH, MIXED)
    step = max(decode_bounds(decode_times(SMALL, UNIT, BATCH, MIXED)))
    assert found.prompt_s == pytest.approx(2 * 348)
    assert found.decode_s == pytest.approx(2 * 2 * step)
    assert found.tokens_per_s == pytest.approx(6 * 3 / (found.prompt_s + found.decode_s))


def test_the_best_placement_is_no_worse_than_any_of_a_grid_that_fits():
    pytest.importorskip("scipy")
    shape, machine = Shape(48, 7168, 28672, 56), Machine(cpu_bytes=60 * GB)
    batch = Batch(8, 32)
    best = best_placement(shape, machine, batch)
    shares = [(a / 4, b / 4, 1 - (a + b) / 4) for a in range(5) for b in range(5 - a)]
    tiers = [machine.usable * x * (1 + 1e-9) for x in (machine.gpu_bytes, machine.cpu_bytes, machine.disk_bytes)]

    def fits(placement):
        gpu_prompt, gpu_decode, cpu_prompt, cpu_decode, disk = memory(shape, batch, placement)
        return max(gpu_prompt, gpu_decode) <= tiers[0] and max(cpu_prompt, cpu_decode) <= tiers[1] and disk <= tiers[2]

    placements = [Placement(*w, *c, h, 1 - h) for w in shares for c in shares for h in (0, 0.5, 1)]
    fitting = [cost(shape, machine, batch, placement).tokens_per_s for placement in placements if fits(placement)]
    assert best and fits(best.placement) and len(fitting) > 5
    assert best.tokens_per_s >= max(fitting) * (1 - 1e-6)


def test_the_search_is_near_what_the_source_system_reports():
    pytest.importorskip("scipy")
    small = search(Shape(32, 4096, 16384, 32), Machine(cpu_bytes=200 * GB))
    large = search(Shape(48, 7168, 28672, 56), Machine(cpu_bytes=200 * GB))
    assert small.tokens_per_s == pytest.approx(25.26, rel=0.2)  # measured there: OPT-6.7B
    assert large.tokens_per_s == pytest.approx(7.32, rel=0.2)  # OPT-30B
    assert sum(small.placement.percents[:2]) == 100
    with pytest.raises(BudgetError):
        search(SMALL, replace(UNIT, gpu_bytes=10.0))
