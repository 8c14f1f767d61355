"""The engine's logits are llama.cpp's own, bit for bit, whatever is resident and however the rest is streamed."""

from __future__ import annotations

import numpy as np
import pytest
from engines import assert_same, engine, greedy
from reference import reference_logits_and_tokens, system_info
from tiny_models import ARCHS, OTHER_ARCHS

from runtime.llama import model_file
from runtime.llama.model_file import ModelFile
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import smallest_window, streamable_bytes

THREADS = 2


def prompt_of(n):
    return [7 + (i * 37) % 200 for i in range(n)]


def check(path, plan, n_prompt=7, n_predict=8, n_ubatch=64, reference=None, **settings):
    prompt = prompt_of(n_prompt)
    if reference is None:
        reference = reference_logits_and_tokens(
            path, prompt, n_predict, n_ctx=512, n_ubatch=n_ubatch, n_threads=THREADS, **settings
        )
    with engine(path, plan, n_ubatch=n_ubatch, n_threads=THREADS, **settings) as opened:
        assert_same(greedy(opened, prompt, n_predict), reference)
        return opened.counters, opened.streamed_bytes


@pytest.mark.parametrize("file_type", ["q8_0", "f16"])
def test_bundled_model_under_every_kind_of_plan(bundled_variant, file_type):
    path = bundled_variant(file_type)
    n_layers = ModelFile.open(path).n_layers
    prompt = prompt_of(7)
    reference = reference_logits_and_tokens(path, prompt, 64, n_ctx=512, n_ubatch=64, n_threads=THREADS)
    for layout in Layout:
        for k in (0, n_layers // 3, n_layers):
            for w in (1, 2, 4):
                with engine(path, Plan(k, w, layout), n_ubatch=64, n_threads=THREADS) as opened:
                    assert_same(greedy(opened, prompt, 64), reference)


@pytest.mark.parametrize("file_type", ["q8_0", "f16", "f32"])
@pytest.mark.parametrize("n_prompt", [1, 7, 300])
def test_trained_stories_model(stories, file_type, n_prompt):
    check(stories(file_type), Plan(2, 1, Layout.BALANCED), n_prompt, n_predict=64)


@pytest.mark.parametrize("n_prompt", [1, 300])
@pytest.mark.parametrize("file_type", ["q8_0", "f16"])
def test_prompts_of_one_token_and_of_several_ubatches(bundled_variant, file_type, n_prompt):
    check(bundled_variant(file_type), Plan(2, 1, Layout.BALANCED), n_prompt)


@pytest.mark.parametrize("arch", [*ARCHS, *OTHER_ARCHS])
@pytest.mark.parametrize("file_type", ["f16", "q8_0"])
def test_architectures(tiny_model, arch, file_type):
    path = tiny_model(arch, file_type)
    prompt = prompt_of(70)
    reference = reference_logits_and_tokens(path, prompt, 6, n_ctx=512, n_ubatch=64, n_threads=THREADS)
    for plan in (Plan(0, 1), Plan(1, 2, Layout.EVEN), Plan(2, 1, Layout.BALANCED)):
        check(path, plan, 70, 6, reference=reference)


@pytest.mark.parametrize("file_type", ["q4_0", "q4_1", "q4_K", "q6_K"])
def test_quantisations(tiny_model, file_type):
    path = tiny_model("llama", file_type)
    check(path, Plan(0, 1), 70)
    check(path, Plan(2, 2, Layout.BALANCED), 7)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "qwen3moe"])
def test_window_of_one_tensor(tiny_model, arch):
    """The smallest ring: every tensor has to leave before the next one can come, in whatever order they are used."""
    path = tiny_model(arch)
    window = smallest_window(ModelFile.open(path))
    counters, streamed = check(path, Plan(0, 1, window_bytes=window), 70, 6)
    assert counters.bytes_read >= 6 * streamed


def test_quantised_kv(tiny_model):
    check(tiny_model("llama"), Plan(1, 1), 70, kv_type="q8_0")


def test_everything_resident_reads_each_byte_once(tiny_model):
    path = tiny_model("llama")
    with engine(path, Plan(4, 1, Layout.BALANCED, pinned_bytes=10**9)) as opened:
        greedy(opened, prompt_of(3), 2)
        before = opened.counters.bytes_read
        opened.forward([5])
        assert opened.streamed_bytes == 0
        assert opened.counters.bytes_read - before <= 8192 * 2  # nothing but an embedding row


