"""`h2o bench kv`: rows, report and pictures of a very small run; mistakes are one line."""

import json

import pytest
from children import without_progress

from h2o_cli.bench.kv.methods import EVERYWHERE, FULL, OMNIKV, OTHERS, Roles, compared_methods
from h2o_cli.bench.kv.report import report
from h2o_cli.bench.kv.rows import KvRow, accuracy_of
from h2o_cli.bench.rows import read_lines
from h2o_cli.main import run_command
from h2o_cli.session.kv_layers import find_choice
from runtime.llama.model_file import ModelFile


def run(*arguments):
    return run_command(["bench", "kv", *map(str, arguments)])


def test_a_small_run(bundled_model, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    data = tmp_path / "passkey.jsonl"
    line = {"context": "The pass key is 12. " * 9, "input": "What is the pass key?", "answer": "12", "options": []}
    data.write_text(json.dumps(line))
    flags = [
        "--quick",
        "--suite",
        "quality",
        "--task",
        "two-stage",
        "--length",
        160,
        "--trials",
        1,
        "--keep",
        0.1,
        "-t",
        2,
    ]
    flags += [word for name in (FULL, OMNIKV, EVERYWHERE, OTHERS) for word in ("--method", name)]
    assert run(bundled_model, *flags, "--data", data, "--other", "2,5", "--output", tmp_path / "out") == 0
    rows = read_lines(tmp_path / "out" / "rows.jsonl", KvRow)
    assert {row.suite for row in rows} == {"accuracy", "divergence", "data"}
    full = [row for row in rows if row.method == FULL]
    assert all(row.kv_share == 1 for row in full)
    assert all(row.kl == 0 for row in full if row.suite == "divergence")
    own = next(row for row in rows if row.method == OMNIKV)
    assert 0.2 < own.kv_share < 0.6
    found = find_choice(ModelFile.open(bundled_model).hash)
    assert (own.layers, own.wait, own.select) == (found.layers, found.wait, found.select)
    assert all((row.lost, row.gained) == (0, 0) for row in full if row.suite == "accuracy")
    everywhere = next(row for row in rows if row.method == EVERYWHERE)
    assert everywhere.kv_share == pytest.approx(own.kv_share, abs=0.01)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "omnikv, other layers (2,5) 10%" in text
    assert "accuracy-two-stage.png" in text
    assert (tmp_path / "out" / "accuracy-two-stage.png").read_bytes().startswith(b"\x89PNG")
    assert "Scores on files" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--suite", "poems"), "choose one of quality, speed"),
        (("--task", "poem"), "choose one of needle"),
        (("--keep", "0"), "is not possible"),
        (("--layers", "x"), "is not a list of layers"),
        (("--layers", "9"), "there is no layer 9"),
        (("--length", "4000"), "do not fit the context"),
        (("--data", "/nonexistent"), "cannot read"),
        (("--output", "/dev/null/x"), "cannot be written"),
        (("--select", "best"), "choose one of last"),
        (("--strategy", "fast"), "choose one of multi"),
    ],
)
def test_mistakes_are_one_line(bundled_model, tmp_path, flags, words, capsys):
    flags = (*flags, "--output", tmp_path / "out") if "--output" not in flags else flags
    assert run(bundled_model, "--suite", "quality", *flags) in (1, 2)
    err = capsys.readouterr().err
    assert words in err
    assert len(without_progress(err)) <= 2


def test_methods_keep_the_same_total():
    roles = Roles((1, 3), 0, "last", 8, 3)
    found = compared_methods(roles, (1.0, 0.1), [(2, 4)])
    assert [method.label for method in found][:3] == [FULL, "omnikv 100%", "omnikv 10%"]
    everywhere = next(method for method in found if method.name == EVERYWHERE)
    assert 1 + 7 * everywhere.kv.keep == pytest.approx(3 + 5 * 0.1)
    assert found[-1].kv.layers == (2, 4)


def row(**fields):
    return KvRow(**{"suite": "accuracy", "model": "m", "method": OMNIKV, "label": "omnikv 10%", **fields})


def test_report():
    rows = [
        row(n=4, right=3, lost=1, gained=0, task="needle", length=512, depth=0.5, kv_share=0.4),
        row(n=4, right=1, task="needle", length=512, depth=0.9, kv_share=0.4),
        row(suite="speed", ms_per_token=1.5, faster=1.25, faster_again=1.5, length=1024, n=32, kv_bytes=2 * 10**6),
    ]
    text = report(rows)
    assert "| omnikv 10% | 40% | 50 | 50 | 1 | 0 |" in text
    assert "| omnikv 10% | 75 | 25 |" in text
    assert "| omnikv 10% | 1.5 | - | 1.25 (1.50) | - (-) | 2 | - | - |" in text
    assert accuracy_of([]) is None
