"""`h2o batch` with a pool that is too small: the answers are those of a large one, and nothing stays behind."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from cgroups import memory_limit

from h2o_cli.main import run_command
from runtime.answer.pool_trace import check, read_trace

MB = 10**6
H2O = [sys.executable, "-m", "h2o_cli.main"]
SENTENCES = ["Once upon a time there was a dog.", "Tom and Lily went to the park.", "The cat was sad.", "One day"]


@pytest.fixture
def prompts(tmp_path):
    rng, path = random.Random(1), tmp_path / "prompts.jsonl"
    texts = [" ".join(rng.choice(SENTENCES) for _ in range(rng.randint(1, 5))) for _ in range(20)]
    path.write_text("".join(json.dumps({"prompt": text, "max_tokens": rng.randint(10, 60)}) + "\n" for text in texts))
    return path


def batch(model, prompts, answers, *more):
    files = ["-f", str(prompts), "-o", str(answers)]
    return ["batch", str(model), *files, "--temp", "0", "-t", "1", "--batch-size", "8", *map(str, more)]


def texts(path):
    found = {}
    for line in path.read_text().splitlines():
        answer = json.loads(line)
        assert answer["custom_id"] not in found, "an answer stands there twice"
        found[answer["custom_id"]] = answer["response"]["body"]["choices"][0]["text"]
    return found


@pytest.mark.parametrize("swap", ["ram", "disk"])
def test_answers_under_pressure_are_those_without(bundled_model, prompts, tmp_path, capsys, swap):
    assert run_command(batch(bundled_model, prompts, tmp_path / "calm")) == 0
    pressed, trace, times = tmp_path / "pressed", tmp_path / "trace", tmp_path / "times"
    flags = ["--kv-pool", "1.1", "--admission", "reserve:0.5", "--swap", swap, "--trace", trace, "--json"]
    flags += ["--timeline", times]
    capsys.readouterr()
    assert run_command(batch(bundled_model, prompts, pressed, *flags)) == 0
    totals = json.loads(capsys.readouterr().out)
    assert texts(pressed) == texts(tmp_path / "calm")
    with trace.open() as file:
        replay = check(read_trace(file))
    assert totals["swaps_in"] == totals["swaps_out"] == totals["preemptions"] == replay.events["swap_out"] > 0
    events = Counter(json.loads(line)["event"] for line in times.read_text().splitlines())
    assert (events["load_cache"], events["store_cache"]) == (totals["blocks_in"], totals["blocks_out"])
    assert events["compute"] == 9 * totals["passes"]  # layers and head
    assert totals["admission"] == "reserve:0.5"
    assert 0 < totals["swap_in_read_s"] < totals["swap_in_s"] < totals["seconds"]
    assert 0 < totals["swap_out_s"] < totals["seconds"]
    assert totals["ledger"]["swap_bytes"] > (MB if swap == "ram" else 0)
    assert {path.name for path in tmp_path.iterdir()} <= {"prompts.jsonl", "calm", "pressed", "trace", "times", ".user"}


def test_a_trace_without_pressure(bundled_model, prompts, tmp_path, capsys):
    trace = tmp_path / "trace"
    assert run_command(batch(bundled_model, prompts, tmp_path / "a", "--trace", trace, "--json")) == 0
    totals = json.loads(capsys.readouterr().out)
    assert (totals["admission"], totals["preemptions"], totals["swap_in_s"]) == ("simulate", 0, 0)
    with trace.open() as file:
        assert check(read_trace(file)).events["free"] == 20


def test_a_kill_while_texts_are_swapped_loses_nothing(bundled_model, prompts, tmp_path):
    answers, trace = tmp_path / "a", tmp_path / "trace"
    command = [*H2O, *batch(bundled_model, prompts, answers, "--kv-pool", "1.1", "--admission", "none")]
    with subprocess.Popen([*command, "--trace", str(trace)], stderr=subprocess.DEVNULL, bufsize=1) as process:
        end = time.monotonic() + 60
        while not (answers.exists() and answers.read_bytes().count(b"\n") >= 3) and time.monotonic() < end:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert {path.name for path in tmp_path.iterdir()} <= {"prompts.jsonl", "a", "trace", ".user"}
    assert run_command(command[3:]) == 0
    assert run_command(batch(bundled_model, prompts, tmp_path / "calm")) == 0
    assert texts(answers) == texts(tmp_path / "calm")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--admission", "most"], "--admission most is not possible"),
        (["--admission", "watermark:2"], "--admission watermark:2 is not possible"),
        (["--swap", "ram"], "with --admission simulate nothing is swapped out"),
        (["--admission", "none", "--swap", "tape"], "there is no --swap tape"),
        (["--kv-pool", "1KB"], "is less than a block of 16 tokens"),
        (["--kv-pool", "2", "--ctx", "100"], "--kv-pool and --ctx both say"),
    ],
)
def test_wrong_usage_is_one_line(bundled_model, prompts, tmp_path, flags, message, capsys):
    assert run_command([*batch(bundled_model, prompts, tmp_path / "a"), *flags]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_trace_that_cannot_be_written_is_one_line(bundled_model, prompts, tmp_path, capsys):
    assert run_command(batch(bundled_model, prompts, tmp_path / "a", "--trace", tmp_path / "none" / "trace")) == 1
    assert "cannot be written: No such file" in capsys.readouterr().err


@pytest.mark.cgroup
@pytest.mark.parametrize("swap", ["ram", "disk"])
def test_a_pressed_batch_lives_inside_its_budget(bundled_model, prompts, tmp_path, swap):
    budget_mb = 52
    with memory_limit(budget_mb * MB) as group:
        flags = ["-m", budget_mb, "--kv-pool", "1.1", "--admission", "none", "--swap", swap, "--json"]
        done = group.run([*H2O, *batch(bundled_model, prompts, tmp_path / "a", *flags)], timeout=120, env=os.environ)
        assert done.returncode == 0, done.stderr
        assert group.kills == 0
        assert group.peak_bytes <= budget_mb * MB
    totals = json.loads(done.stdout)
    assert (totals["answers"], totals["errors"]) == (20, 0)
    assert totals["swaps_out"] > 5
