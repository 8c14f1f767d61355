"""Layers move off a device that has become slow, and only then."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.placement import Device, SplitModel, choose_devices, predicted, ranges_of
from planner.rebalance import as_seen, corrected, moved, slowness, smoothed

MB = 10**6
MODEL = SplitModel((10 * MB,) * 20, 4000, 10 * MB)
PAIR = [Device("a:1", 120 * MB, 100 * MB, 1e-9, 1e-4), Device("b:1", 120 * MB, 100 * MB, 1e-9, 1e-4)]


def test_the_mean_follows_slowly():
    assert smoothed([]) == 0.0
    assert smoothed([3.0]) == 3.0
    assert smoothed([1.0] * 10) == pytest.approx(1.0)
    assert smoothed([1.0] * 20 + [2.0]) == pytest.approx(1.1)
    assert smoothed([1.0] * 20 + [2.0] * 50) == pytest.approx(2.0, rel=0.01)


def test_a_device_is_slow_beside_the_others():
    expected = {"a": 1.0, "b": 2.0, "c": 3.0}
    assert slowness(expected, {"a": 1.0, "b": 6.0, "c": 3.0}) == {"a": 1.0, "b": 3.0, "c": 1.0}
    assert slowness(expected, {"a": 2.0, "b": 4.0, "c": 6.0}) == {"a": 1.0, "b": 1.0, "c": 1.0}  # all of them
    assert slowness(expected, {"a": 0.5, "b": 2.0}) == {"a": 0.5, "b": 1.0}
    assert slowness({"a": 1.0}, {"a": 4.0, "x": 1.0}) == {"a": 4.0}  # alone, beside the prediction


def test_only_what_is_far_off_is_corrected():
    assert corrected({}, {"a": 1.4, "b": 0.7}) == {}
    assert corrected({}, {"a": 3.0, "b": 0.5}) == {"a": 3.0, "b": 1.0}
    assert corrected({"a": 3.0}, {"a": 2.0}) == {"a": 6.0}
    assert corrected({"a": 3.0}, {"a": 0.4}) == {"a": pytest.approx(1.2)}
    assert corrected({"a": 3.0}, {}) == {"a": 3.0}  # it has no layers any more


def test_layers_move_off_a_slow_device_and_back():
    placement = choose_devices(MODEL, PAIR).placement
    half = placement.shares[1].n_groups
    assert 8 <= half <= 12
    factors = {"b:1": 20.0}
    choice = moved(MODEL, PAIR, placement, factors)
    few = {d.address: s.n_groups for d, s in zip(choice.placement.devices, choice.placement.shares, strict=True)}
    assert few.get("b:1", 0) < half - 2
    assert moved(MODEL, PAIR, choice.placement, factors) is None  # it stays
    back = moved(MODEL, PAIR, choice.placement, {})
    assert back.placement.shares == placement.shares


def test_all_layers_may_leave_the_first_device():
    """Its priority is the highest, but not when it is slow."""
    roomy = [replace(device, memory_bytes=300 * MB) for device in PAIR]
    placement = choose_devices(MODEL, roomy).placement
    assert [device.address for device in placement.devices] == ["a:1"]
    choice = moved(MODEL, roomy, placement, {"a:1": 3.0})
    assert [device.address for device in choice.placement.devices] == ["b:1"]


@pytest.mark.parametrize("factor", [1.0, 1.2, 1.6])
def test_little_moves_nothing(factor):
    placement = choose_devices(MODEL, PAIR).placement
    assert moved(MODEL, PAIR, placement, {"a:1": factor}) is None


def test_a_device_that_varies_around_the_limit_moves_layers_once():
    placement, factors, moves = choose_devices(MODEL, PAIR).placement, {}, 0
    for i in range(50):
        used = [device.address for device in placement.devices]
        expected = dict(zip(used, placement.turns_s, strict=True))
        really = 5.0 if i % 2 else 4.0  # times as slow as measured
        seen = {a: s * (really / factors.get(a, 1.0) if a == "b:1" else 1.0) for a, s in expected.items()}
        after = corrected(factors, slowness(expected, seen))
        choice = moved(MODEL, PAIR, placement, after) if after != factors else None
        if choice:
            placement, factors, moves = choice.placement, after, moves + 1
    assert moves <= 1


def test_turns_of_the_devices_sum_to_a_token_without_its_hops():
    for devices in (PAIR, as_seen(PAIR, {"b:1": 3.0}), [Device("a:1", 50 * MB, 100 * MB, 1e-9)]):
        for rounds in (1, 2, 4):
            n = len(MODEL.group_bytes) // len(devices)
            found = predicted(MODEL, devices, ranges_of([n] * len(devices), rounds))
            hops_s = sum(devices[r.device].hop_s(MODEL.hidden_bytes) for r in found.ranges) if len(devices) > 1 else 0
            assert sum(found.turns_s) + hops_s == pytest.approx(found.token_s)
