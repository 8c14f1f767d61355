"""`h2o bench admission`: texts for batches under pressure, and traces of their pools."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h2o_cli.output import note, print_json
from runtime.errors import LIMITS, H2OError, UsageError


def bench_admission(
    check: Annotated[
        Path | None, typer.Option("--check", metavar="TRACE", help="Play a trace of `h2o batch` again, and check it.")
    ] = None,
    export: Annotated[
        Path | None,
        typer.Option("--export", metavar="FOLDER", help="Write that trace as output.csv and pure_sequence.csv."),
    ] = None,
    make_prompts: Annotated[
        Path | None, typer.Option("--make-prompts", metavar="FILE", help="Write prompts of mixed lengths.")
    ] = None,
    number: Annotated[int, typer.Option("--number", metavar="N", min=1, help="How many prompts.")] = 100,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Same seed, same prompts.")] = 0,
    behaviors: Annotated[
        Path | None, typer.Option("--behaviors", metavar="CSV", help="Take prompts from a column Behavior (HarmBench).")
    ] = None,
) -> None:
    """Make prompts for `h2o batch`, and check the traces of its pools.

    A checked trace is told as one JSON object: how often each event came, and the most blocks held.
    """
    if make_prompts is None and check is None:
        raise UsageError("nothing is to be done", "give --check TRACE or --make-prompts FILE")
    if make_prompts is not None:
        from h2o_cli.bench.admission.workload import read_behaviors, workload, write_requests

        arrivals = workload(number, seed, read_behaviors(behaviors) if behaviors else ())
        write_requests(arrivals, make_prompts)
        note(f"wrote {number} prompts to {make_prompts}")
    if check is not None:
        _check(check, export)


def _check(path: Path, export: Path | None) -> None:
    """Check a trace, and write it in the source's forms. Raises H2OError."""
    from runtime.answer.pool_trace import check, read_trace, write_operations, write_swap_ins

    try:
        with path.open(encoding="utf-8") as file:
            lines = list(read_trace(file))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise H2OError(f"the trace {path} cannot be read: {reason}", "give another file") from None
    replay = check(lines)
    print_json(
        {"events": replay.events, "most_blocks": replay.most, "blocks": {t: lines[0][t] for t in ("fast", "slow")}}
    )
    if export is None:
        return
    try:
        export.mkdir(parents=True, exist_ok=True)
        with (export / "output.csv").open("w") as file:
            write_operations(lines, file)
        with (export / "pure_sequence.csv").open("w") as file:
            write_swap_ins(lines, file)
    except OSError as error:
        step = LIMITS.get(error.errno or 0, "give another folder")
        raise H2OError(f"{export} cannot be written: {error.strerror}", step) from None
