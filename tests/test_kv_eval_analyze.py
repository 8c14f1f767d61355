"""`h2o kv analyze`: filter layers found, measured, kept and found again by a run."""

import json
import os
import re
import signal

import numpy as np
import pytest
from children import without_progress

from h2o_cli import cmd_kv
from h2o_cli.main import run_command
from h2o_cli.session import kv_layers
from profiler.kv_eval.analyze import Analysis, Search, choose, neighbours
from profiler.kv_eval.layers_file import Candidate, load_choice
from profiler.kv_eval.model import divergence, log_softmax
from runtime.llama.model_file import ModelFile

QUICK = ("--length", 160, "--prompts", 2, "--checks", 3, "-t", 2)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "profiles"
    monkeypatch.setattr(cmd_kv, "profiles_folder", lambda: folder)
    monkeypatch.setattr(kv_layers, "profiles_folder", lambda: folder)
    return folder


def run(*arguments):
    return run_command(["kv", "analyze", *map(str, arguments)])


def test_layers_are_kept_where_a_run_finds_them(bundled_model, elsewhere, capsys):
    assert run(bundled_model, *QUICK) == 0
    out, err = capsys.readouterr()
    file = ModelFile.open(bundled_model)
    choice = kv_layers.find_choice(file.hash)
    assert f"filter layers {','.join(map(str, choice.layers))}, wait" in out
    assert str(elsewhere) in err
    assert f"selector {choice.select}" in out
    assert len(choice.candidates) == 2 * 3
    assert {c.select for c in choice.candidates} == {"softmax", "last"}
    assert all(0 <= c.same <= 1 for c in choice.candidates)
    assert choice.lengths == (160,)
    assert sorted(c.kl for c in choice.candidates) == [c.kl for c in choice.candidates]
    assert all(c.dense_share <= 5 / 8 for c in choice.candidates)
    assert choice.complete and choice.most_kl == 0.01
    assert np.all(np.diag(choice.similarity) >= np.max(choice.similarity, axis=0) - 1e-3)
    assert list(choice.curves) == [4, 8]


def test_json_file_text_and_plot(bundled_model, tmp_path, elsewhere, capsys):
    pytest.importorskip("matplotlib")
    text = tmp_path / "text.txt"
    text.write_text("One sunny day Anna went to the lake. Tom has the old jar. " * 60)
    target, plot = tmp_path / "found.json", tmp_path / "curves.png"
    flags = ["--length", 256, "--select", "uniform", "--text", text, "-o", target, "--plot", plot, "--json"]
    assert run(bundled_model, *QUICK, *flags) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(target.read_text())
    choice = load_choice(target)
    assert (choice.n_prompts, choice.lengths, choice.select) == (2, (256, 128), "uniform")
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert not elsewhere.exists()


def test_how_long_it_takes_is_said_first_and_quick_cuts_it(bundled_model, elsewhere, capsys, monkeypatch):
    monkeypatch.setattr(cmd_kv, "QUICK_S", 0.001)
    flags = ("--quick", "--length", 160, "--prompts", 9, "--checks", 12, "-t", 2)
    assert run(bundled_model, *flags) == 0
    said = re.search(r"takes about (\d+) s \((\d+) sample prompts, (\d+) choices\)", capsys.readouterr().err)
    assert said
    choice = kv_layers.find_choice(ModelFile.open(bundled_model).hash)
    assert (int(said[2]), int(said[3])) == (choice.n_prompts, len(choice.candidates)) == (3, 2 * 2)


def end_after(monkeypatch, n_measured):
    """Ctrl-C while the next choice is measured."""
    measure, calls = Analysis._measure, []

    def measured(self, *arguments):
        calls.append(arguments)
        if len(calls) == n_measured + 1:
            os.kill(os.getpid(), signal.SIGINT)
        return measure(self, *arguments)

    monkeypatch.setattr(Analysis, "_measure", measured)


