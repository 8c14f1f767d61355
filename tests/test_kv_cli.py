"""The flags of `h2o run` that filter keys and values."""

from __future__ import annotations

import json

import pytest

from h2o_cli import main as cli


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """run(*arguments): exit code, standard output, standard error of `h2o run` in this process."""
    monkeypatch.setattr("h2o_cli.opening.default_plan_path", lambda: tmp_path / "default-plan.bin")
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
        "--kv-keep",
        0.25,
        "--kv-store",
        store,
    )
    assert code == 0, err
    assert "speculation is off" in err
    facts = json.loads(out)
    figures, n_prompt = facts["kv"], len(facts["prompt_tokens"])
    assert figures["store"] == store and figures["layers"] == [0] and figures["sparse_layers"] == [2, 3]
    assert figures["prompt_rows"] == n_prompt and figures["kept_rows"] == n_prompt // 4
    row_bytes, n_past = 2 * 128 * 2, n_prompt + 3
    kept_bytes = (n_prompt // 4 + 3) * 2 * row_bytes
    stored_bytes = n_prompt * 2 * row_bytes
    assert figures["bytes_in_memory"] == n_past * 2 * row_bytes + kept_bytes + (stored_bytes if store == "ram" else 0)
    assert figures["bytes_on_disk"] == (stored_bytes if store == "disk" else 0)
    assert bool(figures["bytes_read_per_token"]) == (store == "disk")
    assert facts["ledger"]["filter_bytes"] > 0


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
