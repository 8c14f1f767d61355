"""The pool counts exactly, whatever comes; what steps aside comes back; and a trace with a fault is found out."""

from __future__ import annotations

import io
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.answer.admission import Admission, Pressure
from runtime.answer.pool import FAST, SLOW, Event, Pool
from runtime.answer.pool_trace import TraceError, TraceWriter, check, read_trace, write_operations, write_swap_ins
from runtime.answer.scheduler import LONG, Job, Limits
from runtime.errors import EngineError, UsageError

POLICIES = ["none", "reserve:0", "reserve:1", "reserve:3.2", "average:1.8", "average:7.4", "watermark:0.05"]
JOBS = st.lists(
    st.tuples(st.integers(1, 200), st.integers(1, 90), st.floats(0, 1)),  # prompt, most tokens, share that really comes
    min_size=1,
    max_size=30,
)


def run(jobs, admission, n_sequences=8, fast=30, slow=5000, block_tokens=16, each_turn=lambda pressure: None):
    """The trace of jobs (prompt, most tokens, share that really comes) under pressure, and tokens computed of each."""
    trace = []
    pool = Pool(fast, slow, block_tokens, record=lambda event: trace.append(event.as_dict()))
    pressure = Pressure(pool, Admission.parse(admission), Limits(fast * block_tokens, n_sequences, 2 * LONG, 128))
    waiting = [(i, Job(n, 0, most), max(1, round(most * share))) for i, (n, most, share) in enumerate(jobs)]
    waiting = [job for job in waiting if pressure.fits(job[1])]
    running, done = {}, {}
    while waiting or running:
        while waiting and pressure.may_join(waiting[0][1]):
            number, job, comes = waiting.pop(0)
            pressure.join(number, job)
            running[number] = job, job.n_left - comes
        turn = pressure.next_turn({number: job for number, (job, _) in running.items()})
        assert turn.tokens, "nothing goes on"
        each_turn(pressure)
        for number, n in turn.tokens.items():
            job, end = running[number]
            assert len(pool.held(number)) * block_tokens >= job.n_cached + n
            running[number] = job.after(n), end
            if running[number][0].n_left == end:
                done[number] = running.pop(number)[0].n_cached
                pressure.leave(number)
    assert pool.n_free(FAST) == fast
    assert pool.n_free(SLOW) == slow
    return [pool.header(), *trace], done


@given(JOBS, st.sampled_from(POLICIES), st.integers(1, 12), st.integers(4, 40), st.integers(0, 60), st.integers(1, 32))
@settings(max_examples=200, deadline=None)
def test_all_is_answered_and_nothing_leaks(jobs, admission, n_sequences, fast, slow, block_tokens):
    def within(pressure):
        assert sum(len(pressure.pool.held(i)) for i in pressure.pool.resident()) <= fast

    trace, done = run(jobs, admission, n_sequences, fast, slow, block_tokens, within)
    replay = check(trace)
    assert replay.most[FAST] <= fast
    assert replay.most[SLOW] <= slow
    assert replay.events["allocate"] == replay.events["free"] == len(done)
    for number, cached in done.items():
        assert cached == jobs[number][0] + max(1, round(jobs[number][1] * jobs[number][2])) - 1


@given(JOBS, st.integers(4, 40))
@settings(max_examples=100, deadline=None)
def test_no_reserve_is_none_exactly(jobs, fast):
    assert run(jobs, "reserve:0", fast=fast) == run(jobs, "none", fast=fast)


def crowded(n, seed=7):
    rng = random.Random(seed)
    return [(rng.randint(5, 60), rng.randint(20, 120), rng.random()) for _ in range(n)]


def test_two_thousand_swaps_leave_no_leak_and_no_double_owner():
    rng = random.Random(7)
    trace, done = run([(rng.randint(1, 10), rng.randint(20, 120), 1) for _ in range(1000)], "none", 24, fast=40)
    replay = check(trace)
    assert replay.events["swap_out"] >= 2000
    assert replay.events["swap_in"] == replay.events["swap_out"]
    assert len(done) == 1000


