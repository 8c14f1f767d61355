"""The benchmark of admission: the simulator does what the engine does, and what the report says."""

from __future__ import annotations

import csv

import pytest

from h2o_cli import cmd_bench_admission
from h2o_cli.bench.admission import runs
from h2o_cli.bench.admission.engine_runs import PressedEngine, open_engine, simulated
from h2o_cli.bench.admission.report import ADMISSION
from h2o_cli.bench.admission.rows import AdmissionRow, Run
from h2o_cli.bench.admission.workload import Arrival
from h2o_cli.bench.results import Results
from h2o_cli.bench.speed import parts
from h2o_cli.main import run_command
from planner.pool_simulator import Arrivals, Work
from runtime.answer.admission import Admission
from runtime.answer.pool import Pool
from runtime.answer.pool_trace import check, read_trace


def test_the_simulator_swaps_as_the_engine(bundled_model):
    prompt = "Once upon a time there was a little dog who wanted to see the sea."
    times = (0, 0, 2, 30, 200, 203)
    arrivals = [Arrival(at_pass, prompt, 40, 0.5 + i / 10) for i, at_pass in enumerate(times)]
    n_passes = []
    with open_engine(bundled_model, 16, 4) as engine:
        prompts = engine.prompts(arrivals)
        for text, fast in (("none", 8), ("reserve:8", 8), ("none", 5), ("none", 16)):
            admission = Admission.parse(text)
            run = engine.run(prompts, admission, 3, fast, fit=True)
            costs = engine.costs()
            texts = [prompt.text for prompt in prompts]
            beside = simulated(texts, Pool(fast, engine.slow(fast)), admission, engine.limits, costs, 3)
            counts = [
                (r.n_passes, r.n_tokens, r.n_prompt_tokens, r.swaps_out, r.blocks_out, r.blocks_in)
                for r in (run, beside)
            ]
            assert counts[0] == counts[1]
            assert (run.swaps_out > 0) == (fast < 16)
            assert costs.block_out_s > 0
            assert run.swap_s < run.seconds
            n_passes.append(run.n_passes)
    assert n_passes[2] > n_passes[0] >= n_passes[3] > 40


def test_texts_arrive_in_passes():
    arrivals = Arrivals([0, 4, 9])
    assert arrivals.is_here(0, 0, 0)
    assert not arrivals.is_here(1, 3, 1)
    assert arrivals.is_here(1, 4, 1)
    assert arrivals.is_here(2, 6, 0)  # nothing to do until then: 3 passes are skipped
    assert arrivals.is_here(2, 7, 1)


def test_costs_are_fitted_to_the_median_of_the_same_pass():
    engine = PressedEngine.__new__(PressedEngine)
    engine._swapped = [0, 0.0, 0, 0.0]
    works = [Work(0, n, 10 * n * n) for n in range(1, 6)]
    runs = [[(work, scale * (1e-3 + 1e-4 * work.n_texts)) for work in works] for scale in (1, 50, 1.2)]
    engine._timed = {("none", 8): runs}
    assert engine.costs().pass_s == pytest.approx(1.2e-3)
    assert engine.costs(last=1).pass_s == pytest.approx(1.2e-3)
    engine._timed = {("none", 8): runs[::-1]}
    assert engine.costs(last=1).pass_s == pytest.approx(1e-3)


def row(suite, admission, seconds, **more):
    found = Admission.parse(admission)
    zero = {"swap_s": 0.01, "n_passes": 9, "n_prompt_tokens": 50, "n_refused": 0, "swaps_in": 2, "swaps_out": 2}
    runs = tuple(
        Run(seed=seed, seconds=s, n_tokens=100, blocks_in=5, blocks_out=5, **zero) for seed, s in enumerate(seconds)
    )
    fields = {"policy": found.kind, "value": found.value, "fast": 48, "slow": 96, "batch_size": 32, "n_texts": 9}
    return AdmissionRow(suite=suite, model="m", admission=admission, runs=runs, **fields, **more)


