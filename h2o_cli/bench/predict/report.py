"""The rows, report and summary of the benchmark of predictors of swap-ins."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from h2o_cli.bench.predict.compare import verdict, wilson, won_and_lost
from h2o_cli.bench.predict.rules import BAR, KNOWN_THEN, Guesses
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
    where only this method was right, and only the rule "previous id - 1"; rule_won, rule_lost: and only best_rule, the
    rule that was right most often before the test (of those that know who waits, just after the swap-in before it).
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
    best_rule: str
    rule_won: int
    rule_lost: int
    window_size: int | None = None
    seed: int | None = None
    epochs: int | None = None

    @property
    def verdict(self) -> str:
        """Against "previous id - 1"; empty for that rule itself."""
        return "" if self.method == BAR else verdict(self.won, self.lost)

    @property
    def rule_verdict(self) -> str:
        """Against the best rule; empty for that rule itself."""
        return "" if self.method == self.best_rule else verdict(self.rule_won, self.rule_lost)


def best_rule(ids: Sequence[int], rules: dict[str, Guesses]) -> str:
    """The rule that was right most often before the test, of those that say it when the last swap-in is done."""
    split = first_of_test(len(ids))
    names = [name for name in rules if not name.endswith(KNOWN_THEN)]
    return max(names, key=lambda name: sum(_right(rules[name][:split], ids[:split])))


def rows_of(
    ids: Sequence[int], found: dict[str, Guesses], rules: dict[str, Guesses], mod: int, **fields: object
) -> Iterator[PredictRow]:
    """A row for what each method said; rules: what the rules said, to compare with."""
    split, best = first_of_test(len(ids)), best_rule(ids, rules)
    truth = ids[split:]
    bar_right, best_right = (_right(rules[name][split:], truth) for name in (BAR, best))
    for method, all_guesses in found.items():
        said = all_guesses[split:]
        right = _right(said, truth)
        won, lost = won_and_lost(right, bar_right)
        rule_won, rule_lost = won_and_lost(right, best_right)
        interval = wilson(sum(right), len(truth))
        yield PredictRow(
            suite="predict",
            method=method,
            n_swap_ins=len(ids),
            n=len(truth),
            guesses=sum(guess is not None for guess in said),
            hits=sum(right),
            residue_hits=sum(g is not None and (g - i) % mod == 0 for g, i in zip(said, truth, strict=True)),
            mod=mod,
            low=interval.low,
            high=interval.high,
            won=won,
            lost=lost,
            best_rule=best,
            rule_won=rule_won,
            rule_lost=rule_lost,
            **fields,  # type: ignore[arg-type]
        )


def _right(said: Guesses, truth: Sequence[int]) -> list[bool]:
    return [guess == number for guess, number in zip(said, truth, strict=True)]


_METHOD = (
    "The last quarter of the swap-ins is the test; only what comes before it is learnt from. **Right**: the id itself, "
    "with Wilson's 95 % interval; a method that says nothing is wrong. **Modulo**: right up to multiples of `--mod`. "
    f'**Against the bar**: where just one of this method and "{BAR}" was right, how often that was this method and how '
    "often the bar; better or worse only where the exact 95 % interval of that share leaves out one half. **Best "
    "rule**: the same against the rule that was right most often before the test (without those known then). The "
    "intervals take swap-ins as independent, and each stands for itself. **Known then**: the rule looks at who waits "
    "just before the swap-in, the others just after the one before it. A class of the classifier stands for the "
    "nearest id to the last one; what the regressor gives is rounded."
)
HEADER = (
    "method",
    "right",
    "95 % interval",
    "said",
    "modulo",
    "against the bar",
    "won : lost",
    "best rule",
    "won : lost",
)


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
                row.rule_verdict or "the best rule",
                f"{row.rule_won} : {row.rule_lost}" if row.rule_verdict else NONE,
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
    """Whether anything that was trained is better than the bar, and than the best rule."""
    trained = [row for row in rows if row.kind == "trained"]
    if not trained:
        return "Nothing was trained."
    said = []
    for what, names in (
        (f'"{BAR}"', [row.method for row in trained if row.verdict == "better"]),
        (f'the best rule, "{trained[0].best_rule}"', [row.method for row in trained if row.rule_verdict == "better"]),
    ):
        said.append(f"{' and '.join(names) if names else 'nothing'} better than {what}")
    return f"Of what was trained: {'; '.join(said)}."


_LEFT = (0, 5, 7)


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
