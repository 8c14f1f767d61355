import time
from dataclasses import replace

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from source_profiles import SOURCE_PROFILES
from test_model_profile import make_profile

from planner.arms import h2o_arms, pinned_per_unit
from planner.bandit import BanditResult
from planner.choose import choose, choose_exactly, decide, leanest, pick, play
from planner.exact import Best, best_arm, best_source_arm
from planner.footprint import measure_footprint, streamable_bytes
from planner.kv import KvUse
from planner.simulator import limit_s, source_token_ms, token_s
from planner.source.profile import SourceProfile, import_source
from profiler.model_profile import KvLayer, KvProfile
from runtime.errors import BudgetError, ProfileError, UsageError
from runtime.kv.options import KvFilter
from runtime.memory import HUGE_PAGE
from runtime.plans.ledger import POSITION_BYTES, budget_for
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import overlapping_window, whole_layers

QWEN_1_5B, QWEN_0_5B = SOURCE_PROFILES["qwen2.5-1.5b-f16"], SOURCE_PROFILES["qwen2.5-0.5b-f16"]
CTX = {"ctx_tokens": 100, "ubatch_tokens": 50}
QUICK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def profiles(draw):
    n = draw(st.integers(1, 8))
    sizes = draw(st.lists(st.integers(100_000, 1_000_000), min_size=n, max_size=n))
    if draw(st.booleans()):
        sizes = sizes[:1] * n
    compute_s = draw(st.lists(st.floats(0.0001, 0.02), min_size=n, max_size=n))
    head = draw(st.sampled_from([0, 80_000, 2_000_000]))
    return make_profile(sizes, compute_s, disk=1e8, head=head, head_s=head / 1e9, overhead_s=0.001, fixed=50_000)


# --- the source system ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "repeats", "share", "k", "w", "token_ms"),
    [
        (QWEN_1_5B, 1, 0.25, 5, 2, 1895),
        (QWEN_1_5B, 1, 0.50, 11, 3, 1405),
        (QWEN_1_5B, 1, 0.75, 17, 4, 930),
        (QWEN_0_5B, 1, 0.50, 8, 4, 843),
        (QWEN_1_5B, 3, 0.90, 62, 13, 1824),
        (QWEN_1_5B, 3, 0.50, 35, 7, 4078),
    ],
)
def test_known_optima(one, repeats, share, k, w, token_ms):
    source = SourceProfile(one.io_speed, one.layer_sizes * repeats, one.t_compute * repeats, one.t_release * repeats)
    best = best_source_arm(source, share * sum(source.layer_sizes))
    assert (best.arm, round(best.token_ms)) == (Plan(k, w), token_ms)


def test_source_ties_go_to_more_layers_then_more_resident_ones():
    # loads hide behind 400 ms of compute when a layer is resident and the window holds two: (1, 2), (1, 3), (2, 2)
    source = SourceProfile(1000, (1, 1, 1, 1), (100, 100, 100, 100), (0, 0, 0, 0))
    assert best_source_arm(source, 3).arm == Plan(1, 2)
    for w in (2, 3):
        assert source_token_ms(source, 1, w) == source_token_ms(source, 2, 2) == source_token_ms(source, 3, 1) == 400
    assert best_source_arm(source, 4).arm == Plan(3, 1)


def test_source_budget_below_one_layer():
    with pytest.raises(BudgetError, match="first layer") as caught:
        best_source_arm(SourceProfile(1000, (20, 10), (1, 1), (1, 1)), 15)
    assert caught.value.floor_bytes == 20 * 2**20


# --- arms ---------------------------------------------------------------------------------------------------------


