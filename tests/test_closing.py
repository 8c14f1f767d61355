"""The figures behind an answer, and what is shown while a prompt is read."""

from __future__ import annotations

import json
from types import SimpleNamespace as Some

import pytest

from h2o_cli import closing, console, output
from h2o_cli import main as cli
from h2o_cli.session.profiled import Profiled
from runtime.answer.meter import Statistics
from runtime.engine.layout import Layout as Layout_
from runtime.plans.plan import Layout, Plan


@pytest.fixture(autouse=True)
def plan_file(tmp_path, monkeypatch):
    monkeypatch.setattr("h2o_cli.session.model.default_plan_path", lambda: tmp_path / "plan.bin")


def session(*, streamed=1, profile=None, layout=Layout.BALANCED, kv=None):
    engine = Some(plan=Plan(10, 2, layout), streamed_bytes=streamed, kv=kv)
    model = Some(profile=profile, is_named=True, team=None)
    return Some(engine=engine, model=model, budget_bytes=14_000_000_000, speculation=None)


SLOW = Statistics(
    n_tokens=1024,
    ttft_s=123.456,
    decode_ms_per_token=12345.6,
    tokens_per_s=0.081,
    bytes_read_per_token=13_720_200_000,
    bytes_asked_per_token=13_720_200_000,
    disk_wait_ms_per_token=11000.0,
    limit_ms_per_token=12000.0,
)


def test_two_lines_of_eighty_columns_whatever_there_is_to_say(monkeypatch):
    monkeypatch.setattr(closing, "predicted_ms", lambda *_, **__: 12300.0)
    kv = Some(summary="1234 of 12345 prompt positions attended in 22 of 24 layers", guesses=True)
    lines = closing.closing_line(session(layout=Layout.PREFIX, kv=kv), SLOW).split("\n")
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("h2o: 1024 tokens, first 123 s, then 12346 ms each (predicted 12300)")
    assert "13.72 GB read each" in lines[1] and "of 14000 MB" in lines[1]


def test_predicted_stands_beside_measured_where_there_is_a_profile(monkeypatch):
    assert "predicted" not in closing.closing_line(session(), SLOW)
    monkeypatch.setattr(closing, "predicted_ms", lambda *_, **__: 11.25)
    assert "then 12346 ms each (predicted 11.2)" in closing.closing_line(session(), SLOW)


def test_what_says_nothing_is_left_out():
    found = Statistics(n_tokens=1, ttft_s=0.5, decode_ms_per_token=9.0, tokens_per_s=111.0, bytes_read_per_token=0.0)
    found = found._replace(tokens_per_pass=1.0)  # nothing was drafted
    line = closing.closing_line(session(streamed=0), found)
    assert "all in memory" in line and "1 token," in line
    for word in ("read", "limit", "waited", "k=", "per pass"):
        assert word not in line
    assert "k=10 w=2" in closing.closing_line(session(), found)


def test_the_least_important_part_goes_first():
    parts = [(0, "a" * 70), (2, "b" * 30), (1, "c" * 30), (2, "d" * 30)]
    assert closing.fit(list(parts), 75) == "a" * 70 + ",\n  " + "b" * 30 + ", " + "c" * 30
    assert closing.fit([*parts, (1, "e" * 30)], 75) == "a" * 70 + ",\n  " + "c" * 30 + ", " + "e" * 30


def test_a_run_after_a_profile_predicts(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    model = str(tiny_model("qwen2"))
    flags = ["run", model, "-p", "a", "-n", "4", "--json"]
    assert cli.run_command(flags) == 0
    assert json.loads(capsys.readouterr().out)["predicted_ms_per_token"] is None
    assert cli.run_command(["profile", model, "--repeats", "1"]) == 0
    capsys.readouterr()
    assert cli.run_command(flags) == 0
    assert json.loads(capsys.readouterr().out)["predicted_ms_per_token"] > 0


def test_weights_make_room_for_a_prediction_at_the_end(tiny_model, tmp_path, monkeypatch, capsys):
    """Where memory is full to the last byte, the process that predicts would be ended."""
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    model = str(tiny_model("qwen2"))
    assert cli.run_command(["profile", model, "--repeats", "1"]) == 0
    rooms, token_ms, make_room = [], Profiled.token_ms, Layout_.make_room
    monkeypatch.setattr(Layout_, "make_room", lambda self, n: (rooms.append(n), make_room(self, n)))
    monkeypatch.setattr(Profiled, "token_ms", lambda *about: token_ms(*about) if rooms else None)
    flags = ["run", model, "-m", "2000", "-p", "a", "-n", "4"]
    capsys.readouterr()
    assert cli.run_command(flags) == 0
    assert "(predicted " in capsys.readouterr().err
    rooms.clear()
    assert cli.run_command([*flags, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["predicted_ms_per_token"] > 0 and len(rooms) == 1
    assert found["ledger"].get("draft_bytes", 0) == 0  # it is the answer's


# --- progress -------------------------------------------------------------------------------------------------------


@pytest.fixture
def shares(monkeypatch):
    """What progress says of the tokens computed, asked at every piece of weights."""
    from runtime.weights.store import LayerStore

    seen, asked = [], []

    class Watched(output.Progress):
        def __init__(self, what, share, *, enabled=True):
            super().__init__(what, share, enabled=False)
            seen.append((what, enabled))
            asked.append(share)

    plain = LayerStore.need

    def need(self, piece):
        if asked:
            seen.append(asked[-1]())
        return plain(self, piece)

    monkeypatch.setattr(LayerStore, "need", need)
    monkeypatch.setattr(console, "Progress", Watched)
    return seen


def test_progress_counts_computed_tokens_and_layers(tiny_model, shares, capsys):
    """Four passes over streamed layers: the share rises with every layer, not with the bytes that were read."""
    from runtime.engine.engine import Engine

    passes = []
    compute = Engine._compute
    Engine._compute = lambda self, pass_: (passes.append(pass_.n_tokens), compute(self, pass_))[1]
    try:
        prompt = "word " * 120
        assert cli.run_command(["run", str(tiny_model("llama")), "-p", prompt, "-n", "1", "--ubatch", "128"]) == 0
    finally:
        Engine._compute = compute
    (what, enabled), *found = shares
    n = sum(passes)
    assert enabled and what == f"reading the prompt ({n} tokens)" and len(passes) > 1
    first = [share for share in found if share * n < passes[0]]
    assert len(set(first)) >= 4, "a pass was not counted layer by layer"
    assert found == sorted(found) and found[-1] <= 1


def test_short_prompts_show_no_progress(tiny_model, shares, capsys):
    assert cli.run_command(["run", str(tiny_model("llama")), "-p", "a b c", "-n", "1"]) == 0
    assert shares[0][1] is False
