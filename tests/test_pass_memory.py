"""The memory that passes take and give back."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from engines import engine
from stores import bytes_in_memory

from runtime.engine.pass_memory import PROMPT as PROMPT_USE
from runtime.engine.pass_memory import Use, rows_for
from runtime.llama import abi
from runtime.memory import resident_bytes_outside
from runtime.passes import Part
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import smallest_window, streamable_bytes
from runtime.settings import SHORT_PASS
from runtime.sizes import MB, PAGE, page_down, page_up

PROMPT = [3 + i * 7 % 250 for i in range(300)]


def sizes(opened, n_tokens):
    """The tokens of each pass that n_tokens take."""
    return [pass_.n_tokens for pass_ in opened.cut(Part(0, 0, (5,) * n_tokens), decode=False)]


@pytest.mark.parametrize("n_ubatch", [100, 128, 200, 512])
def test_a_small_budget_makes_no_context_for_shorter_passes(n_ubatch, tiny_model, monkeypatch):
    monkeypatch.setattr("runtime.engine.engine.Engine.apply", lambda *_: None)
    with engine(tiny_model("llama"), Plan(0, 1, budget_bytes=1), n_ubatch=n_ubatch) as opened:
        assert sizes(opened, n_ubatch) == [n_ubatch] * (n_ubatch <= 128) or min(sizes(opened, n_ubatch)) >= 64


def logits_after_prompt(opened):
    opened.forward(PROMPT)
    first = opened.logits().copy()
    opened.forward([9])
    return first, opened.logits().copy()


@pytest.mark.parametrize("file_type", ["q8_0", "f16"])
def test_the_answer_is_the_same_however_many_passes_a_prompt_takes(bundled_variant, file_type):
    path = bundled_variant(file_type)
    results = []
    for n_ubatch, budget in ((512, 0), (512, 1000 * MB), (150, 0)):
        plan = Plan(0, 1, Layout.BALANCED, budget_bytes=budget)
        with engine(path, plan, n_ubatch=n_ubatch, repack=False) as opened:
            results.append((len(sizes(opened, len(PROMPT))), *logits_after_prompt(opened)))
    assert [n for n, *_ in results] == [3, 1, 4]
    for _, *logits in results:
        assert all(np.array_equal(a, b) for a, b in zip(logits, results[0][1:], strict=True))


def touched_bytes(regions):
    return bytes_in_memory([region.range for region in regions])


@pytest.mark.parametrize("n_logits", [4, 33])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi3", "qwen3moe", "gpt2", "cohere2"])
def test_after_a_prompt_short_passes_stay_within_their_share(tiny_model, arch, n_logits):
    shape = "layers=4,dim=256,ffn=512,heads=4,kv_heads=4,vocab=8192,ctx=512"  # logits of 33 tokens are the most of it
    model = f"{arch}:{shape}" if n_logits == 33 else arch
    with engine(tiny_model(model), n_ubatch=512 if n_logits == 4 else 40, n_logits=n_logits, n_ctx=512) as opened:
        buffers, memory = opened._context.buffers, opened.layout.needs.passes
        scratch = [region for region in buffers.regions if region not in buffers._cleared]
        prompt = PROMPT[: sizes(opened, 300)[0]]
        opened.forward(prompt)
        assert touched_bytes(scratch) <= memory.compute(Use(long=True))
        for n in (1, 4, SHORT_PASS, 2, min(17, n_logits), min(33, n_logits), 1):
            rows = rows_for(min(n, n_logits), n_logits)
            if rows == 1:
                opened._context.drop_scratch()
            opened.forward([5] * n, min(n, n_logits))
            assert touched_bytes(scratch) <= memory.compute(Use(long=False, rows=rows if n <= 4 else n_logits)), n


def ggmls_scratch(opened):
    """The pages of ggml's scratch."""
    return [(page_down(b.work_data), page_up(b.work_data + b.work_size)) for b in opened._context._backends()]


SHAPE = "llama:layers=2,dim=512,ffn=1024,heads=4,kv_heads=2,vocab=4000,ctx=512"  # its head has tiles


