"""The benchmark of batches: what its figures are made of, and both sides on a small model."""

from __future__ import annotations

import subprocess

import msgspec
import pytest

from h2o_cli.bench.batch.report import BATCH
from h2o_cli.bench.batch.rows import BatchRow, Figures, projected_s, with_figures
from h2o_cli.bench.batch.runs import BatchBench, Settings, finished
from h2o_cli.bench.box import Outcome
from h2o_cli.bench.models.named import bench_model
from h2o_cli.bench.results import Results
from h2o_cli.bench.speed.engines import H2O
from h2o_cli.main import run_command
from runtime.sizes import MB

MMAP = "llama.cpp mmap"


def row(engine=H2O, n_streams=4, **more):
    fields = {"file_bytes": 10**9, "budget": "419", "budget_bytes": 419 * MB, "read_bytes_per_s": 400 * MB}
    fields |= {"engine": engine, "n_streams": n_streams, "prompt_len": 32, "gen_len": 64}
    return BatchRow(suite="batch", model="m/f16", **{**fields, **more})


def figures(n_steps=5, step_s=0.5, **more):
    return Figures(2.0, (1.0, 0.7, *[step_s] * (n_steps - 2)), 1e6, **more)


def outcome(rc=0, stdout="", **more):
    return Outcome(rc, 1.0, 1.0, 5 * MB, 0, 0.0, stdout=stdout, **more)


def test_a_projection_goes_on_as_the_later_steps():
    assert projected_s([1.0, 0.7, 0.5, 0.3], 4) == pytest.approx(2.5)
    assert projected_s([1.0, 0.7, 0.5, 0.3], 63) == pytest.approx(2.5 + 59 * 0.4)
    assert projected_s([1.0, 0.7], 3) == pytest.approx(1.7 + 0.85)


def test_figures_are_of_all_streams():
    found = with_figures(row(gen_len=6), figures(wait_s=1.0, compute_s=2.0, choose_s=0.2))
    assert found.prefill_tokens_per_s == pytest.approx(4 * 32 / 2)
    assert (found.decode_s, found.total_s) == (pytest.approx(3.2), pytest.approx(5.2))
    assert found.decode_tokens_per_s == pytest.approx(4 * 5 / 3.2)
    assert found.total_tokens_per_s == pytest.approx(4 * 6 / 5.2)
    assert found.latency_ms == pytest.approx(500)
    assert found.breakdown == {"wait": 200, "compute": 400, "choose": pytest.approx(40)}
    assert not found.projected


def test_what_became_of_a_command():
    assert finished(row(), outcome(-9, oom_killed=True)).status == "oom"
    assert finished(row(), outcome(-9, timed_out=True)).status == "timeout"
    refused = outcome(1, stderr="h2o: too small: the smallest budget that works here is -m 440")
    assert finished(row(), refused).status == "too small"
    assert finished(row(), outcome(0, "nonsense")).status == "failed"
    assert finished(row(), outcome(0, msgspec.json.encode(figures()).decode())).status == "ok"


def test_the_report_compares_and_marks_what_is_projected(tmp_path):
    rows = [with_figures(row(n_streams=1, status="ok"), figures(63))]
    rows += [with_figures(row(status="ok", cut_gen_len=6, predicted_decode_tokens_per_s=9.0), figures())]
    rows += [with_figures(row(MMAP, status="ok"), figures(63, step_s=1.0)), row(MMAP, 1, status="oom")]
    results = Results(BATCH, tmp_path, json=True)
    results.begin()
    results.keep(rows)
    assert results.read() == rows
    results.finish(rows)
    text = (tmp_path / "batch.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| 419 MB | h2o | 4")]
    assert "| ~7.83 | 4.0 x | 1.95 x | 9.00 |" in lines[0]
    assert "OOM" in text and "cut-gen-len" in text


@pytest.mark.parametrize("engine", [H2O, MMAP])
def test_both_sides_do_all_steps(bundled_model, tmp_path, engine, monkeypatch):
    settings = Settings(
        bench_model(str(bundled_model)), ("300",), (3,), (engine,), prompt_len=40, gen_len=4, threads=1, predict=False
    )

    def start(self, command, size):
        done = subprocess.run(command, env=self._env, capture_output=True, text=True, check=False, timeout=60)
        return outcome(done.returncode, done.stdout, stderr=done.stderr)

    monkeypatch.setattr(BatchBench, "_start", start)
    (found,) = BatchBench(settings, tmp_path).run()
    assert found.status == "ok", found.note
    assert found.decode_tokens_per_s > 0
    assert not found.projected
    assert BATCH.told(found).startswith(bundled_model.stem)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--engine", "x"], "there is no engine 'x'"),
        (["--cut-gen-len", "1"], "--cut-gen-len 1 is not possible"),
        (["--budget", "x"], "x"),
    ],
)
def test_wrong_usage_is_one_line(flags, message, tmp_path, capsys):
    assert run_command(["bench", "batch", *flags, "--output", str(tmp_path / "r")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r").exists()
