"""Attention over keys and values of which a part lies in memory and the rest in a file, where it is not copied."""

from __future__ import annotations

from contextlib import ExitStack, closing

import numpy as np
import pytest

from h2o_cli.bench.batch.in_place import Attention, Ways, mapped, segments
from h2o_cli.main import run_command

TEXTS, KV_HEADS, HEADS, WIDTH = 6, 2, 4, 64
TOLERANCE = 2e-3  # the kernel sums values in 16 bits


def exact(query, keys, values):
    """Attention of one token in 64 bits: query [heads, width], keys and values [rows, kv_heads, width]."""
    found = []
    for head, one in enumerate(query.astype(np.float64)):
        shared = head // (len(query) // keys.shape[1])
        scores = keys[:, shared].astype(np.float64) @ one / np.sqrt(len(one))
        weights = np.exp(scores - scores.max())
        found.append(weights @ values[:, shared].astype(np.float64) / weights.sum())
    return np.array(found)


def texts_of(n_rows):
    random = np.random.default_rng(n_rows)
    cache = random.standard_normal((TEXTS, 2, n_rows, KV_HEADS, WIDTH)).astype(np.float16)
    return random.standard_normal((TEXTS, HEADS, WIDTH)).astype(np.float32), cache


@pytest.mark.parametrize(
    ("percents", "wanted"),
    [((100, 0), [12, 0]), ((50, 50), [6, 6]), ((30, 70), [2, 10]), ((0, 100), [0, 12]), ((30, 30, 40), [2, 2, 8])],
)
def test_parts_are_whole_texts_and_the_last_tier_has_the_rest(percents, wanted):
    parts = segments(TEXTS * KV_HEADS, KV_HEADS, percents)
    assert [len(part) for part in parts] == wanted
    assert [i for part in parts for i in part] == list(range(TEXTS * KV_HEADS))


@pytest.mark.parametrize("n_rows", [1, 40, 300, 1024])
@pytest.mark.parametrize("percent", [0, 50, 70, 100])
def test_mixed_attention_is_that_of_memory_alone_and_of_numpy(tmp_path, n_rows, percent):
    queries, cache = texts_of(n_rows)
    parts = segments(TEXTS * KV_HEADS, KV_HEADS, (percent, 100 - percent))
    in_memory, in_file = (range(part.start // KV_HEADS, part.stop // KV_HEADS) for part in parts)
    (tmp_path / "cache").write_bytes(cache[in_file.start :].tobytes() or b"\0")
    half = cache[0, 0].nbytes
    with ExitStack() as opened:
        attention = opened.enter_context(closing(Attention(2)))
        address, _ = opened.enter_context(mapped(tmp_path / "cache"))
        starts = [cache[i].ctypes.data for i in in_memory]
        starts += [address + i * 2 * half for i in range(len(in_file))]
        mixed = [
            attention.compute(query, start, start + half, n_rows, KV_HEADS)
            for query, start in zip(queries, starts, strict=True)
        ]
        pure = [
            attention.compute(query, one.ctypes.data, one.ctypes.data + half, n_rows, KV_HEADS)
            for query, one in zip(queries, cache, strict=True)
        ]
    assert np.array_equal(mixed, pure)
    wanted = [exact(query, *one) for query, one in zip(queries, cache, strict=True)]
    assert np.abs(np.array(mixed) - wanted).max() < TOLERANCE


def test_all_ways_give_the_same_attention(tmp_path):
    with closing(Attention(1)) as attention, closing(Ways(attention, tmp_path / "cache", 70)) as ways:
        found = [ways.copied(), ways.copied_ahead(), ways.in_place(), ways.in_place(ahead=True)]
    assert all(np.array_equal(found[0], one) for one in found)
    assert not (tmp_path / "cache").exists()


def test_the_flag_is_answered_with_the_reason(bundled_model, tmp_path, capsys):
    files = ["-f", tmp_path / "p", "-o", tmp_path / "a"]
    assert run_command([str(word) for word in ("batch", bundled_model, *files, "--cpu-cache-compute")]) == 2
    assert "docs/batch.md" in capsys.readouterr().err
