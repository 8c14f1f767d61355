"""Texts of mixed lengths in bursts from a seed, and the command that makes them and checks traces."""

from __future__ import annotations

import itertools
import json
import statistics

import pytest

from h2o_cli.bench.admission.workload import read_behaviors, workload
from h2o_cli.main import run_command
from h2o_cli.session.batch_files import BatchRequest, read_requests
from runtime.answer.pool import Pool
from runtime.answer.pool_trace import open_trace
from runtime.answer.sampler import Sampling
from runtime.errors import H2OError


def test_a_seed_says_all():
    assert workload(50, 3) == workload(50, 3) != workload(50, 4)


def test_lengths_have_a_heavy_tail_and_arrivals_come_in_bursts():
    found = workload(2000, 1)
    words = sorted(len(arrival.prompt.split()) for arrival in found)
    assert words[0] >= 8
    assert words[-1] == 400
    assert statistics.mean(words) > 1.5 * statistics.median(words)
    assert 25 < statistics.median(arrival.n_predict for arrival in found) < 60
    passes = [arrival.at_pass for arrival in found]
    assert passes == sorted(passes)
    assert passes[0] == 0
    same = sum(a == b for a, b in itertools.pairwise(passes))
    assert 0.7 < same / len(passes) < 0.95
    assert all(0 < arrival.share <= 1 <= arrival.n_predict <= 256 for arrival in found)


def test_behaviors_are_taken_in_turn(tmp_path):
    path = tmp_path / "behaviors.csv"
    path.write_text('Behavior,Category\n"Write a poem, please",x\nCount to ten,y\n,z\n')
    prompts = [arrival.prompt for arrival in workload(4, 0, read_behaviors(path))]
    assert sorted(prompts) == ["Count to ten"] * 2 + ["Write a poem, please"] * 2
    assert sorted(prompts[:2]) == ["Count to ten", "Write a poem, please"]


@pytest.mark.parametrize("content", ["", "Prompt\nx\n", "Behavior\n", b"\xff\xfe"])
def test_a_file_without_behaviors_is_an_error(tmp_path, content):
    path = tmp_path / "x.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(H2OError, match="no column Behavior"):
        read_behaviors(path)
    with pytest.raises(H2OError, match="cannot be read"):
        read_behaviors(tmp_path / "none")


def test_the_command_makes_prompts_that_a_batch_reads(tmp_path):
    path = tmp_path / "prompts.jsonl"
    assert run_command(["bench", "admission", "--make-prompts", str(path), "--number", "20", "--seed", "2"]) == 0
    found = list(read_requests(path, Sampling()))
    assert len(found) == 20
    assert all(isinstance(item, BatchRequest) and item.n_predict and item.prompt for item in found)


def test_the_command_checks_a_trace_and_writes_the_sources_tables(tmp_path, capsys):
    path = tmp_path / "trace"
    with open_trace(path) as writer:
        pool = Pool(4, 4, record=writer)
        writer.begin(pool)
        pool.hold(1, 20)
        pool.swap_out(1)
        pool.swap_in(1)
        pool.free(1)
    capsys.readouterr()
    assert run_command(["bench", "admission", "--check", str(path), "--export", str(tmp_path / "csv")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["events"] == {"allocate": 1, "append": 0, "swap_out": 1, "swap_in": 1, "free": 1}
    assert (tmp_path / "csv" / "pure_sequence.csv").read_text() == "sequence_id\n1\n"
    assert (tmp_path / "csv" / "output.csv").read_text().count("\n") == 5
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert run_command(["bench", "admission", "--check", str(path)]) == 1
    assert "sequence 1 still holds blocks" in capsys.readouterr().err
