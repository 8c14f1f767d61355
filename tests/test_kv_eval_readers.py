"""Files of LongBench and InfiniteBench: read as published, refused line by line when they are not; scores."""

import json

import pytest

from h2o_cli.bench.kv import readers
from h2o_cli.bench.kv.readers import Example, measure_of, read_examples, score, truncate_middle
from runtime.errors import UsageError

LONG = {
    "input": "Who wrote it?",
    "context": "A long text.",
    "answers": ["Ada Lovelace", "Lovelace"],
    "length": 3,
    "dataset": "hotpotqa",
    "language": "en",
    "all_classes": None,
    "_id": "f00",
}
INFINITE = {"id": 0, "context": "A long text.", "input": "What is the pass key?", "answer": ["71432"], "options": []}


def written(tmp_path, *lines, name="passkey.jsonl"):
    path = tmp_path / name
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_longbench(tmp_path):
    (found,) = read_examples(written(tmp_path, LONG, ""))
    assert found == Example("hotpotqa", "A long text.", "Who wrote it?", ("Ada Lovelace", "Lovelace"))
    assert "Question: Who wrote it?" in found.ending


def test_infinitebench(tmp_path):
    (found,) = read_examples(written(tmp_path, INFINITE))
    assert found == Example("passkey", "A long text.", "What is the pass key?", ("71432",))


def test_choices_become_letters(tmp_path):
    line = {**INFINITE, "answer": ["blue"], "options": ["red", "blue", "green", "grey"]}
    (found,) = read_examples(written(tmp_path, line, name="longbook_choice_eng.jsonl"))
    assert found.answers == ("B",)
    assert "B. blue" in found.question


def test_numbers_are_answers(tmp_path):
    (found,) = read_examples(written(tmp_path, {**INFINITE, "answer": 12}, name="math_find.jsonl"))
    assert found.answers == ("12",)


def test_only_so_many_lines(tmp_path):
    assert len(read_examples(written(tmp_path, LONG, LONG, LONG, "not read"), most=2)) == 2


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of passkey.jsonl"),
        ("[1]", "neither"),
        ({"text": "x"}, "neither"),
        ({**LONG, "answers": "x"}, "line 2"),
        ({**LONG, "answers": []}, "no answer"),
        ({**LONG, "context": None}, "context"),
        ({key: value for key, value in LONG.items() if key != "dataset"}, "dataset"),
        ({**INFINITE, "answer": {}}, "answer"),
        ({**INFINITE, "answer": ["x"], "options": ["a", "b"]}, "no answer"),
    ],
)
def test_lines_that_are_none(tmp_path, line, words):
    with pytest.raises(UsageError, match=words) as caught:
        read_examples(written(tmp_path, LONG, line))
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(UsageError, match="cannot read"):
        read_examples(tmp_path / "nothing")
    with pytest.raises(UsageError, match="holds no questions"):
        read_examples(written(tmp_path, "", ""))
    with pytest.raises(UsageError, match="'poem' is not known"):
        measure_of("poem")


@pytest.mark.parametrize(
    ("task", "said", "wanted", "value"),
    [
        ("hotpotqa", "It was Ada Lovelace.", "Ada Lovelace", 2 * 2 / 6),
        ("hotpotqa_e", "The Ada, Lovelace", "ada lovelace", 1.0),
        ("hotpotqa", "", "Ada", 0.0),
        ("multifieldqa_zh", "\u5317\u4eac", "\u5317\u4eac\u3002", 1.0),
        ("passage_count", "12, or 13", "12", 0.5),
        ("passage_retrieval_en", "Paragraph 7", "Paragraph 7", 1.0),
        ("passkey", "The key is 71432, not 5.", "71432", 1.0),
        ("passkey", "5, no 71432", "71432", 0.0),
        ("kv_retrieval", '"abc-12": x', "abc-12", 1.0),
        ("longbook_choice_eng", "The answer is B.", "B", 1.0),
        ("lcc", "# code\nx = 1", "x = 1", 1.0),
        ("gov_report", "a b c d", "a c d e", 2 * 3 / 8),
    ],
)
def test_scores(task, said, wanted, value):
    assert score(Example(task, "", "", ("nothing else", wanted) if task == "hotpotqa" else (wanted,)), said) == (
        pytest.approx(value)
    )


def test_a_label_is_shared_among_those_that_were_said():
    classes = ("Number", "Date", "Other entity", "entity")
    assert score(Example("trec", "", "", ("Number",), classes), "Number or Date") == 0.5
    assert score(Example("trec", "", "", ("Other entity",), classes), "Other entity") == 1.0
    assert score(Example("trec", "", "", ("Date",), classes), "Number") == 0.0


def test_the_middle_is_left_out():
    assert truncate_middle(range(10), 10) == list(range(10))
    assert truncate_middle(range(10), 5) == [0, 1, 7, 8, 9]
    assert truncate_middle(range(10), 1) == [9]


def test_every_public_task_has_a_measure():
    names = "narrativeqa qasper hotpotqa 2wikimqa musique gov_report trec samsum lcc repobench-p passkey kv_retrieval"
    assert all(callable(measure_of(name)) for name in names.split())
    assert len(readers._BY_TASK) == 33
