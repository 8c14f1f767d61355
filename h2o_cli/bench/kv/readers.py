"""Questions from files of LongBench and InfiniteBench that the user has, and how their answers are scored.

LongBench (Bai et al., ACL 2024): JSON lines with input, context, answers, length, dataset, language, all_classes, _id.
InfiniteBench (Zhang et al., ACL 2024): JSON lines with id, context, input, answer, options; the task is the file's
name. The prompts here are this project's own and the same for every method: scores compare methods with each other, not
with published tables.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import msgspec

from runtime.errors import UsageError

_KINDS = "give a JSONL file of LongBench or InfiniteBench"
ANSWER_TOKENS = 32
_OPTIONS = "ABCD"


@dataclass(frozen=True)
class Example:
    """A question about a context. answers: any of them is right; classes: all labels of a classification."""

    task: str
    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...] = ()

    @property
    def ending(self) -> str:
        """What follows the context in a prompt."""
        return f"\n\nQuestion: {self.question}\nAnswer:" if self.question else "\n\nAnswer:"


class _LongBench(msgspec.Struct):
    input: str
    context: str
    answers: list[str]
    dataset: str
    all_classes: list[str] | None = None


class _InfiniteBench(msgspec.Struct):
    context: str
    input: str
    answer: str | int | float | list[str | int | float]
    options: list[str] = []


def read_examples(path: Path, most: int = 0) -> list[Example]:
    """The questions of a file, at most `most` of them (0: all). Raises UsageError for a line that is none."""
    found: list[Example] = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    found.append(_example(line, path, number))
                if most and len(found) >= most:
                    break
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", _KINDS) from None
    if not found:
        raise UsageError(f"{path} holds no questions", _KINDS)
    return found


def _example(line: bytes, path: Path, number: int) -> Example:
    try:
        fields: Any = msgspec.json.decode(line)
        if isinstance(fields, dict) and "answers" in fields:
            long = msgspec.convert(fields, _LongBench)
            return _checked(
                Example(long.dataset, long.context, long.input, tuple(long.answers), tuple(long.all_classes or ()))
            )
        if isinstance(fields, dict) and "answer" in fields:
            return _checked(_from_infinite_bench(msgspec.convert(fields, _InfiniteBench), path.stem))
    except (msgspec.DecodeError, UnicodeDecodeError, ValueError) as error:
        raise UsageError(f"line {number} of {path.name} cannot be used: {error}", _KINDS) from None
    raise UsageError(f"line {number} of {path.name} has neither `answers` nor `answer`", _KINDS)


def _from_infinite_bench(found: _InfiniteBench, task: str) -> Example:
    answer = found.answer if isinstance(found.answer, list) else [found.answer]
    answers, question = [str(one) for one in answer], found.input
    if found.options:
        lines = [f"{letter}. {option}" for letter, option in zip(_OPTIONS, found.options, strict=False)]
        question = "\n".join([question, *lines]).strip()
        answers = [letter for letter, option in zip(_OPTIONS, found.options, strict=False) if option in answers]
    return Example(task, found.context, question, tuple(answers))


def _checked(example: Example) -> Example:
    if not example.answers:
        raise ValueError("it has no answer")
    return example


def truncate_middle(tokens: Sequence[int], most: int) -> list[int]:
    """At most `most` tokens: the first half and the last half of what is too long (as LongBench and OmniKV do)."""
    if len(tokens) <= most:
        return list(tokens)
    head = most // 2
    return [*tokens[:head], *tokens[len(tokens) - (most - head) :]]


# --- scores, 0 to 1 --------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    """Lower-case words without punctuation and articles (SQuAD's normalisation; Rajpurkar et al., EMNLP 2016)."""
    plain = "".join(" " if c in string.punctuation else c for c in text.lower())
    return [word for word in plain.split() if word not in ("a", "an", "the")]


def _f1(said: Sequence[str], wanted: Sequence[str]) -> float:
    common = sum((Counter(said) & Counter(wanted)).values())
    return 2 * common / (len(said) + len(wanted)) if common else 0.0


def word_f1(said: str, wanted: str, _classes: Sequence[str] = ()) -> float:
    """Harmonic mean of precision and recall over words."""
    return _f1(_words(said), _words(wanted))


def character_f1(said: str, wanted: str, _classes: Sequence[str] = ()) -> float:
    """The same over characters, for Chinese."""
    return _f1([c for c in said if c.isalnum()], [c for c in wanted if c.isalnum()])


def rouge_l(said: str, wanted: str, _classes: Sequence[str] = ()) -> float:
    """F-measure of the longest common subsequence of words (Lin, "ROUGE", 2004)."""
    a, b = said.lower().split(), wanted.lower().split()
    row = [0] * (len(b) + 1)
    for word in a:
        before, row = row, [0] * (len(b) + 1)
        for i, other in enumerate(b):
            row[i + 1] = before[i] + 1 if word == other else max(before[i + 1], row[i])
    return 2 * row[-1] / (len(a) + len(b)) if row[-1] else 0.0


def right_label(said: str, wanted: str, classes: Sequence[str] = ()) -> float:
    """The label is named; shared among all labels that are named and are no part of it."""
    named = [label for label in classes if label in said and (label == wanted or label not in wanted)]
    return 1.0 / len(named) if wanted in named else 0.0


def right_number(said: str, wanted: str, _classes: Sequence[str] = ()) -> float:
    """Part of the numbers that were said which are the wanted one."""
    numbers, number = re.findall(r"\d+", said), re.search(r"\d+", wanted)
    return sum(n == number.group() for n in numbers) / len(numbers) if numbers and number else 0.0


def first_number(said: str, wanted: str, _classes: Sequence[str] = ()) -> float:
    """The first number that was said is the wanted one."""
    found = re.search(r"\d+", said)
    return float(found is not None and found.group() == wanted)


def contains(said: str, wanted: str, _classes: Sequence[str] = ()) -> float:
    """The answer holds the wanted words as a whole."""
    words, other = f" {' '.join(_words(said))} ", f" {' '.join(_words(wanted))} "
    return float(other in words)


def first_letter(said: str, wanted: str, _classes: Sequence[str] = ()) -> float:
    """The first lone A, B, C or D is the wanted one."""
    found = re.search(r"\b([A-D])\b", said)
    return float(found is not None and found.group(1) == wanted)


def similar_line(said: str, wanted: str, _classes: Sequence[str] = ()) -> float:
    """Similarity of the first line of code with the wanted one."""
    lines = [line for line in said.strip("\n").split("\n") if not line.lstrip().startswith(("`", "#", "//"))]
    return SequenceMatcher(None, (lines or [""])[0], wanted).ratio()


Measure = Callable[[str, str, Sequence[str]], float]
_MEASURES: dict[Measure, str] = {
    word_f1: "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa longbook_qa_eng",
    character_f1: "multifieldqa_zh longbook_qa_chn",
    rouge_l: "gov_report qmsum multi_news samsum vcsum dureader longbook_sum_eng",
    right_label: "trec lsht",
    right_number: "passage_count passage_retrieval_en passage_retrieval_zh",
    first_number: "passkey number_string math_find",
    contains: "kv_retrieval longdialogue_qa_eng code_run math_calc",
    first_letter: "longbook_choice_eng code_debug",
    similar_line: "lcc repobench-p",
}
_BY_TASK = {task: measure for measure, tasks in _MEASURES.items() for task in tasks.split()}


def measure_of(task: str) -> Measure:
    """How answers of a task are scored; the file of LongBench-E ends in `_e`. Raises UsageError for unknown tasks."""
    measure = _BY_TASK.get(task) or _BY_TASK.get(task.removesuffix("_e"))
    if measure is None:
        raise UsageError(f"the task {task!r} is not known", f"one of {', '.join(sorted(_BY_TASK))}")
    return measure


def score(example: Example, said: str) -> float:
    """The best score over all right answers."""
    measure = measure_of(example.task)
    return max(measure(said, wanted, example.classes) for wanted in example.answers)