def finished(folder, fresh, simulated=(0.96, 0.97)):
    beside = row("admission sweep", "none", simulated).runs
    rows = [row("admission check", "none", (1.0, 1.0), simulated=beside)]
    rows += [row("admission sweep", "none", (1.0, 1.1, 1.2)), row("admission sweep", "reserve:0", (1.0, 1.1, 1.2))]
    rows += [row("admission sweep", "reserve:1", (0.9, 1.0, 1.1)), row("admission fresh", "none", (1.0, 1.0, 1.0))]
    rows += [row("admission fresh", "reserve:1", fresh), row("admission bandit", "reserve:0", (), n_plays=7)]
    rows += [
        row("admission known", "simulate", (1 / 1.1, 1.0, 1.2 / 1.1)),
        row("admission engine", "none", (1.0, 1.0, 1.0)),
    ]
    rows += [row("admission engine", "reserve:1", (0.8, 0.79, 0.808)), row("admission twice", "none", (0.5, 0.5, 0.5))]
    results = Results(ADMISSION, folder, json=True)
    results.begin()
    results.keep(rows)
    assert results.read() == rows
    results.finish(rows)
    return (folder / "admission.md").read_text()


def test_the_report_says_whether_the_optimum_is_better_than_none(tmp_path):
    text = finished(tmp_path, (0.9, 0.91, 0.92))
    assert "best is reserve:1" in text
    assert "better than none" in text
    assert "takes reserve:0 after 7 of 6 runs, -9" in text
    assert "| none | 100.0 ± 0.0 | 103.6 ± 6.8 | 3.6 ± 6.8 |" in text
    assert "Intervals reach beyond 10 % at none (2 rounds, 9 texts). All means are within 10 %." in text
    assert "known, simulate would be 10.0 ± 0.0 % beside none: better than none" in text
    assert (
        "(3 rounds of 9 texts) reserve:1 is better than none (25.1 ± 3.5 %), and has 0.63 ± 0.02 of the speed" in text
    )
    assert "Swaps take 1.00 ± 0.00 % of the seconds of none" in text
    text = finished(tmp_path, (0.9, 1.0, 1.1), (0.96, 0.961))
    assert "no different from none" in text
    assert "within 10 % of the engine at all 1 points (2 rounds, 9 texts), intervals included" in text
    assert "Means are beyond 10 % at none." in finished(tmp_path, (0.9, 1.0, 1.1), (0.86, 0.861))
    with (tmp_path / "admission.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 29
    assert (lines[0]["factor"], lines[0]["swap_in_count"], lines[0]["out_spd"]) == ("0.0", "2", "100.0")


def test_it_is_a_part_of_the_whole_benchmark(tmp_path, monkeypatch, capsys):
    small = {"TEXTS": 12, "REPEATS": 2, "QUICK_STEP": 6.0, "QUICK_ROUNDS": 2, "QUICK_ENGINE_TEXTS": 4}
    for name, n in small.items():
        monkeypatch.setattr(cmd_bench_admission, name, n)
    monkeypatch.setattr(runs, "TRACED_TEXTS", 150)
    monkeypatch.setattr(parts, "wanted_parts", lambda **_: [])
    assert run_command(["bench", "--output", str(tmp_path), "--quick"]) == 0
    out = capsys.readouterr().out
    assert "reserve: best is reserve:" in out
    assert "first to arrive, known then" in out
    rows = Results(ADMISSION, tmp_path).read()
    assert [row.admission for row in rows if row.suite == "admission check"] == list(runs.CHECKED)
    assert {"admission engine", "admission twice", "admission known"} < {row.suite for row in rows}
    (trace,) = tmp_path.glob("admission-trace-*.jsonl")
    with trace.open() as file:
        assert check(read_trace(file)).events["swap_in"] > 16
    assert (tmp_path / "predict.md").exists()
