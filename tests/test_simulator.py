import random

import pytest
from test_model_profile import make_profile, spread

from planner import simulator
from planner.arms import h2o_arms, in_bytes, pinned_per_unit, source_arms, source_layer_max
from planner.exact import best_arm
from planner.footprint import streamable_bytes
from planner.simulator import (
    Lanes,
    decode_rates,
    draw,
    first_token_s,
    limit_s,
    source_token_ms,
    token_s,
)
from planner.source.profile import SourceProfile
from runtime.memory import HUGE_PAGE
from runtime.plans.plan import Layout, Plan

# 10, 20 and 30 ms to load, 5, 15 and 25 to compute, 1, 2 and 3 to release.
SOURCE = SourceProfile(1000, (10, 20, 30), (5, 15, 25), (1, 2, 3))


@pytest.fixture(autouse=True)
def no_handover(monkeypatch):
    """Times in these tests are whole seconds."""
    monkeypatch.setattr(simulator, "HANDOVER_S", 0.0)


@pytest.mark.parametrize(
    ("k", "w", "token_ms"),
    [
        # loads end at 10; max(10, 15+1)+20 = 36; max(36, 51+2)+30 = 83; computes at 15, 51, 83+25
        (0, 1, 108),
        # loads end at 10, 30, max(30, 15+1)+30 = 60; computes at 15, 45, 60+25
        (0, 2, 85),
        (0, 3, 85),
        # layer 0 computes until 5; loads end at 20, max(20, 35+2)+30 = 67; computes at 20+15 = 35, 67+25
        (1, 1, 92),
        # loads end at 20, 50; computes at 35, 50+25
        (1, 2, 75),
        # layers 0 and 1 compute until 20; the load ends at 30; 30+25
        (2, 1, 55),
        # everything resident: 5+15+25
        (3, 1, 45),
    ],
)
def test_source_formulas(k, w, token_ms):
    assert source_token_ms(SOURCE, k, w) == pytest.approx(token_ms)


def test_release_delays_a_load_when_it_is_the_last_to_finish():
    # release 20 ms: the second load starts at 15+20, ends at 55, computes until 70; third 70+20+30 = 120, 145
    slow = SourceProfile(1000, (10, 20, 30), (5, 15, 25), (20, 20, 20))
    assert source_token_ms(slow, 0, 1) == pytest.approx(145)


@pytest.mark.parametrize(("mib", "layer_max"), [(9, 0), (10, 1), (29.9, 1), (30, 2), (60, 3), (1000, 3)])
def test_source_layer_max_is_the_longest_prefix(mib, layer_max):
    assert source_layer_max(SOURCE, mib) == layer_max


def test_source_arms_in_order():
    pairs = [(arm.k, arm.w) for arm in source_arms(SOURCE, 60)]
    assert pairs == [(0, 1), (0, 2), (0, 3), (1, 1), (1, 2), (2, 1)]
    assert source_arms(SOURCE, 9) == []


# --- this program's pipeline: two layers of 400 bytes, 100 bytes/s, so 4 s to read each ----------------------------


def two_layers(compute_s, **more):
    return make_profile([400, 400], [compute_s, compute_s], disk=100, min_window=100, **more)


def test_disk_bound():
    # the disk never waits: 800 bytes at 100 bytes/s
    assert token_s(two_layers(1.0), Plan(0, 1, Layout.PREFIX, 0, 400)) == pytest.approx(8)


def test_compute_bound():
    assert token_s(two_layers(8.0), Plan(0, 1, Layout.PREFIX, 0, 400)) == pytest.approx(16)


def test_resident_layers_cost_no_disk_time():
    # only layer 1 is read, 4 s, also while layer 0 computes; computing takes 2 s
    assert token_s(two_layers(1.0), Plan(1, 1, Layout.PREFIX, 400, 400)) == pytest.approx(4)
    # half of everything: the same bytes
    assert token_s(two_layers(1.0), Plan(1, 1, Layout.BALANCED, 400, 200)) == pytest.approx(4)


def test_everything_resident():
    assert token_s(two_layers(1.0), Plan(2, 1, Layout.PREFIX, 800, 0)) == pytest.approx(2)


