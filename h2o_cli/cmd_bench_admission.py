"""`h2o bench admission`: texts for batches under pressure, and traces of their pools."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from h2o_cli.output import note, print_json
from h2o_cli.session.models import BUNDLED_MODEL
from runtime.errors import LIMITS, H2OError

if TYPE_CHECKING:
    from h2o_cli.bench.admission.runs import Settings


STEP, REPEATS, FAST, BATCH_SIZE, ROUNDS = 0.2, 10, 32, 32, 7
QUICK_STEP, QUICK_ROUNDS = 0.6, 4
TEXTS, ENGINE_TEXTS, QUICK_ENGINE_TEXTS = 100, 32, 16


def bench_admission(  # noqa: PLR0913, PLR0917 - one parameter per flag
    quick: Annotated[bool, typer.Option("--quick", help="Fewer points, under a minute.")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="FILE.gguf or SHAPE/TYPE; repeatable. [default: the bundled one]"),
    ] = None,
    pool: Annotated[int, typer.Option("--pool", metavar="BLOCKS", min=1, help="Blocks of 16 tokens.")] = FAST,
    batch_size: Annotated[
        int, typer.Option("--batch-size", metavar="N", min=2, max=32, help="Texts at once, at most.")
    ] = BATCH_SIZE,
    repeats: Annotated[int, typer.Option("--repeats", metavar="N", min=2, help="Seeds of each point.")] = REPEATS,
    rounds: Annotated[
        int | None,
        typer.Option("--rounds", metavar="N", min=2, help="Turns of the engine's runs. [default: 7, quick: 4]"),
    ] = None,
    engine_texts: Annotated[
        int | None,
        typer.Option("--engine-texts", metavar="N", min=4, help="Texts of each of them. [default: 32, quick: 16]"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="For rows, report and plots.")] = Path(
        "bench-results"
    ),
    add: Annotated[bool, typer.Option("--add", help="Keep the rows that are in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every row as a JSON object instead of a table.")] = False,
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
    number: Annotated[int, typer.Option("--number", metavar="N", min=1, help="How many prompts.")] = TEXTS,
    seed: Annotated[int, typer.Option("--seed", metavar="S", help="Same seed, same prompts.")] = 0,
    behaviors: Annotated[
        Path | None, typer.Option("--behaviors", metavar="CSV", help="Take prompts from a column Behavior (HarmBench).")
    ] = None,
) -> None:
    """Search how many blocks to keep free when texts are admitted, on a simulator that is fitted to the engine.

    With --make-prompts or --check: make prompts for `h2o batch`, or check the trace of its pool, instead. A checked
    trace is told as one JSON object: how often each event came, and the most blocks held.
    """
    if make_prompts is None and check is None:
        from h2o_cli.bench.admission.runs import Settings

        step = QUICK_STEP if quick else STEP
        rounds = rounds or (QUICK_ROUNDS if quick else ROUNDS)
        engine_texts = engine_texts or (QUICK_ENGINE_TEXTS if quick else ENGINE_TEXTS)
        settings = Settings(pool, batch_size, number, repeats, step, seed, rounds, engine_texts)
        _search(model or [str(BUNDLED_MODEL)], settings, _Output(output, add, json))
    if make_prompts is not None:
        from h2o_cli.bench.admission.workload import read_behaviors, workload, write_requests

        arrivals = workload(number, seed, read_behaviors(behaviors) if behaviors else ())
        write_requests(arrivals, make_prompts)
        note(f"wrote {number} prompts to {make_prompts}")
    if check is not None:
        _check(check, export)


class _Output(NamedTuple):
    folder: Path
    add: bool
    json: bool


def _search(models: list[str], settings: Settings, output: _Output) -> list[Path]:
    """Fit, check and sweep; the traces of the simulator's pools. Raises H2OError."""
    from h2o_cli.bench.admission.report import ADMISSION
    from h2o_cli.bench.admission.runs import AdmissionBench
    from h2o_cli.bench.models.named import bench_model
    from h2o_cli.bench.results import Results

    found = [bench_model(name) for name in models]
    results = Results(ADMISSION, output.folder, output.json)
    results.begin(add=output.add)
    traces = []
    for model in found:
        model.prepare()
        trace = output.folder / f"admission-trace-{model.name.replace('/', '-')}.jsonl"
        results.keep(AdmissionBench(model, settings, trace).run())
        traces.append(trace)
    results.finish(results.read())
    return traces


def quick_search(folder: Path, *, add: bool, json: bool) -> list[Path]:
    """The quick form with the bundled model, as a part of `h2o bench`; the traces that it leaves. Raises H2OError."""
    from h2o_cli.bench.admission.runs import Settings

    settings = Settings(FAST, BATCH_SIZE, TEXTS, REPEATS, QUICK_STEP, 0, QUICK_ROUNDS, QUICK_ENGINE_TEXTS)
    return _search([str(BUNDLED_MODEL)], settings, _Output(folder, add, json))


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
