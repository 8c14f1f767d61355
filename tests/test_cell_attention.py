"""Attention to cells anywhere by a function of ours: llama.cpp's bits, in its graph, and its nodes again afterwards."""

from __future__ import annotations

import array
import ctypes

import numpy as np
import pytest
from engines import cancel_at_piece, engine
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import Cancelled
from runtime.kv import apart
from runtime.llama import abi, cell_attention
from runtime.llama import turned as turned_module
from runtime.llama.cell_attention import F16, CellAttention, Trial
from runtime.passes import Part, Pass
from runtime.plans.plan import Plan
from runtime.sizes import MB

Q8_0, Q4_0 = 8, 2
needs_function = pytest.mark.skipif(not cell_attention.is_there(), reason="no compiler, or a processor without AVX2")
PLAN = Plan(0, 1, budget_bytes=1000 * MB)
KV_TYPES = pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])


def text(seed, n):
    return tuple(3 + (seed * 31 + i * 7) % 250 for i in range(n))


@pytest.fixture
def turned(monkeypatch):
    """How many nodes were turned in each pass; each is an attention of llama.cpp's again afterwards."""
    for kind in (F16, Q8_0, Q4_0):
        cell_attention.is_right(kind)  # tried once in a process
    counts, put_back = [], CellAttention.put_back

    def counting(self):
        nodes = self.turned
        assert all(node.op == abi.OP_CUSTOM for node in nodes)
        wanted = [tuple(one.parameters) for one in self._nodes[: len(nodes)]]
        put_back(self)
        assert all(node.op == abi.OP_FLASH_ATTN_EXT for node in nodes)
        assert [tuple(np.array(node.op_params[:6], np.int32).view(np.uint64)) for node in nodes] == wanted
        counts.append(len(nodes))

    monkeypatch.setattr(CellAttention, "put_back", counting)
    return counts


def without_it(monkeypatch):
    monkeypatch.setattr(apart.cell_attention, "is_right", lambda _kind: False)


@needs_function
@settings(deadline=None, max_examples=100)
@given(
    st.sampled_from([(F16, 8), (Q8_0, 32), (Q4_0, 32)]),
    st.tuples(st.integers(1, 20), st.integers(0, 20)),
    st.integers(1, 63),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.integers(0, 900),
    st.integers(1, 3),
)
def test_bits_are_those_of_llama_cpp(kind, widths, n_tokens, heads, n_more, n_threads):
    """Of one token, with many positions, too: llama.cpp cuts them over its threads."""
    (type_id, block), n_tokens = kind, 1 if n_more > 250 else n_tokens
    width, value_width = (min(n * block, 512) for n in widths)
    shape, values = (width, n_tokens, heads[0] * heads[1]), (value_width, heads[1])
    trial = Trial(type_id, shape, n_tokens + n_more, n_threads, values)
    wanted = trial.compute(turned=False)
    for _ in range(2):
        assert trial.compute(turned=True) == wanted
    trial.close()


def passes(opened, n_texts, first=0, n=4):
    """Logits of passes of short prompts, then of a token of each text; at last of two of them, one behind the other."""
    parts = [Part(i, 0, text(i, first + 2 + i), 1) for i in range(n_texts)]
    found = []
    for step in range(n):
        parts = parts[:0:-1][:2] if step == n - 1 else parts
        opened.compute([Pass(tuple(parts))])
        found.append(np.array([opened.logits(i) for i in range(len(parts))]))
        parts = [Part(part.sequence, part.end, (5 + part.sequence,), 1) for part in parts]
    return found


def logits_of(path, plan=PLAN, first=0, n_texts=5, **settings):
    several = {"n_sequences": n_texts, "n_logits": n_texts}
    with engine(path, plan, n_ctx=2048, n_ubatch=512, **{"n_threads": 2, **several, **settings}) as opened:
        return passes(opened, n_texts, first), opened.file.n_layers


@needs_function
@KV_TYPES
@pytest.mark.parametrize("plan", [Plan(0, 1), PLAN], ids=["streamed", "resident"])
def test_logits_are_the_same_with_and_without_it(bundled_model, monkeypatch, plan, kv_type, turned):
    found, n_layers = logits_of(bundled_model, plan, kv_type=kv_type)
    assert turned == [n_layers] * 4
    without_it(monkeypatch)
    turned.clear()
    wanted, _ = logits_of(bundled_model, plan, kv_type=kv_type)
    assert not turned
    for own, other in zip(found, wanted, strict=True):
        assert np.array_equal(own, other)


@needs_function
def test_long_parts_are_llama_cpps(bundled_model, turned):
    found, n_layers = logits_of(bundled_model, first=60)
    assert turned == [0, n_layers, n_layers, n_layers]  # the longest prompt of the first pass has 66 tokens
    with engine(bundled_model, PLAN, n_ctx=2048, n_ubatch=512, n_threads=2) as opened:
        opened.forward(text(4, 66))
        for step, tokens in enumerate([(9,), (9,)]):
            assert np.array_equal(found[step][4], opened.logits())
            opened.forward(tokens)


