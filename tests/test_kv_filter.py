"""Filtered decoding: all rows kept gives llama.cpp's own bits; rows that are not chosen are never read."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from engines import assert_same, engine, greedy

from runtime.kv.options import KvFilter
from runtime.plans.plan import Plan

THREADS = 2
PROMPT = [7 + (i * 37) % 200 for i in range(300)]
WINDOWED = "cohere2:layers=12,dim=256,ffn=512,heads=4,kv_heads=2,vocab=512,ctx=1024"
RESIDENT = Plan(4, 1, pinned_bytes=10**9)
STREAMED = Plan(0, 1)


def answer(path, plan=RESIDENT, n_predict=8, prompt=PROMPT, **settings):
    with engine(path, plan, n_ubatch=64, n_threads=THREADS, **settings) as opened:
        return greedy(opened, prompt, n_predict)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "phi3", "falcon", "gpt2", WINDOWED])
def test_all_rows_kept_gives_the_same_bits(tiny_model, arch, kv_type):
    path = tiny_model(arch)
    settings = {"kv_type": kv_type, "n_ctx": 1024 if arch == WINDOWED else 512}
    plain = answer(path, RESIDENT, **settings)
    for plan in (RESIDENT, STREAMED):
        assert_same(answer(path, plan, kv=KvFilter(keep=1.0, wait=0, layers=()), **settings), plain)


def test_all_rows_kept_over_the_borders_of_a_graph(tiny_model):
    """llama.cpp makes a new graph where the rows pass a multiple of 256, and another attention kernel from 512 on."""
    path = tiny_model("llama")
    for n_prompt in (250, 505):
        prompt = [7 + (i * 37) % 200 for i in range(n_prompt)]
        plain = answer(path, prompt=prompt, n_predict=14, n_ctx=1024)
        assert_same(answer(path, prompt=prompt, n_predict=14, n_ctx=1024, kv=KvFilter(keep=1.0)), plain)


def poison(opened):
    """Write NaN over the rows that sparse layers have in llama.cpp's cache."""
    for layer in opened.kv.roles.sparse:
        for part in opened.kv.cache.layers[layer].parts:
            nan = np.full(part.n_bytes // 2, np.nan, np.float16)
            ctypes.memmove(part.data, nan.ctypes.data, part.n_bytes)


def test_rows_that_are_not_chosen_are_not_read(tiny_model):
    """With the first and the last rows chosen for good, nothing is fetched after the first token."""
    path, kv = tiny_model("llama"), KvFilter(keep=40, method="sinks")
    expected = answer(path, kv=kv)
    with engine(path, RESIDENT, n_ubatch=64, n_threads=THREADS, kv=kv) as opened:
        assert_same(greedy(opened, PROMPT, 8, before_token=lambda i: poison(opened) if i == 1 else None), expected)


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("plan", [RESIDENT, STREAMED])
@pytest.mark.parametrize("options", [{"keep": 1.0}, {"keep": 0.1, "least": 1}, {"keep": 33, "block": 8}])
def test_a_store_on_disk_gives_the_same_bits(tiny_model, tmp_path, kv_type, plan, options):
    path = tiny_model("llama")
    in_ram = answer(path, plan, kv=KvFilter(**options), kv_type=kv_type)
    on_disk = KvFilter(**options, store="disk", folder=str(tmp_path))
    assert_same(answer(path, plan, kv=on_disk, kv_type=kv_type), in_ram)
    assert not list(tmp_path.glob("h2o-kv*"))
