"""Filtered attention against numpy: which rows are chosen, and what attending to them gives."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from engines import assert_same, engine, greedy
from kv_reference import Recorder, attend, best, per_head, softmax

from runtime.kv.options import KvFilter
from runtime.kv.selection import Selection
from runtime.plans.plan import Plan

THREADS = 2
PROMPT = [7 + (i * 37) % 200 for i in range(300)]
RESIDENT = Plan(4, 1, pinned_bytes=10**9)
KV_HEADS = 2


@pytest.fixture
def taken(monkeypatch):
    """The rows of every choice, in order."""
    rows, take = [], Selection.take

    def record(self, chosen):
        rows.append(chosen.copy())
        take(self, chosen)

    monkeypatch.setattr(Selection, "take", record)
    return rows


def open_filtered(path, **options):
    return engine(path, RESIDENT, n_ubatch=64, n_threads=THREADS, kv=KvFilter(**options))


@pytest.mark.parametrize("strategy", ["multi", "without_pack"])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_attention_over_a_subset(tiny_model, taken, arch, strategy):
    """Output of every sparse layer, over six tokens: chosen rows and the tail, nothing else."""
    with open_filtered(tiny_model(arch), keep=30, strategy=strategy) as opened:
        recorder, kv = Recorder(opened), opened.kv
        opened.forward(PROMPT)
        for step in range(6):
            opened.forward([11 + step])
            tail = len(PROMPT) + np.arange(step + 1)
            for layer in kv.roles.sparse:
                keys, values = recorder.cached(layer, opened.n_past, KV_HEADS)
                compact = kv._sparse._buffers.compact[layer]
                for part, rows in enumerate((keys, values)):
                    own = compact.rows[part][30 : 30 + step + 1].view(np.float16).reshape(step + 1, KV_HEADS, -1)
                    rows[tail] = own
                chosen = np.concatenate([taken[-1], tail])
                query, scale = recorder.queries[layer][-1], recorder.scales[layer]
                expected = attend(keys[chosen], values[chosen], query, scale)
                assert np.abs(recorder.outputs[layer] - expected).max() < 6e-3


def scores_of(select, recorder, layer, n_prompt, window):
    """Scores of the prompt's rows by the queries seen so far, and how many rows the window holds."""
    keys, _ = recorder.cached(layer, n_prompt, KV_HEADS)
    queries, scale = recorder.queries[layer], recorder.scales[layer]
    if select == "last":
        return per_head(keys, queries[-1]).max(axis=0) * scale
    if select == "softmax":
        return softmax(per_head(keys, queries[-1]) * scale).max(axis=0)
    total = np.zeros(n_prompt)
    first = len(queries) - window if select == "uniform" else n_prompt - window + 1
    for position in range(first, len(queries)):
        n = min(n_prompt, position + 1)
        found = softmax(per_head(keys[:n], queries[position]) * scale).max(axis=0)
        total = (total if select == "uniform" else total / 2) + np.pad(found, (0, n_prompt - n))
    inside = max(0, len(queries) - window)
    total[inside:] = np.inf
    return total


@pytest.mark.parametrize("select", ["last", "softmax", "uniform", "exp"])
def test_the_chosen_rows(tiny_model, taken, select):
    """Every selector's choice over 20 tokens (the window is 16) against a slow one; near ties may fall either way."""
    n_prompt = 150  # its last pass has 22 tokens
    with open_filtered(tiny_model("llama"), keep=40, select=select) as opened:
        recorder = Recorder(opened)
        opened.forward(PROMPT[:n_prompt])
        for step in range(20):
            opened.forward([11 + step])
            check_choice(scores_of(select, recorder, 0, n_prompt, 16), taken[-1])
        opened.forward(PROMPT[:5])  # a second turn: everything until now can be chosen
        n_prompt = opened.n_past
        opened.forward([50])
        check_choice(scores_of(select, recorder, 0, n_prompt, 16), taken[-1])


def check_choice(scores, rows):
    """Whether these are the 40 best rows, but for those whose scores are as good as equal."""
    different = np.setxor1d(rows, best(scores, 40))
    assert np.all(np.diff(rows) > 0) and len(rows) == 40
    assert np.allclose(scores[different], np.sort(scores)[-40], rtol=2e-2), different


def test_heavy_hitters(tiny_model, taken):
    """Half of the budget by attention summed over the prompt's queries and heads, half the last rows."""
    n_prompt = 90
    with open_filtered(tiny_model("llama"), keep=20, method="heavy") as opened:
        recorder = Recorder(opened)
        opened.forward(PROMPT[:n_prompt])
        queries = {layer: list(found) for layer, found in recorder.queries.items()}
        opened.forward([5])
        for i, layer in enumerate(opened.kv.roles.sparse):
            keys, _ = recorder.cached(layer, n_prompt, KV_HEADS)
            sums = np.zeros(n_prompt)
            for position, query in enumerate(queries[layer]):
                weights = softmax(per_head(keys[: position + 1], query) * recorder.scales[layer])
                sums[: position + 1] += weights.sum(axis=0)
            sums[-10:] = np.inf
            expected = best(sums, 20)
            different = np.setxor1d(taken[i], expected)
            assert np.allclose(sums[different], np.sort(sums)[-20], rtol=2e-2)


def poison(opened, chosen):
    """NaN over all rows of sparse layers in llama.cpp's cache but the chosen ones."""
    for layer in opened.kv.roles.sparse:
        for part in opened.kv.cache.layers[layer].parts:
            nan = np.full(part.row_bytes // 2, np.nan, np.float16)
            for row in set(range(part.n_cells)) - chosen:
                ctypes.memmove(part.data + row * part.row_bytes, nan.ctypes.data, part.row_bytes)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
def test_rows_that_are_not_chosen_are_never_read(tiny_model, taken, kv_type):
    path, kv = tiny_model("llama"), KvFilter(keep=30)
    settings = {"n_ubatch": 64, "n_threads": THREADS, "kv": kv, "kv_type": kv_type}
    with engine(path, RESIDENT, **settings) as opened:
        expected = greedy(opened, PROMPT, 8)
    chosen = {int(row) for rows in taken for row in rows}
    assert len(chosen) < len(PROMPT)
    with engine(path, RESIDENT, **settings) as opened:
        assert_same(greedy(opened, PROMPT, 8, before_token=lambda i: i or poison(opened, chosen)), expected)


def test_scores_for_whoever_watches(tiny_model):
    """What an analysis sees: softmax scores of the prompt's rows at every layer, with nothing filtered."""
    seen = {}
    with open_filtered(tiny_model("llama"), method="full") as opened:
        recorder = Recorder(opened)
        opened.kv.watch(range(4), lambda layer, scores: seen.setdefault(layer, []).append(scores))
        opened.forward(PROMPT)
        assert not seen
        opened.forward([5])
        opened.forward([6])
        for layer in range(4):
            assert [scores.shape for scores in seen[layer]] == [(300,), (300,)]
            keys, _ = recorder.cached(layer, 300, KV_HEADS)
            expected = softmax(per_head(keys, recorder.queries[layer][-1]) * recorder.scales[layer]).max(axis=0)
            assert np.allclose(seen[layer][1], expected, atol=2e-3)
