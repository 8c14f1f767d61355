"""Several sequences in one engine: each has the tokens that it has alone."""

from __future__ import annotations

import pytest
from engines import engine
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.answer.batch import Batch, Wanted
from runtime.answer.generate import Request, generate
from runtime.answer.sampler import Sampler, Sampling
from runtime.engine.sequence import TokenSequence
from runtime.errors import EngineError
from runtime.llama.tokenizer import Tokenizer
from runtime.passes import Part, Pass
from runtime.plans.plan import Plan
from runtime.plans.residency import streamable_bytes

GREEDY = Sampling(temp=0)
PROMPTS = [
    "Once upon a time there was",
    "A",
    "The little dog wanted to play with the cat, but the cat did not want to play. So the dog",
    "Tom and Lily",
    "One day, a girl named Lucy went to the park with her mom and her dad and her brother and",
    "It was a sunny day and",
]


def alone(path, requests, **settings):
    """The answers of single runs: (text, finish)."""
    found = []
    for request in requests:
        with engine(path, n_threads=1, n_ctx=256, **settings) as opened:
            tokenizer, sampler = Tokenizer(opened._model, opened.file), Sampler(GREEDY, opened.n_vocab)
            steps = list(generate(TokenSequence(opened), tokenizer, sampler, request))
            sampler.close()
            found.append(("".join(step.text for step in steps), steps[-1].finish))
    return found


def requests_of(path, lengths):
    with engine(path) as opened:
        tokenizer = Tokenizer(opened._model, opened.file)
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(lengths))]
        return [Request(tuple(tokenizer.encode(p)), n, ()) for p, n in zip(prompts, lengths, strict=True)]


def batched(path, requests, n_sequences, plan=None, **settings):
    with engine(path, plan, n_threads=1, n_sequences=n_sequences, n_logits=n_sequences, **settings) as opened:
        batch = Batch(opened, Tokenizer(opened._model, opened.file), lambda: None)
        assert all(batch.can_ever_run(request) for request in requests)
        wanted = (Wanted(i, request, GREEDY) for i, request in enumerate(requests))
        found = {done.key: (done.text, done.finish) for done in batch.answer(wanted)}
        assert opened._context.n_cells == 0
        return [found[i] for i in range(len(requests))], batch


@pytest.mark.parametrize("n_sequences", [2, 4, 16])
def test_answers_are_those_of_single_runs(bundled_model, n_sequences):
    requests = requests_of(bundled_model, [24, 3, 40, 17, 1, 30, 8, 24])
    found, batch = batched(bundled_model, requests, n_sequences, n_ctx=512, n_ubatch=128)
    assert found == alone(bundled_model, requests)
    assert batch.largest == min(n_sequences, 8)


def test_streamed_weights_are_read_once_for_all(bundled_model):
    requests = requests_of(bundled_model, [16] * 6)
    with engine(bundled_model) as opened:
        total = streamable_bytes(opened.file)
        budget = opened.layout.fixed_bytes + total // 2
    plan = Plan(0, 1, budget_bytes=budget)
    found, batch = batched(bundled_model, requests, 6, plan, n_ctx=256, n_ubatch=128)
    assert found == alone(bundled_model, requests)
    counters = batch.engine.counters
    assert batch.engine.streamed_bytes > 0
    assert counters.passes <= 20  # few for the prompts, one for each token
    assert counters.bytes_read <= 2 * total + counters.passes * batch.engine.streamed_bytes


def test_sequences_wait_for_cells(bundled_model):
    requests = requests_of(bundled_model, [20] * 12)
    found, batch = batched(bundled_model, requests, 12, n_ctx=160, n_ubatch=128)
    assert found == alone(bundled_model, requests)
    assert 1 < batch.largest < 12


BEGIN = "You are a teller of stories for children. " * 12


def with_beginning(path, ends, lengths, begin=BEGIN):
    with engine(path) as opened:
        tokenizer = Tokenizer(opened._model, opened.file)
        prompts = [tuple(tokenizer.encode(begin + end)) for end in ends]
        return [Request(prompt, n, ()) for prompt, n in zip(prompts, lengths, strict=True)]


