"""How well the lengths of answers are known beforehand: from prompts, from answers before, and while they go on."""

from __future__ import annotations

import bisect
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

from h2o_cli.bench.admission.rows import Mean, mean
from h2o_cli.bench.predict.sequences import FEWEST, first_of_test
from h2o_cli.bench.report import document, machines, started_by
from h2o_cli.bench.results import Kind
from h2o_cli.bench.rows import Row, chosen, distinct
from h2o_cli.bench.tables import NONE, markdown_table
from h2o_cli.output import table
from runtime.answer.pool import BLOCK_TOKENS
from runtime.errors import H2OError, UsageError

ADMITTED, GOING_ON = "when it is admitted", "at each block"
MEAN_BEFORE = "mean of the answers before"
_NEAREST = 5


class Ended(NamedTuple):
    """An answer that ended by itself: tokens of its prompt and its own."""

    n_prompt: int
    n_answer: int


class LengthRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """One method on the answers of a file (model: its name), learnt from the first of them and tested on the last n.

    asked: when the rest of an answer is predicted. error, error_half: mean absolute error of an answer in tokens, and
    half of its 95 % interval. beside, beside_half: how much larger it is than the bar's, answer by answer.
    """

    suite: Literal["lengths"]
    asked: str
    method: str
    n_learnt: int
    n: int
    error: float
    error_half: float
    beside: float
    beside_half: float


def is_answers(path: Path) -> bool:
    """Whether a file begins as one of answers of `h2o batch` does. Raises H2OError where it cannot be read."""
    try:
        with path.open("rb") as file:
            return b'"custom_id"' in file.readline()
    except OSError as error:
        raise H2OError(f"{path} cannot be read: {error.strerror}", "give another file") from None


def read_ended(path: Path) -> list[Ended]:
    """The answers that ended by themselves, in the order in which they did. Raises UsageError and H2OError."""
    found = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            body = (json.loads(line)["response"] or {}).get("body")
            if body and body["choices"][0]["finish_reason"] == "stop":
                found.append(Ended(body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]))
    except (ValueError, KeyError, TypeError, IndexError):
        raise H2OError(f"{path} has lines that are no answers", "give the -o file of `h2o batch`") from None
    if len(found) < FEWEST:
        text = f"{path} has {len(found)} answers that ended by themselves, fewer than {FEWEST}"
        raise UsageError(text, "raise max_tokens, or answer more prompts")
    return found


# --- what is predicted: tokens that are still to come ----------------------------------------------------------------

Predictor = Callable[[int, int], float]  # tokens of the prompt, tokens of the answer so far -> tokens to come


def _mean(learnt: Sequence[Ended]) -> Predictor:
    value = statistics.fmean(ended.n_answer for ended in learnt)
    return lambda _n_prompt, n_so_far: max(1.0, value - n_so_far)


def _median(learnt: Sequence[Ended]) -> Predictor:
    value = statistics.median(ended.n_answer for ended in learnt)
    return lambda _n_prompt, n_so_far: max(1.0, value - n_so_far)


def _line(learnt: Sequence[Ended]) -> Predictor:
    prompts, answers = zip(*learnt, strict=True)
    if len(set(prompts)) == 1:
        return _mean(learnt)
    slope, base = statistics.linear_regression(prompts, answers)
    return lambda n_prompt, n_so_far: max(1.0, base + slope * n_prompt - n_so_far)


def _nearest(learnt: Sequence[Ended]) -> Predictor:
    def predict(n_prompt: int, n_so_far: int) -> float:
        near = sorted(learnt, key=lambda ended: abs(ended.n_prompt - n_prompt))[:_NEAREST]
        return max(1.0, statistics.fmean(ended.n_answer for ended in near) - n_so_far)

    return predict


