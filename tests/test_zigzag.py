"""Texts in blocks have the answers of a continuous batch; without overlap nothing is read while computing."""

from __future__ import annotations

import time

import pytest
from engines import engine

from runtime.answer.batch import Batch, Wanted
from runtime.answer.generate import Request
from runtime.answer.sampler import Sampling
from runtime.engine.guests import Guests
from runtime.engine.weights_guest import WeightsGuest
from runtime.llama.tiled_product import TiledProduct
from runtime.llama.tokenizer import Tokenizer
from runtime.plans.plan import Plan
from runtime.weights.store import LayerStore

GREEDY = Sampling(temp=0)
WORDS = ["Once upon a time there was", "a little dog", "and it wanted to play with Tom and Lily", "in the big park"]
N_TEXTS = 20
BLOCK = 6
PLAN = Plan(1, 1)  # one layer stays, the others are streamed


def requests_of(path):
    """Prompts of 3 to about 170 tokens, answers of 1 to 40."""
    with engine(path) as opened:
        tokenizer = Tokenizer(opened._model, opened.file)
        prompts = [" ".join(WORDS[i % 4 :] * 12)[: 5 + 41 * i] for i in range(N_TEXTS)]
        return [Request(tuple(tokenizer.encode(p)), 1 + i * 17 % 40, ()) for i, p in enumerate(prompts)]


class Watched(Batch):
    """A batch that notes who computes in each pass: (number, tokens, reads its prompt)."""

    def _counts(self):
        counts = super()._counts()
        self.steps.append([(r.number, n, r.job.n_unread > 0) for r, n in zip(self._running, counts, strict=True)])
        return counts


def answers(path, requests, *, in_blocks=False, overlap=True):
    several = {"n_sequences": BLOCK, "n_logits": BLOCK}
    sizes = {"n_threads": 1, "n_ctx": 1024, "n_ubatch": 128}
    with engine(path, PLAN, overlap=overlap, **several, **sizes) as opened:
        batch = Watched(opened, Tokenizer(opened._model, opened.file), lambda: None, in_blocks=in_blocks)
        batch.steps = []
        done = batch.answer(Wanted(i, request, GREEDY) for i, request in enumerate(requests))
        found = {one.key: (one.text, one.finish) for one in done}
        assert opened._context.n_cells == 0
        return [found[i] for i in range(len(requests))], batch


@pytest.fixture(scope="module")
def wanted(bundled_model):
    """(requests, answers of a continuous batch)."""
    requests = requests_of(bundled_model)
    assert min(len(r.prompt) for r in requests) < 4 < 160 < max(len(r.prompt) for r in requests)
    return requests, answers(bundled_model, requests)[0]


@pytest.mark.parametrize(("in_blocks", "overlap"), [(True, True), (True, False), (False, False)])
def test_answers_are_those_of_a_continuous_batch_with_overlap(bundled_model, wanted, in_blocks, overlap):
    requests, continuous = wanted
    found, batch = answers(bundled_model, requests, in_blocks=in_blocks, overlap=overlap)
    assert found == continuous
    assert batch.engine.streamed_bytes > 0


def test_a_block_begins_together_and_ends_before_the_next(bundled_model, wanted):
    requests, _ = wanted
    _, batch = answers(bundled_model, requests, in_blocks=True)
    block, seen = set(), set()
    for step in batch.steps:
        numbers = {number for number, _, _ in step}
        if not numbers <= block:
            assert not numbers & seen, "a text joined a block that had begun"
            block = numbers
        seen |= numbers
        if any(reads for _, _, reads in step):
            assert all(n == 0 for _, n, reads in step if not reads)
        else:
            assert all(n == 1 for _, n, _ in step)
    assert seen == set(range(N_TEXTS))
    assert batch.largest == BLOCK


@pytest.mark.parametrize("overlap", [True, False])
def test_whether_anything_is_read_while_computing(bundled_model, wanted, monkeypatch, overlap):
    requests, _ = wanted
    reads, times = [], [0.0]
    computing = []

    def watched(name, holder, *, ends=lambda *_: True):
        inner = getattr(holder, name)

        def call(*given, **named):
            if ends(*given):
                computing.append((times[0], time.perf_counter()))
            found = inner(*given, **named)
            times[0] = time.perf_counter()
            return found

        monkeypatch.setattr(holder, name, call)

    # llama.cpp computes between the last node it asks about and the report, or the end of the pass
    watched("_on_node", Guests, ends=lambda _guests, _node, ask, _data: not ask)
    watched("end", WeightsGuest)
    tiles = TiledProduct.compute

    def compute(*given):
        begin = time.perf_counter()
        tiles(*given)
        computing.append((begin, time.perf_counter()))

    monkeypatch.setattr(TiledProduct, "compute", compute)
    monkeypatch.setattr(LayerStore, "read_observer", lambda *seen: reads.append(seen[2:]))
    answers(bundled_model, requests[:8], in_blocks=True, overlap=overlap)
    at_once = sum(any(begin < b and a < end for a, b in computing) for begin, end in reads)
    assert len(reads) > 100
    assert (at_once > 10) if overlap else (at_once == 0)