def test_a_reserve_swaps_less():
    def swaps(admission):
        return check(run(crowded(100), admission, n_sequences=24, fast=40)[0]).events["swap_out"]

    assert swaps("none") > swaps("reserve:3") > swaps("reserve:12")


def test_the_youngest_steps_aside_and_the_oldest_never_does():
    trace, _ = run(crowded(100), "none", n_sequences=8, fast=16)
    resident, alive = set(), set()
    for line in trace[1:]:
        sequence = line["sequence"]
        if line["event"] == "swap_out":
            assert sequence == max(resident)
            assert sequence != min(alive)
        if line["event"] == "swap_in":
            assert sequence == min(alive - resident)
        resident = resident - {sequence} if line["event"] in ("swap_out", "free") else resident | {sequence}
        alive = alive - {sequence} if line["event"] == "free" else alive | {sequence}


@pytest.mark.parametrize(
    ("text", "n", "n_blocks", "block", "kept"),
    [
        ("none", 200, 100, 16, 0),
        ("reserve:1", 0, 100, 16, 0),
        ("reserve:1", 1, 100, 16, 1),
        ("reserve:1", 16, 100, 16, 1),
        ("reserve:1", 17, 100, 16, 2),
        ("reserve:0.2", 80, 100, 16, 1),
        ("reserve:12", 40, 100, 16, 30),
        ("reserve:2", 40, 100, 32, 3),
        ("average:6", 0, 60, 16, 0),
        ("average:6", 9, 60, 16, 0),
        ("average:6", 10, 60, 16, 60),
        ("watermark:0.01", 3, 250, 16, 2),
        ("watermark:0.01", 0, 250, 16, 0),
    ],
)
def test_what_is_kept_free(text, n, n_blocks, block, kept):
    assert Admission.parse(text).kept_free(n, n_blocks, block) == kept
    assert str(Admission.parse(text)) == text


@pytest.mark.parametrize(
    "text", ["", "all", "none:1", "reserve", "reserve:", "reserve:-1", "reserve:nan", "reserve:inf", "watermark:1"]
)
def test_other_admissions_are_refused(text):
    with pytest.raises(UsageError, match="is not possible"):
        Admission.parse(text)


def test_the_slow_tier_has_room_for_all_but_the_oldest():
    """A reserve is kept free in the fast tier only, so it lets as many in as fit the slow one."""
    pressure = Pressure(Pool(100, 4), Admission.parse("reserve:12"), Limits(1600, 8, 128, 128))
    job = Job(16, 0, 17)  # two blocks at its end
    for number in range(3):
        assert pressure.may_join(job)
        pressure.join(number, job)
    assert not pressure.may_join(job)
    pressure.leave(0)
    assert pressure.may_join(job)


def test_what_is_not_possible_changes_nothing():
    events = []
    pool = Pool(2, 1, record=events.append)
    pool.hold(1, 17)
    for impossible in (
        lambda: pool.hold(2, 1),
        lambda: pool.hold(1, 33),
        lambda: pool.swap_out(1),
        lambda: pool.swap_in(1),
        lambda: pool.swap_out(9),
    ):
        with pytest.raises(EngineError):
            impossible()
    assert (pool.held(1), pool.n_free(FAST), pool.n_free(SLOW)) == ((0, 1), 0, 1)
    assert events == [Event("allocate", 1, (0, 1), FAST)]
    pool.free(9)
    assert len(events) == 1


def swapped():
    """A trace with every kind of event: 1 steps aside for 0 and comes back."""
    pool = Pool(4, 4, record=lambda event: lines.append(event.as_dict()))
    lines = [pool.header()]
    pool.hold(0, 32)
    pool.hold(1, 20)
    pool.swap_out(1)
    pool.hold(0, 33)
    pool.free(0)
    pool.swap_in(1)
    pool.free(1)
    return lines


