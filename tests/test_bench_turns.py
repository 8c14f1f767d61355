"""The benchmark's turns: pairs of rounds, their ratios, and what a side of it answers."""

from __future__ import annotations

import json
from contextlib import nullcontext
from io import StringIO

import pytest

from h2o_cli.bench.speed import turns
from h2o_cli.bench.speed.engines import tokens_hash
from h2o_cli.bench.speed.rounds import AGAIN, serve
from runtime.errors import EngineError
from runtime.sizes import MB


class FakeEngine:
    """Takes a fixed time for every token; its answer has n_tokens."""

    peak_bytes = 5 * MB

    def __init__(self, name, log, seconds, n_tokens=10**6):
        self.name, self.log, self.seconds, self.n_tokens = name, log, seconds, n_tokens

    def ask(self, line, timeout_s):
        self.log.append((self.name, line))
        if line == AGAIN:
            self.left = self.n_tokens
        n = min(1 if line == AGAIN else int(line), self.left)
        self.left -= n
        seconds, n_computed = (1.0, 300) if line == AGAIN else (n * self.seconds, n)
        return json.dumps({"seconds": seconds, "n_computed": n_computed, "tokens": [7] * n})


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr(turns, "PAUSE_S", 0)


def take_turns(own_s, other_s, n_tokens=10**6):
    """The log of two fake engines, and what came of their turns."""
    log = []
    engines = FakeEngine("h2o", log, own_s, n_tokens), FakeEngine("other", log, other_s, n_tokens)
    return log, turns.take_turns(lambda: nullcontext(engines))


def test_the_ratio_of_turns_is_of_pairs(no_pause):
    _, taken = take_turns(0.02, 0.01)
    decode, prefill = taken.figures.decode, taken.figures.prefill
    assert (decode.ratio, decode.quartiles) == (pytest.approx(0.5), (pytest.approx(0.5), pytest.approx(0.5)))
    assert (decode.h2o_tokens_per_s, decode.llama_cpp_tokens_per_s) == (pytest.approx(50), pytest.approx(100))
    assert (prefill.ratio, prefill.h2o_tokens_per_s, prefill.n_tokens) == (1.0, 300.0, 300)
    assert len(decode.pairs) == turns.OPENINGS * turns.DECODE_PAIRS
    assert tokens_hash(taken.tokens) == taken.figures.llama_cpp_tokens_hash
    assert taken.peak_bytes == 5 * MB


def test_the_order_of_turns_changes(no_pause):
    log, _ = take_turns(0.02, 0.01)
    decode = [name for name, line in log if line != AGAIN][2 * turns.WARM_DECODE_PAIRS :]
    assert decode[:8] == ["h2o", "other", "other", "h2o", "h2o", "other", "other", "h2o"]


def test_an_answer_that_ends_early_gives_fewer_pairs(no_pause):
    n = 1 + (turns.WARM_DECODE_PAIRS + 2) * turns.DECODE_TOKENS
    assert len(take_turns(0.02, 0.01, n)[1].figures.decode.pairs) == 2 * turns.OPENINGS
    with pytest.raises(EngineError, match="ended its answer"):
        take_turns(0.02, 0.01, 3)


def test_output_that_is_no_round(no_pause):
    engine = FakeEngine("h2o", [], 0.1)
    engine.ask = lambda *_: "nonsense"
    with pytest.raises(EngineError, match="cannot be read"):
        turns.take_turns(lambda: nullcontext((engine, engine)))


def test_rounds_on_demand(monkeypatch, capsys):
    class Answer:
        prompt = (1, 2, 3)

        def forget(self):
            self.tokens = iter([5, 6, 7])

        def next_token(self):
            return next(self.tokens, None)

    monkeypatch.setattr("sys.stdin", StringIO(f"{AGAIN}\n1\n4\n{AGAIN}\n"))
    serve(Answer())
    done = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["tokens"] for one in done] == [[5], [6], [7], [5]]
    assert [one["n_computed"] for one in done] == [3, 1, 1, 3]
    assert all(one["seconds"] >= 0 for one in done)
