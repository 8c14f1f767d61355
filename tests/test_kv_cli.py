"""The flags of `h2o run` that filter keys and values."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from cgroups import memory_limit

from h2o_cli import main as cli
from h2o_cli.session.kv_filter import cut_middle


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """run(*arguments): exit code, standard output, standard error of `h2o run` in this process."""
    monkeypatch.setattr("h2o_cli.session.model.default_plan_path", lambda: tmp_path / "default-plan.bin")
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    def call(*arguments):
        code = cli.run_command(["run", "-t", "1", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.mark.parametrize("store", ["ram", "disk"])
def test_figures(run, tiny_model, store):
    path = tiny_model("llama")
    code, out, err = run(
        path,
        "-p",
        "a b c d " * 20,
        "-n",
        4,
        "--temp",
        0,
        "--json",
        "--kv-filter",
        "--kv-layers",
        0,
        "--kv-keep",
        10,
        "--kv-store",
        store,
    )
    assert code == 0, err
    assert "speculation is off" in err
    facts = json.loads(out)
    figures, n_prompt = facts["kv"], len(facts["prompt_tokens"])
    assert figures["store"] == store and figures["layers"] == [0] and figures["sparse_layers"] == [2, 3]
    assert figures["prompt_rows"] == n_prompt and figures["kept_rows"] == 10
    assert figures["layers_from"] == "given" and "guess" not in err
    row_bytes, n_past = 2 * 128 * 2, n_prompt + 3
    kept_bytes = (10 + 3) * 2 * row_bytes
    stored_bytes = n_prompt * 2 * row_bytes
    assert figures["bytes_in_memory"] == n_past * 2 * row_bytes + kept_bytes + (stored_bytes if store == "ram" else 0)
    assert figures["bytes_on_disk"] == (stored_bytes if store == "disk" else 0)
    assert bool(figures["bytes_read_per_token"]) == (store == "disk")
    assert facts["ledger"]["filter_bytes"] > 0


def test_layers_that_are_a_guess_are_said_to_be_one(run, tiny_model):
    path = tiny_model("llama")
    flags = ["-p", "a b c d " * 80, "-n", 4, "--ctx", 512, "--temp", 0, "--kv-filter"]
    code, out, err = run(path, *flags, "--json")
    assert code == 0, err
    figures = json.loads(out)["kv"]
    assert figures["layers_from"] == "guess" and figures["kept_rows"] == 256 < figures["prompt_rows"]
    layers = ",".join(map(str, figures["layers"]))
    assert f"warning: {path.name} was not analyzed, its filter layers {layers} are a guess" in err
    assert f"h2o kv analyze --quick {path}" in err
    code, _, err = run(path, *flags)
    assert code == 0 and "filter layers guessed" in " ".join(err.split())


@pytest.mark.parametrize("flags", [(), ("--kv-layers", "0"), ("--kv-store", "disk")])
def test_a_short_prompt_is_answered_as_without_a_filter(run, bundled_model, flags):
    same = [bundled_model, "-p", "Once there was a", "-n", 24, "--temp", 0, "--json", "--speculate", "off"]
    plain = json.loads(run(*same)[1])
    code, out, err = run(*same, "--kv-filter", *flags)
    assert code == 0, err
    found = json.loads(out)
    assert found["kv"]["kept_rows"] == len(found["prompt_tokens"]) < 7
    assert found["tokens"] == plain["tokens"]


def test_nothing_is_guessed_where_nothing_is_left_out(run, tiny_model):
    code, _, err = run(tiny_model("llama"), "-p", "a b c", "-n", 2, "--kv-filter")
    assert code == 0 and "guess" not in err


def test_without_a_filter_there_are_no_figures(run, tiny_model):
    code, out, _ = run(tiny_model("llama"), "-p", "a", "-n", 1, "--json")
    assert code == 0 and json.loads(out)["kv"] is None


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--kv-keep", "0.1"], "without --kv-filter"),
        (["--kv-filter", "--kv-type", "f32"], "--kv-type f32"),
        (["--kv-filter", "--draft", "auto"], "--draft"),
        (["--kv-filter", "--kv-keep", "0"], "--kv-keep 0"),
        (["--kv-filter", "--kv-layers", "2,x"], "not a list"),
        (["--kv-filter", "--kv-layers", "9"], "there is no layer 9"),
        (["--kv-filter", "--kv-wait", "7"], "leave no layer"),
        (["--kv-filter", "--kv-store", "tape"], "choose one of ram, disk"),
        (["--kv-filter", "--kv-method", "h2o"], "choose one of"),
    ],
)
def test_wrong_flags_end_in_one_line(run, tiny_model, flags, words):
    code, _, err = run(tiny_model("llama"), "-p", "a b c", "-n", 1, *flags)
    assert code == 2 and words in err
    assert "Traceback" not in err


FIELDS = {
    "cpu_num_threads": 2,
    "use_chat_template": False,
    "cot": False,
    "max_context_len": 20,
    "model_name": "meta-llama/Meta-Llama-3-8B-Instruct",
    "load_in_8bit": False,
    "load_in_4bit": False,
    "model_cls": "multi",
    "cache_cls": "lazy",
    "use_flash_attn": True,
    "do_select_layers": "1",
    "num_wait_load_layers": 0,
    "real_offload": True,
    "dense_more": True,
    "num_of_selected_tokens": 5,
    "selector_cls": "exp",
    "window_size": 3,
}


@pytest.fixture
def config(tmp_path):
    """config(**changes): a file with the source system's fields."""

    def write(**changes):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(FIELDS | changes))
        return path

    return write


