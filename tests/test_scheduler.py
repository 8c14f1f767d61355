"""Who is admitted finds the cells that it needs, whatever ends early, and everything is answered."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.answer.scheduler import LONG, Job, Limits, may_join, next_pass, peak_cells

WAITING = st.lists(
    st.tuples(st.integers(1, 300), st.integers(1, 90), st.floats(0, 1)),  # prompt, most tokens, share that really comes
    min_size=1,
    max_size=20,
)
LIMITS = st.builds(
    Limits,
    st.integers(150, 900),
    st.integers(1, 20),
    st.integers(2 * LONG, 200),
    st.sampled_from([64, 128, 256]),
    apart=st.booleans(),
    in_blocks=st.booleans(),
)


@given(WAITING, LIMITS)
@settings(max_examples=300, deadline=None)
def test_cells_always_suffice_and_all_is_answered(waiting, limits):
    waiting = [job for job in waiting if Job(job[0], 0, job[1]).most_cells <= limits.n_cells]
    running, answered, n_waiting = [], 0, len(waiting)
    for _ in range(20000):
        while waiting:
            n_prompt, most, share = waiting[0]
            new = Job(n_prompt, 0, most)
            if not may_join([job for job, _ in running], new, limits):
                break
            running.append((new, max(1, round(most * share))))
            waiting.pop(0)
        if not running:
            break
        jobs = [job for job, _ in running]
        counts = next_pass(jobs, limits)
        check_pass(jobs, counts, limits)
        if limits.in_blocks:
            check_step(jobs, counts)
        after = []
        for (before, comes), n in zip(running, counts, strict=True):
            job = before.after(n)
            chosen = before.n_left - job.n_left
            if comes == chosen:
                answered += 1
            else:
                after.append((job, comes - chosen))
        running = after
    assert answered == n_waiting
    assert not running


def check_pass(jobs, counts, limits):
    """Every token goes through the kernel that it meets alone, and there are cells for all."""
    assert any(counts)
    assert sum(job.n_cached for job in jobs) + sum(counts) <= limits.n_cells
    total = sum(counts)
    assert total <= limits.n_long
    for job, n in zip(jobs, counts, strict=True):
        block, long = job.block(limits.n_block) if job.n_unread else (1, False)
        assert n <= block
        if not n:
            continue
        if limits.apart:
            assert n == block or (long and n >= LONG and block - n >= LONG)
        elif total >= LONG:
            assert long
            assert n >= LONG or n == block
        else:
            assert not long


def check_step(jobs, counts):
    """A step of a block: prompts only, or a token of every text."""
    if any(job.n_unread for job in jobs):
        assert all(n == 0 for job, n in zip(jobs, counts, strict=True) if not job.n_unread)
    else:
        assert counts == [1] * len(jobs)


def limits(n_cells=1000, n_sequences=8):
    return Limits(n_cells, n_sequences, 128, 128)


def test_a_job_alone_takes_its_prompt_and_answer():
    assert peak_cells([Job(10, 0, 5)], limits()) == 14 == Job(10, 0, 5).most_cells
    assert peak_cells([Job(10, 12, 3)], limits()) == 15 == Job(10, 12, 3).most_cells


def test_one_that_ends_soon_makes_room_in_time():
    short, long = Job(10, 10, 2), Job(10, 10, 20)
    assert peak_cells([short, long], limits()) == 30  # the long one alone at its end; both need 24 before
    assert may_join([short], long, limits(30))
    assert not may_join([short], long, limits(29))
    assert not may_join([short], long, limits(99, 1))


def test_short_blocks_come_beside_answers_and_long_ones_alone():
    answering, rest, long, short = Job(10, 10, 5), Job(150, 128, 5), Job(100, 0, 5), Job(40, 0, 5)
    assert next_pass([answering, rest, long, short], limits()) == [1, 22, 0, 34]
    assert next_pass([answering, long, short, rest], limits()) == [0, 100, 0, 0]
    assert next_pass([answering, Job(64, 0, 5), Job(64, 0, 5), short], limits()) == [0, 64, 64, 0]


def test_a_short_block_of_one_text_alone_is_not_cut():
    """Its last token would be computed as one alone, whose attention is cut over the threads in many cells."""
    for n in (1, 62, 63):
        assert next_pass([Job(512 + n, 512, 5)], Limits(1024, 1, 512, 512)) == [n]


def test_apart_everything_goes_together():
    apart = Limits(1000, 8, 256, 128, True)
    answering, rest, long, short = Job(10, 10, 5), Job(150, 128, 5), Job(100, 0, 5), Job(40, 0, 5)
    assert next_pass([answering, rest, long, short], apart) == [1, 22, 100, 40]
    assert next_pass([answering, long, long, short], apart) == [1, 100, 100, 40]
    assert next_pass([answering, long, long, long, short], apart) == [1, 100, 100, 0, 40]
    assert next_pass([answering, Job(128, 0, 5), Job(128, 0, 5), Job(128, 0, 5)], apart) == [1, 128, 64, 0]


def test_apart_a_block_that_leaves_no_room_for_answers_goes_without():
    assert next_pass([Job(10, 10, 5), Job(126, 0, 5)], Limits(1000, 8, 128, 128, True)) == [0, 126]
    assert next_pass([Job(10, 10, 5), Job(128, 0, 5)], Limits(1000, 8, 128, 128, True)) == [1, 64]


def test_a_block_longer_than_any_pass_leaves_a_long_part():
    assert next_pass([Job(150, 0, 5)], Limits(1000, 8, 128, 256)) == [86]
    assert next_pass([Job(150, 86, 5)], Limits(1000, 8, 128, 256)) == [64]


def test_nothing_joins_a_block_that_has_begun():
    blocks = Limits(1000, 8, 256, 128, apart=True, in_blocks=True)
    assert may_join([Job(10, 0, 5), Job(20, 0, 5)], Job(10, 0, 5), blocks)
    assert not may_join([Job(10, 0, 5), Job(20, 20, 4)], Job(10, 0, 5), blocks)
    assert not may_join([Job(10, 12, 1)], Job(10, 0, 5), blocks)


def test_a_block_reads_its_prompts_before_it_answers():
    blocks = Limits(1000, 8, 256, 128, apart=True, in_blocks=True)
    assert next_pass([Job(10, 10, 5), Job(128, 0, 5), Job(128, 0, 5)], blocks) == [0, 128, 64]
    assert next_pass([Job(10, 10, 5), Job(128, 128, 5), Job(128, 64, 5)], blocks) == [0, 0, 64]
    assert next_pass([Job(10, 10, 5), Job(128, 128, 5), Job(128, 128, 5)], blocks) == [1, 1, 1]


def test_texts_of_a_block_keep_their_cells_while_prompts_are_read():
    jobs = [Job(10, 0, 2), Job(300, 0, 9)]
    at_once, blocks = (Limits(1000, 8, 128, 128, apart=True, in_blocks=how) for how in (False, True))
    assert peak_cells(jobs, at_once) == 308
    assert peak_cells(jobs, blocks) == 312