def test_next_token_is_read_while_the_head_and_the_rest_of_a_pass_run():
    # 8 s of reading; 2 s of layers, 3 s of resident head, 2 s of sampling: all of it beside the disk
    profile = two_layers(1.0, head=800, head_s=3.0, overhead_s=2.0)
    arm = Plan(0, 2, Layout.PREFIX, 0, 800)
    assert token_s(profile, arm) == pytest.approx(16)
    assert pinned_per_unit(profile, Plan(0, 1, Layout.PREFIX, 500, 400)) == [0, 0, 500]
    head_resident = Plan(0, 2, Layout.PREFIX, 800, 800)
    assert token_s(profile, head_resident) == pytest.approx(8)
    # with a window of half a layer (two segments) only those two are read beside the 5 s of head and sampling;
    # the third starts when the first has computed, at 0.25; six take until 6.25; the last computes until 6.5; and 5
    narrow = Plan(0, 1, Layout.PREFIX, 800, 200)
    assert token_s(profile, narrow) == pytest.approx(11.5)


def test_releasing_is_on_the_disk_lane():
    import msgspec

    profile = two_layers(1.0)
    layers = tuple(msgspec.structs.replace(layer, release_s=spread(0.5)) for layer in profile.layers)
    profile = msgspec.structs.replace(profile, layers=layers)
    assert token_s(profile, Plan(0, 1, Layout.PREFIX, 0, 400)) == pytest.approx(9)
    assert token_s(profile, Plan(1, 1, Layout.PREFIX, 400, 400)) == pytest.approx(4.5)


def test_lanes_without_room_for_overlap():
    # a ring of one segment: read 1, compute 2, read 1, compute 2, ...
    lanes = Lanes(50)
    assert lanes.run([(1.0, 50, 2.0)] * 3) == pytest.approx(9)
    # it goes on where it was: the next read waits for the last compute
    assert lanes.run([(1.0, 50, 2.0)]) == pytest.approx(12)


def test_lanes_with_room_for_two():
    # reads end at 1, 2, and, as two segments fill the ring, at 3+1, 5+1; computes end at 3, 5, 7, 9
    lanes = Lanes(100)
    assert lanes.run([(1.0, 50, 2.0)] * 4) == pytest.approx(9)
    assert lanes.read_end_s == pytest.approx(6)


def test_room_reaches_the_disk_late(monkeypatch):
    monkeypatch.setattr(simulator, "HANDOVER_S", 0.5)
    # the third read may begin when the first segment has computed, at 3, and begins at 3.5; the fourth at 5.5
    lanes = Lanes(100)
    assert lanes.run([(1.0, 50, 2.0)] * 4) == pytest.approx(9)
    assert lanes.read_end_s == pytest.approx(6.5)
    # a ring of one segment waits for it every time
    assert Lanes(50).run([(1.0, 50, 2.0)] * 3) == pytest.approx(9 + 2 * 0.5)


def test_a_fast_disk_wants_a_wider_window_than_a_slow_one(monkeypatch):
    monkeypatch.setattr(simulator, "HANDOVER_S", 0.0005)

    def window(disk):
        sizes = [2_240_000] * 30
        profile = make_profile(sizes, [0.0003] * 30, disk=disk, head=30_000_000, head_s=0.002, min_window=557_000)
        return best_arm(profile, h2o_arms(profile, 66_000_000)).arm.window_bytes

    assert window(400e6) == 2 * 557_000
    assert window(2500e6) == 2 * HUGE_PAGE


def test_first_token():
    profile = two_layers(1.0, head=400, head_s=0.5)
    # 100 tokens of prefill take 10 s a layer: the disk (8 s) is hidden behind, but for layer 0's first of 4 segments
    arm = Plan(0, 2, Layout.PREFIX, 0, 800)
    assert first_token_s(profile, arm, 100, 100) == pytest.approx(1 + 20 + 0.5)
    # one token: never less than a decode pass; 12 s of reading, the head's last segment after it
    assert first_token_s(profile, arm, 1, 100) == pytest.approx(12 + 0.5 / 4)
    # two passes of 50: the same compute, the head once
    assert first_token_s(profile, arm, 100, 50) == pytest.approx(1 + 20 + 0.5)
    # everything resident is still read once
    assert first_token_s(profile, Plan(2, 1, Layout.PREFIX, 1200, 0), 1, 100) == pytest.approx(12 + 0.5 / 4)
    # small passes are disk-bound: ten passes of 10 tokens, 8 s of reading each and 1 s a layer; then the head
    assert first_token_s(profile, arm, 100, 10) == pytest.approx(84 + 0.5 / 4, rel=0.01)


