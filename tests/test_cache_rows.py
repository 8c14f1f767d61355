"""Keys and values that are put into another context's cache: what comes next has the same bits."""

from __future__ import annotations

import numpy as np
import pytest
from engines import assert_same, engine, greedy

from runtime.kv.rows import CacheRows
from runtime.plans.plan import Plan

PROMPT = [int(token) for token in np.random.default_rng(1).integers(1, 500, 37)]
SAME = {"repack": False, "n_ctx": 256, "n_threads": 1}


def rows_of(opened):
    return CacheRows(opened.caches, opened.file, opened.settings.n_ctx)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "f32"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "gemma2", "gemma3"])
def test_the_answer_goes_on_with_the_same_bits(arch, kv_type, tiny_model):
    path, settings = tiny_model(arch), SAME | {"kv_type": kv_type}
    with engine(path, **settings) as first:
        first.forward(PROMPT)
        rows = rows_of(first)
        n = len(rows.cell_bytes)
        data = [rows.read(at, 16, 0, n) for at in (0, 16, 32)]
        assert len(data[0]) == 16 * sum(rows.cell_bytes) > 0
        expected = greedy(first, [7], 20)
    with engine(path, **settings) as second:
        second.adopt(len(PROMPT))
        assert second.n_past == len(PROMPT)
        for at, block in zip((0, 16, 32), data, strict=True):
            rows_of(second).write(at, 16, 0, n, block)
        assert second.counters.passes == 0
        assert_same(greedy(second, [7], 20), expected)


def test_layers_are_put_in_one_by_one(tiny_model):
    path = tiny_model("qwen2")
    with engine(path, **SAME) as first, engine(path, **SAME) as second:
        first.forward(PROMPT)
        second.adopt(len(PROMPT))
        source, target = rows_of(first), rows_of(second)
        for at in (0, 16, 32):
            for layer in range(len(source.cell_bytes)):
                target.write(at, 16, layer, layer + 1, source.read(at, 16, layer, layer + 1))
        assert_same(greedy(second, [7], 8), greedy(first, [7], 8))


def test_without_its_keys_and_values_another_text_comes(tiny_model):
    """The comparison above sees it."""
    with engine(tiny_model("llama"), **SAME) as first, engine(tiny_model("llama"), **SAME) as second:
        first.forward(PROMPT)
        second.adopt(len(PROMPT))
        with pytest.raises(AssertionError):
            assert_same(greedy(second, [7], 20), greedy(first, [7], 20))


def test_weights_that_are_streamed_are_not_read_for_it(tiny_model):
    """And passes behind it, of the same size or another one, compute what they should."""
    path = tiny_model("llama")
    with engine(path, **SAME) as first, engine(path, Plan(1, 1, budget_bytes=0), **SAME) as second:
        first.forward(PROMPT[:32])
        before = second.counters.bytes_read
        second.adopt(32)
        assert second.counters.bytes_read == before
        source, target = rows_of(first), rows_of(second)
        for at in (0, 16):
            target.write(at, 16, 0, 4, source.read(at, 16, 0, 4))
        for tokens in (PROMPT[:16], PROMPT[:16], [5], PROMPT[16:]):
            first.forward(tokens)
            second.forward(tokens)
            assert np.array_equal(first.logits(), second.logits())


def test_where_positions_are_not_in_their_own_cells_there_are_none(tiny_model):
    with engine(tiny_model("llama"), **SAME) as opened:
        assert len(rows_of(opened).cell_bytes) == 4
        ((name, address), *_), file = next(filter(None, opened.caches)).items(), opened.file
        assert CacheRows(opened.caches, file, opened.settings.n_ctx + 256).cell_bytes == ()
        assert CacheRows([*opened.caches, {name.replace("_k_", "_r_"): address}], file, 256).cell_bytes == ()