@QUICK
@given(profiles(), st.floats(0, 1.1))
def test_arms_fill_what_is_available_and_no_more(profile, share):
    total = streamable_bytes(profile)
    smallest = min(profile.memory.min_window_bytes, total)
    available = max(smallest, int(share * total))
    arms = h2o_arms(profile, available)
    assert arms
    for arm in arms:
        assert arm.pinned_bytes + arm.window_bytes == min(available, total)
        assert arm.pinned_bytes == total or arm.window_bytes >= smallest
        assert sum(pinned_per_unit(profile, arm)) <= arm.pinned_bytes
        assert 0 <= arm.k <= len(profile.layers)
        assert 1 <= arm.w <= len(profile.layers)
        if arm.layout != Layout.BALANCED:
            resident = whole_layers(len(profile.layers), arm.k, arm.layout)
            assert sum(profile.layers[i].bytes for i in resident) <= arm.pinned_bytes
        largest = max(
            layer.bytes - pinned for layer, pinned in zip(profile.layers, pinned_per_unit(profile, arm), strict=False)
        )
        if arm.window_bytes >= max(layer.bytes for layer in profile.layers):
            assert arm.window_bytes >= arm.w * largest * 0.999 - arm.w or arm.k == len(profile.layers)


def test_arms_of_unequal_layers():
    profile = make_profile([100, 200, 300, 400], [1.0] * 4, head=0, disk=100)
    arms = h2o_arms(profile, 900, (Layout.PREFIX, Layout.EVEN))
    # one window of 400 leaves 500: the first two layers (300) and 200 of the third; even(2) is layers 1 and 3: 600
    assert arms == [
        Plan(2, 1, Layout.PREFIX, 500, 400),
        Plan(1, 2, Layout.PREFIX, 100, 800),
        Plan(1, 1, Layout.EVEN, 500, 400),
        Plan(0, 2, Layout.EVEN, 100, 800),
    ]


def test_balanced_arm():
    # half of 1000 bytes: with w=1, f * 1000 + (1 - f) * 100 = 500, f = 4/9
    profile = make_profile([100] * 8, [1.0] * 8, head=200, min_window=10, disk=100)
    narrowest, arm = h2o_arms(profile, 500, (Layout.BALANCED,))[:2]
    assert (arm.k, arm.w, arm.pinned_bytes, arm.window_bytes) == (4, 1, 444, 56)
    # two of the largest pieces: one is read while the other is computed
    assert (narrowest.w, narrowest.pinned_bytes, narrowest.window_bytes) == (1, 480, 20)


def test_no_window_is_narrower_than_two_pieces_where_there_is_room():
    profile = make_profile([100] * 8, [1.0] * 8, head=200, min_window=90, disk=100)
    assert min(arm.window_bytes for arm in h2o_arms(profile, 500)) == 180
    fast = make_profile([100] * 8, [1.0] * 8, head=200, min_window=40, disk=40_000)
    assert min(arm.window_bytes for arm in h2o_arms(fast, 500)) == 120  # three: a read takes a millisecond
    assert {arm.window_bytes for arm in h2o_arms(profile, 100)} == {90, 100}


@pytest.mark.parametrize("layout", Layout)
def test_windows_lie_in_huge_pages_where_the_disk_is_fast(layout):
    sizes = [2_240_000] * 30
    profile = make_profile(sizes, [0.0003] * 30, disk=2.5e9, head=30_000_000, min_window=557_000)
    windows = {arm.window_bytes for arm in h2o_arms(profile, 66_000_000, (layout,))}
    assert len(windows) > 3
    assert all(window % HUGE_PAGE == 0 for window in windows if window < 66_000_000)


def test_only_the_head_is_streamed():
    profile = make_profile([100] * 4, [1.0] * 4, head=400, min_window=50, disk=100)
    arms = h2o_arms(profile, 600, (Layout.PREFIX,))
    assert Plan(4, 1, Layout.PREFIX, 500, 100) in arms


# --- the exact search ---------------------------------------------------------------------------------------------