def test_limit():
    profile = two_layers(1.0, head=400, head_s=0.5, overhead_s=0.25)
    assert limit_s(profile, 1200) == pytest.approx(12)
    assert limit_s(profile, 100) == pytest.approx(2.75)
    assert decode_rates(profile).compute_s == [1.0, 1.0, 0.5]


@pytest.mark.parametrize("compute_s", [0.005, 0.020, 0.0465, 0.1])
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_no_arm_beats_its_limit(compute_s, share):
    profile = make_profile([140 * 10**6] * 16, [compute_s] * 16, disk=3e9, head=3 * 10**8, head_s=0.05)
    total = streamable_bytes(profile)
    for arm in h2o_arms(profile, int(share * total)):
        assert token_s(profile, arm) >= limit_s(profile, total - arm.pinned_bytes) * (1 - 1e-9)


def test_spreading_residency_keeps_the_disk_busy():
    # 32 layers of 140 MB at 3 GB/s with 20 ms of compute each and 60 % of the bytes: the disk needs 0.6 s
    profile = make_profile([140 * 10**6] * 32, [0.020] * 32, disk=3e9)
    available = int(0.6 * 32 * 140 * 10**6)
    best = {layout: best_arm(profile, h2o_arms(profile, available, (layout,))).token_ms for layout in Layout}
    assert best[Layout.BALANCED] == pytest.approx(640, rel=0.01)  # all of the compute: nothing is waited for
    assert best[Layout.BALANCED] < best[Layout.EVEN] * 1.001
    assert best[Layout.EVEN] < 0.9 * best[Layout.PREFIX]


def test_a_window_smaller_than_a_layer_still_works():
    profile = make_profile([1000, 1000], [1.0, 1.0], disk=100, min_window=10)
    assert token_s(profile, Plan(0, 1, Layout.PREFIX, 0, 10)) == pytest.approx(20, rel=0.1)


def test_pinned_bytes_go_to_whole_layers_then_the_head_then_the_rest():
    profile = make_profile([100, 200, 300], [1.0] * 3, head=80)
    assert pinned_per_unit(profile, Plan(1, 1, Layout.PREFIX, 150, 10)) == [100, 0, 0, 50]
    assert pinned_per_unit(profile, Plan(1, 1, Layout.PREFIX, 230, 10)) == [100, 50, 0, 80]
    assert pinned_per_unit(profile, Plan(1, 1, Layout.EVEN, 230, 10)) == [0, 200, 0, 30]
    assert pinned_per_unit(profile, Plan(1, 1, Layout.BALANCED, 340, 10)) == [50, 100, 150, 40]
    assert pinned_per_unit(profile, Plan(3, 1, Layout.EVEN, 680, 0)) == [100, 200, 300, 80]


def test_bytes_of_a_plan_by_hand():
    profile = make_profile([100, 200, 300], [1.0] * 3, head=80)
    assert in_bytes(profile, Plan(1, 2, Layout.PREFIX)) == Plan(1, 2, Layout.PREFIX, 100, 580)
    assert in_bytes(profile, Plan(1, 1, Layout.EVEN)) == Plan(1, 1, Layout.EVEN, 200, 300)
    assert in_bytes(profile, Plan(1, 1, Layout.BALANCED)) == Plan(1, 1, Layout.BALANCED, 200, 300)
    assert in_bytes(profile, Plan(9, 1, Layout.PREFIX)) == Plan(3, 1, Layout.PREFIX, 600, 80)
    for complete in (Plan(1, 2, pinned_bytes=7), Plan(0, 2, window_bytes=7)):
        assert in_bytes(profile, complete) == complete


def test_drawn_values():
    rng = random.Random(1)
    values = [draw(spread(10.0, 0.1), rng) for _ in range(2000)]
    assert sum(values) / 2000 == pytest.approx(10, rel=0.01)
    assert 7 <= min(values) < max(values) <= 13
    assert draw(spread(10.0), rng) == 10
    assert min(draw(spread(1.0, 0.5), rng) for _ in range(2000)) > 0
