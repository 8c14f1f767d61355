"""Texts in blocks have the answers of a continuous batch; without overlap nothing is read while computing."""

from __future__ import annotations

import json
import time
from itertools import groupby

import pytest
import zigzag_source
from engines import engine
from hypothesis import given
from hypothesis import strategies as st
from zigzag_source import COMPUTE, LOAD_HIDDEN, LOAD_WEIGHT, STORE_HIDDEN, SYNC, Event

from runtime.answer.batch import Batch, Wanted
from runtime.answer.generate import Request
from runtime.answer.sampler import Sampling
from runtime.engine.guests import Guests
from runtime.engine.timeline import open_timeline
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
    monkeypatch.setattr(LayerStore, "read_observer", lambda _, *times: reads.append(times))
    answers(bundled_model, requests[:8], in_blocks=True, overlap=overlap)
    at_once = sum(any(begin < b and a < end for a, b in computing) for begin, end in reads)
    assert len(reads) > 100
    assert (at_once > 10) if overlap else (at_once == 0)


# --- the source's order -------------------------------------------------------------------------------------------

SIZES = [st.integers(1, 5), st.integers(1, 5), st.integers(1, 4)]


@given(*SIZES, st.booleans())
def test_the_source_loads_and_computes_everything_once(n_steps, n_layers, n_batches, overlap):
    events = list(zigzag_source.Block(n_steps, n_layers, n_batches).events(overlap=overlap))
    assert len(set(events)) == len(events)
    places = [(i, j, k) for i in range(n_steps) for j in range(n_layers) for k in range(n_batches)]
    found = {what: [event[1:] for event in events if event.what == what] for what in {event.what for event in events}}
    assert found[COMPUTE] == places
    assert found[LOAD_WEIGHT] == [place for place in places if place[2] == 0]  # once for all batches
    assert found[LOAD_HIDDEN] == places
    assert found.get("load_cache", []) == [place for place in places if place[0] > 0]


@given(*SIZES)
def test_in_the_source_every_load_is_one_step_ahead(n_steps, n_layers, n_batches):
    events = list(zigzag_source.Block(n_steps, n_layers, n_batches).events())
    at = {event: n for n, event in enumerate(events)}
    prologue = events[: events.index(Event(SYNC, -1, -1, -1))]
    assert prologue[0] == Event(LOAD_WEIGHT, 0, 0, 0)
    for i, j in [(i, j) for i in range(n_steps) for j in range(n_layers)][1:]:
        beside = at[Event(COMPUTE, *divmod(i * n_layers + j - 1, n_layers), 0)]  # (i, 0): the last layer of i - 1
        assert beside - 4 <= at[Event(LOAD_WEIGHT, i, j, 0)] < beside
    last = at[Event(COMPUTE, n_steps - 1, n_layers - 1, n_batches - 1)]
    behind = [event.what for event in events[last + 1 :] if event.what != SYNC]
    assert behind[-1] == STORE_HIDDEN  # the epilogue
    assert LOAD_WEIGHT not in behind


@given(*SIZES)
def test_in_strict_order_the_source_loads_just_before_it_computes(n_steps, n_layers, n_batches):
    order = [event[1:3] for event in zigzag_source.Block(n_steps, n_layers, n_batches).events(overlap=False)]
    assert order == sorted(order)


# --- what the engine does -----------------------------------------------------------------------------------------


