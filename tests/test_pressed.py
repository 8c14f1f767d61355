"""Texts that are swapped out and in go on as if nothing had been: the same bits, the same answers."""

from __future__ import annotations

import os
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from engines import engine
from test_batch import GREEDY, PROMPTS, batched

from runtime.answer.admission import Admission
from runtime.answer.batch import Wanted
from runtime.answer.generate import Request
from runtime.answer.pool import BLOCK_TOKENS, Pool
from runtime.answer.pool_trace import check
from runtime.answer.pressed import CountedBatch, Parts, PressedBatch
from runtime.answer.swapping import Swapping
from runtime.errors import DiskError, EngineError
from runtime.kv.slow_tier import DiskTier, RamTier
from runtime.llama.cell_memory import CellMemory, state_bytes
from runtime.llama.tokenizer import Tokenizer
from runtime.passes import Part, Pass


def block_bytes_of(opened):
    cache = opened.layout.needs.cache
    return state_bytes(cache.n_bytes // cache.n_cells, BLOCK_TOKENS, opened.file.n_layers)


def tier(opened, kind, tmp_path, n_blocks):
    return RamTier(n_blocks, block_bytes_of(opened)) if kind == "ram" else DiskTier(tmp_path, block_bytes_of(opened))


def some_requests(path, n, seed=3):
    rng = random.Random(seed)
    with engine(path) as opened:
        tokenizer = Tokenizer(opened._model, opened.file)
        texts = [" ".join(rng.choice(PROMPTS) for _ in range(min(6, int(rng.paretovariate(1))))) for _ in range(n)]
        return [Request(tuple(tokenizer.encode(text)), rng.randint(10, 70), ()) for text in texts]


def pressed(path, requests, admission, tmp_path, kind="ram", n_blocks=16):
    """The answers of a batch under pressure, its trace and itself."""
    lines = []
    settings = {"n_threads": 2, "n_ctx": n_blocks * BLOCK_TOKENS, "n_sequences": 12, "n_logits": 12, "swap_bytes": 1}
    with engine(path, **settings) as opened:
        pool = Pool(n_blocks, 12 * n_blocks, record=lambda event: lines.append(event.as_dict()))
        lines.append(pool.header())
        slow = tier(opened, kind, tmp_path, 12 * n_blocks)
        swapping = Swapping(opened, slow, block_bytes_of(opened))
        parts = Parts(opened, Tokenizer(opened._model, opened.file), lambda: None)
        batch = PressedBatch(parts, pool, Admission.parse(admission), swapping)
        assert all(batch.can_ever_run(request) for request in requests)
        wanted = (Wanted(i, request, GREEDY) for i, request in enumerate(requests))
        found = {done.key: (done.text, done.finish) for done in batch.answer(wanted)}
        assert opened._context.n_cells == 0
        swapping.close()
        slow.close()
    return [found[i] for i in range(len(requests))], lines, batch


@pytest.mark.parametrize(("admission", "kind"), [("none", "ram"), ("none", "disk"), ("reserve:2", "ram")])
def test_answers_under_pressure_are_those_without(bundled_model, tmp_path, admission, kind):
    requests = some_requests(bundled_model, 24)
    found, lines, batch = pressed(bundled_model, requests, admission, tmp_path, kind)
    calm, _ = batched(bundled_model, requests, 12, n_ctx=2048)
    assert found == calm
    replay = check(lines)
    assert replay.events["swap_in"] == replay.events["swap_out"] == batch.pool.counts.swaps_out
    assert batch.pool.counts.swaps_out > (10 if admission == "none" else 0)
    assert [path for path in tmp_path.iterdir() if path.name != ".user"] == []


def test_simulated_admission_is_traced_in_whole_blocks(bundled_model):
    requests = some_requests(bundled_model, 12)
    lines = []
    with engine(bundled_model, n_threads=2, n_ctx=512, n_sequences=8, n_logits=8) as opened:
        pool = Pool(32, 0, record=lambda event: lines.append(event.as_dict()))
        batch = CountedBatch(Parts(opened, Tokenizer(opened._model, opened.file), lambda: None), pool)
        wanted = (Wanted(i, request, GREEDY) for i, request in enumerate(requests))
        assert len(list(batch.answer(wanted))) == 12
    replay = check([pool.header(), *lines])
    assert replay.events["swap_out"] == 0
    assert replay.events["append"] > 0
    assert replay.most["fast"] > 20


@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_text_comes_back_bit_by_bit(bundled_model, tmp_path, kind):
    tokens = tuple(5 + 7 * i % 190 for i in range(90))
    settings = {"n_threads": 2, "n_ctx": 256, "n_sequences": 4, "n_logits": 4, "swap_bytes": 1}

    def answer(opened, positions, sequence=0):
        found = []
        for i in positions:
            opened.compute([Pass((Part(sequence, i, (tokens[i],), 1),), True)])
            found.append(opened.logits().copy())
        return found

    with engine(bundled_model, **settings) as opened:
        opened.compute([Pass((Part(0, 0, tokens[:45], 1),))])
        calm = answer(opened, range(45, 90))
    with engine(bundled_model, **settings) as opened:
        slow = tier(opened, kind, tmp_path, 16)
        swapping = Swapping(opened, slow, block_bytes_of(opened))
        opened.compute([Pass((Part(1, 0, tokens[:30], 1),)), Pass((Part(0, 0, tokens[:45], 1),))])
        opened.truncate(0, 1)  # what comes next lies before what is there
        found = answer(opened, range(45, 60))
        saved = swapping.out(0, 60, range(3, 7))
        assert opened._context.n_cells == 0
        opened.compute([Pass((Part(0, 0, tokens[5:25], 1), Part(1, 0, tokens[3:9], 1)))])
        opened.truncate(0, 0)
        swapping.back(2, saved)
        found += answer(opened, range(60, 90), 2)
        swapping.close()
        slow.close()
    assert all(np.array_equal(a, b) for a, b in zip(calm, found, strict=True))


@pytest.mark.parametrize("arch", ["gemma2", "gemma3"])
@pytest.mark.parametrize("kind", ["ram", "disk"])
def test_a_text_longer_than_a_window_comes_back(tiny_model, tmp_path, arch, kind):
    """To other cells, in whose order llama.cpp's attention adds up, with its f16: so not bit by bit."""
    tokens = tuple(5 + 7 * i % 190 for i in range(230))
    settings = {"n_threads": 2, "n_ctx": 512, "n_sequences": 4, "n_logits": 4, "swap_bytes": 1}
    prompt = [Pass((Part(0, i, tokens[i : i + 34], 1),)) for i in range(0, 170, 34)]

    def answer(opened, positions, sequence=0):
        found = []
        for i in positions:
            opened.compute([Pass((Part(sequence, i, (tokens[i],), 1),), True)])
            found.append(opened.logits().copy())
        return found

    with engine(tiny_model(arch), **settings) as opened:
        assert opened.attention is None
        opened.compute(prompt)
        calm = answer(opened, range(170, 230))
    with engine(tiny_model(arch), **settings) as opened:
        slow = tier(opened, kind, tmp_path, 16)
        swapping = Swapping(opened, slow, block_bytes_of(opened))
        opened.compute([Pass((Part(1, 0, tokens[:30], 1),)), *prompt])
        found = answer(opened, range(170, 190))
        saved = swapping.out(0, 190, range(3, 15))
        assert opened._context.n_cells == 30
        opened.compute([Pass((Part(1, 30, tokens[5:25], 1),)), Pass((Part(0, 0, tokens[3:9], 1),))])
        opened.truncate(0, 0)
        swapping.back(2, saved)
        found += answer(opened, range(190, 230), 2)
        swapping.close()
        slow.close()
    assert all(np.allclose(a, b, rtol=0, atol=0.1) for a, b in zip(calm, found, strict=True))
    assert min(np.abs(a - b).max() for a, b in pairwise(calm)) > 1


def test_a_full_disk_is_one_line_and_leaves_no_file(bundled_model, tmp_path):
    class FullTier(DiskTier):
        def write(self, block, source):
            os.close(self._fd)
            self._fd = os.open("/dev/full", os.O_RDWR)
            super().write(block, source)

    with engine(bundled_model, n_threads=1, n_ctx=64, n_sequences=3, n_logits=3, swap_bytes=1) as opened:
        slow = FullTier(tmp_path, block_bytes_of(opened))
        swapping = Swapping(opened, slow, block_bytes_of(opened))
        opened.compute([Pass((Part(0, 0, (5, 6, 7), 1),))])
        with pytest.raises(DiskError, match=r"swapping .* failed: No space left on device; free some space"):
            swapping.out(0, 3, [0])
        swapping.close()
        slow.close()
    assert [path for path in tmp_path.iterdir() if path.name != ".user"] == []


def test_no_folder_for_the_file_is_an_error(tmp_path):
    with pytest.raises(DiskError, match="no file to swap to can be made"):
        DiskTier(Path(tmp_path / "none"), 4096)


def test_a_state_that_llama_cpp_does_not_give_or_take_is_an_error(bundled_model):
    """Else a text would go on with keys and values that are not its own."""
    with engine(bundled_model, n_ctx=256, n_sequences=2, n_logits=2, swap_bytes=1) as opened:
        opened.compute([Pass((Part(0, 0, (5, 6, 7), 1),))])
        for n_bytes, change, said in ((64, "save", "did not give"), (2**16, "load", "did not take")):
            memory = CellMemory(opened.context, n_bytes)
            with pytest.raises(EngineError, match=said):
                getattr(memory, change)(0)
            memory.close()