@pytest.mark.parametrize("n_ctx", [300, 1024])
def test_what_prompts_begin_with_is_computed_once(bundled_model, n_ctx):
    ends = [f"Tell me about {name}." for name in ("a dog", "the big cat and its friends", "Tom", "rain", "a boy")]
    requests = with_beginning(bundled_model, ends, [12, 3, 20, 9, 15])
    found, batch = batched(bundled_model, requests, 4, n_ctx=n_ctx, n_ubatch=128)
    assert found == alone(bundled_model, requests)
    assert batch.n_shared_tokens >= 4 * 64
    assert batch.engine.counters.tokens < sum(len(r.prompt) + r.n_predict for r in requests) - 3 * 64
    assert batch.largest == 4


def test_texts_with_other_beginnings_are_answered_as_well(bundled_model):
    requests = []
    for begin in (BEGIN, "It was a rainy day and the girl felt sad. " * 10, ""):
        requests += with_beginning(bundled_model, ["Who?", "Why?", "Where?"], [8, 12, 5], begin)
    requests += requests[1:3]
    found, batch = batched(bundled_model, requests, 3, n_ctx=512, n_ubatch=128)
    assert found == alone(bundled_model, requests)
    assert batch.n_shared_tokens


@given(
    st.lists(st.tuples(st.sampled_from([0, 70, 130]), st.integers(1, 90), st.integers(1, 40)), min_size=1, max_size=9),
    st.integers(1, 4),
    st.integers(200, 500),
)
@settings(max_examples=15, deadline=None)
def test_cells_suffice_whatever_texts_have_in_common(bundled_model, texts, n_sequences, n_ctx):
    begin = tuple(3 + i * 7 % 250 for i in range(130))
    ends = [tuple(4 + (i * 31 + j * 11) % 240 for j in range(more)) for i, (_, more, _) in enumerate(texts)]
    prompts = [begin[:n] + end for (n, _, _), end in zip(texts, ends, strict=True)]
    wanted = [Request(prompt, n, ()) for prompt, (_, _, n) in zip(prompts, texts, strict=True)]
    several = {"n_sequences": n_sequences, "n_logits": n_sequences}
    sizes = {"n_threads": 1, "n_ctx": n_ctx, "n_ubatch": 128}
    with engine(bundled_model, Plan(0, 1, budget_bytes=10**9), **sizes, **several) as opened:
        batch = Batch(opened, Tokenizer(opened._model, opened.file), lambda: None)
        wanted = [request for request in wanted if batch.can_ever_run(request)]
        done = list(batch.answer(Wanted(i, request, GREEDY) for i, request in enumerate(wanted)))
        assert {one.key for one in done} == set(range(len(wanted)))
        assert opened._context.n_cells == 0


def test_what_can_never_fit_is_known_beforehand(bundled_model):
    (request,) = requests_of(bundled_model, [300])
    with engine(bundled_model, n_ctx=128, n_sequences=2, n_logits=2) as opened:
        assert not Batch(opened, Tokenizer(opened._model, opened.file), lambda: None).can_ever_run(request)


def test_an_engine_of_one_sequence_refuses_several(bundled_model):
    pass_ = Pass((Part(0, 0, (1,), 1), Part(1, 0, (1,), 1)))
    with engine(bundled_model) as opened, pytest.raises(EngineError, match="2 sequences cannot be computed"):
        opened.compute([pass_])


def test_a_pass_that_fails_is_forgotten_in_all_sequences(bundled_model):
    with engine(bundled_model, n_sequences=2, n_logits=2, n_ctx=64, n_threads=1) as opened:
        first = Pass((Part(0, 0, (5, 6), 1), Part(1, 0, (7,), 1)))
        opened.compute([first])
        opened.guests.stop = EngineError("stopped")
        with pytest.raises(EngineError, match="stopped"):
            opened.compute([Pass((Part(0, 2, (8,), 1), Part(1, 1, (9,), 1)))])
        assert [opened._context.n_past(s) for s in (0, 1)] == [2, 1]
        opened.compute([Pass((Part(0, 2, (8,), 1), Part(1, 1, (9,), 1)))])