def test_a_configuration_file(run, tiny_model, config):
    path = config()
    code, out, err = run(tiny_model("llama"), "-p", "a b c d " * 20, "-n", 4, "--json", "--kv-config", path)
    assert code == 0, err
    assert "the middle of the prompt was left out" in err
    facts = json.loads(out)
    assert len(facts["prompt_tokens"]) == 20
    expected = {"layers": [1], "wait": 0, "store": "disk", "strategy": "lazy", "select": "exp", "kept_rows": 5}
    assert {key: facts["kv"][key] for key in expected} == expected


def test_flags_come_before_the_configuration_file(run, tiny_model, config):
    flags = ["--kv-store", "ram", "--kv-layers", "0", "--kv-keep", "7", "--kv-wait", "1"]
    code, out, err = run(tiny_model("llama"), "-p", "a b c d " * 20, "-n", 2, "--json", "--kv-config", config(), *flags)
    assert code == 0, err
    expected = {"layers": [0], "wait": 1, "store": "ram", "select": "exp", "kept_rows": 7}
    assert {key: json.loads(out)["kv"][key] for key in expected} == expected


def test_the_middle_is_cut_out():
    assert cut_middle(range(10), 4) == [0, 1, 8, 9]
    assert cut_middle(range(10), 5) == [0, 1, 7, 8, 9]
    assert cut_middle(range(3), 5) == [0, 1, 2] and cut_middle(range(3), 0) == [0, 1, 2]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"attn_sparsity": 1}, "unknown field `attn_sparsity`"),
        ({"cache_cls": "magic"}, "cache_cls 'magic'"),
        ({"selector_cls": "magic"}, "selector_cls 'magic'"),
        ({"model_cls": "once_offload"}, "model_cls 'once_offload'"),
        ({"use_flash_attn": False}, "flash attention"),
        ({"dense_more": False}, "always dense"),
        ({"load_in_8bit": True}, "the GGUF file's"),
        ({"cot": True}, "step by step"),
        ({"do_select_layers": "2,x"}, "not a list"),
        ({"num_of_selected_tokens": 0}, "--kv-keep 0"),
        ({"window_size": 0}, "window_size"),
        ({"max_context_len": "many"}, "Expected `int | null`"),
    ],
)
def test_configuration_files_that_cannot_be_used(run, tiny_model, config, changes, words):
    code, _, err = run(tiny_model("llama"), "-p", "a b c", "-n", 1, "--kv-config", config(**changes))
    assert code == 2 and words in err and "Traceback" not in err


def test_a_configuration_file_that_is_no_json(run, tiny_model, tmp_path):
    (tmp_path / "config.json").write_text("{")
    code, _, err = run(tiny_model("llama"), "-p", "a", "-n", 1, "--kv-config", tmp_path / "config.json")
    assert code == 2 and "cannot be used" in err
    assert run(tiny_model("llama"), "-p", "a", "-n", 1, "--kv-config", tmp_path / "missing")[0] == 1


def smallest_budget(command, tmp_path):
    """The floor that the error for a hopeless budget names, in MB."""
    done = subprocess.run([*command, "-m", "20"], capture_output=True, text=True, check=False, cwd=tmp_path)
    found = re.search(r"-m (\d+)", done.stderr)
    assert found, done.stderr
    return int(found[1])


@pytest.mark.cgroup
def test_a_context_that_does_not_fit_runs_from_disk(tiny_model, tmp_path):
    """134 MB of keys and values inside a limit that is smaller; the answer is that of the store in memory."""
    model = tiny_model("llama:layers=8,dim=512,ffn=256,heads=8,kv_heads=8,vocab=512,ctx=8192")
    (tmp_path / "prompt").write_text("the old man and the sea " * 90)
    command = [sys.executable, "-m", "h2o_cli.main", "run", str(model), "-f", "prompt", "-s", "plan", "--ctx", "8192"]
    command += ["-n", "8", "--temp", "0", "--json", "-t", "2", "--ubatch", "256"]
    filtered = [*command, "--kv-filter", "--kv-layers", "0"]
    on_disk = [*filtered, "--kv-store", "disk"]
    budget_mb = smallest_budget(on_disk, tmp_path) + 2
    assert smallest_budget(command, tmp_path) > budget_mb + 50
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with memory_limit(budget_mb * 10**6) as group:
        done = group.run([*on_disk, "-m", str(budget_mb)], cwd=tmp_path, env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
        assert group.kills == 0 and group.peak_bytes <= budget_mb * 10**6
    found = json.loads(done.stdout)
    assert found["kv"]["bytes_on_disk"] == len(found["prompt_tokens"]) * 6 * 2048
    done = subprocess.run([*filtered, "-m", "400"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["tokens"] == found["tokens"]