@pytest.mark.parametrize("n_threads", [1, 2, 8])
@pytest.mark.parametrize(
    ("model", "file_type"),
    [(SHAPE, "f16"), (SHAPE, "q8_0"), (SHAPE, "q4_0"), (SHAPE, "q4_k"), (SHAPE, "iq4_xs"), ("qwen3moe", "q4_k")],
)
def test_scratch_of_every_thread_is_counted(model, file_type, n_threads, tiny_model):
    """Inputs of products, tiles of products from 8 tokens on, tiles of attention from 64."""
    with engine(tiny_model(model, file_type), n_threads=n_threads, n_ubatch=200, n_logits=9, repack=False) as opened:
        memory, planned = opened.layout.needs.passes, ggmls_scratch(opened)
        budget = opened.layout.fixed_bytes + streamable_bytes(opened.file) // 2 + 2 * smallest_window(opened.file)
        opened.apply(Plan(0, 1, Layout.BALANCED, window_bytes=2 * smallest_window(opened.file), budget_bytes=budget))
        for n, rows in ((8, 1), (7, 1), (9, 9), (1, 1), (16, 1), (64, 1), (128, 1), (1, 1)):
            opened._context.drop_scratch()
            opened.truncate(0)
            opened.forward(PROMPT[:n], rows)
            touched, counted = bytes_in_memory(ggmls_scratch(opened)), memory.scratch.bytes_for(n, rows)
            assert touched <= counted <= 2 * touched + n_threads * 4 * PAGE, (n, rows)
            assert counted <= opened.ledger.compute_bytes
        assert ggmls_scratch(opened) == planned  # ggml needed no other


def test_tiles_of_products_do_not_stay(tiny_model):
    """A pass of 8 tokens is as short as one of a token and its drafts, but not where threads compute in tiles."""
    with engine(tiny_model(SHAPE, "q4_k"), n_threads=8, n_ubatch=64, repack=False) as opened:
        budget = opened.layout.fixed_bytes + streamable_bytes(opened.file) // 2 + 2 * smallest_window(opened.file)
        opened.apply(Plan(0, 1, Layout.BALANCED, window_bytes=2 * smallest_window(opened.file), budget_bytes=budget))
        opened.forward(PROMPT[:8])
        tiles = bytes_in_memory(ggmls_scratch(opened))
        assert opened.ledger.compute_bytes > tiles > 8 * 256 * 1024
        opened.forward([5])
        assert bytes_in_memory(ggmls_scratch(opened)) < tiles // 20
        assert opened.ledger.compute_bytes < tiles


def test_weights_make_room_for_a_prompt_and_come_back(bundled_model):
    with engine(bundled_model, n_ubatch=256, n_ctx=256) as opened:  # a context that the prompt fills
        fixed = opened.layout.fixed_bytes
        budget = fixed + streamable_bytes(opened.file) // 2 + 2 * smallest_window(opened.file)
        opened.apply(Plan(0, 1, Layout.BALANCED, window_bytes=2 * MB, budget_bytes=budget))
        opened.forward(PROMPT[:250])
        during = opened.ledger
        opened.forward([5])
        after = opened.ledger
        assert during.fixed_bytes == fixed
        assert after.resident_bytes > during.resident_bytes
        assert max(during.total_bytes, after.total_bytes) <= budget
        opened.truncate(0)
        opened.forward(PROMPT[:200])
        assert opened.ledger.total_bytes <= budget
        assert opened.ledger.resident_bytes < after.resident_bytes
        assert opened.layout.plan_changes == 1


def without_cache(ledger):
    """The fixed bytes without keys and values, whose room grows with the context."""
    return ledger.fixed_bytes - ledger.kv_bytes


def output_pages(opened, n_bytes):
    """The whole pages of llama.cpp's output."""
    logits = ctypes.addressof(abi.llama.llama_get_logits(opened.context).contents)
    return [(page_up(logits), page_down(logits + n_bytes))]


def test_weights_take_the_place_of_the_logits_of_drafts_that_are_not_made(bundled_model):
    with engine(bundled_model, n_ubatch=64, n_ctx=512, n_logits=16) as opened:
        budget = opened.layout.fixed_bytes + streamable_bytes(opened.file) // 2 + 2 * smallest_window(opened.file)
        opened.apply(Plan(0, 1, Layout.BALANCED, window_bytes=2 * MB, budget_bytes=budget))
        rows = 15 * 4 * opened.n_vocab

        def token(n_drafted=0):
            opened.forward([5] * (1 + n_drafted), 1 + n_drafted)
            return opened.ledger

        opened.forward(PROMPT[:60])
        prompt = opened.ledger
        without = token()
        drafted = token(15)
        assert drafted.compute_bytes >= without.compute_bytes + rows
        assert drafted.resident_bytes < without.resident_bytes
        assert drafted.total_bytes <= budget
        fixed = max(without_cache(prompt), without_cache(drafted))  # never both at once
        assert opened.layout.fixed_bytes - opened.layout._cache.n_bytes == fixed
        output = output_pages(opened, rows)
        assert bytes_in_memory(output) > rows * 3 // 4
        back = token()
        assert without_cache(back) == without_cache(without)
        assert back.resident_bytes > drafted.resident_bytes
        assert bytes_in_memory(output) < rows // 4