def _stopping(learnt: Sequence[Ended]) -> Predictor:
    """What those that came as far had left, on average."""
    lengths = sorted(ended.n_answer for ended in learnt)

    def predict(_n_prompt: int, n_so_far: int) -> float:
        longer = lengths[bisect.bisect_right(lengths, n_so_far) :]
        return statistics.fmean(longer) - n_so_far if longer else 1.0

    return predict


METHODS: dict[str, Callable[[Sequence[Ended]], Predictor]] = {
    MEAN_BEFORE: _mean,
    "median of them": _median,
    "line through prompts' lengths": _line,
    f"mean of the {_NEAREST} with the nearest prompts": _nearest,
    "what those as long had left (stopping)": _stopping,
}


def rows_of(ended: Sequence[Ended], **fields: object) -> Iterator[LengthRow]:
    """A row for each method and time."""
    split = first_of_test(len(ended))
    learnt, test = ended[:split], ended[split:]
    for asked, step in ((ADMITTED, 0), (GOING_ON, BLOCK_TOKENS)):
        bar: list[float] = []
        for method, learn in METHODS.items():
            if method == list(METHODS)[-1] and not step:
                continue  # nothing has come yet: the same as the bar
            errors = [_error(learn(learnt), answer, step) for answer in test]
            bar = bar or errors
            error, beside = mean(errors), mean([a - b for a, b in zip(errors, bar, strict=True)])
            yield LengthRow(
                suite="lengths",
                asked=asked,
                method=method,
                n_learnt=split,
                n=len(test),
                error=error.value,
                error_half=error.half,
                beside=beside.value,
                beside_half=beside.half,
                **fields,  # type: ignore[arg-type]
            )


def _error(predict: Predictor, answer: Ended, step: int) -> float:
    """Tokens that a prediction is wrong by, on average over all times at which it is asked for."""
    times = range(0, answer.n_answer, step) if step else (0,)
    errors = [abs(predict(answer.n_prompt, n) - (answer.n_answer - n)) for n in times]
    return statistics.fmean(errors or [0.0])


# --- the report ------------------------------------------------------------------------------------------------------

_METHOD = (
    "Only answers that ended by themselves, in the order in which they did. The last quarter is the test. **Error**: "
    "by how many tokens a prediction of what is still to come is wrong, with its 95 % interval. **Beside the bar**: "
    f'the difference to "{MEAN_BEFORE}", answer by answer; better or worse only where its interval leaves out 0.'
)


def table_rows(rows: Sequence[LengthRow]) -> list[tuple[str, ...]]:
    """A line for each method and time, the head first."""
    lines: list[tuple[str, ...]] = [("asked", "method", "error", "beside the bar", "")]
    for row in rows:
        beside = Mean(row.beside, row.beside_half)
        verdict = ("worse" if row.beside > 0 else "better") if beside.is_apart else "not told apart"
        shown = (NONE, "the bar") if row.method == MEAN_BEFORE else (beside.text(), verdict)
        lines.append((row.asked, row.method, Mean(row.error, row.error_half).text(), *shown))
    return lines


def report(rows: Sequence[LengthRow], _pictures: Sequence[str] = ()) -> str:
    """The tables as Markdown."""
    parts = [machines(rows), _METHOD, started_by(rows)] if rows else ["No answers."]
    for name in distinct(row.model for row in rows):
        at = chosen(rows, model=name)
        parts += [f"## {_title(at[0])}", markdown_table(table_rows(at), _LEFT)]
    return document("Predicting lengths", parts)


_LEFT = (0, 1, 4)


def _summary(rows: Sequence[LengthRow]) -> str:
    names = distinct(row.model for row in rows)
    tables = ((_title(at[0]), table(table_rows(at), right=(2, 3))) for at in (chosen(rows, model=n) for n in names))
    return "\n\n".join(f"{title}\n{lines}" for title, lines in tables)


def _title(row: LengthRow) -> str:
    return f"{row.model}: learnt from {row.n_learnt} answers, tested on the next {row.n}"


LENGTHS = Kind(LengthRow, report, _summary, rows="lengths.jsonl", report="lengths.md")