@pytest.mark.skipif("AMX_INT8 = 1" in system_info(), reason="llama.cpp's default is another arrangement with AMX")
@pytest.mark.parametrize("file_type", ["q4_0", "q4_K", "q8_0"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3moe"])
def test_everything_resident_computes_as_llama_cpp_does_by_default(tiny_model, arch, file_type):
    """Weights that all fit are repacked like llama.cpp's own; once some are streamed again they are plain again."""
    path, prompt = tiny_model(arch, file_type), prompt_of(70)
    options = {"n_ctx": 512, "n_ubatch": 64, "n_threads": THREADS}
    by_default = reference_logits_and_tokens(path, prompt, 6, repack=True, **options)
    plain = reference_logits_and_tokens(path, prompt, 6, **options)
    everything = Plan(4, 1, Layout.BALANCED, pinned_bytes=10**9)
    with engine(path, everything, n_ubatch=64, n_threads=THREADS) as opened:
        assert_same(greedy(opened, prompt, 6), by_default)
        opened.truncate(0)
        opened.apply(Plan(0, 1))
        assert_same(greedy(opened, prompt, 6), plain)
        opened.truncate(0)
        opened.apply(everything)
        assert_same(greedy(opened, prompt, 6), by_default)


def test_streamed_bytes_are_read_once_per_token(tiny_model):
    with engine(tiny_model("llama"), Plan(1, 1)) as opened:
        greedy(opened, prompt_of(3), 8)
        start, reads = opened.counters.bytes_read, 8
        for _ in range(reads):
            opened.forward([5])
        per_token = (opened.counters.bytes_read - start) / reads
        assert per_token == pytest.approx(opened.streamed_bytes, rel=0.1)


def test_plans_change_between_any_two_tokens(tiny_model):
    path = tiny_model("qwen2")
    prompt = prompt_of(20)
    reference = reference_logits_and_tokens(path, prompt, 40, n_ctx=512, n_ubatch=64, n_threads=THREADS)
    rng = np.random.default_rng(1)
    with engine(path, Plan(0, 1), n_ubatch=64, n_threads=THREADS) as opened:

        def change(_):
            layout = Layout(int(rng.integers(3)))
            opened.apply(Plan(int(rng.integers(5)), int(rng.integers(1, 4)), layout, int(rng.integers(2)) * 10**6))

        assert_same(greedy(opened, prompt, 40, change), reference)
        assert opened.layout.plan_changes == 39


def test_prefetched_input_embedding_is_read_once(tiny_model):
    path = tiny_model("llama")
    check(path, Plan(1, 1), 70, prefetch_input=True, reference=llama_reference(path))
    with engine(path, Plan(4, 1, Layout.BALANCED, pinned_bytes=10**9), prefetch_input=True) as opened:
        greedy(opened, prompt_of(3), 2)
        before = opened.counters.bytes_read
        opened.forward([100, 300, 500])
        assert opened.counters.bytes_read == before
        assert opened.ledger.embedding_bytes >= opened.file.row_tables[0].n_bytes


def llama_reference(path):
    return reference_logits_and_tokens(path, prompt_of(70), 8, n_ctx=512, n_ubatch=64, n_threads=THREADS)


def test_truncated_sequence_goes_on_as_if_never_longer(tiny_model):
    path = tiny_model("llama")
    with engine(path, Plan(1, 1)) as opened:
        opened.forward(prompt_of(9))
        opened.forward([3])
        first = opened.logits().copy()
        opened.forward([4])
        opened.truncate(9)
        opened.forward([3])
        assert np.array_equal(opened.logits(), first)


def test_logits_of_several_positions(tiny_model):
    path = tiny_model("llama", "q8_0")
    with engine(path, Plan(1, 1), n_logits=4) as opened:
        opened.forward(prompt_of(9), n_logits=4)
        last_four = [opened.logits(i).copy() for i in range(4)]
        opened.truncate(0)
        opened.forward(prompt_of(6))
        for expected, token in zip(last_four, [*prompt_of(9)[6:], None], strict=True):
            assert np.allclose(opened.logits(), expected, atol=1e-2)
            if token is not None:
                opened.forward([token])


@pytest.mark.parametrize("file_type", ["f16", "q8_0", "q4_0", "q4_1", "q4_k_m"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma2", "phi3"])
def test_matrices_of_a_layer_in_tiles(tiny_model, monkeypatch, arch, file_type):
    """Streamed, partly resident, resident; a prompt longer than a pass, and single tokens after it."""
    path = tiny_model(arch, file_type)
    n_whole = len(list(ModelFile.open(path).pieces))
    monkeypatch.setattr(model_file, "TILED_BYTES", 40_000)
    monkeypatch.setattr(model_file, "TILE_BYTES", 20_000)
    file = ModelFile.open(path)
    assert len(list(file.pieces)) > 2 * n_whole
    prompt = prompt_of(150)
    reference = reference_logits_and_tokens(path, prompt, 6, n_ctx=512, n_ubatch=128, n_threads=THREADS)
    half = streamable_bytes(file) // 2
    window = 3 * smallest_window(file)
    for plan in (
        Plan(0, 1, window_bytes=window),
        Plan(2, 1, Layout.BALANCED, pinned_bytes=half, window_bytes=window),
        Plan(2, 1, Layout.PREFIX, pinned_bytes=half),
        Plan(4, 1, pinned_bytes=2 * half),
    ):
        check(path, plan, reference=reference, n_prompt=150, n_predict=6, n_ubatch=128, repack=False)
