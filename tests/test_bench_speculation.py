"""`h2o bench speculation`: which runs it makes, and what its report says of them."""

import json

import msgspec
import pytest

from h2o_cli import main as cli
from h2o_cli.bench.box import Outcome
from h2o_cli.bench.speed.engines import Result
from h2o_cli.bench.speed.speculation import MODES, OFF, TEXTS, measure, report, summaries, table_rows

MB = 10**6


class FakeChildren:
    """Answers every job: without drafts in ms of 100, with drafts in a third of it."""

    def __init__(self):
        self.jobs = []

    def floor_bytes(self, job, device):
        return (60 if "--draft" in job.flags else 40) * MB

    def answer(self, engine, job, device):
        self.jobs.append(job)
        drafts = job.flags != MODES[OFF]
        figures = {"tokens_per_pass": 3.0 if drafts else 1.0, "drafted": 9 * drafts, "accepted": 6 * drafts}
        figures |= {"decode_ms_per_token": 33.0 if drafts else 100.0, "limit_ms_per_token": 98.0}
        outcome = Outcome(0, 1.0, 1.0, 50 * MB, 0, 0.0, stdout=json.dumps(figures))
        tokens = (7, 8) if job.prompt == TEXTS[0].prompt and drafts else tuple(range(job.n_predict))
        return ["h2o", "run", *job.flags], outcome, Result("ok", tokens=tokens)


@pytest.fixture
def rows(bundled_model):
    device = type("Device", (), {"read_bytes_per_s": 16 * MB})()
    return list(measure(FakeChildren(), bundled_model, device, 2))


def test_every_text_in_every_mode_in_its_smallest_budget(bundled_model):
    children = FakeChildren()
    device = type("Device", (), {"read_bytes_per_s": 16 * MB})()
    rows = list(measure(children, bundled_model, device, 2))
    assert {(row.prompt, row.mode) for row in rows} == {(i, mode) for i in range(len(TEXTS)) for mode in MODES}
    for job in children.jobs:
        assert job.budget_bytes == (60 if "--draft" in job.flags else 40) * MB


def test_plain_text_is_repeated_in_turns(bundled_model):
    device = type("Device", (), {"read_bytes_per_s": 16 * MB})()
    rows = list(measure(FakeChildren(), bundled_model, device, 2, repeats=3))
    plain = [row for row in rows if row.kind == "plain text"]
    assert [row.mode for row in plain if row.prompt == 6] == [
        OFF,
        "look-up",
        "draft auto",
        "look-up",
        OFF,
        OFF,
        "look-up",
    ]
    found = {(line.kind, line.mode): line for line in summaries(rows)}
    assert {mode: found["plain text", mode].n_pairs for mode in MODES} == {OFF: 9, "look-up": 9, "draft auto": 3}
    assert found["quotes", "look-up"].n_pairs == 3


def test_the_median_of_pairs_does_not_follow_a_drift(rows):
    slower = [msgspec.structs.replace(row, ms_per_token=row.ms_per_token * (1 + row.prompt)) for row in rows]
    assert all(line.pair_ratio == pytest.approx(100 / 33) for line in summaries(slower) if line.mode != OFF)


def test_summaries(rows):
    found = {(line.kind, line.mode): line for line in summaries(rows)}
    assert len(found) == 9
    line = found["quotes", "look-up"]
    assert (line.tokens_per_pass, line.drafted, line.accepted) == (pytest.approx(3), 27, 18)
    assert (line.ratio, line.limit_ms_per_token) == (pytest.approx(100 / 33), pytest.approx(98))
    assert line.equal
    assert not found["recall", "look-up"].equal


def test_a_run_that_failed_leaves_its_prompt_out(rows):
    failed = [msgspec.structs.replace(row, status="oom", ms_per_token=None) if row.prompt == 0 else row for row in rows]
    assert all(line.equal for line in summaries(failed))
    assert summaries(failed[:3]) == []


def test_report(rows, bundled_model):
    text = report(rows)
    assert f"# Speculation: {bundled_model.name}, " in text
    assert "# recall 1, draft auto\nh2o run --draft auto" in text
    assert "disk at 16 MB/s" in text
    assert "| quotes | look-up | 3.00 | 18 of 27 | 33 | 98 | 3.03x | 3.030x of 3 | = |" in text
    assert all(len(line) == len(table_rows(rows)[0]) for line in table_rows(rows))


def test_command(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("h2o_cli.cmd_bench_speculation._rows", lambda device, repeats: iter(rows))
    monkeypatch.setattr("h2o_cli.bench.box.check_rights", lambda device: None)
    assert cli.run_command(["bench", "speculation", "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert "tokens/pass" in out
    assert "recall 1, draft auto: 3.00 tokens per pass" in err
    assert len((tmp_path / "out" / "speculation.jsonl").read_text().splitlines()) == len(rows)
    assert (tmp_path / "out" / "speculation.md").exists()
    (tmp_path / "file").write_text("")
    assert cli.run_command(["bench", "speculation", "--output", str(tmp_path / "file" / "x")]) == 2
