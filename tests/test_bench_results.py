"""What all benchmarks share: rows in a file, tables, the frame of a report, and reports made again from old rows."""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Literal

import pytest

from h2o_cli import main as cli
from h2o_cli.bench.commands import h2o, last_words, python, shown_command
from h2o_cli.bench.kv.report import KV
from h2o_cli.bench.report import commands, document, machines, started_by
from h2o_cli.bench.results import Kind, Results, check_names
from h2o_cli.bench.rows import Median, Row, append_line, circumstances, median_of, read_lines
from h2o_cli.bench.speed.report import SPEED
from h2o_cli.bench.speed.rows import Timeline, read_timelines
from h2o_cli.bench.speed.speculation import SPECULATION
from h2o_cli.bench.tables import markdown_table, millions, number, percent, shown
from profiler.model_profile import DeviceInfo
from runtime.errors import UsageError

DOCS = Path(__file__).resolve().parent.parent / "docs"
MACHINE = DeviceInfo("0", "A processor", 2, 8 * 10**9, "Linux 6")


class Toy(Row, frozen=True, kw_only=True, omit_defaults=True):
    """A row of a benchmark of toys."""

    suite: Literal["toys"]
    n: int = 0


def toy(n=0, **fields):
    return Toy(**{"suite": "toys", "model": "m", "n": n, **fields})