def test_what_was_measured_is_kept_when_it_is_ended(bundled_model, elsewhere, capsys, monkeypatch):
    end_after(monkeypatch, 3)
    assert run(bundled_model, *QUICK) == 130
    choice = kv_layers.find_choice(ModelFile.open(bundled_model).hash)
    assert not choice.complete and len(choice.candidates) == 3
    assert choice.chosen.kl == min(c.kl for c in choice.candidates)
    err = capsys.readouterr().err
    assert "ended early: the best of 3 choices" in err and str(elsewhere) in err


def test_a_whole_analysis_is_not_replaced_by_a_part_of_one(bundled_model, elsewhere, capsys, monkeypatch):
    assert run(bundled_model, *QUICK) == 0
    before = kv_layers.find_choice(ModelFile.open(bundled_model).hash)
    end_after(monkeypatch, 3)
    assert run(bundled_model, *QUICK) == 130
    assert kv_layers.find_choice(ModelFile.open(bundled_model).hash) == before
    assert "stays as it is" in capsys.readouterr().err


def test_nothing_is_kept_where_nothing_was_measured(bundled_model, elsewhere, capsys, monkeypatch):
    end_after(monkeypatch, 0)
    assert run(bundled_model, *QUICK) == 130
    assert not list(elsewhere.glob("*"))
    assert "nothing is kept" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("most_kl", "said", "unsaid"),
    [
        (1000, "the smallest dense part with at most 1000 nats per token", "differ"),
        (
            0,
            "the smallest divergence: none is good enough, at most 0 nats per token, so answers will differ",
            "dense part",
        ),
    ],
)
def test_the_summary_says_why(bundled_model, elsewhere, capsys, most_kl, said, unsaid):
    assert run(bundled_model, *QUICK, "--kl", most_kl) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert said in last and unsaid not in last


def test_the_guess_is_measured_too(bundled_model, elsewhere):
    for dense in (0.5, 0.6):  # the guess has five dense layers of eight
        assert run(bundled_model, *QUICK, "--dense", dense) == 0
        choice = kv_layers.find_choice(ModelFile.open(bundled_model).hash)
        assert (((2, 4, 6), 0) in [(c.layers, c.wait) for c in choice.candidates]) == (dense > 0.5)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--keep", "12"), "is not a share"),
        (("--keep", "1.5"), "is not possible"),
        (("--keep", "x"), "is not a number"),
        (("--select", "best"), "choose one of last"),
        (("--dense", "0.05"), "raise --dense"),
        (("--text", "/nonexistent"), "cannot read the text"),
        (("-o", "/nonexistent/file"), "cannot be written"),
        (("--length", "5000"), "context"),
    ],
)
def test_mistakes_are_one_line(bundled_model, flags, words, capsys):
    assert run(bundled_model, *QUICK, *flags) in (1, 2)
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err
    assert len(without_progress(err)) <= 2


def test_a_short_text(bundled_model, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("Too short.")
    assert run(bundled_model, *QUICK, "--text", text) == 1
    assert "too few" in capsys.readouterr().err


def candidate(dense, kl):
    return Candidate((1,), 0, "last", dense, 0.5, kl=kl)


def test_the_cheapest_that_is_good_enough():
    found = [candidate(0.5, 0.001), candidate(0.3, 0.009), candidate(0.25, 0.2)]
    assert choose(found, 0.01) is found[1]
    assert choose(found, 0.0001) is found[0]
    assert choose(found, 1.0) is found[2]


def test_neighbours_are_one_step_away_and_possible():
    search = Search(most_filters=2)
    found = neighbours(range(8), Candidate((1, 4), 0, "last", 0.4, 0.5), search, 4)
    assert ((1, 3), 0) in found
    assert ((1, 5), 0) in found
    assert ((1,), 0) in found
    assert ((2, 4), 0) in found
    assert ((1, 4), 1) not in found  # five dense layers
    assert all(len(layers) <= 2 for layers, _ in found)


def test_divergence():
    rng = np.random.default_rng(1)
    a, b = (log_softmax(rng.normal(size=50).astype(np.float32)) for _ in range(2))
    assert np.exp(a).sum() == pytest.approx(1, rel=1e-5)
    assert divergence(a, a) == pytest.approx(0, abs=1e-6)
    assert divergence(a, b) == pytest.approx(float((np.exp(a) * (a - b)).sum()), rel=1e-4)
