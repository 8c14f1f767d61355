"""Attention of sequences that share a cache: each has the bits that it has alone, wherever its positions lie."""

from __future__ import annotations

import ctypes
from random import Random

import numpy as np
import pytest
from engines import engine

from runtime.kv import in_graph
from runtime.kv.single_tokens import NO_LOGIT, PADDED, SEEN, SingleTokens
from runtime.llama import abi
from runtime.llama.compiled import LIBRARY
from runtime.passes import Part, Pass
from runtime.plans.plan import Plan
from runtime.sizes import MB

PLAN = Plan(0, 1, budget_bytes=1000 * MB)


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
        assert opened.attention.cells[1] == [*range(40, 70), *range(30)]
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


def test_one_node_of_a_pass_is_looked_at_once_the_graph_is_known(bundled_model):
    seen = []
    with shared(bundled_model, 2) as opened:
        if not LIBRARY:
            pytest.skip("the package was built without a compiler")
        before = opened.attention.before
        opened.attention.before = lambda node: seen.append(abi.Tensor.from_address(node).op) or before(node)
        for i in range(3):
            compute(opened, (0, i, (5 + i,)), (1, i, (6,)))
            seen.append(None)
        compute(opened, (0, 3, (8,)))
        assert opened.attention.cells == {0: [0, 2, 4, 6], 1: [1, 3, 5]}
        assert opened.attention.n_cells == 7
        n_layers = opened.file.n_layers
    passes = [one.split() for one in " ".join("|" if op is None else str(op) for op in seen).split("|")]
    ops = [[one.count(str(op)) for op in (abi.OP_SET_ROWS, abi.OP_FLASH_ATTN_EXT)] for one in passes]
    # while the first one is computed, every weight is new; the last one is of another shape
    assert ops[0][1] == n_layers
    assert ops[1:] == [[1, 0], [1, 0], [1, n_layers]]


def test_nodes_of_llama_cpps_are_as_they_were_after_each_pass(bundled_model):
    a, b, steps = tokens(1, 20), tokens(2, 31), []
    with shared(bundled_model, 2) as opened:
        compute(opened, (0, 0, a[:10]), (1, 0, b[:1]))
        for i in range(10):  # in turns, both texts and one of them
            steps.append(compute(opened, (0, 10 + i, a[10 + i : 11 + i]), (1, 1 + 3 * i, b[1 + 3 * i : 2 + 3 * i])))
            known = opened.attention._in_graph._known
            assert len(known) == opened.file.n_layers
            assert all(nodes._read() == nodes._made for nodes in known)
            for k in (2, 3):
                steps.append(compute(opened, (1, k + 3 * i, b[k + 3 * i : k + 1 + 3 * i])))
            if i == 5:
                opened.guests.stop = ValueError("stopped")
                with pytest.raises(ValueError, match="stopped"):
                    compute(opened, (0, 16, a[16:17]), (1, 19, b[19:20]))
    assert_equal([step[0] for step in steps[::3]], logits_alone(bundled_model, a, 10)[1:])
    assert_equal([step[-1] for step in steps], logits_alone(bundled_model, b, 1)[1:])


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


def test_nodes_are_known_where_they_are_what_they_were(bundled_model):
    """Those of another pass are not taken for them, nor is a node in the middle of a pass that they have over."""
    with shared(bundled_model, 2) as opened:
        for i in range(2):
            compute(opened, (0, i, (5,)), (1, i, (6,)))
        nodes = opened.attention._in_graph
        assert nodes.is_known(2)
        assert not nodes.is_known(3)
        last = nodes._known[-1].node
        mask, size = last.src[3], last.nb[3]
        last.src[3] = last.src[2]
        assert not nodes.is_known(2)
        last.src[3], last.nb[3] = mask, size + 8
        assert nodes.is_known(2)
        assert nodes._known[-1]._made == nodes._known[-1]._read()
        last.nb[3] = size
        address = ctypes.addressof(last)
        nodes.is_aimed = True
        assert not opened.attention.before(address)
        nodes.is_aimed = False
        assert opened.attention.before(address)


def test_nodes_of_a_pass_that_failed_or_that_differ_between_layers_are_not_known(bundled_model, monkeypatch):
    a, b = tokens(1, 14), tokens(2, 14)
    with shared(bundled_model, 2) as opened:
        compute(opened, (0, 0, a[:10]), (1, 0, b[:10]))
        attention, n, after = opened.attention, [], opened.attention.after

        def stop_at_the_third(address):
            n.append(address)
            opened.guests.stop = ValueError("stopped") if len(n) == 3 else opened.guests.stop
            after(address)

        attention.after = stop_at_the_third
        with pytest.raises(ValueError, match="stopped"):
            compute(opened, (0, 10, a[10:11]), (1, 10, b[10:11]))
        assert attention._in_graph._known == []
        found = [compute(opened, (0, i, a[i : i + 1]), (1, i, b[i : i + 1])) for i in (10, 11)]
        assert len(attention._in_graph._known) == opened.file.n_layers
        monkeypatch.setattr(in_graph._LayerNodes, "shapes", property(lambda nodes: [nodes.layer]))
        attention._in_graph._known = []
        found += [compute(opened, (0, i, a[i : i + 1]), (1, i, b[i : i + 1])) for i in (12, 13)]
        assert attention._in_graph._known == []
    assert_equal([step[0] for step in found], logits_alone(bundled_model, a, 10)[1:])
    assert_equal([step[1] for step in found], logits_alone(bundled_model, b, 10)[1:])


def test_texts_outgrow_the_cells_that_one_node_attends_to(bundled_model):
    a, b, found = tokens(30, 262), tokens(31, 262), [[], []]
    with shared(bundled_model, 2, n_threads=2) as opened:
        compute(opened, (0, 0, a[:250]), (1, 0, b[:250]))
        for i in range(250, 262):
            for own, logits in zip(found, compute(opened, (0, i, a[i : i + 1]), (1, i, b[i : i + 1])), strict=True):
                own.append(logits)
    for text, own in zip((a, b), found, strict=True):
        assert_equal(own, logits_alone(bundled_model, text, 250, n_threads=2)[1:])


def test_what_texts_see_is_added_to_their_tables():
    """Or written down anew: both come to the same."""
    random, tables = Random(4), SingleTokens(4)
    cells = {i: [random.randrange(5000) for _ in range(random.randrange(1, 9))] for i in range(6)}
    texts = [0, 1]
    for _ in range(300):
        if not random.randrange(4):
            i = random.randrange(6)
            cells[i] = [random.randrange(5000) for _ in range(random.randrange(1, 9))]
            tables.forget()
        if not random.randrange(3):
            texts = random.sample(range(6), random.randrange(1, 5))
        parts = [Part(i, len(cells[i]), (1,), 1) for i in texts]
        for i in texts:
            cells[i].append(random.randrange(5000))
        tables.place(parts, cells)
        for line, i in enumerate(texts):
            begin, end = line * PADDED, len(cells[i])
            assert tables.cells[begin : begin + end].tolist() == cells[i]
            assert tables.masks[begin : begin + PADDED].tolist() == [SEEN] * end + [NO_LOGIT] * (PADDED - end)


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


def test_nodes_are_made_anew_only_where_more_rows_are_copied(bundled_model):
    made = []
    with shared(bundled_model, 2) as opened:
        make = opened.attention._in_graph.make
        opened.attention._in_graph.make = lambda shape: made.append(shape) or make(shape)
        for i in range(20):
            compute(opened, (0, i, (5 + i,)), (1, i, (6,)))
    assert made == [(2, 8), (2, 16), (2, 24)]
