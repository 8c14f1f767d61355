"""The speed benchmark: engines, what is run, report, plots, and all of it on a tiny model."""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from emulated import can_emulate, groups_left

from h2o_cli.bench.box import Outcome
from h2o_cli.bench.models.named import BenchModel, bench_model
from h2o_cli.bench.rows import read_lines
from h2o_cli.bench.speed import parts, turns
from h2o_cli.bench.speed.engines import H2O, Job, command, read_result, tokens_hash, turns_commands
from h2o_cli.bench.speed.report import report, summary_rows
from h2o_cli.bench.speed.rows import InTurns, Read, Rounds, Span, SpeedRow, Timeline
from h2o_cli.bench.speed.runs import MMAP, Settings, budget_bytes, cases, check_budget, estimate_s
from h2o_cli.main import run_command
from profiler.model_profile import DeviceInfo
from runtime.errors import UsageError
from runtime.sizes import MB

PROJECT = Path(__file__).resolve().parent.parent
SHAPE = "llama:layers=6,dim=512,ffn=2048,heads=8,kv_heads=4,vocab=4096,ctx=1024,tied=0"  # 56 MB of f16


# --- engines ---------------------------------------------------------------------------------------------------------


def outcome(**values):
    base = {"rc": 0, "wall_s": 9.0, "output_s": 8.0, "peak_bytes": 10, "bytes_read": 10, "started_s": 100.0}
    return Outcome(**{**base, **values})


H2O_FIGURES = {
    "tokens": [1, 2, 3],
    "prompt_tokens": [7, 8],
    "ttft_process_s": 3.5,
    "prefill_tokens_per_s": 7.0,
    "tokens_per_s": 0.5,
    "decode_ms_per_token": 1990.0,
    "disk_wait_ms_per_token": 1900.0,
    "bytes_read_per_token": 5.0,
    "plan": {"k": 1, "w": 2, "layout": "balanced"},
    "ledger": {"process_bytes": 5},
}


def test_the_first_token_of_h2o_is_counted_from_the_start_of_the_process():
    result = read_result(H2O, outcome(stdout=json.dumps(H2O_FIGURES)))
    assert result.status == "ok"
    assert result.ms_per_token == pytest.approx(2000)
    assert (result.ttft_s, result.prefill_tokens_per_s) == (3.5, 7.0)
    assert result.ledger == {"process_bytes": 5}


def test_llama_cpp_tells_its_first_token_by_the_clock():
    figures = {"tokens": [1, 2], "prompt_tokens": [7], "first_token_monotonic_s": 103.5, "decode_ms_per_token": 5.0}
    figures["bytes_read_per_token"] = 9.0
    result = read_result(MMAP, outcome(stdout=json.dumps(figures)))
    assert (result.status, result.ttft_s, result.ms_per_token) == ("ok", 3.5, 5.0)


@pytest.mark.parametrize(
    ("values", "status"),
    [
        ({"rc": -9, "oom_killed": True}, "oom"),
        ({"rc": 1, "oom_killed": True, "stderr": "a child was killed"}, "oom"),
        ({"rc": -9, "timed_out": True}, "timeout"),
        (
            {"rc": 1, "stderr": "h2o: 1 B is too small\n next: the smallest budget that works here is -m 147 (a"},
            "too small",
        ),
        ({"rc": 1, "stderr": "something else"}, "failed"),
        ({"rc": -11}, "failed"),
        ({"stdout": "no json"}, "failed"),
        ({"stdout": "{}"}, "failed"),
        ({"stdout": "[1]"}, "failed"),
    ],
)
def test_how_a_run_can_end(values, status):
    result = read_result(H2O, outcome(**values))
    assert result.status == status
    assert result.note
    assert result.floor_bytes == (147 * MB if status == "too small" else 0)


def test_every_engine_is_asked_for_the_same(tmp_path):
    job = Job(tmp_path / "m.gguf", 5 * MB, "hi", 3, ctx=256, threads=1)
    for engine in (H2O, MMAP):
        words = command(engine, job)
        assert {str(tmp_path / "m.gguf"), "hi", "3", "256", "1"} <= set(words)
    for words in turns_commands(job):
        assert {str(tmp_path / "m.gguf"), "hi", "256", "1"} <= set(words)


# --- what is run -----------------------------------------------------------------------------------------------------


