"""Attention of dense layers by products: numpy's results, and values that are turned and come back bit for bit."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from engines import engine
from hypothesis import given
from hypothesis import strategies as st
from kv_reference import Recorder, attend

from runtime.kv.cache import Rows2D, V
from runtime.kv.dense import TurnedValues
from runtime.kv.options import KvFilter
from runtime.llama import abi
from runtime.memory import Region, view
from runtime.plans.plan import Plan

RESIDENT = Plan(4, 1, pinned_bytes=10**9)
PROMPT = [7 + (i * 37) % 200 for i in range(300)]
KV_HEADS = 2
N_VALUES = 40


def values_of(opened, layer, n_rows):
    """Bits of the values in llama.cpp's cache."""
    part = opened.kv.cache.layers[layer].parts[V]
    return bytes(view(part.data, n_rows * part.row_bytes))


def check(opened, recorder, layer, error):
    """The output of the last pass at a dense layer against numpy; brings its values back to the cache."""
    opened.kv._dense._turned[layer].give_back()
    keys, values = recorder.cached(layer, opened.n_past, KV_HEADS)
    expected = attend(keys, values, recorder.queries[layer][-1], recorder.scales[layer])
    assert np.abs(recorder.outputs[layer] - expected).max() < error * np.abs(expected).max()


@pytest.mark.parametrize("arch", ["llama", "qwen3", "phi3"])
def test_dense_layers_attend_to_every_row(tiny_model, arch):
    """Over several tokens, after a cut, in a second turn; llama.cpp adds up in f16 and is less exact."""
    with engine(tiny_model(arch), RESIDENT, n_ubatch=64, n_threads=2, kv=KvFilter(keep=30)) as opened:
        recorder = Recorder(opened)
        layers = [n for n in opened.kv.cache.filterable if n not in opened.kv.roles.sparse]
        opened.forward(PROMPT)
        before = {layer: values_of(opened, layer, len(PROMPT)) for layer in layers}
        for step in range(6):
            opened.forward([11 + step])
        for layer in layers:
            assert opened.kv._dense._turned[layer]._n_rows == opened.n_past
            check(opened, recorder, layer, 1e-3)
            assert values_of(opened, layer, len(PROMPT)) == before[layer]
        for tokens in ([20], [21]):
            opened.forward(tokens)
        opened.truncate(290)
        opened.forward(PROMPT[:9])
        opened.forward([30])
        opened.truncate(opened.n_past - 1)
        opened.forward([31])
        for layer in layers:
            check(opened, recorder, layer, 1e-3)


@pytest.mark.parametrize(("options", "kv_type"), [({"keep": 1.0}, "f16"), ({"keep": 400}, "f16"), ({}, "q8_0")])
def test_where_llama_cpp_attends_itself(tiny_model, options, kv_type):
    """All rows kept: its own bits are wanted. A quantised cache: values are not turned."""
    with engine(tiny_model("llama"), RESIDENT, n_ubatch=64, kv=KvFilter(**options), kv_type=kv_type) as opened:
        opened.forward(PROMPT)
        opened.forward([5])
        dense = opened.kv._dense
        assert dense is None or all(turned._n_rows == 0 for turned in dense._turned.values())


def test_few_rows(tiny_model, monkeypatch):
    """llama.cpp attends to few rows, and again after a cut."""
    monkeypatch.setattr("runtime.kv.dense.LEAST_ROWS", 152)
    with engine(tiny_model("llama"), RESIDENT, n_ubatch=64, kv=KvFilter(keep=30, layers=(0,), wait=1)) as opened:
        recorder, turned = Recorder(opened), opened.kv._dense._turned
        opened.forward(PROMPT[:150])
        for n_rows in (0, 152, 153):
            opened.forward([5])
            assert [turned[layer]._n_rows for layer in (0, 1)] == [n_rows, n_rows]
        for layer in (0, 1):
            check(opened, recorder, layer, 1e-3)
        opened.forward(PROMPT[:9])
        opened.truncate(150)
        opened.forward([7])
        assert [turned[layer]._n_rows for layer in (0, 1)] == [0, 0]
        for layer in (0, 1):
            check(opened, recorder, layer, 2e-2)