FIRST, SECOND, OUT, MORE, GONE, BACK, LAST = range(1, 8)
FAULTS = {
    "a block of somebody else's": (lambda t: t[SECOND].update(blocks=[0, 3]), "is sequence 0's, not 1's"),
    "a block that is not there": (lambda t: t[MORE].update(blocks=[4]), "there is no block 4"),
    "a leak": (lambda t: t.pop(LAST), "sequence 1 still holds blocks"),
    "given back in part": (lambda t: t[GONE]["blocks"].pop(), "sequence 0 gives back"),
    "given back twice": (lambda t: t.append(t[LAST]), "which is in none"),
    "another's block given back": (lambda t: t[OUT].update(freed=[0, 3]), "sequence 1 gives back"),
    "one block given back twice": (lambda t: t[OUT].update(freed=[2, 2]), "sequence 1 gives back"),
    "swapped in without being out": (lambda t: t.insert(OUT, t[BACK]), "swap_in in the fast tier of sequence 1"),
    "lost in a swap": (lambda t: t[OUT]["blocks"].pop(), "2 blocks became 1"),
    "appended while it is out": (lambda t: t[MORE].update(sequence=1), "sequence 1, which is in slow"),
    "freed in the wrong tier": (lambda t: t[LAST].update(tier="slow"), "sequence 1, which is in fast"),
    "taken without an allocation": (lambda t: t.pop(SECOND), "which is in none"),
    "more than the slow tier has": (lambda t: t[0].update(slow=1), "there is no block 1 in the slow tier"),
    "allocated twice": (lambda t: t.insert(SECOND, t[FIRST]), "allocate in the fast tier of sequence 0"),
}


def test_a_trace_without_a_fault_passes():
    replay = check(swapped())
    assert replay.events == {"allocate": 2, "append": 1, "swap_out": 1, "swap_in": 1, "free": 2}
    assert (replay.most, replay.left) == ({FAST: 4, SLOW: 2}, [])
    assert check(swapped()[:LAST], whole=False).left == [1]


@pytest.mark.parametrize(("make", "message"), FAULTS.values(), ids=FAULTS)
def test_every_fault_is_found(make, message):
    lines = swapped()
    make(lines)
    with pytest.raises(TraceError, match=message):
        check(lines)


@pytest.mark.parametrize("lines", [[], [{}], [{"event": "pool", "fast": True, "slow": 1}], [{"event": "free"}]])
def test_what_is_no_trace_is_refused(lines):
    with pytest.raises(TraceError, match="no trace"):
        check(lines)


@pytest.mark.parametrize("more", [{}, {"event": "free", "sequence": 1, "blocks": "0", "tier": "fast"}, {"event": []}])
def test_what_is_no_event_is_refused(more):
    with pytest.raises(TraceError, match=r"line 2: .* is no event"):
        check([{"event": "pool", "fast": 1, "slow": 1}, more])


def test_a_trace_survives_its_file_and_becomes_the_sources_tables():
    file = io.StringIO()
    writer = TraceWriter(file)
    pool = Pool(2, 2, record=writer)
    writer.begin(pool)
    pool.hold(5, 20)
    pool.swap_out(5)
    pool.swap_in(5)
    pool.free(5)
    lines = list(read_trace(file.getvalue().splitlines()))
    assert lines[0] == {"event": "pool", "fast": 2, "slow": 2, "block_tokens": 16}
    assert lines[2] == {"event": "swap_out", "sequence": 5, "blocks": [0, 1], "tier": "slow", "freed": [0, 1]}
    check(lines)
    operations, swap_ins = io.StringIO(), io.StringIO()
    write_operations(lines, operations)
    write_swap_ins(lines, swap_ins)
    names = ["Allocate sequence", "Swapped out blocks", "Swapped in blocks", "Freed block"]
    assert operations.getvalue().splitlines() == ["operation,sequence_id", *(f"{name},5" for name in names)]
    assert swap_ins.getvalue() == "sequence_id\n5\n"
    with pytest.raises(TraceError, match="line 2 of the trace is no JSON object"):
        list(read_trace(["{}", "x"]))