def test_with_room_for_everything_a_prompts_memory_stays(bundled_model):
    with engine(bundled_model, Plan(0, 1, budget_bytes=1000 * MB), n_ubatch=256, n_ctx=1024) as opened:
        buffers = opened._context.buffers
        scratch = [region for region in buffers.regions if region not in buffers._cleared]
        opened.forward(PROMPT[:256])
        used = touched_bytes(scratch)
        opened.forward([5])
        assert touched_bytes(scratch) >= used > opened.layout.needs.passes.compute(Use(long=False))
        assert opened.ledger.total_bytes <= 1000 * MB
        smaller = opened.layout.fixed_bytes + streamable_bytes(opened.file) // 2
        opened.apply(Plan(0, 1, Layout.BALANCED, window_bytes=2 * MB, budget_bytes=smaller))
        opened.forward([5])
        assert touched_bytes(scratch) <= opened.layout.needs.passes.compute(Use(long=False))
        assert opened.ledger.total_bytes <= smaller


def test_a_prompts_memory_stays_where_all_weights_are_there_beside_it(bundled_model, monkeypatch):
    """Without room for a full context and drafts; then a token finds its pages, and nothing is laid out or counted for
    it."""
    with engine(bundled_model, n_ubatch=256, n_ctx=512, n_logits=16, repack=False) as opened:
        layout = opened.layout
        monkeypatch.setattr(layout._code, "begin", lambda: None)  # no pages of libraries make room
        buffers, needs, total = opened._context.buffers, layout.needs, streamable_bytes(opened.file)
        scratch = [region for region in buffers.regions if region not in buffers._cleared]
        prompt = needs.ledger(PROMPT_USE)
        budget = without_cache(prompt) + needs.kv_bytes(256) + total + 2 * PAGE
        opened.apply(Plan(0, 1, budget_bytes=budget))
        opened.forward(PROMPT[:250])
        assert not layout._fits
        used, laid_out = touched_bytes(scratch), []
        assert used > needs.passes.compute(Use(long=False))
        with monkeypatch.context() as patch:
            patch.setattr(layout, "_lay_out", lambda *args, **_: laid_out.append(args))
            patch.setattr(layout, "_beside_all", lambda *args: laid_out.append(args))
            opened.forward([5])
        assert (touched_bytes(scratch), laid_out) == (used, [])
        for _ in range(40):  # keys and values need the room
            opened.forward([5])
        assert opened.streamed_bytes == 0
        assert touched_bytes(scratch) <= needs.passes.compute(Use(long=False))
        assert opened.ledger.total_bytes <= budget


def test_where_all_weights_fit_beside_all_pages_of_libraries_nobody_looks_at_those(bundled_model, monkeypatch):
    with engine(bundled_model, n_ctx=512, n_logits=16) as opened:
        layout = opened.layout
        prompt = without_cache(layout.needs.ledger(PROMPT_USE))
        full = prompt + layout.needs.kv_bytes(64) + streamable_bytes(opened.file)
        looks = []
        monkeypatch.setattr(layout._code, "begin_pass", lambda *, long, streams: looks.append(long) or False)
        for budget in (full + MB, full - 2 * MB):
            opened.truncate(0)
            opened.apply(Plan(0, 1, budget_bytes=budget))
            opened.forward(PROMPT[:30])
            opened.forward([5])
            opened.forward([5])
        assert looks == [True, True, False, False]


def test_logits_of_drafts_made_while_everything_fitted_are_gone_under_a_smaller_budget(bundled_model):
    with engine(bundled_model, Plan(0, 1, budget_bytes=1000 * MB), n_ubatch=256, n_ctx=1024, n_logits=16) as opened:
        rows = 15 * 4 * opened.n_vocab
        opened.forward(PROMPT[:256])
        opened.forward([5] * 16, 16)
        opened.forward([5])
        assert bytes_in_memory(output_pages(opened, rows)) > rows * 3 // 4
        smaller = opened.layout.fixed_bytes + streamable_bytes(opened.file) // 2
        opened.apply(Plan(0, 1, Layout.BALANCED, window_bytes=2 * MB, budget_bytes=smaller))
        opened.forward(PROMPT[:100])
        assert bytes_in_memory(output_pages(opened, rows)) < rows // 4


def test_what_was_freed_is_given_back_before_the_process_is_measured(bundled_model, monkeypatch):
    """Blocks of the heap that were freed between others that are in use: their pages stay until the heap is trimmed."""
    libc, block_bytes, counted = ctypes.CDLL(None), 64 * 2**10, []
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    blocks = [libc.malloc(block_bytes) for _ in range(512)]
    for block in blocks:
        ctypes.memset(block, 1, block_bytes)
    every_second, others = blocks[::2], blocks[1::2]

    def free_every_second(opened):
        counted.append(resident_bytes_outside(opened._store.ranges))
        while every_second:
            libc.free(every_second.pop())

    monkeypatch.setattr("runtime.engine.engine.Engine._open_attention", free_every_second)
    with engine(bundled_model) as opened:
        (before,), after = counted, opened.layout.needs.process_bytes
    for block in others:
        libc.free(block)
    assert before - after > len(others) * block_bytes * 3 // 4