@pytest.fixture
def empty_model(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(bytes(1000))
    return BenchModel("m", path)


def test_budgets():
    assert budget_bytes("floor", 1000, 123) == 123
    assert budget_bytes("60%", 1000, 123) == 600
    assert budget_bytes("1.5MB", 1000, 123) == 1_500_000
    for wrong in ("", "%", "0%", "some", "-5"):
        with pytest.raises(UsageError):
            check_budget(wrong)


def test_engines_have_turns_and_small_budgets_are_left_out(empty_model):
    settings = Settings((empty_model,), (), budgets=("floor", "40%", "80%"), repeats=3, llama_repeats=2)
    found = cases(settings, {"m": 500})
    assert {case.budget for case in found} == {"floor", "80%"}
    first, second = ([c.engine for c in found if (c.budget, c.repeat) == ("80%", i)][:3] for i in (0, 1))
    assert first == second[::-1]
    assert sum(case.engine == H2O and case.suite == "budgets" for case in found) == 6
    assert sum(case.engine == MMAP and case.suite == "budgets" for case in found) == 4
    assert all(estimate_s(case, 4e8) > 0 for case in found)


def test_more_tokens_where_they_take_milliseconds(empty_model):
    settings = Settings((empty_model,), (), budgets=("100%", "112%"), n_predict=6, n_predict_fitting=24)
    found = {case.budget: case.n_predict for case in cases(settings, {"m": 500}) if case.suite == "budgets"}
    assert found == {"100%": 6, "112%": 24}


def test_parts_of_a_full_run():
    *throttled, full_disk = parts.wanted_parts()
    assert [[model.name for model in part.models] for part in throttled] == [[name] for name in parts.MODELS]
    assert [part.budgets for part in throttled] == list(parts.MODELS.values())
    assert ["resident" in part.suites for part in throttled] == [True, False]
    assert {part.read_bytes_per_s for part in throttled} == {400 * MB}
    assert (full_disk.read_bytes_per_s, full_disk.suites) == (0, ("budgets",))
    assert full_disk.engines == (H2O, MMAP)
    assert full_disk.repeats == full_disk.llama_repeats > 1
    assert [part.suites for part in parts.wanted_parts(suites=["resident"])] == [("resident",)]


def test_parts_that_flags_ask_for():
    (quick,) = parts.wanted_parts(quick=True, repeats=3)
    assert (len(quick.models), quick.budgets, quick.repeats) == (1, parts.QUICK_BUDGETS, 3)
    (slow,) = parts.wanted_parts(models=["qwen2.5-0.5b"], budgets=["300"], disk=100)
    assert (slow.budgets, slow.read_bytes_per_s) == (("300",), 100 * MB)
    both = parts.wanted_parts(models=["qwen2.5-0.5b"], budgets=["300"])
    assert [(part.budgets, part.read_bytes_per_s) for part in both] == [(("300",), 400 * MB), (("300",), 0)]


def test_model_names(tmp_path):
    model = bench_model("qwen2.5-0.5b/Q8_0", tmp_path)
    assert (model.name, model.path) == ("qwen2.5-0.5b/q8_0", tmp_path / "qwen2.5-0.5b-q8_0.gguf")
    assert bench_model("llama:layers=2,dim=64", tmp_path).path.parent == tmp_path
    for wrong in ("nothing-like-this", "qwen2.5-0.5b/q99", "missing.gguf"):
        with pytest.raises(UsageError):
            bench_model(wrong, tmp_path)


# --- rows and report -------------------------------------------------------------------------------------------------

MACHINE = DeviceInfo("0", "A processor", 2, 8 * 10**9, "Linux 6")


def row(engine=H2O, budget="60%", repeat=0, ms=1000.0, status="ok", **values):
    base = {
        "suite": "budgets",
        "model": "half/f16",
        "file_bytes": 10**9,
        "budget_bytes": 600 * MB,
        "read_bytes_per_s": 400 * MB,
        "machine": MACHINE,
        "versions": {"h2o": "1.0"},
        "commands": (f"run {engine}",),
        "bench": "h2o bench",
        "peak_bytes": 600 * MB,
    }
    if status == "ok":
        base |= {"ms_per_token": ms, "ttft_s": 2.5, "tokens_hash": tokens_hash([1, 2]), "bytes_per_token": 4e8}
    if engine == H2O and status == "ok":
        base |= {"limit_ms_per_token": 980.0, "yield_": 980 / ms, "predicted_ms_per_token": 990.0}
        base |= {"disk_wait_ms_per_token": 900.0, "plan": {"k": 9, "w": 1, "layout": "balanced"}}
        base |= {"ledger": {"process_bytes": 80 * MB, "window_bytes": 20 * MB, "resident_bytes": 500 * MB}}
    return SpeedRow(**{**base, "engine": engine, "budget": budget, "repeat": repeat, "status": status, **values})


IN_TURNS = InTurns(
    decode=Rounds(8, 20.0, 20.4, 0.98, (0.97, 0.991), ((0.4, 0.392),)),
    prefill=Rounds(300, 200.0, 210.0, 0.952, (0.95, 0.96), ((1.5, 1.428),)),
    llama_cpp_peak_bytes=700 * MB,
    llama_cpp_tokens_hash=tokens_hash([1, 2]),
)


def fixed_rows():
    small = {"budget": "floor", "budget_bytes": 150 * MB}
    return [
        row(ms=1000),
        row(MMAP, ms=2300),
        row("llama.cpp direct-io", status="oom"),
        row(ms=1200, repeat=1),
        row(MMAP, ms=2310, repeat=1),
        row(**small, ms=2400),
        row(MMAP, **small, status="timeout"),
        row(suite="first token", n_prompt_tokens=300, ms=1000, first_token_limit_s=2.4),
        row(suite="resident", budget="resident", ms=50, prefill_tokens_per_s=200, in_turns=IN_TURNS),
    ]


GOLDEN = """\
# Benchmark

A processor, 2 cores, Linux 6. h2o 1.0.

Memory limited to the budget (page cache included), caches cold. Medians of the runs, least to most in brackets where they are more than 5 % apart. Budgets in percent of the file.

```
h2o bench
```

## half/f16, 1.00 GB, disk at 400 MB/s

| budget | h2o, ms/token | llama.cpp mmap, ms/token | llama.cpp direct-io, ms/token | h2o faster by |
| --- | ---: | ---: | ---: | ---: |
| floor (150 MB) | 2400 | timeout | - | - |
| 60% (600 MB) | 1100 [1000-1200] | 2305 | OOM | 2.10 x |

| budget | engine, runs | ms/token | limit | yield | predicted | read, MB/token | disk wait, ms | first token, s | peak, MB | plan k, w | tokens |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| floor (150 MB) | h2o, 1 | 2400 | 980 | 0.408 | 990 | 400 | 900 | 2.50 | 600 | 9, 1 balanced | f71998fe = |
| 60% (600 MB) | h2o, 2 | 1100 [1000-1200] | 980 | 0.898 [0.817-0.980] | 990 | 400 | 900 | 2.50 | 600 | 9, 1 balanced | f71998fe = |
| 60% (600 MB) | llama.cpp mmap, 2 | 2305 | - | - | - | 400 | - | 2.50 | 600 | - | f71998fe = |

<details><summary>The command of every row</summary>

```
# half/f16, 60% (600 MB), h2o
run h2o
# half/f16, 60% (600 MB), llama.cpp mmap
run llama.cpp mmap
# half/f16, 60% (600 MB), llama.cpp direct-io
run llama.cpp direct-io
# half/f16, floor (150 MB), h2o
run h2o
# half/f16, floor (150 MB), llama.cpp mmap
run llama.cpp mmap
```

</details>

## First token of a long prompt

| model, budget | disk | engine, runs | prompt tokens | first token, s | limit, s | tokens |
| --- | ---: | ---: | ---: | ---: | ---: | ---: |
| half/f16, 60% (600 MB) | disk at 400 MB/s | h2o, 1 | 300 | 2.50 | 2.40 | f71998fe (alone) |

<details><summary>The command of every row</summary>

```
# half/f16, 60% (600 MB), h2o
run h2o
```

</details>

## Everything resident

| model | decode, tokens/s: h2o | decode, tokens/s: llama.cpp | prefill, tokens/s: h2o | prefill, tokens/s: llama.cpp | decode, h2o / llama.cpp | prefill, h2o / llama.cpp | peak, MB: h2o | llama.cpp | tokens |
| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
| half/f16 | 20.00 | 20.40 | 200.0 | 210.0 | 0.980 [0.970-0.991] | 0.952 [0.950-0.960] | 600 | 700 | f71998fe = |

<details><summary>The command of every row</summary>

```
# half/f16, resident (600 MB), h2o
run h2o
```

</details>
"""  # noqa: E501


def test_the_report_of_fixed_rows():
    assert report(fixed_rows()) == GOLDEN


def test_a_report_shows_the_pictures_of_a_setup_with_it():
    found = report(fixed_rows(), ["speed-half-f16-400MBps.png", "speed-half-f16-unthrottled.png"])
    assert found.count("![") == 1
    assert "![speed-half-f16-400MBps](speed-half-f16-400MBps.png)" in found


def test_disks_are_not_mixed():
    found = report([*fixed_rows(), row(read_bytes_per_s=0, ms=77)])
    assert "## half/f16, 1.00 GB, disk at its own speed" in found
    assert "| 60% (600 MB) | 1100 [1000-1200] |" in found


def test_a_report_of_nothing():
    assert "No runs." in report([])


def test_the_summary_has_a_line_per_engine():
    lines = summary_rows(fixed_rows())
    assert len({len(line) for line in lines}) == 1
    assert len(lines) == 1 + 7
    assert "OOM" in {line[3] for line in lines}
    assert "h2o: 0.980 x, prompt 0.952 x llama.cpp" in {line[2] for line in lines}


def test_tokens_that_differ_are_seen():
    rows = [row(), row(MMAP, tokens_hash=tokens_hash([1, 3]))]
    assert "differ" in report(rows)


def test_tokens_that_differ_in_turns_are_seen():
    other = msgspec.structs.replace(IN_TURNS, llama_cpp_tokens_hash=tokens_hash([1, 3]))
    assert "differ" in report([row(suite="resident", budget="resident", in_turns=other)])


def test_turns_that_failed_are_reported():
    assert "| half/f16 | no answer |" in report([row(suite="resident", status="failed", note="no answer")])


# --- plots -----------------------------------------------------------------------------------------------------------


def test_the_plots_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    from h2o_cli.bench.speed.plots import draw

    spans = (Span(0, 0.0, 0.1, 0.05), Span(1, 0.1, 0.2, 0.0))
    reads = (Read(0, 10, -0.01, 0.05), Read(1, 10, 0.05, 0.1))
    timeline = Timeline("half/f16", 600 * MB, 1, 0.2, spans, reads, 400 * MB)
    unthrottled = [row(read_bytes_per_s=0), row(MMAP, read_bytes_per_s=0)]
    paths = draw([*fixed_rows(), *unthrottled], [timeline], tmp_path)
    ends = ["speed-half-f16-400MBps", "memory-half-f16-400MBps", "speed-half-f16-unthrottled"]
    assert [path.stem for path in paths] == [*ends, "memory-half-f16-unthrottled", "timeline-half-f16-400MBps"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib(tmp_path, monkeypatch):
    from h2o_cli.bench.speed.plots import draw

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(UsageError, match=r"pip install '.*\[bench\]'"):
        draw(fixed_rows(), [], tmp_path)


# --- all of it -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model", "nothing-like-this"],
        ["--budget", "much"],
        ["--engine", "nothing"],
        ["--suite", "nothing"],
        ["--disk", "-1"],
        ["--repeats", "0"],
    ],
)
def test_wrong_flags(arguments, tmp_path, capsys):
    assert run_command(["bench", *arguments, "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.cgroup
@pytest.mark.skipif(not can_emulate(), reason="no device can be emulated here")
def test_a_benchmark_of_a_tiny_model(tmp_path, tiny_model, monkeypatch, capsys):
    for name, n in {"OPENINGS": 1, "PREFILL_PAIRS": 2, "DECODE_PAIRS": 2}.items():
        monkeypatch.setattr(turns, name, n)
    output = tmp_path / "out"
    flags = ["--quick", "--model", tiny_model(SHAPE), "--budget", 90, "--disk", 200, "--output", output, "--json"]
    flags += ["--suite", "budgets", "--suite", "resident", "--engine", H2O, "--engine", MMAP]
    monkeypatch.setattr(sys, "argv", ["h2o", "bench", *map(str, flags)])
    assert run_command(sys.argv[1:]) == 0
    out, err = capsys.readouterr()
    rows = read_lines(output / "rows.jsonl", SpeedRow)
    assert [msgspec.json.decode(line, type=SpeedRow) for line in out.splitlines()] == rows
    by_engine = {one.engine: one for one in rows if one.suite == "budgets"}
    own, plain = by_engine[H2O], by_engine[MMAP]
    assert own.status == plain.status == "ok", err
    assert own.tokens_hash == plain.tokens_hash
    assert own.peak_bytes <= 90 * MB
    assert own.limit_ms_per_token and own.predicted_ms_per_token and own.machine
    (resident,) = (one for one in rows if one.suite == "resident")
    assert resident.in_turns, resident.note
    assert resident.tokens_hash == resident.in_turns.llama_cpp_tokens_hash
    assert resident.peak_bytes and resident.in_turns.llama_cpp_peak_bytes
    text = (output / "report.md").read_text()
    assert str(tmp_path) not in text
    assert all(command in text for one in rows for command in (*one.commands, one.bench))
    assert not list((PROJECT / "model_configs").glob("*.json"))
    assert groups_left() == []
    if find_spec("matplotlib"):
        assert list(output.glob("timeline-*.png"))
    assert run_command(["bench", "report", str(output)]) == 0
    assert (output / "report.md").read_text() == text