class Done:
    """What a run in blocks of two batches did: events by their beginning, and the streamed bytes of each layer."""

    def __init__(self, path, requests, file, monkeypatch, *, overlap):
        several = {"n_sequences": BLOCK, "n_logits": BLOCK}
        sizes = {"n_threads": 1, "n_ctx": 1024, "n_ubatch": 128, "depth": 1}  # one reader: begun in their order
        with open_timeline(file) as timeline, engine(path, PLAN, overlap=overlap, **several, **sizes) as opened:
            timeline.join(opened, opened._model, BLOCK // 2)
            if overlap:
                wait_for_next_pass(monkeypatch, timeline, opened.n_vocab)
            batch = Batch(opened, Tokenizer(opened._model, opened.file), lambda: None, in_blocks=True)
            list(batch.answer(Wanted(i, request, GREEDY) for i, request in enumerate(requests)))
            self.n_passes, self.head = opened.counters.passes, opened.file.head.index
            self.window = opened.ledger.window_bytes
            streamed = [piece for piece in opened.file.pieces if piece.number not in opened._store.wanted]
        self.layer_bytes = {j: sum(p.span_bytes for p in streamed if p.layer == j) for j in range(self.head + 1)}
        events = sorted(map(json.loads, file.read_text().splitlines()), key=lambda event: event["begin_s"])
        self.first = events[0]
        loads = [event for event in events if event["event"] == LOAD_WEIGHT and not event["stays"]]
        self.loads = [event for event in loads if event["i"] < self.n_passes]
        self.behind = loads[len(self.loads) :]
        self.computed = {(event["i"], event["j"]): event for event in events if event["event"] == COMPUTE}

        self.without_output = set(range(self.n_passes)) - {e["i"] for e in self.loads if e["j"] == self.head}

    def by_place(self):
        """((i, j), loads of that layer), one after the other."""
        return [(place, list(loads)) for place, loads in groupby(self.loads, key=lambda e: (e["i"], e["j"]))]

    def in_source(self, what, *, overlap):
        """(i, j) of the source's events, in their order."""
        block = zigzag_source.Block(self.n_passes, self.head + 1, 2)
        return [(e.i, e.j) for e in block.events(overlap=overlap) if e.what == what and e.k == 0]


def wait_for_next_pass(monkeypatch, timeline, n_rows):
    """The last tile of the head is computed when something was read for the next pass."""
    compute = TiledProduct.compute

    def wait(product, address, first_row, n):
        end = time.monotonic() + 10
        while first_row + n == n_rows and time.monotonic() < end:
            if any(event["i"] > timeline._i for event in list(timeline._events)):
                break
            time.sleep(0.001)
        compute(product, address, first_row, n)

    monkeypatch.setattr(TiledProduct, "compute", wait)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_engine_loads_and_computes_in_the_order_of_the_source(
    bundled_model, wanted, tmp_path, monkeypatch, overlap
):
    done = Done(bundled_model, wanted[0], tmp_path / "t", monkeypatch, overlap=overlap)
    assert list(done.computed) == done.in_source(COMPUTE, overlap=overlap)
    expected = [
        (i, j)
        for i, j in done.in_source(LOAD_WEIGHT, overlap=overlap)
        if done.layer_bytes[j] and not (i in done.without_output and j == done.head)
    ]
    assert [place for place, _ in done.by_place()] == expected
    for (i, j), loads in done.by_place():
        if i in done.without_output and j == done.head - 1:
            continue  # llama.cpp computes a part of the last layer for outputs only
        compute = done.computed[i, j]
        n_bytes = sum(e["bytes"] for e in loads)  # each byte once for all batches
        if i == 0:  # the order in which llama.cpp uses a layer's pieces is learnt: what was read too soon is read again
            assert n_bytes >= done.layer_bytes[j]
        else:
            assert n_bytes == done.layer_bytes[j]
        assert all(e["end_s"] <= compute["end_s"] for e in loads)
        assert overlap or all(compute["begin_s"] <= e["begin_s"] for e in loads)
    assert {(0, 1), (0,)} & {tuple(event["k"]) for event in done.computed.values()}


def test_prologue_wrap_around_and_epilogue(bundled_model, wanted, tmp_path, monkeypatch):
    done = Done(bundled_model, wanted[0], tmp_path / "t", monkeypatch, overlap=True)
    assert (done.first["event"], done.first["i"], done.first["j"]) == (LOAD_WEIGHT, 0, 0)  # the prologue
    for i in range(done.n_passes - 1):  # the wrap-around: beside the head of a pass, across steps and across blocks
        if i not in done.without_output:
            following = next(e for e in done.loads if e["i"] == i + 1)
            assert following["begin_s"] < done.computed[i, done.head]["end_s"]
    assert {e["i"] for e in done.behind} <= {done.n_passes}  # the epilogue: no more than what fills the window
    assert sum(e["bytes"] for e in done.behind) <= done.window
