"""Attention of sequences that share a cache: each has the bits that it has alone, wherever its positions lie."""

from __future__ import annotations

import numpy as np
import pytest
from engines import engine

from runtime.llama import abi, cell_attention
from runtime.llama.cell_attention import F16, is_right
from runtime.passes import Part, Pass
from runtime.plans.plan import Plan
from runtime.sizes import MB

PLAN = Plan(0, 1, budget_bytes=1000 * MB)
by_both = pytest.mark.parametrize("short_parts", ["in C", "copied"], indirect=True)


@pytest.fixture
def short_parts(request, monkeypatch):
    """Which attention computes short parts: the function in C, where it is there, or llama.cpp's, of copied rows."""
    if request.param == "copied":
        monkeypatch.setattr(cell_attention, "is_right", lambda _kind: False)


def tokens(seed, n):
    return tuple(3 + (seed * 31 + i * 7) % 250 for i in range(n))


def logits_alone(path, sequence, n_first, **settings):
    """Of a block, and of each token behind it."""
    with engine(path, PLAN, n_ctx=1024, n_ubatch=512, **settings) as opened:
        opened.forward(sequence[:n_first])
        found = [opened.logits().copy()]
        for token in sequence[n_first:]:
            opened.forward([token])
            found.append(opened.logits().copy())
        return found


def compute(opened, *parts):
    """The logits of the last token of every part: (sequence, first position, tokens)."""
    opened.compute([Pass(tuple(Part(*part, 1) for part in parts))])
    return [opened.logits(i).copy() for i in range(len(parts))]


def shared(path, n_sequences, **settings):
    several = {"n_sequences": n_sequences, "n_logits": n_sequences}
    return engine(path, PLAN, n_ctx=1024, n_ubatch=512, **several, **settings)


def assert_equal(found, wanted):
    assert len(found) == len(wanted)
    for step, (own, other) in enumerate(zip(found, wanted, strict=True)):
        assert np.array_equal(own, other), f"step {step}: {np.abs(own - other).max()}"


@by_both
@pytest.mark.usefixtures("short_parts")
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_cells_that_others_left_are_as_good_as_any(bundled_model, kv_type):
    a, b = tokens(1, 40), tokens(2, 60)
    wanted = logits_alone(bundled_model, b, 30, kv_type=kv_type)
    with shared(bundled_model, 2, kv_type=kv_type) as opened:
        assert opened.attention
        found = compute(opened, (0, 0, a), (1, 0, b[:30]))[1:]
        opened.truncate(0, 0)
        for i in range(30, 60):
            found += compute(opened, (1, i, b[i : i + 1]))
        assert opened.attention.cells[1].tolist() == [*range(40, 70), *range(30)]
    assert_equal(found, wanted)


def test_long_and_short_blocks_and_answers_in_one_pass(bundled_model):
    long, short, answer = tokens(3, 102), tokens(4, 10), tokens(5, 22)
    with shared(bundled_model, 3) as opened:
        compute(opened, (2, 0, answer[:20]))
        steps = [compute(opened, (0, 0, long[:100]), (1, 0, short[:8]), (2, 20, answer[20:21]))]
        steps += [compute(opened, (1, 8, short[8:9]), (0, 100, long[100:101]), (2, 21, answer[21:22]))]
    assert_equal([steps[0][0], steps[1][1]], logits_alone(bundled_model, long, 100)[:2])
    assert_equal([steps[0][1], steps[1][0]], logits_alone(bundled_model, short, 8)[:2])
    assert_equal([steps[0][2], steps[1][2]], logits_alone(bundled_model, answer, 20)[1:])


@by_both
@pytest.mark.usefixtures("short_parts")
def test_many_positions_are_cut_over_threads_as_alone(bundled_model):
    long = tokens(6, 273)
    with shared(bundled_model, 2, n_threads=2) as opened:
        compute(opened, (1, 0, tokens(7, 10)))
        found = compute(opened, (0, 0, long[:270]))
        for i in range(270, 273):
            found += compute(opened, (1, i - 260, (9,)), (0, i, long[i : i + 1]))[1:]
    assert_equal(found, logits_alone(bundled_model, long, 270, n_threads=2))


def test_a_pass_that_failed_leaves_its_cells(bundled_model):
    a = tokens(8, 12)
    with shared(bundled_model, 2) as opened:
        found = compute(opened, (0, 0, a[:10]), (1, 0, a))[:1]
        opened.guests.stop = ValueError("stopped")
        with pytest.raises(ValueError, match="stopped"):
            compute(opened, (0, 10, a[10:11]))
        for i in (10, 11):
            found += compute(opened, (0, i, a[i : i + 1]))
    assert_equal(found, logits_alone(bundled_model, a, 10))


@by_both
@pytest.mark.usefixtures("short_parts")
def test_a_shared_beginning_is_as_good_as_ones_own(bundled_model):
    begin, ends = tokens(9, 100), [tokens(10, 30), tokens(11, 3), tokens(12, 70)]
    with shared(bundled_model, 4) as opened:
        compute(opened, (0, 0, begin + ends[0]))
        opened.share(0, 4, 100)
        opened.truncate(0, 0)
        found = []
        for sequence, end in enumerate(ends):
            opened.share(4, sequence, 100)
            opened.compute([Pass((Part(sequence, 100, end[:-1], 1, long=True), Part(3, sequence, (5,), 1)))])
            found.append([opened.logits(0).copy(), *compute(opened, (sequence, 99 + len(end), end[-1:]))])
        assert opened.attention.n_cells == 3 + 100 + sum(map(len, ends))
    for end, own in zip(ends, found, strict=True):
        assert_equal(own, logits_alone(bundled_model, begin + end, 99 + len(end)))