@pytest.mark.usefixtures("usual_rows")
def test_llama_cpp_attends_to_fewer_than_a_thousand_rows(tiny_model):
    shape = "llama:layers=4,dim=256,ffn=512,heads=4,kv_heads=2,vocab=512,ctx=2048,tied=0"
    kv = KvFilter(keep=30, layers=(0,), wait=1)
    with engine(tiny_model(shape), RESIDENT, n_ctx=2048, n_ubatch=512, kv=kv) as opened:
        recorder, turned = Recorder(opened), opened.kv._dense._turned
        opened.forward([7 + (i * 37) % 200 for i in range(1000)])
        opened.forward([5])
        assert [turned[layer]._n_rows for layer in (0, 1)] == [0, 0]
        check(opened, recorder, 0, 2e-2)
        opened.forward([9] * 30)
        opened.forward([5])
        assert [turned[layer]._n_rows for layer in (0, 1)] == [1032, 1032]
        check(opened, recorder, 0, 1e-3)


def test_a_budget_that_becomes_smaller_than_the_prompt(tiny_model):
    """llama.cpp attends while all rows are kept, products from then on, and llama.cpp again after a cut."""
    with engine(tiny_model("llama"), RESIDENT, n_ubatch=64, kv=KvFilter(keep=320)) as opened:
        recorder = Recorder(opened)
        layer = opened.kv.roles.filters[0]
        opened.forward(PROMPT)
        opened.forward([5])
        check(opened, recorder, layer, 2e-2)
        opened.forward(PROMPT[:30])
        opened.forward([6])
        assert opened.kv._dense._turned[layer]._n_rows == opened.n_past
        check(opened, recorder, layer, 1e-3)
        opened.forward([7])
        opened.truncate(300)
        opened.forward([8])
        assert opened.kv._dense._turned[layer]._n_rows == 0
        check(opened, recorder, layer, 2e-2)


@given(st.data())
def test_rows_are_turned_and_come_back(data):
    """Rows written, taken in, cut off and given back in any order; what lies around them in memory stays."""
    n_cells = data.draw(st.sampled_from([300, 5000]))
    before = data.draw(st.sampled_from([0, 48, 4096]))
    row_bytes, around = 2 * N_VALUES, 10_000
    region = Region(before + n_cells * row_bytes + around)
    everything = np.frombuffer(view(region.address, region.n_bytes), np.uint8)
    everything[:] = 77
    tensor = abi.Tensor()
    tensor.data = region.address + before
    turned = TurnedValues(Rows2D(ctypes.addressof(tensor), row_bytes, n_cells, is_half=True))
    in_cache = everything[before : before + n_cells * row_bytes].view(np.uint16).reshape(n_cells, N_VALUES)
    expected = np.zeros((n_cells, N_VALUES), np.uint16)
    numbers = np.random.default_rng(data.draw(st.integers(0, 9)))
    n_rows, n_turned = 0, 0
    for step in data.draw(st.lists(st.sampled_from(["write", "one", "cut", "back"]), min_size=3, max_size=12)):
        if step == "cut":
            n_rows = data.draw(st.integers(0, n_rows))
            turned.truncate(n_rows)
        elif step == "back":
            turned.give_back()
            n_turned = 0
            np.testing.assert_array_equal(in_cache[:n_rows], expected[:n_rows])
        else:
            n_new = min(1 if step == "one" else data.draw(st.integers(1, 3000)), n_cells - n_rows)
            rows = numbers.integers(0, 2**16, (n_new, N_VALUES), np.uint16)
            in_cache[n_rows : n_rows + n_new] = expected[n_rows : n_rows + n_new] = rows
            n_rows += n_new
            if data.draw(st.booleans()):
                turned.take_in(n_rows)
                n_turned = n_rows
        n_turned = min(n_turned, n_rows)
        described = abi.Tensor()
        turned.describe(described, n_cells, N_VALUES // 2)
        shape = (2, N_VALUES // 2, n_cells)
        seen = np.ndarray(shape, np.uint16, view(described.data, described.nb[3]), strides=list(described.nb)[2::-1])
        np.testing.assert_array_equal(seen.reshape(N_VALUES, n_cells)[:, :n_turned].T, expected[:n_turned])
        assert not seen[:, :, n_turned:].any()
    assert (everything[:before] == 77).all() and (everything[before + n_cells * row_bytes :] == 77).all()
    turned.free()
    region.free()
