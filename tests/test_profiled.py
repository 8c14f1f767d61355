"""What a run takes from a profile comes from a child, is what the planner says, and a run goes on without it."""

from __future__ import annotations

import os
from dataclasses import replace

import msgspec
import pytest
from test_model_profile import make_profile

from h2o_cli import main as cli
from h2o_cli.session.profiled import Profiled, early_child
from planner.choose import choose_exactly
from planner.kv import KvUse
from planner.simulator import token_s
from profiler.model_profile import save_profile
from runtime.kv.options import KvFilter
from runtime.llama.model_file import ModelFile
from runtime.plans.ledger import Ledger
from runtime.plans.plan import Layout, Plan
from runtime.settings import Settings

MB = 10**6


@pytest.fixture
def profile(tiny_model, tmp_path, monkeypatch):
    """A profile that fits a tiny model, in the folder of this test."""
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    file = ModelFile.open(tiny_model("qwen2"))
    made = make_profile([4 * MB] * file.n_layers, [0.001] * file.n_layers, disk=1e9, head=8 * MB, min_window=MB)
    model = msgspec.structs.replace(made.model, hash=file.hash)
    made = msgspec.structs.replace(made, model=model, disk=msgspec.structs.replace(made.disk, depth=3))
    save_profile(made, tmp_path / "made.json")
    return made


@pytest.fixture
def found(profile, tiny_model):
    """The profile as a run finds it."""
    profiled = Profiled.find(ModelFile.open(tiny_model("qwen2")), pytest.fail)
    yield profiled
    profiled.rest()


def ends_with(end, found):
    """Whether the child is gone behind end()."""
    pid = found._child._child
    end()
    with pytest.raises(ChildProcessError):
        os.waitpid(pid, os.WNOHANG)
    return found._child is None


def test_the_facts(profile, found):
    assert (found.machine, found.request_bytes, found.depth) == (profile.machine, 2**20, 3)


@pytest.mark.parametrize("budget", [6 * MB, 12 * MB, 100 * MB])
@pytest.mark.parametrize("layout", [None, *Layout])
def test_plans_are_the_planners(profile, found, budget, layout):
    settings = Settings(n_ctx=512, n_ubatch=40, kv_type="q8_0")
    wanted = choose_exactly(
        profile, budget, ctx_tokens=512, ubatch_tokens=40, layout=layout, kv=KvUse(settings.kv_type, settings.kv)
    )
    plan = found.plan(budget, settings, layout)
    assert plan == wanted
    assert type(plan.layout) is Layout


def test_no_plan_below_the_floor_or_without_the_facts_it_needs(found):
    assert found.plan(1000, Settings(), None) is None
    assert found.plan(100 * MB, Settings(kv=KvFilter()), None) is None  # the profile knows no layers' keys and values


def test_predictions_are_the_simulators(profile, found):
    ledger = Ledger(0, 0, 0, 0, 0, window_bytes=2 * MB, resident_bytes=5 * MB)
    for plan, shared in ((Plan(1, 1, Layout.BALANCED), ledger), (Plan(0, 2), replace(ledger, resident_bytes=0))):
        arm = Plan(plan.k, plan.w, plan.layout, shared.resident_bytes, shared.window_bytes)
        assert found.token_ms(plan, shared) == 1000 * token_s(profile, arm)
        assert ends_with(found.rest, found)


def test_a_child_that_dies_leaves_a_run_without_a_prediction(found, monkeypatch):
    found.rest()
    monkeypatch.setattr("h2o_cli.session.profiled._Reader.plan", lambda *_: os._exit(1))
    assert found.plan(100 * MB, Settings(), None) is None
    assert found.token_ms(Plan(0, 1), Ledger(0, 0, 0, 0, 0)) > 0
    found.rest()
    monkeypatch.setattr("h2o_cli.session.profiled._Reader.token_ms", lambda *_: os._exit(1))
    assert found.token_ms(Plan(0, 1), Ledger(0, 0, 0, 0, 0)) is None
    assert found._child is None


@pytest.mark.usefixtures("profile")
def test_a_run_that_can_start_no_process(tiny_model, tmp_path, monkeypatch, capsys):
    def refuse():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("os.fork", refuse)
    flags = ["run", str(tiny_model("qwen2")), "-p", "a", "-n", "2", "-t", "1", "-s", str(tmp_path / "plan")]
    assert cli.run_command(flags) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "made.json" in line]
    assert len(lines) == 1
    assert "was not used: no process can be started for the planner" in lines[0]


def test_a_damaged_profile(profile, tiny_model, tmp_path):
    path = tmp_path / "made.json"
    path.write_text(path.read_text().replace('"decode_compute_s"', '"no"'))
    lines = []
    assert Profiled.find(ModelFile.open(tiny_model("qwen2")), lines.append) is None
    assert len(lines) == 1
    assert "made.json was not used: " in lines[0]
    assert "measure again" in lines[0]


@pytest.mark.usefixtures("profile")
def test_a_child_that_began_early_is_used_or_ended(tiny_model, tmp_path, monkeypatch):
    child = early_child()
    found = Profiled.find(ModelFile.open(tiny_model("qwen2")), pytest.fail, child)
    assert found._child is child
    assert ends_with(found.rest, found)
    begun = []
    monkeypatch.setattr("h2o_cli.session.model.early_child", lambda: begun.append(early_child()) or begun[-1])
    for model in (tiny_model("llama"), tmp_path / "none.gguf"):  # without a profile; not there
        code = cli.run_command(["run", str(model), "-p", "a", "-n", "1", "-t", "1", "-s", str(tmp_path / "plan")])
        assert code == (not model.exists())
        assert begun[-1]._child == 0


def test_no_child_without_profiles(tmp_path, monkeypatch):
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    assert early_child() is None
