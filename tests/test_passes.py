"""What a pass says of itself, how a prompt is cut into passes, and who is refused."""

from __future__ import annotations

from itertools import accumulate, pairwise

import pytest
from engines import engine
from hypothesis import given
from hypothesis import strategies as st

from runtime.engine.sequence import TokenSequence
from runtime.errors import EngineError
from runtime.passes import Part, Pass, cut
from runtime.plans.plan import Plan
from runtime.settings import FULL_TILES

lengths, blocks = st.integers(1, 3000), st.integers(1, 1024)


@given(st.builds(Part, st.integers(0, 9), st.integers(0, 99), lengths.map(lambda n: tuple(range(n)))), blocks, blocks)
def test_passes_cover_the_tokens_in_blocks_of_llama_cpps_size(part, n_ubatch, most):
    n_tokens, passes = len(part.tokens), cut(part, n_ubatch, most)
    sizes = [pass_.n_tokens for pass_ in passes]
    assert sum((pass_.tokens for pass_ in passes), ()) == part.tokens
    assert passes[0].only.first == part.first
    assert passes[-1].only.end == part.end
    assert all(before.only.end == after.only.first for before, after in pairwise(passes))
    assert {pass_.only.sequence for pass_ in passes} == {part.sequence}
    assert min(sizes) >= 1
    assert max(sizes) <= min(n_ubatch, most)
    assert set(range(n_ubatch, n_tokens, n_ubatch)) <= set(accumulate(sizes))
    if most >= n_ubatch:
        assert sizes == [n_ubatch] * (n_tokens // n_ubatch) + [n_tokens % n_ubatch] * (n_tokens % n_ubatch > 0)


@given(lengths, st.integers(FULL_TILES, 1024), st.integers(FULL_TILES, 1024))
def test_memory_never_makes_a_pass_shorter_than_a_tile_of_attention(n_tokens, n_ubatch, most):
    short = [
        [pass_.n_tokens for pass_ in cut(Part(0, 0, (5,) * n_tokens), n_ubatch, limit) if pass_.n_tokens < 64]
        for limit in (n_ubatch, most)
    ]
    assert short[0] == short[1]


@given(lengths, blocks, blocks, st.integers(0, 40), st.booleans())
def test_only_the_last_pass_makes_outputs(n_tokens, n_ubatch, most, n_outputs, decode):
    *others, last = cut(Part(0, 0, (5,) * n_tokens, n_outputs), n_ubatch, most, decode=decode)
    assert not any(pass_.needs_head for pass_ in others)
    assert last.n_outputs == min(n_outputs, last.n_tokens)
    assert last.needs_head == (n_outputs > 0)
    assert {pass_.decode for pass_ in (*others, last)} == {decode}


def test_a_pass_adds_up_its_parts():
    both = Pass((Part(0, 4, (1, 2), 1), Part(1, 0, (3, 4, 5))), decode=True)
    assert both.tokens == (1, 2, 3, 4, 5)
    assert (both.n_tokens, both.n_outputs, both.needs_head) == (5, 1, True)
    assert [part.end for part in both.parts] == [6, 3]


def test_a_pass_over_two_sequences_is_refused_before_anything_happens(tiny_model):
    both = Pass((Part(0, 3, (1,), 1), Part(1, 0, (3,), 1)), decode=True)
    with engine(tiny_model("llama"), Plan(1, 1)) as opened:
        opened.forward([5, 6, 7])
        logits, passes = opened.logits().copy(), opened.counters.passes
        with pytest.raises(EngineError, match="a pass over 2 sequences cannot be computed"):
            opened.compute([both])
        assert opened.counters.passes == passes and opened.n_past == 3
        assert (opened.logits() == logits).all()
        opened.compute([Pass(both.parts[:1], decode=True)])
        assert opened.n_past == 4


def test_a_sequence_says_which_passes_continue_an_answer(tiny_model):
    """Whatever their length: one token can be all that is new of a prompt."""
    with engine(tiny_model("llama"), Plan(1, 1), n_logits=2) as opened:
        sequence = TokenSequence(opened)
        for step, n_decodes in [
            (lambda: sequence.feed([5, 6, 7]), 0),
            (lambda: sequence.extend([8]), 1),
            (lambda: sequence.extend([9, 10]), 2),
            (lambda: sequence.feed([5, 6, 7, 8, 9, 10, 11]), 2),
        ]:
            step()
            assert opened.counters.decodes == n_decodes
        assert sequence.n_past == opened.n_past == len(sequence.tokens) == 7
