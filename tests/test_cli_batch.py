"""`h2o batch`: every line is answered once, as `h2o run` answers it, whatever ends the command on the way."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import msgspec
import pytest
from cgroups import memory_limit
from recurrent_models import recurrent_model

from h2o_cli.main import run_command
from profiler.measure import Measurement
from profiler.model_profile import Spread, save_profile

MB = 10**6
H2O = [sys.executable, "-m", "h2o_cli.main"]
LINES = [
    "Once upon a time",
    '{"prompt": "Tom and Lily", "max_tokens": 5}',
    '{"custom_id": "chat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8}',
    "{bad",
    '{"custom_id": "long", "prompt": "word", "max_tokens": 100000}',
    '{"prompt": ""}',
    "The dog and the cat",
]


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(LINES) + "\n")
    return path


def batch(model, prompts, answers, *more):
    files = ["-f", str(prompts), "-o", str(answers)]
    return ["batch", str(model), *files, "-n", "12", "--temp", "0", "-t", "1", *map(str, more)]


def read(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {answer["custom_id"]: answer for answer in found}
    assert len(by_id) == len(found), "an answer stands there twice"
    return by_id


def wait_until(what):
    end = time.monotonic() + 60
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def size(path):
    return path.stat().st_size if path.exists() else 0


def text_of(answer):
    (choice,) = answer["response"]["body"]["choices"]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def test_answers_are_those_of_single_runs(bundled_model, prompts, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    assert run_command(batch(bundled_model, prompts, answers, "--json")) == 0
    totals = json.loads(capsys.readouterr().out)
    assert (totals["answers"], totals["errors"], totals["skipped"], totals["largest_batch"]) == (5, 2, 0, 5)
    found = read(answers)
    assert found.keys() == {"line-1", "line-2", "chat", "line-4", "long", "line-6", "line-7"}
    assert "JSON is malformed" in found["line-4"]["error"]["message"]
    assert "do not fit" in found["long"]["error"]["message"]
    for custom_id, prompt, n in (
        ("line-1", ["-p", "Once upon a time"], 12),
        ("line-2", ["-p", "Tom and Lily"], 5),
        ("chat", ["-p", "Hi", "--chat"], 8),
        ("line-7", ["-p", "The dog and the cat"], 12),
    ):
        alone = ["run", str(bundled_model), *prompt, "-n", str(n), "--temp", "0", "-t", "1", "--json"]
        assert run_command(alone) == 0
        single = json.loads(capsys.readouterr().out)
        assert text_of(found[custom_id]) == single["text"]
        usage = found[custom_id]["response"]["body"]["usage"]
        assert usage["prompt_tokens"] == len(single["prompt_tokens"])
        assert usage["completion_tokens"] == len(single["tokens"])


def test_a_system_prompt_is_computed_once(bundled_model, tmp_path, capsys):
    prompts, answers = tmp_path / "p", tmp_path / "a"
    system = {"role": "system", "content": "You tell short stories to children, and you are always kind. " * 6}
    lines = [{"messages": [system, {"role": "user", "content": f"Tell me of {name}."}]} for name in ("Tom", "a dog")]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines * 2))
    assert run_command(batch(bundled_model, prompts, answers, "--json")) == 0
    totals = json.loads(capsys.readouterr().out)
    assert totals["shared_prompt_tokens"] >= 3 * 64
    assert totals["prompt_tokens"] > totals["shared_prompt_tokens"]
    found = read(answers)
    assert text_of(found["line-1"]) == text_of(found["line-3"])


def test_schedules_give_the_same_answers(bundled_model, prompts, tmp_path, capsys):
    found = []
    for i, flags in enumerate((["--batch-size", 4], ["--schedule", "zigzag", "--batch-size", 2, "--num-batches", 2])):
        answers = tmp_path / f"a{i}"
        more = ["--overlap", "off", "--trace", tmp_path / "t"] if i else []
        assert run_command(batch(bundled_model, prompts, answers, "--json", *flags, *more)) == 0
        totals = json.loads(capsys.readouterr().out)
        assert totals["largest_batch"] == 4
        assert (totals["schedule"], totals["num_batches"]) == (("zigzag", 2) if i else ("continuous", 1))
        assert totals["overlap"] is not bool(i)
        found.append({key: text_of(answer) for key, answer in read(answers).items() if answer["response"]})
    assert found[0] == found[1]


def test_a_timeline_that_cannot_be_written_is_one_line(bundled_model, prompts, tmp_path, capsys):
    assert run_command(batch(bundled_model, prompts, tmp_path / "a", "--timeline", tmp_path / "no" / "t")) == 1
    assert "cannot be written" in capsys.readouterr().err


def test_a_second_run_repeats_nothing(bundled_model, prompts, tmp_path, capsys):
    answers = tmp_path / "answers.jsonl"
    assert run_command(batch(bundled_model, prompts, answers)) == 0
    before = answers.read_bytes()
    capsys.readouterr()
    assert run_command(batch(bundled_model, prompts, answers, "--json")) == 0
    totals = json.loads(capsys.readouterr().out)
    assert (totals["answers"], totals["skipped"], totals["passes"]) == (0, 7, 0)
    assert answers.read_bytes() == before


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_what_is_finished_survives_any_end(bundled_model, tmp_path, number):
    prompts, answers = tmp_path / "p", tmp_path / "a"
    prompts.write_text("".join(f"Story {i}\n" for i in range(24)))
    command = [*H2O, *batch(bundled_model, prompts, answers, "-n", 200, "--batch-size", 4)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not (answers.exists() and answers.read_bytes().count(b"\n") >= 2):
            assert time.monotonic() < end and process.poll() is None, process.stderr.read()
            time.sleep(0.01)
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert "Traceback" not in err
    kept = read(answers)
    done = subprocess.run([*command, "-n", "8"], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    found = read(answers)
    assert len(found) == 24
    assert all(found[custom_id] == answer for custom_id, answer in kept.items())


def test_ten_kills_lose_and_repeat_nothing(bundled_model, tmp_path):
    prompts, answers = tmp_path / "p", tmp_path / "a"
    lines = [{"prompt": f"Story {i} of a dog", "max_tokens": 1 + 37 * i % 90} for i in range(60)]
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = [*H2O, *batch(bundled_model, prompts, answers, "--batch-size", 8)]
    moments, kept = random.Random(1), {}
    for _ in range(10):
        until, more_s = size(answers) + moments.randrange(1000), moments.uniform(0, 0.05)
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
            wait_until(lambda process=process, until=until: size(answers) > until or process.poll() is not None)
            time.sleep(more_s)
            process.kill()
        assert process.returncode == -signal.SIGKILL
        whole = answers.read_bytes().rpartition(b"\n")[0].decode().splitlines()
        found = {line["custom_id"]: line for line in map(json.loads, whole)}
        assert len(found) == len(whole), "an answer stands there twice"
        assert all(found[key] == kept[key] for key in kept)
        kept = found
    assert subprocess.run(command, capture_output=True, check=False, timeout=120).returncode == 0
    found = read(answers)
    assert found.keys() == {f"line-{i}" for i in range(1, 61)}
    assert all(found[key] == kept[key] for key in kept)


@pytest.mark.cgroup
def test_a_batch_lives_inside_its_budget(tiny_model, tmp_path):
    model = tiny_model("llama:layers=12,dim=768,ffn=3072,heads=12,kv_heads=4,vocab=4096,ctx=512,tied=0", "f16")
    prompts = tmp_path / "p"
    prompts.write_text("".join(f"{'word ' * (5 * i)}end\n" for i in range(20)))
    budget_mb = 140
    with memory_limit(budget_mb * MB) as group:
        command = [*H2O, *batch(model, prompts, tmp_path / "a", "-m", budget_mb, "--json")]
        done = group.run(command, timeout=120, env=os.environ)
        assert done.returncode == 0, done.stderr
        assert group.kills == 0
        assert group.peak_bytes <= budget_mb * MB
    totals = json.loads(done.stdout)
    assert (totals["answers"], totals["errors"]) == (20, 0)
    assert totals["largest_batch"] > 4
    assert totals["bytes_read"] > 0


def test_the_batch_size_is_the_fastest_by_the_profile(bundled_model, prompts, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    command = batch(bundled_model, prompts, tmp_path / "a", "-m", 400, "--batch-size", "auto")
    assert run_command(command) == 0
    assert "--batch-size 16 is taken: `h2o profile` can say what is best" in capsys.readouterr().err
    profile = Measurement(bundled_model, 1, n_threads=1).run()
    slow = Spread(100.0, 0.0, 1, 100.0, 100.0)  # seconds: one text alone is faster
    batches = tuple(msgspec.structs.replace(b, streamed_s=slow, resident_s=slow) for b in profile.batches)
    save_profile(msgspec.structs.replace(profile, batches=batches), tmp_path / "p.json")
    assert run_command(batch(bundled_model, prompts, tmp_path / "b", "-m", 400, "--batch-size", "auto", "--json")) == 0
    out, err = capsys.readouterr()
    assert "--batch-size 1 is chosen: about" in err
    assert json.loads(out)["largest_batch"] == 1
    assert read(tmp_path / "a").keys() == read(tmp_path / "b").keys()


@pytest.mark.cgroup
def test_the_smallest_budget_that_is_named_works(bundled_model, prompts, tmp_path):
    def run(budget_mb):
        with memory_limit(budget_mb * MB) as group:
            command = [*H2O, *batch(bundled_model, prompts, tmp_path / "a", "-m", budget_mb)]
            return group.run(command, timeout=60, env=os.environ)

    with memory_limit(400 * MB) as group:
        command = [*H2O, *batch(bundled_model, prompts, tmp_path / "a", "-m", 20)]
        refused = group.run(command, timeout=60, env=os.environ)
    assert "--batch-size lowers it" in refused.stderr
    floor_mb = int(re.search(r"-m (\d+)", refused.stderr).group(1))
    assert f"-m {floor_mb} " in run(floor_mb - 1).stderr
    done = run(floor_mb)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "33"], "--batch-size 33 is not possible"),
        (["--batch-size", "many"], "--batch-size many is not possible"),
        (["--batch-size", "auto", "--schedule", "zigzag"], "--batch-size auto is not for --schedule zigzag"),
        (["-n", "0"], "-n 0 is not possible"),
        (["--ctx", "0"], "--ctx 0 is not possible"),
        (["--schedule", "zag"], "there is no --schedule zag"),
        (["--overlap", "yes"], "--overlap yes is not possible"),
        (["--num-batches", "2"], "add --schedule zigzag"),
        (["--schedule", "zigzag", "--num-batches", "3"], "--num-batches 3 of 16 texts is not possible"),
        (["--schedule", "zigzag", "--num-batches", "0"], "--num-batches 0 of 16 texts is not possible"),
        (["--schedule", "zigzag", "--admission", "none"], "the texts of a block are never swapped out"),
    ],
)
def test_wrong_usage_is_one_line(bundled_model, prompts, tmp_path, flags, message, capsys):
    assert run_command([*batch(bundled_model, prompts, tmp_path / "a"), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("what", ["no model", "a budget too small", "no prompts"])
def test_a_batch_that_does_not_open_leaves_no_answers(bundled_model, prompts, tmp_path, what, capsys):
    model = tmp_path / "none.gguf" if what == "no model" else bundled_model
    more = ["-m", "20"] if what == "a budget too small" else []
    command = batch(model, tmp_path / "none" if what == "no prompts" else prompts, tmp_path / "a", *more)
    assert run_command(command) == 1
    assert capsys.readouterr().err.startswith("h2o: ")
    assert not (tmp_path / "a").exists()


def test_missing_prompts_are_one_line(bundled_model, tmp_path, capsys):
    assert run_command(batch(bundled_model, tmp_path / "none", tmp_path / "a")) == 1
    assert "the prompts" in capsys.readouterr().err


def test_a_recurrent_model_is_refused(prompts, tmp_path, capsys):
    assert run_command(batch(recurrent_model(tmp_path, "mamba"), prompts, tmp_path / "a")) == 1
    assert "keeps a state without positions" in capsys.readouterr().err
