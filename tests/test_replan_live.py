"""`h2o plan --live`: plans tried on a running process."""

import json
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest
from test_model_profile import make_profile
from test_plan_stats import MODEL, PROCESS

from h2o_cli import main as cli
from h2o_cli import plan_live
from h2o_cli.plan_report import outlook_of
from planner import running_process
from planner.footprint import streamable_bytes
from planner.replan import Pulled, Row
from planner.simulator import token_s
from profiler.model_profile import load_profile, save_profile
from runtime.llama.model_file import ModelFile
from runtime.plans.file import read_plan, write_plan
from runtime.plans.plan import Plan
from runtime.plans.stats import StatsReader, stats_path
from runtime.sizes import MB

ROOT = Path(__file__).parents[1]
H2O = [sys.executable, "-m", "h2o_cli.main"]
FOREIGN = Plan(1, 2, model_hash=MODEL)


@pytest.fixture
def plan_file(tmp_path):
    return tmp_path / "plan.bin"


@pytest.fixture
def profile_path(tmp_path):
    """Ten layers of 100 bytes, for the process of test_plan_stats: 900 bytes for weights."""
    made = make_profile([100] * 10, [1e-4] * 10, disk=1e5, head=20)
    info = msgspec.structs.replace(made.model, hash=MODEL)
    path = tmp_path / "profile.json"
    save_profile(msgspec.structs.replace(made, model=info), path)
    return path


