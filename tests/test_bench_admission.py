"""The benchmark of admission: the simulator does what the engine does, and what the report says."""

from __future__ import annotations

import csv

from h2o_cli.bench.admission.engine_runs import open_engine, simulated
from h2o_cli.bench.admission.report import ADMISSION
from h2o_cli.bench.admission.rows import AdmissionRow, Run
from h2o_cli.bench.admission.workload import Arrival
from h2o_cli.bench.results import Results
from runtime.answer.admission import Admission


def test_the_simulator_swaps_as_the_engine(bundled_model):
    prompt = "Once upon a time there was a little dog who wanted to see the sea."
    arrivals = [Arrival(0, prompt, 40, 0.5 + i / 10) for i in range(5)]
    with open_engine(bundled_model, 8, 4) as engine:
        prompts = engine.prompts(arrivals)
        for text in ("none", "reserve:8"):
            run = engine.run(prompts, Admission.parse(text), 3, counts=True)
            costs = engine.costs()
            beside = simulated(
                [p.text for p in prompts], Admission.parse(text), engine.limits, costs, engine.fast, engine.slow, 3
            )
            counts = [
                (r.n_passes, r.n_tokens, r.n_prompt_tokens, r.swaps_out, r.blocks_out, r.blocks_in)
                for r in (run, beside)
            ]
            assert counts[0] == counts[1]
            assert run.swaps_out > 0 or text != "none"
            assert costs.block_out_s > 0


def row(suite, admission, seconds, **more):
    found = Admission.parse(admission)
    zero = {"n_passes": 9, "n_prompt_tokens": 50, "n_refused": 0, "swaps_in": 2, "swaps_out": 2}
    runs = tuple(
        Run(seed=seed, seconds=s, n_tokens=100, blocks_in=5, blocks_out=5, **zero) for seed, s in enumerate(seconds)
    )
    fields = {"policy": found.kind, "value": found.value, "fast": 48, "slow": 96, "batch_size": 32, "n_texts": 9}
    return AdmissionRow(suite=suite, model="m", admission=admission, runs=runs, **fields, **more)


def finished(folder, fresh):
    rows = [row("admission check", "none", (1.0,), simulated=row("admission sweep", "none", (0.96,)).runs)]
    rows += [row("admission sweep", "none", (1.0, 1.1, 1.2)), row("admission sweep", "reserve:0", (1.0, 1.1, 1.2))]
    rows += [row("admission sweep", "reserve:1", (0.9, 1.0, 1.1)), row("admission fresh", "none", (1.0, 1.0, 1.0))]
    rows += [row("admission fresh", "reserve:1", fresh), row("admission bandit", "reserve:0", (), n_plays=7)]
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
    assert "| none | 100.0 | 104.2 | +4.2 % |" in text
    assert "no different from none" in finished(tmp_path, (0.9, 1.0, 1.1))
    with (tmp_path / "admission.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 16
    assert (lines[0]["factor"], lines[0]["swap_in_count"], lines[0]["out_spd"]) == ("0.0", "2", "100.0")