TOYS = Kind(
    Toy,
    text=lambda rows, pictures: document("Toys", [machines(rows), *map(str, pictures)]),
    summary=lambda rows: f"{len(rows)} toys",
    told=lambda row: f"toy {row.n}",
    draw=lambda rows, folder: [folder / "new.png"],
)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_read_back(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [toy(1, **circumstances(tmp_path), commands=("a", "b")), toy(2)]
    for row in rows:
        append_line(path, row)
    assert read_lines(path, Toy) == rows
    assert path.read_text().splitlines()[1] == '{"suite":"toys","model":"m","n":2}'
    assert rows[0].machine.n_cores and rows[0].versions["h2o"] and rows[0].bench and rows[0].at


def test_torn_and_foreign_lines_are_left_out_and_told(tmp_path):
    path = tmp_path / "rows.jsonl"
    append_line(path, toy(1))
    with path.open("ab") as file:
        file.write(b'{"suite":"plants","model":"m"}\n\xff\n\n{"suite":"toys","mod')
    append_line(path, toy(2))
    said = []
    assert [row.n for row in read_lines(path, Toy, said.append)] == [1, 2]
    assert len(said) == 1
    assert said[0].startswith(f"3 of 5 lines of {path} are left out, the first is line 2: ")


def test_files_without_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    with pytest.raises(UsageError, match="cannot read"):
        read_lines(path, Toy)
    path.write_text("{}\n")
    with pytest.raises(UsageError, match="something else"):
        read_lines(path, Toy)
    path.write_text("\n")
    assert read_lines(path, Toy) == []
    assert read_timelines(tmp_path / "missing") == []


def test_the_newest_timeline_of_a_device(tmp_path):
    for seconds in (1.0, 2.0):
        append_line(tmp_path / "lines", Timeline("m", 5, 1, seconds, (), ()))
    (found,) = read_timelines(tmp_path / "lines")
    assert found.pass_s == 2.0


def test_the_median_is_over_the_rows_that_have_the_figure():
    rows = [toy(n) for n in (1, 9, 2, 0)]
    assert median_of(rows, lambda row: row.n or None) == Median(2, 1, 9, 3)
    assert median_of(rows, lambda row: None) is None


# --- tables and reports ----------------------------------------------------------------------------------------------


def test_a_table():
    table = markdown_table([["a", "b", "c"], ["1", "2", "3"]], left=(0, 2))
    assert table == "| a | b | c |\n| --- | ---: | --- |\n| 1 | 2 | 3 |"


def test_figures_as_text():
    assert [number(1.25, 1), number(None), percent(0.5), millions(2_400_000, 1)] == ["1.2", "-", "50", "2.4"]
    assert shown(Median(100, 98, 102, 3)) == "100"
    assert shown(Median(1, 0.5, 2, 3), 2) == "1.00 [0.50-2.00]"
    assert shown(None) == "-"


def test_the_frame_of_a_report():
    versions = {"python": "3.11.7", "h2o": "1.0", "llama_cpp_python": "not installed"}
    rows = [toy(1, machine=MACHINE, versions=versions, bench="h2o bench toys"), toy(2, commands=("old",))]
    rows.append(toy(2, commands=("new",)))
    assert machines(rows) == "A processor, 2 cores, Linux 6. python 3.11.7, h2o 1.0."
    assert started_by(rows) == "```\nh2o bench toys\n```"
    assert "```\n# toy 1\n# toy 2\nnew\n```" in commands(rows, TOYS.told)
    assert commands(rows[:1], TOYS.told) == started_by([]) == machines([]) == ""
    assert document("Title", ["one", "", "two"]) == "# Title\n\none\n\ntwo\n"


def test_commands_for_people():
    assert shown_command(h2o("run", "/a/b/m.gguf", "-p", "a b")) == "h2o run m.gguf -p 'a b'"
    assert shown_command(python("module", "/a/m.gguf")) == f"{Path(sys.executable).name} -m module m.gguf"
    assert last_words("loading\nh2o: no room\n  next: more\n", 1) == "no room"
    assert last_words("", 3) == "exit code 3"


# --- a folder of results ---------------------------------------------------------------------------------------------


def test_a_folder_of_results(tmp_path, capsys):
    results = Results(TOYS, tmp_path / "out")
    results.begin()
    results.keep([toy(1), toy(2)])
    results.finish(results.read())
    out, err = capsys.readouterr()
    assert (out, "toy 1" in err and "report.md" in err) == ("2 toys\n", True)
    assert (tmp_path / "out" / "report.md").read_text() == "# Toys\n\nnew.png\n"
    results.begin(add=True)
    assert len(results.read()) == 2
    (tmp_path / "out" / "old.png").touch()
    results.finish(results.read(), again=True)
    assert (tmp_path / "out" / "report.md").read_text() == "# Toys\n\nnew.png\n\nold.png\n"
    results.begin()
    assert results.read() == []


def test_rows_as_json(tmp_path, capsys):
    results = Results(TOYS, tmp_path, json=True)
    results.keep([toy(1)])
    results.finish(results.read())
    assert capsys.readouterr().out == '{"suite": "toys", "model": "m", "n": 1}\n'


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    results = Results(TOYS, tmp_path / "file" / "out")
    for step in (results.begin, lambda: results.keep([toy()]), lambda: results.finish([toy()])):
        with pytest.raises(UsageError, match="cannot be written"):
            step()


def test_names_are_checked():
    check_names("letter", None, ("a",))
    check_names("letter", ["a"], ("a", "b"))
    with pytest.raises(UsageError, match="there is no letter 'c'; choose one of a, b"):
        check_names("letter", ["a", "c"], ("a", "b"))


@pytest.mark.parametrize(
    ("folder", "kind"), [("bench", SPEED), ("bench", SPECULATION), ("kv-bench", KV)], ids=lambda x: str(x)[:9]
)
def test_the_reports_that_come_with_the_program_are_what_their_rows_give(folder, kind):
    text = (DOCS / folder / kind.report).read_text()
    rows = read_lines(DOCS / folder / kind.rows, kind.row, pytest.fail)
    assert kind.text(rows, re.findall(r"!\[.*?\]\((.*?)\)", text)) == text


def test_reports_are_made_again(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in (SPECULATION.rows, SPEED.rows):
        shutil.copy(DOCS / "bench" / name, tmp_path)
    assert cli.run_command(["bench", "report", str(tmp_path)]) == 0
    for name in (SPECULATION.report, SPEED.report):
        assert (tmp_path / name).read_text()
    assert "tokens/pass" in capsys.readouterr().out
    assert cli.run_command(["bench", "report", str(tmp_path / "missing")]) == 2
    assert "cannot read" in capsys.readouterr().err
