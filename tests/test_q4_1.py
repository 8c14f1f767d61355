"""Products of Q4_1 weights by a function of ours: llama.cpp's bits, in its graph, and its nodes again afterwards."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from engines import cancel_at_piece, engine
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.engine import engine as engine_module
from runtime.errors import Cancelled
from runtime.llama import abi, model_file, q4_1
from runtime.llama import turned as turned_module
from runtime.llama.q4_1 import Products, Trial
from runtime.passes import Part, Pass
from runtime.plans.plan import Plan

needs_function = pytest.mark.skipif(not q4_1.is_there(), reason="no compiler, or a processor without AVX2")
N_TEXTS = 13


@pytest.fixture
def path(bundled_variant):
    return bundled_variant("q4_1")


@pytest.fixture
def turned(monkeypatch):
    """How many nodes were turned together, each time; each is a product of llama.cpp's again afterwards."""
    q4_1.is_right()  # tried once in a process
    counts, put_back = [], Products.put_back

    def counting(self):
        nodes = self.turned
        assert all(node.op == abi.OP_CUSTOM for node in nodes)
        put_back(self)
        assert all(node.op == abi.OP_MUL_MAT and not any(node.op_params) for node in nodes)
        if nodes:
            counts.append(len(nodes))

    monkeypatch.setattr(Products, "put_back", counting)
    return counts


@needs_function
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 33), st.integers(1, 3), st.integers(0, 2**32))
def test_bits_are_those_of_llama_cpp(n_blocks, n_rows, n_columns, n_threads, seed):
    trial = Trial(32 * n_blocks, n_rows, n_columns, n_threads, Random(seed).randbytes)
    wanted = trial.compute(turned=False)
    products = Products(trial.backend)
    products.turn(trial.node)
    assert trial.node.op == (abi.OP_CUSTOM if n_columns >= 4 else abi.OP_MUL_MAT)
    products.put_back()
    assert trial.node.op == abi.OP_MUL_MAT and not any(trial.node.op_params)
    for _ in range(3):
        assert trial.compute(turned=True) == wanted
    trial.close()


def passes(opened):
    """Logits of prompts, and of passes with a token of each text; at last with one of two of them."""
    parts = [Part(i, 0, tuple(3 + (i * 31 + j * 7) % 250 for j in range(2 + i)), 1) for i in range(N_TEXTS)]
    found = []
    for step in range(4):
        parts = parts[: 2 if step == 3 else N_TEXTS]
        opened.compute([Pass(tuple(parts))])
        found.append(np.array([opened.logits(i) for i in range(len(parts))]))
        parts = [Part(part.sequence, part.end, (5 + part.sequence,), 1) for part in parts]
    return found


def logits_of(path, plan, n_threads=2):
    several = {"n_sequences": N_TEXTS, "n_logits": N_TEXTS}
    with engine(path, plan, n_ctx=512, n_ubatch=128, n_threads=n_threads, **several) as opened:
        return passes(opened)


@needs_function
@pytest.mark.parametrize("plan", [Plan(0, 1), Plan(99, 1)], ids=["streamed", "resident"])
def test_logits_are_the_same_with_and_without_it(path, monkeypatch, plan, turned):
    found = logits_of(path, plan)
    names = [one.name for one in model_file.ModelFile.open(path).tensors if one.type_name == q4_1.TYPE_NAME]
    assert turned == [len(names)] * 3  # not in the last pass
    monkeypatch.setattr(engine_module.q4_1, "is_right", lambda: False)
    turned.clear()
    wanted = logits_of(path, plan)
    assert not turned
    for own, other in zip(found, wanted, strict=True):
        assert np.array_equal(own, other)


@needs_function
def test_tiles_of_a_matrix_are_computed_by_it(path, monkeypatch, turned):
    whole = logits_of(path, Plan(0, 1))
    monkeypatch.setattr(model_file, "TILED_BYTES", 20_000)
    monkeypatch.setattr(model_file, "TILE_BYTES", 10_000)
    turned.clear()
    tiled = logits_of(path, Plan(0, 1))
    assert turned.count(1) > 10
    for own, other in zip(tiled, whole, strict=True):
        assert np.array_equal(own, other)


@needs_function
def test_a_pass_that_ends_leaves_no_node_turned(path, monkeypatch, turned):
    with engine(path, Plan(0, 1), n_threads=2) as opened:
        cancel_at_piece(monkeypatch, opened, 20)
        with pytest.raises(Cancelled):
            opened.forward(list(range(3, 20)))
        assert 0 < turned[-1] <= 20
        opened.forward(list(range(3, 20)))
        found = opened.logits().copy()
    monkeypatch.setattr(engine_module.q4_1, "is_right", lambda: False)
    with engine(path, Plan(0, 1), n_threads=2) as opened:
        opened.forward(list(range(3, 20)))
        assert np.array_equal(opened.logits(), found)


@needs_function
def test_what_lies_where_a_node_was_is_left_alone():
    trial = Trial(64, 3, 5)
    trial.compute(turned=False)
    products = Products(trial.backend)
    products.turn(trial.node)
    trial.node.op = abi.OP_MUL_MAT_ID
    other = bytes(trial.node)
    products.put_back()
    assert bytes(trial.node) == other
    trial.close()


@needs_function
def test_a_product_that_it_cannot_compute_stays_llama_cpps():
    trial = Trial(64, 3, 5)
    trial.compute(turned=False)
    products, cpu = Products(trial.backend), abi.cpu_backend(trial.backend)

    def is_turned():
        products.turn(trial.node)
        found = trial.node.op == abi.OP_CUSTOM
        products.put_back()
        return found

    assert is_turned()
    size, cpu.work_size = cpu.work_size, 5 * 2 * 36 - 1
    assert not is_turned()  # its columns do not fit
    cpu.work_size = size
    trial.node.op_params[1] = 1
    assert not is_turned()  # a hint
    trial.node.op_params[1] = 0
    for tensor in (trial.weights, trial.inputs):
        kind, tensor.type = tensor.type, 1
        assert not is_turned()
        tensor.type = kind
    assert is_turned()
    trial.close()


def test_without_it_nothing_is_turned(path, monkeypatch, turned):
    def reference():
        with engine(path, Plan(0, 1), n_threads=2) as opened:
            opened.forward(list(range(3, 20)))
            return opened.logits().copy()

    wanted = reference()
    turned.clear()
    monkeypatch.setattr(engine_module.q4_1, "is_right", lambda: False)
    assert np.array_equal(reference(), wanted)
    assert not turned


@needs_function
def test_other_bits_than_llama_cpps_are_noticed(monkeypatch):
    assert q4_1.is_right.__wrapped__()
    traits = abi.cpu_traits

    def other(type_id):
        found = traits(type_id)
        if type_id == 9:  # the columns': by another quantiser
            return abi.TypeTraitsCpu(traits(8).from_float, found.vec_dot, found.vec_dot_type, found.nrows)
        return found

    monkeypatch.setattr(abi, "cpu_traits", other)
    assert not q4_1.is_right.__wrapped__()


def test_it_is_not_used_where_it_is_not_there(monkeypatch):
    monkeypatch.setattr(turned_module, "LIBRARY", None)
    assert not q4_1.is_right.__wrapped__()