@needs_function
def test_a_piece_of_a_long_block_is_llama_cpps(bundled_model, turned):
    with engine(bundled_model, PLAN, n_ctx=512, n_sequences=2, n_logits=2) as opened:
        opened.compute([Pass((Part(0, 0, text(1, 20), 1, long=True), Part(1, 0, (5,), 1)))])
        assert turned == [0]


@needs_function
def test_a_pass_that_ends_leaves_no_node_turned(bundled_model, monkeypatch, turned):
    wanted, n_layers = logits_of(bundled_model, Plan(0, 1))
    turned.clear()
    with engine(bundled_model, Plan(0, 1), n_ctx=2048, n_ubatch=512, n_threads=2, n_sequences=5, n_logits=5) as opened:
        cancel_at_piece(monkeypatch, opened, 20)
        with pytest.raises(Cancelled):
            passes(opened, 5)
        assert 0 < turned[0] <= n_layers
        for own, other in zip(passes(opened, 5), wanted, strict=True):
            assert np.array_equal(own, other)


@needs_function
def test_what_lies_where_a_node_was_is_left_alone():
    trial = Trial(F16, (64, 2, 1), 20)
    trial.compute(turned=False)
    own, node, cells = trial.own, trial.node, array.array("i", range(20))
    for change in ({"op": abi.OP_MUL_MAT_ID}, {"op_params": (ctypes.c_int32 * 16)(*range(16))}):
        before = bytes(node)
        trial.see(cells).turn(node)
        for name, value in change.items():
            setattr(node, name, value)
        other = bytes(node)
        own.put_back()
        assert bytes(node) == other
        ctypes.memmove(ctypes.byref(node), before, len(before))
    trial.close()


@needs_function
def test_an_attention_that_it_cannot_compute_stays_llama_cpps():
    trial = Trial(F16, (64, 2, 1), 20)
    trial.compute(turned=False)
    own, node, (query, keys, values) = trial.own, trial.node, (t[0] for t in (trial.query, trial.keys, trial.values))
    cells = array.array("i", range(20))
    trial.see(cells)
    lines, root = own.lines(cells, 18, 2), keys.view_src

    def is_turned():
        own.see(lines)
        own.turn(node)
        found = node.op == abi.OP_CUSTOM
        own.put_back()
        assert node.op == abi.OP_FLASH_ATTN_EXT
        return found

    assert is_turned()
    for i in (1, 2):  # what is added to products, and a limit of them
        ctypes.c_float.from_buffer(node, abi.Tensor.op_params.offset + 4 * i).value = 0.5
        assert not is_turned()
        node.op_params[i] = 0
    node.src[4] = node.src[3]  # sinks
    assert not is_turned()
    node.src[4] = None
    for tensor in (keys, values):
        tensor.type = Q8_0
        assert not is_turned()
        tensor.type = F16
    for tensor, i, ne in (
        (query, 1, 3),
        (query, 3, 2),
        (keys, 3, 2),
        (keys, 0, 520),
        (values, 0, 520),
        (values, 0, 60),
    ):
        before, tensor.ne[i] = tensor.ne[i], ne
        assert not is_turned()
        tensor.ne[i] = before
    keys.view_src = None  # no cache
    assert not is_turned()
    keys.view_src = root
    keys.data += 64  # not from its first cell on
    assert not is_turned()
    keys.data -= 64
    most, own._turning.most_turned = own._turning.most_turned, 0
    assert not is_turned()
    own._turning.most_turned = most
    assert is_turned()
    own.turn(node)
    assert node.op == abi.OP_FLASH_ATTN_EXT  # no pass
    trial.close()


@needs_function
def test_other_bits_than_llama_cpps_are_noticed(monkeypatch):
    def all_cells(_attention, cells, _first, n_tokens):
        return [cells.buffer_info()[0], len(cells), 0] * n_tokens

    try_ = cell_attention.is_right.__wrapped__
    assert try_(F16) and try_(Q8_0) and try_(Q4_0)
    traits = abi.cpu_traits
    monkeypatch.setattr(abi, "cpu_traits", lambda kind: traits(Q8_0 if kind == Q4_0 else kind))
    assert not try_(Q4_0)
    monkeypatch.setattr(abi, "cpu_traits", traits)
    monkeypatch.setattr(CellAttention, "lines", all_cells)
    assert not try_(F16)  # a token sees one cell too many


def test_it_is_not_used_where_it_is_not_there(monkeypatch):
    monkeypatch.setattr(turned_module, "LIBRARY", None)
    assert not cell_attention.is_right.__wrapped__(F16)
