"""`h2o bench predict`: how often rules and small networks know which text is swapped in next."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from h2o_cli.output import note
from runtime.errors import UsageError

if TYPE_CHECKING:
    from h2o_cli.bench.predict.trained import Training


def bench_predict(
    files: Annotated[
        list[Path],
        typer.Argument(metavar="FILE...", help="Traces of `h2o batch --trace`, tables as pure_sequence.csv, answers."),
    ],
    window_size: Annotated[
        int | None,
        typer.Option("--window-size", metavar="N", min=1, help="Ids that networks see. [default: 5, regressor: 2]"),
    ] = None,
    mod: Annotated[int, typer.Option("--mod", metavar="N", min=2, help="The classifier's classes: id mod N.")] = 100,
    seed: Annotated[int, typer.Option("--seed", metavar="S", min=0, help="Of the training.")] = 0,
    epochs: Annotated[
        int | None, typer.Option("--epochs", metavar="N", min=1, help="Of the training. [default: 30, regressor: 10]")
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="For rows and report.")] = Path(
        "bench-results"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print every row as a JSON object instead of a table.")] = False,
) -> None:
    """Try predictors of the next text that is swapped in, on the last quarter of a list of swap-ins.

    Rules, and with the extra `predict` two networks that learn from what is before. Of the answers of `h2o batch` their
    lengths are predicted instead.
    """
    from h2o_cli.bench.predict.lengths import is_answers
    from h2o_cli.bench.predict.trained import Training

    if len({path.name for path in files}) < len(files):
        raise UsageError("two files have the same name", "rename one: tables are named after files")
    answers = [path for path in files if is_answers(path)]
    if answers:
        predict_lengths(answers, output, json=json)
    swap_ins = [path for path in files if path not in answers]
    if swap_ins:
        predict(swap_ins, Training(window_size, mod, seed, epochs), output, json=json)


def predict_lengths(files: list[Path], output: Path, *, json: bool) -> None:
    """Try all methods for lengths on each file of answers. Raises H2OError."""
    from h2o_cli.bench.predict.lengths import LENGTHS, read_ended, rows_of
    from h2o_cli.bench.results import Results
    from h2o_cli.bench.rows import circumstances

    lists = [(path, read_ended(path)) for path in files]
    results = Results(LENGTHS, output, json)
    results.begin()
    for path, ended in lists:
        results.keep(rows_of(ended, model=path.name, **circumstances(path)))
    results.finish(results.read())


def predict(files: list[Path], training: Training, output: Path, *, json: bool) -> None:
    """Try all methods on each file. Raises H2OError."""
    from h2o_cli.bench.predict.report import PREDICT, rows_of
    from h2o_cli.bench.predict.rules import guesses
    from h2o_cli.bench.predict.sequences import read_swap_ins
    from h2o_cli.bench.predict.trained import NoTorch, trained
    from h2o_cli.bench.results import Results
    from h2o_cli.bench.rows import circumstances

    lists = [(path, read_swap_ins(path)) for path in files]
    results = Results(PREDICT, output, json)
    results.begin()
    missing = ""
    for path, swap_ins in lists:
        fields = {"model": path.name, **circumstances(path)}
        rules = guesses(swap_ins)
        results.keep(rows_of(swap_ins.ids, rules, rules, training.mod, kind="rule", **fields))
        try:
            learnt = trained(swap_ins.ids, training)
        except NoTorch as error:
            missing = str(error)
            continue
        how = {"window_size": training.window_size, "seed": training.seed, "epochs": training.epochs}
        results.keep(rows_of(swap_ins.ids, learnt, rules, training.mod, kind="trained", **how, **fields))
    if missing:
        note(missing)
    results.finish(results.read())
