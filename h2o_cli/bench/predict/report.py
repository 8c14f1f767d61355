"""The rows, report and summary of the benchmark of predictors of swap-ins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from h2o_cli.bench.predict.compare import verdict, wilson, won_and_lost
from h2o_cli.bench.predict.rules import BAR, Guesses
from h2o_cli.bench.predict.sequences import first_of_test
from h2o_cli.bench.report import document, machines, started_by
from h2o_cli.bench.results import Kind
from h2o_cli.bench.rows import Row, chosen, distinct
from h2o_cli.bench.tables import NONE, markdown_table
from h2o_cli.output import table


class PredictRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """One method on one list of swap-ins (model: its file name), tested on the last n of all n_swap_ins.

    guesses: how often it said anything. hits: how often the id was right; residue_hits: how often it was modulo `mod`,
    which is what the source counts for its classifier. low, high: the 95 % interval of hits / n. won, lost: swap-ins
    where only this method was right, and only the rule "previous id - 1".
    """

    suite: Literal["predict"]
    method: str
    kind: Literal["rule", "trained"]
    n_swap_ins: int
    n: int
    guesses: int
    hits: int
    residue_hits: int
    mod: int
    low: float
    high: float
    won: int
    lost: int
    window_size: int | None = None
    seed: int | None = None
    epochs: int | None = None

    @property
    def verdict(self) -> str:
        """Against "previous id - 1"; empty for that rule itself."""
        return "" if self.method == BAR else verdict(self.won, self.lost)


def rows_of(
    ids: Sequence[int], found: dict[str, Guesses], bar: Guesses, mod: int, **fields: object
) -> Iterator[PredictRow]:
    """A row for what each method said; bar: what "previous id - 1" said."""
    split = first_of_test(len(ids))
    truth = ids[split:]
    bar_right = [guess == number for guess, number in zip(bar[split:], truth, strict=True)]
    for method, all_guesses in found.items():
        said = all_guesses[split:]
        right = [guess == number for guess, number in zip(said, truth, strict=True)]
        same = [guess is not None and (guess - number) % mod == 0 for guess, number in zip(said, truth, strict=True)]
        won, lost = won_and_lost(right, bar_right)
        interval = wilson(sum(right), len(truth))
        yield PredictRow(
            suite="predict",
            method=method,
            n_swap_ins=len(ids),
            n=len(truth),
            guesses=sum(guess is not None for guess in said),
            hits=sum(right),
            residue_hits=sum(same),
            mod=mod,
            low=interval.low,
            high=interval.high,
            won=won,
            lost=lost,
            **fields,  # type: ignore[arg-type]
        )


_METHOD = (
    "The last quarter of the swap-ins is the test; only what comes before it is learnt from. **Right**: the id itself, "
    "with Wilson's 95 % interval; a method that says nothing is wrong. **Modulo**: right up to multiples of `--mod`. "
    f'**Against the bar**: where just one of this method and "{BAR}" was right, how often that was this method and how '
    "often the bar; better or worse only where the exact 95 % interval of that share leaves out one half. The "
    "intervals take swap-ins as independent, and each stands for itself. **Known then**: the rule looks at who waits "
    "just before the swap-in, the others just after the one before it. A class of the classifier stands for the "
    "nearest id to the last one; what the regressor gives is rounded."
)
HEADER = ("method", "right", "95 % interval", "said", "modulo", "against the bar", "won : lost")


def table_rows(rows: Sequence[PredictRow]) -> list[tuple[str, ...]]:
    """A line for each method, the head first."""
    lines: list[tuple[str, ...]] = [HEADER]
    for row in rows:
        lines.append(
            (
                row.method,
                _percent(row.hits / row.n),
                f"{_percent(row.low)} to {_percent(row.high)}",
                _percent(row.guesses / row.n),
                _percent(row.residue_hits / row.n),
                row.verdict or "the bar",
                f"{row.won} : {row.lost}" if row.verdict else NONE,
            )
        )
    return lines


def report(rows: Sequence[PredictRow], _pictures: Sequence[str] = ()) -> str:
    """The tables as Markdown."""
    parts = [machines(rows), _METHOD, started_by(rows)] if rows else ["No swap-ins."]
    for name in distinct(row.model for row in rows):
        at = chosen(rows, model=name)
        parts += [f"## {_title(at[0])}", markdown_table(table_rows(at), _LEFT), conclusion(at)]
    return document("Predicting swap-ins", parts)


def conclusion(rows: Sequence[PredictRow]) -> str:
    """Whether anything that was trained is better than the bar."""
    if all(row.kind == "rule" for row in rows):
        return "Nothing was trained."
    better = [row.method for row in rows if row.kind == "trained" and row.verdict == "better"]
    if better:
        return f'Better than "{BAR}": {", ".join(better)}.'
    return f'Nothing that was trained is better than "{BAR}".'


_LEFT = (0, 5)


def _summary(rows: Sequence[PredictRow]) -> str:
    parts = []
    for name in distinct(row.model for row in rows):
        at = chosen(rows, model=name)
        right = [i for i in range(len(HEADER)) if i not in _LEFT]
        parts.append("\n".join([_title(at[0]), table(table_rows(at), right=right), conclusion(at)]))
    return "\n\n".join(parts)


def _title(row: PredictRow) -> str:
    return f"{row.model}: {row.n_swap_ins} swap-ins, tested on the last {row.n}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


PREDICT = Kind(PredictRow, report, _summary, rows="predict.jsonl", report="predict.md")