@pytest.fixture
def process(plan_file):
    """process(pass_s): something that follows the plan file."""
    command = [sys.executable, "-c", PROCESS, str(plan_file)]
    started = []

    def start(pass_s, n=100000, floor=0, growth=0):
        arguments = [*command, *map(str, (pass_s, n, floor, growth))]
        started.append(subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "ready\n"
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.wait()
        one.stdout.close()


@pytest.fixture
def live(plan_file, profile_path, capsys, monkeypatch):
    """live(*flags): exit code, standard output, standard error of `h2o plan --live`, with short pulls.

    live.plans are the plans that were written.
    """
    monkeypatch.setattr(running_process, "MEASURE_LEAST_S", 0.0)
    plans = []

    def write(path, plan):
        plans.append(write_plan(path, plan))
        return plans[-1]

    monkeypatch.setattr("h2o_cli.plan_live.write_plan", write)

    def call(*flags):
        code = cli.run_command(["plan", "--live", "-c", str(profile_path), "-s", str(plan_file), *map(str, flags)])
        return code, *capsys.readouterr()

    call.plans = plans
    return call


def test_live_plan_of_a_process(live, process, plan_file, profile_path):
    process(0.001)
    code, out, err = live("--json")
    assert code == 0, err
    found = json.loads(out)
    kept = read_plan(plan_file)
    assert (kept.budget_bytes, kept.model_hash, kept.generation) == (1000, MODEL, found["generation"])
    assert (found["k"], found["w"], found["layout"]) == (kept.k, kept.w, kept.layout.label)
    assert sum(found["ledger"].values()) == found["budget_bytes"] == 1000
    assert found["ledger"]["fixed_bytes"] == 100
    assert found["floor_bytes"] == 100 + 25  # and the smallest window
    predicted = 1000 * token_s(load_profile(profile_path), kept)  # with what the process leaves for weights
    assert (found["predicted_ms_per_token"], found["predicted_full_ms_per_token"]) == (predicted, None)
    assert 0 < found["pulls"] < 40
    assert found["measured_ms_per_token"] == pytest.approx(1 - kept.k / 10)
    assert re.search(r"pull 1: k=\d+ w=\d+ \w+, window .*: [0-9.]+ ms per token", err)
    assert len(live.plans) >= found["pulls"] > 1
    for plan in live.plans:
        assert plan.budget_bytes == 1000
        assert plan.pinned_bytes + plan.window_bytes <= 900


def test_live_plan_of_a_process_that_grows(live, process):
    process(0.001, growth=150)
    code, out, err = live("--json")
    assert code == 0, err
    ledger = json.loads(out)["ledger"]
    assert ledger["fixed_bytes"] == 100 + 150
    assert ledger["resident_bytes"] + ledger["window_bytes"] <= 750


def test_what_a_live_plan_is_predicted_to_reach():
    """With the arm that is kept, cut to what the process leaves, whatever the profile says that a run leaves."""
    profile = make_profile([10 * MB] * 10, [1e-4] * 10, disk=1e9, fixed=20 * MB)
    arms = [Plan(k, 1, pinned_bytes=k * 10 * MB, window_bytes=10 * MB) for k in (2, 6, 3, 4)]
    rows = [Row(arm, 1.0, pulls=[Pulled(2.0 + i, 0.0)]) for i, arm in enumerate(arms)]
    facts = {"available_bytes": 75 * MB, "n_pulls": 4, "n_restarts": 0, "is_settled": True}
    found = SimpleNamespace(rows=rows, best=arms[2], best_row=rows[2], **facts)
    plan = replace(arms[2], budget_bytes=100 * MB)
    stats = SimpleNamespace(pid=7, floor_bytes=30 * MB, fixed_bytes=25 * MB)
    outlook = plan_live._live_outlook(found, profile, plan, stats)
    seconds = [token_s(profile, arm) for arm in arms]
    assert seconds.count(seconds[2]) == 1
    assert outlook.ms_per_token == 1000 * seconds[2] != outlook_of(profile, plan, 100 * MB, 128).ms_per_token
    assert outlook_of(profile, plan, 100 * MB, 128).full_ms
    assert outlook.limit_ms == pytest.approx(70)  # what is not in memory, at 1 GB/s
    assert (outlook.full_ms, outlook.floor_bytes, outlook.live["measured_ms_per_token"]) == (None, 30 * MB, 4.0)
    assert (outlook.ledger["resident_bytes"], outlook.ledger["fixed_bytes"]) == (30 * MB, 25 * MB)


def test_live_plan_for_people(live, process, plan_file):
    process(0.001)
    code, out, err = live("-m", "950B", "--explain", "--layout", "even")
    assert code == 0, err
    assert "layout even" in out
    assert "measured: " in out
    assert "tried (ms per token):" in out
    assert "stays in" in err.splitlines()[-1]
    assert read_plan(plan_file).budget_bytes == 950


def test_live_without_a_process(live, plan_file):
    code, out, err = live()
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 2
    assert "no running process follows" in err
    assert not plan_file.exists()


@pytest.mark.parametrize(("floor", "size", "named"), [(0, "110B", 1), (3_000_000, "2999kB", 3)])
def test_live_with_too_little_memory(live, process, plan_file, floor, size, named):
    """For what the process takes now, or will take at its most."""
    process(0.001, floor=floor)
    code, _, err = live("-m", size)
    assert code == 1
    assert "too little for process" in err
    assert f"the smallest budget that works for it is -m {named}" in err
    assert live.plans == []
    assert not plan_file.exists()


@pytest.mark.parametrize("flags", [("--set", "3,1"), ("--show",)])
def test_live_with_flags_that_do_not_go_with_it(live, flags):
    assert live(*flags)[0] == 2


def test_live_with_a_process_that_ends(live, process, plan_file):
    process(0.02, 8)
    code, out, err = live()
    assert (code, out) == (1, "")
    assert "has ended" in err
    assert re.search(r"stopped after \d+ pulls; the best plan so far stays", err)
    assert read_plan(plan_file).model_hash == MODEL


def test_live_leaves_a_foreign_plan_alone(live, process, plan_file, monkeypatch):
    process(0.001)

    def write_two(path, plan):
        written = write_plan(path, plan)
        write_plan(path, FOREIGN)
        return written

    monkeypatch.setattr("h2o_cli.plan_live.write_plan", write_two)
    code, _, err = live()
    assert code == 1
    assert "another plan was written" in err
    assert read_plan(plan_file).k == FOREIGN.k


def test_ctrl_c_leaves_the_best_plan_so_far(process, plan_file, profile_path):
    process(0.005)
    command = [*H2O, "plan", "--live", "-c", str(profile_path), "-s", str(plan_file)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as planner:
        lines = [planner.stderr.readline() for _ in range(2)]
        planner.send_signal(signal.SIGINT)
        out, err = planner.communicate(timeout=30)
    assert (planner.returncode, out) == (130, "")
    assert "stopped after" in err
    pulls = {}
    for line in (*lines, *err.splitlines()):
        match = re.match(r"h2o: pull \d+: k=(\d+) .*: ([0-9.]+) ms per token", line)
        if match:
            pulls[int(match[1])] = float(match[2])
    assert read_plan(plan_file).k == min(pulls, key=pulls.__getitem__)


def floor_of(run):
    """Bytes of the smallest budget that a run names: room for all positions of its context."""
    done = subprocess.run([*run, "-m", "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    return int(float(re.search(r"works here is -m ([\d.]+)", done.stderr)[1]) * 10**6)


def test_live_on_a_model_that_streams(tiny_model, tmp_path, plan_file, capsys, monkeypatch):
    """The whole way: a run of a real model publishes, plans are tried on it, its tokens stay the same."""
    monkeypatch.setattr(running_process, "MEASURE_LEAST_S", 0.0)
    model = tiny_model("gemma2")
    file = ModelFile.open(model)
    made = make_profile(
        [sum(piece.span_bytes for piece in layer.pieces) for layer in file.layers],
        [1e-3] * file.n_layers,
        head=sum(piece.span_bytes for piece in file.head.pieces),
        min_window=max(piece.span_bytes for piece in file.pieces),
    )
    info = msgspec.structs.replace(made.model, hash=file.hash, path=str(model))
    save_profile(msgspec.structs.replace(made, model=info), tmp_path / "p.json")
    run = [*H2O, "run", str(model), "-p", "x", "-n", "20000", "--ctx", "20100", "-s", str(plan_file), "--temp", "0"]
    with subprocess.Popen(run, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        stats = None
        while stats is None and process.poll() is None:
            stats = StatsReader(stats_path(plan_file)).read()
        budget = floor_of(run) + streamable_bytes(made) // 2
        flags = ["plan", "--live", "-c", str(tmp_path / "p.json"), "-s", str(plan_file), "-m", f"{budget}B", "--json"]
        code = cli.run_command(flags)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    out, err = capsys.readouterr()
    assert code == 0, err
    found = json.loads(out)
    assert found["pulls"] < 40 * (1 + found["restarts"])
    assert found["measured_ms_per_token"] > 0
    assert process.returncode == 130
    assert not stats_path(plan_file).exists()