def test_texts_that_share_more_than_the_cache_holds(bundled_model):
    begin, ends = tokens(13, 230), [tokens(14 + i, 3) for i in range(6)]
    several = {"n_sequences": 6, "n_logits": 6}
    with engine(bundled_model, PLAN, n_ctx=256, n_ubatch=256, **several) as opened:
        compute(opened, (0, 0, begin + ends[0][:1]))
        opened.share(0, 6, 230)
        opened.truncate(0, 0)
        for sequence in range(6):
            opened.share(6, sequence, 230)
        parts = [Part(sequence, 230, end[:2], 1, long=sequence % 2 == 0) for sequence, end in enumerate(ends)]
        opened.compute([Pass(tuple(parts))])
        found = [opened.logits(sequence).copy() for sequence in range(6)]
        assert len(opened.attention._copies) == 6
        last = compute(opened, *((sequence, 232, end[2:]) for sequence, end in enumerate(ends)))
    for i in (0, 2, 4):
        assert_equal([found[i], last[i]], logits_alone(bundled_model, begin + ends[i], 232))


def test_a_model_with_windows_keeps_llama_cpps_attention(tiny_model):
    with shared(tiny_model("gemma3"), 2) as opened:
        assert opened.attention is None
        compute(opened, (0, 0, tokens(1, 5)), (1, 0, tokens(2, 3)))


def test_one_node_of_a_pass_of_short_parts_is_looked_at(bundled_model):
    seen = []
    with shared(bundled_model, 2) as opened:
        if not is_right(F16):
            pytest.skip("attention to cells is not computed in C here")
        before = opened.attention.before
        opened.attention.before = lambda node: seen.append(abi.Tensor.from_address(node).op) or before(node)
        for i in range(3):
            compute(opened, (0, i, (5 + i,)), (1, i, (6,)))
            seen.append(None)
        compute(opened, (0, 3, (8,)))
        assert {text: cells.tolist() for text, cells in opened.attention.cells.items()} == {
            0: [0, 2, 4, 6],
            1: [1, 3, 5],
        }
        assert opened.attention.n_cells == 7
    passes = [one.split() for one in " ".join("|" if op is None else str(op) for op in seen).split("|")]
    ops = [[one.count(str(op)) for op in (abi.OP_SET_ROWS, abi.OP_FLASH_ATTN_EXT)] for one in passes]
    assert ops[1:] == [[1, 0]] * 3  # while the first one is computed, every weight is new
    assert ops[0][1] == 0


@by_both
@pytest.mark.usefixtures("short_parts")
def test_passes_of_other_texts_and_in_another_order(bundled_model):
    texts = [tokens(20 + i, 40) for i in range(3)]
    found = [[], [], []]
    with shared(bundled_model, 3, n_threads=2) as opened:
        at = [0, 0, 0]

        def step(*numbers):
            parts = [(i, at[i], texts[i][at[i] : at[i] + 1]) for i in numbers]
            for i, logits in zip(numbers, compute(opened, *parts), strict=True):
                found[i].append(logits)
                at[i] += 1

        for numbers in ((0, 1), (0, 1), (0, 1, 2), (0, 1, 2), (1, 2), (1, 2), (2, 0), (1, 0, 2)):
            for _ in range(3):
                step(*numbers)
    for text, own in zip(texts, found, strict=True):
        assert_equal(own, logits_alone(bundled_model, text[: len(own)], 1, n_threads=2))


@by_both
@pytest.mark.usefixtures("short_parts")
def test_texts_outgrow_the_cells_that_are_not_cut(bundled_model):
    a, b, found = tokens(30, 262), tokens(31, 262), [[], []]
    with shared(bundled_model, 2, n_threads=2) as opened:
        compute(opened, (0, 0, a[:250]), (1, 0, b[:250]))
        for i in range(250, 262):
            for own, logits in zip(found, compute(opened, (0, i, a[i : i + 1]), (1, i, b[i : i + 1])), strict=True):
                own.append(logits)
    for text, own in zip((a, b), found, strict=True):
        assert_equal(own, logits_alone(bundled_model, text, 250, n_threads=2)[1:])


@by_both
@pytest.mark.usefixtures("short_parts")
def test_texts_that_take_the_place_of_others_of_their_length(bundled_model):
    a, b, c = tokens(20, 9), tokens(21, 9), tokens(22, 9)
    with shared(bundled_model, 3) as opened:
        compute(opened, (0, 0, a[:3]), (1, 0, b[:3]))
        for i in range(3, 6):
            compute(opened, (0, i, a[i : i + 1]), (1, i, b[i : i + 1]))
        for i in range(2):
            opened.truncate(0, i)
        found = compute(opened, (1, 0, c[:6]))
        compute(opened, (0, 0, a[:6]))
        for i in range(6, 9):
            found += compute(opened, (0, i, a[i : i + 1]), (1, i, c[i : i + 1]))[1:]
    assert_equal(found, logits_alone(bundled_model, c, 6))
