"""What `h2o plan` predicts is what `h2o run` predicts, for the same budget and context."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import msgspec
import pytest
from test_model_profile import make_profile
from test_plan_kv import PROFILE, h2o

from h2o_cli.plan_report import Outlook, report
from planner.arms import in_bytes, when_full
from planner.footprint import measure_footprint
from profiler.model_profile import Spread, load_profile, save_profile
from runtime.plans.plan import Plan

MB = 10**6
MODEL = "llama:layers=8,dim=512,ffn=2048,heads=8,kv_heads=8,vocab=512,ctx=512"  # 16 KB of keys and values per position
SLOW = 1e7  # bytes per second of its profile's disk: a prediction is a number of bytes
CTX = 512


@pytest.fixture(scope="module")
def model(tiny_model, tmp_path_factory):
    """ask(command, *flags): the JSON object of `h2o COMMAND` for a model that has a profile."""
    path, folder = tiny_model(MODEL), tmp_path_factory.mktemp("profiles")
    environment = {**os.environ, "H2O_PROFILES": str(folder), "TMPDIR": str(folder), "XDG_DATA_HOME": str(folder)}

    def call(*command):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    call(sys.executable, "-c", PROFILE, str(path), "--repeats", "1")
    (profile_path,) = folder.glob("*.json")
    profile = load_profile(profile_path)
    disk = msgspec.structs.replace(profile.disk, bytes_per_s=Spread(SLOW, 0.0, 1, SLOW, SLOW))
    save_profile(msgspec.structs.replace(profile, disk=disk), profile_path)

    def ask(command, *flags):
        return json.loads(call(*h2o(command, path, "--json", "--ctx", CTX, "-s", folder / "plan", *flags)))

    return ask


@pytest.fixture(scope="module")
def budget_mb(model):
    """A budget that holds about half of the weights."""
    return model("plan", "-m", 500)["floor_bytes"] // MB + 25


def test_plan_and_run_predict_the_same_at_the_start_of_an_answer(model, budget_mb):
    planned = model("plan", "-m", budget_mb)
    prompt = ("-p", "the old man " * 5, "--temp", 0, "--speculate", "off", "-t", 2)
    ran = model("run", "-m", budget_mb, *prompt, "-n", 40)
    assert 25 * MB < ran["streamed_bytes"] < 50 * MB
    assert ran["predicted_ms_per_token"] == pytest.approx(planned["predicted_ms_per_token"], rel=0.04)
    assert ran["predicted_ms_per_token"] == pytest.approx(1000 * ran["streamed_bytes_per_pass"] / SLOW, rel=0.02)
    assert planned["predicted_positions"] == 64


def test_an_answer_that_fills_its_context_is_predicted_for_all_of_it(model, budget_mb):
    planned = model("plan", "-m", budget_mb)
    start, full = planned["predicted_ms_per_token"], planned["predicted_full_ms_per_token"]
    assert (full - start) / 1000 * SLOW == pytest.approx((CTX - 64) * 16384, rel=0.1)
    prompt = ("-p", "the old man " * 5, "--temp", 0, "--speculate", "off", "-t", 2)
    ran = model("run", "-m", budget_mb, *prompt, "-n", 600)
    assert len(ran["prompt_tokens"]) + len(ran["tokens"]) > CTX - 2
    assert ran["predicted_ms_per_token"] == pytest.approx((start + full) / 2, rel=0.04)
    assert 1000 * ran["streamed_bytes"] / SLOW == pytest.approx(full, rel=0.04)


def test_a_plan_that_is_shown_predicts_what_it_predicted_when_it_was_made(model, budget_mb):
    made, shown = model("plan", "-m", budget_mb), model("plan", "--show")
    for key in ("predicted_ms_per_token", "predicted_full_ms_per_token", "limit_ms_per_token", "ledger"):
        assert shown[key] == made[key]


@pytest.mark.parametrize(
    ("full_ms", "said"),
    [
        (150.0, "predicted: 100.0 ms per token (10.0 tokens/s) at 64 positions, 150.0 ms at 512 (full)"),
        (101.0, "predicted: 100.0 ms per token (10.0 tokens/s) in all of a context of 512"),
        (None, "predicted: 100.0 ms per token (10.0 tokens/s)"),
    ],
)
def test_it_is_said_where_in_a_context_a_token_takes_so_long(full_ms, said):
    found = Outlook(Plan(1, 1), 100.0, full_ms, 512, limit_ms=90.0)
    assert said in report(found, None).split("\n")


def test_a_full_context_leaves_a_window_where_everything_was_in_memory():
    profile = make_profile([1000] * 4, [0.1] * 4)
    everything = Plan(4, 1, pinned_bytes=4000)
    assert when_full(profile, everything, 4000) == everything
    full = when_full(profile, everything, 3500)
    assert (full.window_bytes, full.pinned_bytes) == (1000, 2500)
    narrow = Plan(3, 1, pinned_bytes=3000, window_bytes=600)
    assert when_full(profile, narrow, 3500) == Plan(2, 1, pinned_bytes=2900, window_bytes=600)


def test_weights_that_never_make_room_leave_room_for_a_prompt_and_a_full_context():
    profile = make_profile([1000] * 4, [0.1] * 4, fixed=5000)
    memory = msgspec.structs.replace(profile.memory, prompt_bytes=300, unused_bytes=2000)
    footprint = measure_footprint(msgspec.structs.replace(profile, memory=memory), 512, 50)
    arm = in_bytes(profile, Plan(1, 1))
    usual, always = (footprint.ledger(20_000, arm.pinned_bytes, arm.window_bytes, always=a) for a in (False, True))
    assert sum(usual.values()) == sum(always.values()) == 20_000
    assert always["free_bytes"] == usual["free_bytes"] - 2300
    assert always["process_bytes"] == usual["process_bytes"] + 2000
    assert footprint.floor_bytes == footprint.fixed_bytes + 2300 + footprint.smallest_window_bytes
