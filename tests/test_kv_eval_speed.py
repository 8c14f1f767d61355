"""Prompts shared between engines, prompts with little attention, and times on a tiny model."""

import numpy as np
import pytest

from h2o_cli.bench.kv.short_prompt import short_attention
from h2o_cli.bench.kv.speed import SpeedRun, Way
from h2o_cli.bench.kv.speed_run import Run
from profiler.kv_eval import model as kv_eval_model
from profiler.kv_eval.model import EvalModel, Start, begin
from runtime.kv.options import KvFilter

PROMPT = [10 + i * 7 % 200 for i in range(600)]
N_CTX = 768


@pytest.fixture
def model(tiny_model):
    found = EvalModel(tiny_model("llama"), n_threads=1, budget_bytes=10**9)
    yield found
    found.close()


def logits_after(engine, tokens):
    found = []
    for token in tokens:
        found.append(engine.logits().copy())
        engine.forward([token])
    return np.array([*found, engine.logits()])


@pytest.mark.parametrize(
    "kv",
    [
        None,
        KvFilter(layers=(0,), wait=0),
        KvFilter(layers=(1,), wait=0, select="uniform"),
        KvFilter(layers=(0,), wait=0, method="heavy"),
    ],
)
def test_a_prompt_computed_by_another_engine_gives_the_same_bits(model, kv):
    (start,) = model.starts([PROMPT], N_CTX)
    assert start.state is not None
    with model.engine(kv, N_CTX) as engine:
        found = []
        for way in (start, Start(PROMPT), start):
            begin(engine, way)
            assert engine.n_past == len(PROMPT)
            found.append(logits_after(engine, (20, 30, 40)))
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_without_memory_for_it_a_prompt_is_computed_anew(model, monkeypatch):
    (start,) = model.starts([PROMPT], N_CTX)
    monkeypatch.setattr(kv_eval_model, "_STATES_PART", 10**9 // (len(start.state) + 1))  # room for one, begun for two
    starts = model.starts([[10], PROMPT, PROMPT, PROMPT], N_CTX)
    assert [start.state is None for start in starts] == [True, False, False, True]


@pytest.mark.parametrize("kv", [None, KvFilter(layers=(0,), wait=0), KvFilter(layers=(0,), wait=0, store="disk")])
def test_a_prompt_with_little_attention_leaves_nothing_behind(model, kv):
    with model.engine(kv, N_CTX) as engine:
        engine.forward(PROMPT)
        usual = logits_after(engine, (20, 30))
        engine.truncate(0)
        with short_attention(engine):
            engine.forward(PROMPT)
        short = logits_after(engine, (20, 30))
        engine.truncate(0)
        engine.forward(PROMPT)
        again = logits_after(engine, (20, 30))
    assert np.array_equal(usual, again)
    assert np.isfinite(short).all()
    assert not np.array_equal(usual, short)


def test_short_prompts_see_everything(model):
    with model.engine(None, N_CTX) as engine:
        engine.forward(PROMPT[:200])
        usual = engine.logits().copy()
        engine.truncate(0)
        with short_attention(engine):
            engine.forward(PROMPT[:200])
        assert np.array_equal(usual, engine.logits())


def test_times_and_memory(tiny_model, tmp_path):
    run = Run(tiny_model("llama"), context=300, n_tokens=2, threads=1)
    full = run.measure(None)
    found = run.measure(KvFilter(layers=(0,), wait=0, store="disk", folder=str(tmp_path), tail=256))
    assert 0 < found.ms_least <= found.ms_per_token
    assert found.kv_bytes < full.kv_bytes
    assert found.read_bytes > 0 == full.read_bytes
    turns = run.turns([KvFilter(layers=(0,), wait=0, keep=keep, least=1) for keep in (0.5, 0.1)])
    for ratios in (turns.faster, turns.faster_again):
        assert set(ratios) == {"0.5", "0.1"}
        assert all(ratio > 0 for ratio in ratios.values())


def test_strategies_are_compared_at_one_budget(tmp_path):
    run = SpeedRun(tmp_path, (64,), (0.3, 0.1), ("ram", "disk"), 1, "", strategies=("multi", "lazy(0.5)", "brutal"))
    labels = [way.label for way in run.ways()]
    assert labels == [
        "full attention",
        "omnikv 30%, ram",
        "omnikv 10%, ram",
        "omnikv 30%, disk",
        "omnikv 10%, disk",
        "omnikv 10%, disk, lazy(0.5)",
        "omnikv 10%, disk, brutal",
    ]
    assert Way(0.1, "ram", "multi") in run.ways()


def test_rows_of_processes_of_their_own(tiny_model, tmp_path):
    run = SpeedRun(tiny_model("llama"), (80,), (0.1,), ("ram",), 1, str(tmp_path), n_tokens=2)
    full, filtered = run.rows()
    assert full.faster is None
    assert min(filtered.faster, filtered.faster_again) > 0
    assert (filtered.faster_one_thread, filtered.threads) == (filtered.faster, 1)
    assert filtered.ms_per_token > 0 and filtered.select == "last"
    assert "--keep 0.1" in filtered.commands[0] and filtered.machine