@QUICK
@given(profiles(), st.floats(0.05, 0.95))
def test_no_plan_with_fewer_resident_bytes_is_faster(profile, share):
    """Brute force over every k at every window, where the search looks at the largest k only."""
    sizes = [layer.bytes for layer in profile.layers]
    total, smallest = streamable_bytes(profile), profile.memory.min_window_bytes
    available = max(smallest, int(share * total))
    if available >= total:
        return
    arms = h2o_arms(profile, available, (Layout.PREFIX, Layout.BALANCED))
    best = best_arm(profile, arms)
    for arm in arms:
        for k in range(arm.k + 1):
            if arm.layout == Layout.PREFIX:
                fewer = Plan(k, arm.w, arm.layout, sum(sizes[:k]), arm.window_bytes)
            else:
                pinned = arm.pinned_bytes * k // max(1, arm.k)
                window = max(smallest, arm.window_bytes * (total - pinned) // (total - arm.pinned_bytes))
                fewer = Plan(k, arm.w, arm.layout, pinned, window)
            assert 1000 * token_s(profile, fewer) >= best.token_ms * (1 - 1e-3)


@QUICK
@given(profiles(), st.floats(0.05, 0.95))
def test_search_skips_no_better_arm(profile, share):
    total = streamable_bytes(profile)
    arms = h2o_arms(profile, max(profile.memory.min_window_bytes, int(share * total)))
    best = best_arm(profile, arms)
    assert best.token_ms == pytest.approx(1000 * min(token_s(profile, arm) for arm in arms), rel=1e-8)
    assert best.token_ms >= 1000 * limit_s(profile, total - best.arm.pinned_bytes) * (1 - 1e-9)


@pytest.mark.parametrize("compute_s", [0.05, 0.265, 0.3])
def test_126_layers_are_planned_quickly(compute_s):
    profile = make_profile([8 * 10**8] * 126, [compute_s] * 126, disk=3e9, head=2 * 10**9, head_s=0.5, min_window=2**24)
    total = streamable_bytes(profile)
    start = time.process_time()
    for share in (0.05, 0.5, 0.9):
        best_arm(profile, h2o_arms(profile, int(share * total)))
    assert time.process_time() - start < 3 * 1.0


# --- choose -------------------------------------------------------------------------------------------------------


def test_footprint():
    profile = make_profile([1000, 1000], [0.1, 0.1], fixed=5000, min_window=250)
    layers = tuple(msgspec.structs.replace(layer, resident_bytes=7) for layer in profile.layers)
    profile = msgspec.structs.replace(profile, layers=layers)
    footprint = measure_footprint(profile, ctx_tokens=300, ubatch_tokens=75)
    # KV 10 per token, 300 tokens in steps of 256; compute 500 at 50 tokens; two layers' small tensors; margin 20
    assert (footprint.kv_bytes, footprint.compute_bytes, footprint.small_tensor_bytes) == (5120, 750, 14)
    assert footprint.process_bytes == 5000 + 256 * POSITION_BYTES  # the profile's context is one step
    assert footprint.fixed_bytes == footprint.process_bytes + 5120 + 750 + 14 + 20
    assert footprint.floor_bytes == footprint.fixed_bytes + 250
    assert measure_footprint(profile, 300, 75, KvUse("q8_0")).kv_bytes == 512 * (10 // 2 * 34 // 32)


def test_buffers_grow_with_the_context():
    profile = make_profile([1000], [0.1], fixed=5000, min_window=250)
    memory = msgspec.structs.replace(
        profile.memory, prompt_bytes=300, compute_bytes_per_token=4, prompt_bytes_per_token=3
    )
    footprint = measure_footprint(msgspec.structs.replace(profile, memory=memory), 1024, 50)
    assert footprint.compute_bytes + footprint.prompt_bytes == 500 + 768 * 4
    assert footprint.prompt_bytes == 300 + 768 * 3


def test_footprint_of_windowed_layers_and_a_filter():
    profile = make_profile([1000] * 4, [0.1] * 4, fixed=5000, min_window=250)
    layers = tuple(KvLayer(n, 64, 128, n != 1) for n in range(4))
    memory = msgspec.structs.replace(profile.memory, filter_process_bytes=777)
    profile = msgspec.structs.replace(profile, kv=KvProfile(2, layers), memory=memory)
    plain = measure_footprint(profile, 1000, 50)
    assert plain.kv_bytes == 4 * 192 * 1024
    assert plain.filter_bytes == 0 and "filter_bytes" not in plain.ledger(10**6, 0, 0)
    options = KvFilter(keep=24, store="disk", tail=1000, readers=1)
    filtered = measure_footprint(profile, 1000, 50, KvUse(filter=options))
    # default filter layer 0, wait layer 1: layers 2 and 3 are sparse
    assert filtered.kv_bytes == plain.kv_bytes - 2 * 1024 * 192
    dense = 2 * 1024 * 2 * 4 + 128 * 1024 + 4096  # scores, weights
    assert filtered.filter_bytes == dense + 2 * 1024 * 192 + 2 * 2**20  # rows in memory, 2 buffers
    assert filtered.process_bytes == plain.process_bytes + 777
    assert sum(filtered.ledger(10**8, 10, 20).values()) == 10**8
    smaller = measure_footprint(profile, 1000, 50, KvUse(filter=replace(options, tail=1)))
    assert smaller.filter_bytes == dense + 1024 * 192 + 2 * 2**20  # the slot of one layer's prompt is larger
    in_memory = measure_footprint(profile, 1000, 50, KvUse("q8_0", replace(options, store="ram", tail=1)))
    assert in_memory.kv_bytes == (34 + 68) * 4 * 1024
    # 25 rows of 34 and of 68 bytes are a page each, and a page is for rows on their way
    assert in_memory.filter_bytes == 1024 * 2 * 4 + 2 * (4096 + 4096) + 4096


def test_kv_that_cannot_be():
    profile = make_profile([1000] * 4, [0.1] * 4)
    with pytest.raises(ProfileError, match="can be filtered"):
        measure_footprint(profile, 512, 50, KvUse(filter=KvFilter()))
    with pytest.raises(UsageError, match="--kv-type q9"):
        KvUse("q9")
    with pytest.raises(UsageError, match="f32"):
        KvUse("f32", KvFilter())


def test_below_the_floor():
    profile = make_profile([10**7] * 4, [0.1] * 4, fixed=10**8, min_window=2 * 10**6)
    floor = measure_footprint(profile, 100, 50).floor_bytes
    with pytest.raises(BudgetError, match="-m 103") as caught:
        choose(profile, floor - 1, **CTX)
    assert caught.value.floor_bytes == floor == 10**8 + 2560 + 500 + 20 + 2 * 10**6
    choice = choose(profile, floor, **CTX)
    assert (choice.plan.k, choice.plan.w, choice.plan.window_bytes) == (0, 1, 2 * 10**6)


def test_a_disk_bound_choice():
    profile = make_profile([10**8] * 10, [0.001] * 10, disk=1e9, noise=0.02, fixed=10**8)
    choice = choose(profile, 6 * 10**8, **CTX)
    assert choice.plan.budget_bytes == 6 * 10**8
    assert choice.plan.model_hash == 77
    assert choice.limit_ms_per_token <= choice.predicted_ms_per_token < 1.05 * choice.limit_ms_per_token
    assert [line.split(":")[0] for line in choice.what_helps] == ["more memory", "a faster disk"]
    assert sum(choice.ledger.values()) == 6 * 10**8
    assert choice.predicted_ttft_s > 1.0  # every byte is read once, at 1 GB/s
    assert choice.statistics[0].n_plays > 1
    assert choice.method


@QUICK
@given(profiles(), st.floats(0.05, 0.95))
def test_what_more_memory_would_give_is_what_a_plan_for_it_predicts(profile, share):
    fixed = measure_footprint(profile, **CTX).fixed_bytes
    budget = fixed + max(profile.memory.min_window_bytes, int(share * streamable_bytes(profile)))
    now, more = choose(profile, budget, **CTX), choose(profile, budget + budget // 4, **CTX)
    said = [line for line in now.what_helps if line.startswith("more memory")]
    gain = more.predicted_ms_per_token < 0.99 * now.predicted_ms_per_token
    assert len(said) == gain
    assert all(f" {more.predicted_ms_per_token:.1f} ms" in line for line in said)


def test_a_compute_bound_choice_streams_the_fewest_bytes():
    profile = make_profile([10**8] * 10, [1.0] * 10, disk=1e9, fixed=10**8)
    choice = choose(profile, 6 * 10**8, **CTX)
    assert choice.predicted_ms_per_token == pytest.approx(10_000)
    assert choice.plan.window_bytes == overlapping_window(profile.memory.min_window_bytes, 1e9)
    assert choice.what_helps == ("neither memory nor disk: computing takes 10000.0 ms of every token",)


def test_a_model_that_fits():
    profile = make_profile([10**6] * 4, [0.01] * 4, head=10**6, fixed=10**6)
    choice = choose(profile, 10**7, **CTX)
    assert (choice.plan.k, choice.plan.pinned_bytes, choice.plan.window_bytes) == (4, 5 * 10**6, 0)
    assert choice.predicted_ms_per_token == pytest.approx(40)
    assert choice.ledger["free_bytes"] > 0


@pytest.mark.parametrize("layout", Layout)
def test_layout_by_hand(layout):
    profile = make_profile([10**8] * 10, [0.05] * 10, disk=1e9, fixed=10**8)
    assert choose(profile, 6 * 10**8, layout=layout, **CTX).plan.layout == layout


def test_the_same_seed_gives_the_same_choice():
    profile = make_profile([10**8] * 10, [0.05] * 10, disk=1e9, noise=0.1, fixed=10**8)
    assert choose(profile, 6 * 10**8, seed=3, **CTX) == choose(profile, 6 * 10**8, seed=3, **CTX)


@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(profiles(), st.floats(0, 1.2), st.floats(0, 0.5), st.sampled_from([None, Layout.BALANCED]))
def test_budget_is_kept_and_more_memory_helps(profile, share, more, layout):
    total = streamable_bytes(profile)
    footprint = measure_footprint(profile, 100, 50)
    budget = footprint.floor_bytes + int(share * total)
    choice = choose(profile, budget, layout=layout, **CTX)
    assert footprint.fixed_bytes + choice.plan.pinned_bytes + choice.plan.window_bytes <= budget
    assert sum(choice.ledger.values()) == budget
    assert min(choice.ledger.values()) >= 0
    assert choice.predicted_ms_per_token >= choice.limit_ms_per_token * (1 - 1e-9)
    # balanced: at most the allowance for a second layer; whole layers: a layer more can mean less of the head
    allowance = 1.05 if layout else 1.15
    larger = choose(profile, budget + int(more * total), layout=layout, **CTX)
    assert larger.predicted_ms_per_token <= choice.predicted_ms_per_token * allowance


def test_unequal_layers_and_imported_profiles():
    source = SourceProfile(840, tuple(range(20, 48)), tuple(range(30, 58)), (8,) * 28)
    profile = import_source(source)
    total = streamable_bytes(profile)
    budgets = [budget_for(int(share * total)) for share in (0.1, 0.25, 0.5, 0.75, 1)]
    times = [choose(profile, budget, ctx_tokens=1, ubatch_tokens=1) for budget in budgets]
    assert [round(c.predicted_ms_per_token) for c in times] == sorted(
        (round(c.predicted_ms_per_token) for c in times), reverse=True
    )
    assert times[-1].plan.k == 28


# --- the bandit decides, the exact search checks ----------------------------------------------------------------------


@st.composite
def noisy_profiles(draw):
    """With spreads of a third, a bandit is often wrong."""
    profile = draw(profiles())
    noise = draw(st.sampled_from([0.0, 0.03, 0.3]))
    sizes = [layer.bytes for layer in profile.layers]
    compute_s = [layer.decode_compute_s.mean for layer in profile.layers]
    return make_profile(sizes, compute_s, disk=1e8, head=profile.head.bytes, overhead_s=0.001, noise=noise)


@QUICK
@given(noisy_profiles(), st.floats(0.05, 0.95), st.integers(0, 3))
def test_the_bandits_arm_is_the_plan_unless_the_exact_search_is_over_a_percent_faster(profile, share, seed):
    footprint = measure_footprint(profile, **CTX)
    budget = footprint.floor_bytes + int(share * streamable_bytes(profile))
    arms = h2o_arms(profile, footprint.available_bytes(budget))
    exact, bandit = pick(profile, arms), play(profile, arms, seed)
    choice = choose(profile, budget, seed=seed, **CTX)
    plan = choice.plan
    chosen = Plan(plan.k, plan.w, plan.layout, plan.pinned_bytes, plan.window_bytes)
    assert chosen in arms
    bandit_ms = 1000 * token_s(profile, bandit.best)
    assert choice.exact == exact
    assert choice.predicted_ms_per_token == 1000 * token_s(profile, chosen) <= 1.01 * exact.token_ms
    if bandit_ms <= 1.01 * exact.token_ms:
        assert choice.predicted_ms_per_token == bandit_ms
        assert choice.method.startswith("the bandit")
    else:
        assert choice.predicted_ms_per_token == exact.token_ms < bandit_ms
        assert choice.method.startswith(f"the exact search, whose plan is {bandit_ms / exact.token_ms - 1:.1%} faster")


WIDE = make_profile([2_240_000] * 30, [0.0004] * 30, disk=3e9, head=30_000_000, head_s=0.002, min_window=557_000)


def test_the_exact_search_wins_where_the_bandit_missed_the_better_arm(monkeypatch):
    """A bandit that is shown nothing but the first layers' arm, which lets the disk rest."""
    monkeypatch.setattr("planner.choose.MOST_PLAYED_ARMS", 1)
    choice = choose(WIDE, 66_000_000, **CTX)
    (played,) = choice.statistics
    gain = 1000 * token_s(WIDE, played.arm) / choice.predicted_ms_per_token - 1
    assert gain > 0.1
    assert (choice.plan.layout, played.arm.layout) == (choice.exact.arm.layout, Layout.PREFIX)
    text = f"the exact search, whose plan is {gain:.1%} faster than that of the bandit (24 plays of 1 plan)"
    assert choice.method == text


def test_the_bandit_wins_where_its_arm_is_the_faster_one():
    """The exact search takes an arm that is slower by the allowance; a bandit that took the fastest one wins."""
    fastest = best_arm(WIDE, h2o_arms(WIDE, 66_000_000)).arm
    found, text = decide(WIDE, BanditResult(fastest, (), 9), pick(WIDE, h2o_arms(WIDE, 66_000_000)))
    assert found.arm == fastest
    assert "the exact search's plan is" in text and text.endswith("% slower")


def test_nothing_is_said_of_differences_that_nobody_can_see():
    twins = [Plan(2, 1, Layout.PREFIX, 4_480_000, 4_480_000), Plan(2, 1, Layout.PREFIX, 4_480_000, 4_480_001)]
    exact = Best(twins[0], 1000 * token_s(WIDE, twins[0]))
    assert decide(WIDE, BanditResult(twins[1], (), 9), exact)[1].endswith("the exact search's plan is as fast")


def test_a_run_begins_with_the_exact_searchs_plan():
    plan = choose_exactly(WIDE, 66_000_000, **CTX)
    arm = choose(WIDE, 66_000_000, **CTX).exact.arm
    assert (plan.k, plan.w, plan.pinned_bytes, plan.window_bytes) == (arm.k, arm.w, arm.pinned_bytes, arm.window_bytes)


# --- what is taken of what is nearly as fast ------------------------------------------------------------------------


def test_bytes_decide_between_arms_that_are_nearly_as_fast():
    """A wider window that gains a percent is not worth its bytes; one that gains much is."""
    arms = h2o_arms(WIDE, 66_000_000)
    fastest, taken = best_arm(WIDE, arms), pick(WIDE, arms)
    assert taken.arm.pinned_bytes > fastest.arm.pinned_bytes
    assert taken.token_ms < 1.15 * fastest.token_ms
    narrowest = max(arms, key=lambda arm: arm.pinned_bytes)
    assert taken.arm != narrowest and token_s(WIDE, narrowest) > 1.2 * fastest.token_ms / 1000


@given(st.lists(st.tuples(st.sampled_from(Layout), st.integers(0, 9), st.floats(1, 2)), min_size=1))
def test_the_leanest_of_what_is_near_the_fastest(rows):
    times = [(Plan(0, 1, layout, pinned, 10 - pinned), ms) for layout, pinned, ms in rows]
    taken, fastest = leanest(times), min(ms for _, ms in times)
    near = [arm for arm, ms in times if ms <= 1.05 * fastest]
    assert taken in near
    assert taken.layout == max(arm.layout for arm in near)
    assert taken.pinned_bytes == max(arm.pinned_bytes for arm in near if arm.layout == taken.layout)


def test_balanced_is_taken_where_others_are_no_faster():
    profile = make_profile([1000] * 10, [0.001] * 10, disk=1e6, head=100, min_window=200)
    for available in (2000, 5000, 8000):
        assert pick(profile, h2o_arms(profile, available)).arm.layout == Layout.BALANCED
