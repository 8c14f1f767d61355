"""`h2o bench predict`: lists of swap-ins, rules that know nothing from later, intervals, and networks that learn."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from h2o_cli.bench.predict.compare import verdict, wilson, won_and_lost
from h2o_cli.bench.predict.lengths import ADMITTED, GOING_ON, MEAN_BEFORE, METHODS, Ended, read_ended
from h2o_cli.bench.predict.lengths import rows_of as length_rows_of
from h2o_cli.bench.predict.report import PredictRow, best_rule, conclusion, rows_of
from h2o_cli.bench.predict.rules import BAR, boyer_moore, guesses, majority, trend
from h2o_cli.bench.predict.sequences import SwapIns, first_of_test, from_table, from_trace, read_swap_ins
from h2o_cli.bench.predict.trained import CLASSIFIER, REGRESSOR, Training, trained
from h2o_cli.bench.predict.windows import nearest_id, windows
from h2o_cli.main import run_command
from runtime.answer.pool import Pool
from runtime.answer.pool_trace import TraceError, open_trace, read_trace, write_swap_ins
from runtime.errors import H2OError, UsageError

IDS = st.lists(st.integers(0, 20), min_size=1, max_size=80)


def traced(path, n=20):
    """A trace in which 1, 2 and 3 arrive, 3 and 1 leave, and come back: 1 first, as it arrived first; n times."""
    with open_trace(path) as writer:
        pool = Pool(8, 8, record=writer)
        writer.begin(pool)
        for sequence in (1, 2, 3):
            pool.hold(sequence, 20)
        for _ in range(n):
            pool.swap_out(3)
            pool.swap_out(1)
            pool.swap_in(1)
            pool.swap_in(3)
    return path


# --- lists of swap-ins -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["sequence_id\n5\n7\n", "5\n7", "at,sequence_id\n0,5\n1,7\n", "seq\n5\n\n7\n"])
def test_a_table_is_read(text):
    assert from_table(text.splitlines()).ids == (5, 7)


@pytest.mark.parametrize("text", ["sequence_id\n5\nx\n", "at,sequence_id\n0,5\n1\n", "-1\n2\n", "a\nb\n"])
def test_a_table_of_something_else_is_an_error(text):
    with pytest.raises(ValueError):
        from_table(text.splitlines())


def test_a_trace_tells_who_waited_and_is_what_its_table_is(tmp_path):
    path = traced(tmp_path / "trace")
    found = read_swap_ins(path)
    assert found.ids == (1, 3) * 20
    assert [(who.sequences, who.first_arrived) for who in found.at[:2]] == [((3, 1), 1), ((3,), 3)]
    assert [(who.sequences, who.first_arrived) for who in found.before[:3]] == [((), None), ((3,), 3), ((), None)]
    table = io.StringIO()
    write_swap_ins(read_trace(path.read_text().splitlines()), table)
    assert from_table(table.getvalue().splitlines()).ids == found.ids


def test_files_that_are_no_lists(tmp_path):
    path = tmp_path / "x"
    with pytest.raises(H2OError, match="cannot be read"):
        read_swap_ins(path)
    path.write_text("sequence_id\n" + "1\n" * 15)
    with pytest.raises(UsageError, match="15 swap-ins"):
        read_swap_ins(path)
    path.write_text("a poem\nabout swaps\n")
    with pytest.raises(H2OError, match="no list of swap-ins"):
        read_swap_ins(path)
    lines = traced(path).read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(TraceError):
        read_swap_ins(path)


@given(st.integers(16, 10**4))
def test_the_test_is_the_last_quarter(n):
    assert 3 * n / 4 <= first_of_test(n) < 3 * n / 4 + 1


# --- rules -----------------------------------------------------------------------------------------------------------


@given(IDS, IDS, IDS)
def test_no_rule_knows_what_comes_later(ids, one, other):
    found = [guesses(SwapIns((*ids, *later))) for later in (one, other)]
    for rule in found[0]:
        assert found[0][rule][: len(ids) + 1] == found[1][rule][: len(ids) + 1]
        assert len(found[0][rule]) == len(ids) + len(one)


def test_simple_rules():
    found = guesses(SwapIns((5, 4, 9)))
    assert list(found) == ["previous id - 1", "previous id + 1", "repeat", "majority of steps"]
    assert found[BAR] == [None, 4, 3]
    assert found["previous id + 1"] == [None, 6, 5]
    assert found["repeat"] == [None, 5, 4]


def test_who_waits_is_looked_at_where_a_trace_tells(tmp_path):
    found = guesses(read_swap_ins(traced(tmp_path / "trace", 8)))
    assert found["first swapped out"][:4] == [None, 3, None, 3]
    assert found["first swapped out, known then"][:4] == [3, 3, 3, 3]
    assert found["first to arrive"][:4] == [None, 3, None, 3]
    assert found["first to arrive, known then"][:4] == [1, 3, 1, 3]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40))
def test_boyer_moore_finds_the_majority(values):
    for value in set(values):
        if 2 * values.count(value) > len(values):
            assert boyer_moore(values) == value


@given(st.lists(st.integers(-2, 2), max_size=40), st.integers(0, 9))
def test_a_trend_is_a_majority_of_the_smallest_window_that_has_one(steps, first):
    sizes, size = [], max(1, first)
    while not sizes or sizes[-1] < len(steps):
        sizes.append(size)
        size *= 2
    for size in sizes:
        recent = steps[-size:]
        most = [step for step in set(recent) if 2 * recent.count(step) > len(recent)]
        if most:
            assert trend(steps, first) == most[0]
            return
    assert trend(steps, first) is None


def test_the_majority_of_steps_grows_its_window_and_keeps_its_last_trend():
    assert majority(list(range(0, 60, 3)))[2:] == list(range(6, 60, 3))
    assert majority([0, 1, 3, 6])[1:] == [None, 2, 5 - 1]  # step 1 is all that is known, then neither 1 nor 2
    noisy = [0, 1, 2, 3, 9, 1, 4, 5]  # the last four steps are -8, 3, 1 and 6; of all seven, four are 1
    assert majority([*noisy, 0])[8] == 6
    assert majority([*noisy, 0], history=4)[8] == 6  # no majority in four: the last trend goes on


@given(IDS, st.integers(1, 8), st.integers(0, 40), st.integers(0, 80))
def test_windows_hold_what_is_just_before(ids, size, begin, length):
    end = min(len(ids), begin + length)
    seen, labels = windows(ids, size, begin, end)
    assert len(seen) == len(labels) == max(0, end - max(begin, size))
    for i, window, label in zip(itertools.count(max(begin, size)), seen, labels, strict=False):
        assert [*window, label] == list(ids[i - size : i + 1])


@given(st.integers(0, 500), st.integers(2, 120), st.data())
def test_a_class_is_the_nearest_id(last, mod, data):
    residue = data.draw(st.integers(0, mod - 1))
    expected = min((n for n in range(last + 2 * mod) if n % mod == residue), key=lambda n: (abs(n - last), n))
    assert nearest_id(residue, last, mod) == expected


# --- intervals -------------------------------------------------------------------------------------------------------


def test_wilsons_interval():
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0, 10) == pytest.approx((0, 0.2775), abs=1e-4)
    assert wilson(0, 0) == (0, 1)


@given(st.integers(1, 1000), st.data())
def test_an_interval_holds_the_share_and_shrinks(n, data):
    hits = data.draw(st.integers(0, n))
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high <= 1
    assert (1 - high, 1 - low) == pytest.approx(wilson(n - hits, n))
    more = wilson(4 * hits, 4 * n)
    assert more.high - more.low < high - low


@given(st.integers(0, 300), st.integers(0, 300))
def test_a_verdict_is_fair(won, lost):
    opposite = {"better": "worse", "worse": "better", "not told apart": "not told apart"}
    assert verdict(won, lost) == opposite[verdict(lost, won)]
    assert verdict(won, lost) != "better" or won > lost


def test_no_method_is_better_without_an_interval():
    pairs = {(0, 0): "not told apart", (5, 0): "not told apart", (6, 0): "better", (12, 6): "not told apart"}
    pairs |= {(60, 40): "not told apart", (61, 39): "better", (39, 61): "worse"}
    assert {pair: verdict(*pair) for pair in pairs} == pairs
    assert won_and_lost([True, True, False, False], [True, False, True, False]) == (1, 1)


# --- the report ------------------------------------------------------------------------------------------------------


def test_rows_count_the_last_quarter_only():
    ids = [9, 8, 7, 1, 0, 5, 14, 4]
    found = {"m": [9, 8, 7, 1, 0, 5, 4, None], BAR: [None, 8, 7, 6, 0, 0, 4, 3]}
    row, bar = rows_of(ids, found, found, 10, model="x", kind="rule")
    assert (row.n_swap_ins, row.n, row.guesses, row.hits, row.residue_hits) == (8, 2, 1, 0, 1)
    assert (row.won, row.lost, bar.verdict) == (0, 0, "")
    assert (bar.best_rule, row.rule_verdict, bar.rule_won, bar.rule_lost) == ("m", "", 0, 0)


def test_the_best_rule_is_chosen_before_the_test():
    ids = [1] * 12 + [2] * 4
    rules = {BAR: [None] * 16, "a": [1] * 16, "b": [2] * 16, "a, known then": ids}
    assert best_rule(ids, rules) == "a"
    row = list(rows_of(ids, {"b": rules["b"]}, rules, 10, model="x", kind="rule"))[-1]
    assert (row.best_rule, row.rule_won, row.rule_lost) == ("a", 4, 0)


def test_the_conclusion_names_what_is_better():
    def row(method, kind, won, rule_won=0):
        counts = {"n_swap_ins": 80, "n": 20, "guesses": 20, "hits": won, "residue_hits": won, "mod": 100, "lost": 0}
        share = {"low": 0.0, "high": 1.0, "won": won, "best_rule": "a", "rule_won": rule_won, "rule_lost": 0}
        return PredictRow(suite="predict", model="x", method=method, kind=kind, **counts, **share)

    assert conclusion([row("a", "rule", 9)]) == "Nothing was trained."
    said = 'Of what was trained: {} better than "previous id - 1"; {} better than the best rule, "a".'
    assert conclusion([row("a", "rule", 9), row("b", "trained", 2)]) == said.format("nothing", "nothing")
    rows = [row("a", "rule", 9, 9), row("b", "trained", 9), row("c", "trained", 9, 9)]
    assert conclusion(rows) == said.format("b and c", "c")


def test_the_command_without_torch_reports_the_rules(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    path, output = traced(tmp_path / "trace"), tmp_path / "out"
    assert run_command(["bench", "predict", str(path), "--output", str(output), "--json"]) == 0
    said = capsys.readouterr()
    rows = [json.loads(line) for line in said.out.splitlines()]
    assert rows[0]["method"] == BAR and len(rows) == 8
    assert said.err.count("pip install '.[predict]'") == 1
    report = (output / "predict.md").read_text()
    assert "| first to arrive, known then | 100.0 % |" in report and "Nothing was trained." in report
    assert run_command(["bench", "report", str(output)]) == 0
    assert (output / "predict.md").read_text() == report


def test_two_files_of_one_name_are_an_error(tmp_path):
    path = traced(tmp_path / "trace")
    assert run_command(["bench", "predict", str(path), str(path), "--output", str(tmp_path / "out")]) == 2


# --- networks --------------------------------------------------------------------------------------------------------

needs_torch = pytest.mark.skipif(
    importlib.util.find_spec("torch") is None, reason="the extra `predict` is not installed"
)


@needs_torch
def test_a_classifier_learns_what_no_rule_sees_and_the_same_from_a_seed():
    ids = [90, 95, 101, 104] * 40  # the nearest ids cross a multiple of 100
    found = trained(ids, Training(seed=1, epochs=4))
    split = first_of_test(len(ids))
    assert found[CLASSIFIER][:split] == [None] * split
    assert found[CLASSIFIER][split:] == ids[split:]
    assert found == trained(ids, Training(seed=1, epochs=4))


@needs_torch
def test_a_regressor_learns_a_step():
    ids = list(range(400))
    found = trained(ids, Training(epochs=10))[REGRESSOR][300:]
    assert all(abs(guess - number) < 20 for guess, number in zip(found, ids[300:], strict=True))


@needs_torch
def test_nothing_is_learnt_from_the_test():
    ids = [3, 9, 4, 7] * 30
    changed = [*ids[:-20], *range(20)]
    split = first_of_test(len(ids))
    one, other = (trained(each, Training(epochs=1)) for each in (ids, changed))
    for method in one:
        assert one[method][split : len(ids) - 19] == other[method][split : len(ids) - 19]


@needs_torch
def test_a_window_that_does_not_fit_is_an_error():
    with pytest.raises(UsageError, match="smaller --window-size"):
        trained(list(range(16)), Training(window_size=12))


def test_from_trace_of_nothing():
    assert from_trace([]) == SwapIns(())


# --- lengths of answers ----------------------------------------------------------------------------------------------


def answer_lines(ended):
    for i, (n_prompt, n_answer) in enumerate(ended):
        usage = {"prompt_tokens": n_prompt, "completion_tokens": n_answer}
        for finish in ("stop", "length"):
            body = {"choices": [{"finish_reason": finish}], "usage": usage}
            yield json.dumps({"custom_id": f"{i}-{finish}", "response": {"body": body}, "error": None})
    yield json.dumps({"custom_id": "refused", "response": None, "error": {"message": "too long"}})


def test_lengths_that_follow_prompts_are_known_from_prompts(tmp_path, capsys):
    ended = [Ended(n, 3 * n + 5) for n in (7, 30, 12, 55, 41, 20, 9, 33) * 6]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(answer_lines(ended)))
    assert read_ended(path) == ended
    assert run_command(["bench", "predict", str(path), "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "answers.jsonl: learnt from 36 answers, tested on the next 12" in out
    rows = {(row.asked, row.method): row for row in length_rows_of(ended, model="m")}
    line, bar = rows[ADMITTED, "line through prompts' lengths"], rows[ADMITTED, MEAN_BEFORE]
    assert (round(line.error, 6), round(line.beside, 6)) == (0, round(-bar.error, 6))
    assert line.beside + line.beside_half < 0
    assert (bar.beside, bar.beside_half) == (0, 0)
    assert run_command(["bench", "report", str(tmp_path / "out")]) == 0


def test_what_is_left_is_known_from_answers_that_came_as_far():
    """Half of the answers are short: whoever is longer goes on for long."""
    rows = {(row.asked, row.method): row for row in length_rows_of([Ended(9, n) for n in (8, 200) * 20], model="m")}
    stopping = rows[GOING_ON, list(METHODS)[-1]]
    assert (ADMITTED, list(METHODS)[-1]) not in rows
    assert stopping.error < rows[GOING_ON, MEAN_BEFORE].error
    assert stopping.beside + stopping.beside_half < 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"custom_id": "a", "response": {"body": 5}}', "has lines that are no answers"),
        ("\n".join(answer_lines([Ended(5, 7)] * 15)), "15 answers that ended by themselves, fewer than 16"),
    ],
)
def test_answers_that_say_nothing_are_one_line(tmp_path, text, message, capsys):
    path = tmp_path / "a"
    path.write_text(text)
    assert run_command(["bench", "predict", str(path), "--output", str(tmp_path / "out")]) in {1, 2}
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
