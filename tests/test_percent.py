"""Where weights lie: the source system's rule and its table, and what --percent does here."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from engines import engine

from h2o_cli.main import run_command
from h2o_cli.session.percent import Placement
from planner.source.midpoint import CPU, DISK, GPU, cache_segments, place, real_percents
from runtime.errors import UsageError
from runtime.llama.model_file import ModelFile
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import streamable_bytes

WIDTH, KV, INNER = 4096, 1024, 14336  # Llama-3.1 8B
ATTENTION = [WIDTH, WIDTH * WIDTH, WIDTH * KV, WIDTH * KV, WIDTH * WIDTH]
MLP = [WIDTH, WIDTH * INNER, WIDTH * INNER, WIDTH * INNER]


@pytest.mark.parametrize(
    ("asked", "real"),
    [
        ((20, 80), (34.6, 65.4, 0)),
        ((10, 90), (0, 100, 0)),
        ((75, 25), (65.4, 34.6, 0)),
        ((30, 30), (34.6, 30.8, 34.6)),
        ((50, 50), (63.5, 36.5, 0)),
    ],
)
def test_the_source_systems_placement_table(asked, real):
    found = real_percents([ATTENTION, MLP] * 32, asked)
    assert tuple(round(percent, 1) for percent in found) == real


def test_early_tensors_go_to_disk_and_late_ones_to_the_gpu():
    assert place([1, 1, 1, 1], (25, 25)) == [DISK, DISK, CPU, GPU]
    assert place([1, 1], (0, 100)) == [CPU, CPU]
    assert place([1, 1], (0, 0)) == [DISK, DISK]
    assert place([], (0, 50)) == []


def test_keys_and_values_are_split_by_whole_sequences():
    assert cache_segments(10, 8, (100, 0)) == (80, 0, 0)
    assert cache_segments(10, 8, (50, 50)) == (40, 40, 0)
    assert cache_segments(5, 8, (50, 50)) == (16, 24, 0)
    assert cache_segments(10, 8, (30, 30)) == (24, 24, 32)
    assert cache_segments(5, 8, (30, 30)) == (8, 8, 24)


@pytest.mark.parametrize(
    ("percent", "rule", "message"),
    [
        ((0, 120, 0, 100, 0, 100), None, "no shares"),
        ((0, -1, 0, 100, 0, 100), None, "no shares"),
        ((10, 50, 0, 100, 0, 100), None, "W_GPU 10 is not possible"),
        ((0, 50, 1, 99, 0, 100), None, "KV_GPU 1 is not possible"),
        ((0, 50, 0, 100, 100, 0), None, "ACT_GPU 100 is not possible"),
        ((0, 50, 0, 50, 0, 100), None, "KV_CPU has to be 100"),
        ((0, 50, 0, 100, 0, 99), None, "ACT_CPU has to be 100"),
        ((0, 50, 0, 100, 0, 100), "middle", "there is no --placement middle"),
        (None, "exact", "--placement is a rule for --percent"),
    ],
)
def test_what_is_not_possible_is_refused_with_the_reason(percent, rule, message):
    with pytest.raises(UsageError, match=message):
        Placement.parse(percent, rule)


def bytes_of(file, numbers):
    return sum(piece.span_bytes for piece in file.pieces if piece.number in numbers)


def test_exact_shares_are_within_two_percent(bundled_model):
    file = ModelFile.open(bundled_model)
    total = streamable_bytes(file)
    for percent in (0, 10, 33, 50, 90, 100):
        found = bytes_of(file, Placement(percent, False).pieces(file))
        assert 0 <= percent - 100 * found / total < 2


def test_midpoint_keeps_whole_late_tensors_of_attention_and_of_the_rest(bundled_model):
    file = ModelFile.open(bundled_model)
    kept = Placement(50, True).pieces(file)
    names = {piece.tensor.name for piece in file.layers[0].pieces if piece.number in kept}
    assert names == {f"blk.0.{name}.weight" for name in ("attn_v", "attn_output", "ffn_up", "ffn_down")}
    assert Placement(0, True).pieces(file) == frozenset()


def test_an_engine_keeps_exactly_the_pieces_it_is_given_as_far_as_they_fit(bundled_model):
    file = ModelFile.open(bundled_model)
    some = Placement(50, False).pieces(file)
    rest = streamable_bytes(file) - bytes_of(file, some)
    plan = Plan(0, 1, Layout.BALANCED, window_bytes=10**6, budget_bytes=300 * 10**6)
    with engine(bundled_model, plan, n_threads=1, resident=some) as e:
        assert e.streamed_bytes == rest
        e.forward([1, 2, 3])
        assert e.streamed_bytes == rest
        least = e.layout.fixed_bytes + 10**6
        e.apply(Plan(0, 1, Layout.BALANCED, window_bytes=10**6, budget_bytes=least))
        assert e.streamed_bytes > rest
    with engine(bundled_model, plan, n_threads=1, resident=Placement(100, False).pieces(file)) as e:
        assert e.streamed_bytes == 0


def shares(w_cpu):
    return ["--percent", "0", str(w_cpu), "0", "100", "0", "100"]


def test_answers_do_not_depend_on_the_placement(bundled_model, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("Once upon a time\nThe dog\n")
    answers, found = [], []
    for i, more in enumerate(([], shares(30), [*shares(60), "--placement", "midpoint"])):
        path = tmp_path / f"answers{i}"
        command = ["batch", str(bundled_model), "-f", str(prompts), "-o", str(path), "-n", "8", "--temp", "0"]
        assert run_command([*command, "-t", "1", "-m", "300", "--json", *more]) == 0
        out, err = capsys.readouterr()
        answers.append(path.read_bytes())
        found.append(json.loads(out).get("placement"))
        assert ("asked" in err) == bool(more)
    assert answers[0] == answers[1] == answers[2]
    assert found[0] is None and found[1]["rule"] == "exact" and found[2]["rule"] == "midpoint"
    assert 28 < found[1]["weights_real_percent"] <= 30
    assert found[1]["weights_disk_bytes"] > 2 * found[1]["weights_memory_bytes"]


def test_weights_that_the_budget_cannot_hold_are_refused(bundled_model, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The dog\n")
    command = ["batch", str(bundled_model), "-f", str(prompts), "-o", str(tmp_path / "a"), "-t", "1", "-m", "52"]
    done = subprocess.run(
        [sys.executable, "-m", "h2o_cli.main", *command, *shares(100)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "W_CPU 100 is" in done.stderr
