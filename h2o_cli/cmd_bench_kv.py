"""`h2o bench kv`: how good, how fast and how small answers are when keys and values are filtered."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from h2o_cli.interrupts import interrupts
from h2o_cli.kv_flags import store_folder
from h2o_cli.output import Progress, emit, note, print_json, versions
from h2o_cli.session.defaults import MOST_THREADS, default_budget, default_threads
from h2o_cli.session.kv_layers import find_choice
from h2o_cli.session.models import BUNDLED_MODEL
from runtime.errors import UsageError
from runtime.kv.options import (
    DEFAULT_SELECT,
    DEFAULT_WAIT,
    GUESSED_WAIT,
    STORES,
    STRATEGIES,
    parse_layers,
    parse_strategy,
)

if TYPE_CHECKING:
    from h2o_cli.bench.kv.methods import Method
    from h2o_cli.bench.kv.quality import Quality
    from h2o_cli.bench.kv.rows import KvRow
    from profiler.kv_eval.model import EvalModel

EPILOG = """Examples:

\b
  h2o bench kv --quick                       under 5 minutes, the bundled model
  h2o bench kv model.gguf --length 4000 --task needle --trials 4
  h2o bench kv model.gguf --data hotpotqa.jsonl --data passkey.jsonl --length 8000
  h2o bench kv --suite speed --context 16384 --context 32768
"""
OUTPUT = Path("bench-results/kv")
KEEPS, QUICK_KEEPS = (0.3, 0.2, 0.1, 0.05), (1.0, 0.1)
LENGTHS, QUICK_LENGTHS = (256, 512, 1024), (512,)
TASKS, QUICK_TASKS = ("needle", "recall", "two-stage"), ("needle", "recall")
CONTEXTS, QUICK_CONTEXTS = (1024, 2048, 4096, 8192, 16384), (1024,)
SPEED_KEEPS, QUICK_SPEED_KEEPS = (0.3, 0.1, 0.05), (0.1,)
SUITES = ("quality", "speed")
QUICK_TRIALS, TRIALS = 4, 20


@dataclass(frozen=True)
class Wanted:
    """What the flags ask for."""

    quality: Quality | None
    keeps: tuple[float, ...]
    others: tuple[tuple[int, ...], ...]
    layers: tuple[int, ...]
    wait: int | None
    select: str | None
    contexts: tuple[int, ...]
    speed_keeps: tuple[float, ...]
    threads: int
    budget_bytes: int
    methods: tuple[str, ...] = ()
    stores: tuple[str, ...] = STORES
    strategies: tuple[str, ...] = STRATEGIES


Model = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Default: the bundled model.", show_default=False),
]
Quick = Annotated[bool, typer.Option("--quick", help="Fewer lengths, budgets and trials.")]
Suites = Annotated[list[str] | None, typer.Option("--suite", metavar="NAME", help="quality or speed; repeatable.")]
Keeps = Annotated[list[float] | None, typer.Option("--keep", metavar="F", help="A budget; repeatable.")]
Lengths = Annotated[
    list[int] | None, typer.Option("--length", metavar="N", min=128, help="Tokens of a prompt; repeatable.")
]
Tasks = Annotated[
    list[str] | None, typer.Option("--task", metavar="NAME", help="needle, recall, two-stage, sum-key; repeatable.")
]
Trials = Annotated[int | None, typer.Option("--trials", metavar="N", min=1, help="Questions per depth.")]
Layers = Annotated[str, typer.Option("--layers", metavar="I,J,..|auto", help="Filter layers.")]
Wait = Annotated[int | None, typer.Option("--wait", metavar="N", min=0, help="Layers behind each that see everything.")]
Others = Annotated[
    list[str] | None, typer.Option("--other", metavar="I,J,..", help="More filter layers to compare; repeatable.")
]
Select = Annotated[
    str | None,
    typer.Option("--select", metavar="NAME", help="last, softmax, uniform or exp. [default: as --layers auto]"),
]
Methods = Annotated[list[str] | None, typer.Option("--method", metavar="NAME", help="Only this method; repeatable.")]
Data = Annotated[
    list[Path] | None,
    typer.Option("--data", metavar="FILE", help="JSON lines of LongBench or InfiniteBench; repeatable."),
]
Examples = Annotated[int, typer.Option("--examples", metavar="N", min=0, help="Most lines of a file; 0: all.")]
Contexts = Annotated[
    list[int] | None, typer.Option("--context", metavar="N", min=64, help="Context for the speed; repeatable.")
]
Stores = Annotated[
    list[str] | None, typer.Option("--store", metavar="NAME", help="ram or disk for the speed; repeatable.")
]
Strategies = Annotated[
    list[str] | None,
    typer.Option("--strategy", metavar="NAME", help="How a disk store fetches, for the speed; repeatable."),
]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", metavar="N", min=1, max=MOST_THREADS, help="Computing threads.")
]
Seed = Annotated[int, typer.Option("--seed", help="Same seed, same questions.")]
Output = Annotated[Path, typer.Option("--output", metavar="FOLDER", help="For rows, report and plots.")]
Add = Annotated[bool, typer.Option("--add", help="Keep the rows that are in the folder.")]
Json = Annotated[bool, typer.Option("--json", help="Print every row as a JSON object.")]


def bench_kv(  # noqa: PLR0913, PLR0917 - one parameter per flag
    model: Model = None,
    quick: Quick = False,
    suite: Suites = None,
    keep: Keeps = None,
    length: Lengths = None,
    task: Tasks = None,
    trials: Trials = None,
    layers: Layers = "auto",
    wait: Wait = None,
    other: Others = None,
    select: Select = None,
    method: Methods = None,
    data: Data = None,
    examples: Examples = 0,
    context: Contexts = None,
    store: Stores = None,
    strategy: Strategies = None,
    threads: Threads = None,
    seed: Seed = 0,
    output: Output = OUTPUT,
    add: Add = False,
    as_json: Json = False,
) -> None:
    """Measure filtered keys and values beside full attention and baselines: answers, divergence, speed, memory."""
    from h2o_cli.bench.kv.quality import Quality, examples_of
    from h2o_cli.bench.kv.rows import read_rows

    _check(suite, task, method, store, keep, select, strategy)
    quality = Quality(
        tasks=tuple(task or (() if data else QUICK_TASKS if quick else TASKS)),
        lengths=(lengths := tuple(length or (QUICK_LENGTHS if quick else LENGTHS))),
        trials=trials or (QUICK_TRIALS if quick else TRIALS),
        texts=0 if data and not task else 3 if quick else 6,
        examples=examples_of(data or [], examples),
        example_tokens=max(lengths) if data else 0,
        seed=seed,
    )
    suites = suite or (["quality"] if data or model else list(SUITES))
    wanted = Wanted(
        quality=quality if "quality" in suites else None,
        keeps=tuple(keep or (QUICK_KEEPS if quick else KEEPS)),
        others=tuple(parse_layers(text) for text in other or ()),
        layers=parse_layers(layers),
        wait=wait,
        select=select,
        contexts=tuple(context or (QUICK_CONTEXTS if quick else CONTEXTS)) if "speed" in suites else (),
        speed_keeps=tuple(k for k in keep or (QUICK_SPEED_KEEPS if quick else SPEED_KEEPS) if k < 1),
        threads=threads or default_threads(),
        budget_bytes=default_budget(),
        methods=tuple(method or ()),
        stores=tuple(store or STORES),
        strategies=tuple(strategy or (STRATEGIES[:1] if quick else STRATEGIES)),
    )
    rows_file = _open(output, add=add)
    rows = read_rows(rows_file)
    for row in _measure(Path(model).expanduser() if model else BUNDLED_MODEL, wanted):
        rows.append(row)
        _keep(row, rows_file, as_json=as_json)
    _write(rows, output, quiet=as_json)


def _check(
    suite: Suites, task: Tasks, method: Methods, store: Stores, keep: Keeps, select: Select, strategy: Strategies
) -> None:
    """Raise UsageError for names and shares that do not exist."""
    from h2o_cli.bench.kv.methods import NAMES
    from profiler.kv_eval.needles import TASKS as KNOWN_TASKS
    from runtime.kv.options import KvFilter

    for names, known in ((suite, SUITES), (task, KNOWN_TASKS), (method, NAMES), (store, STORES)):
        for name in names or ():
            if name not in known:
                raise UsageError(f"{name!r} is not known", f"choose one of {', '.join(known)}")
    for share in keep or ():
        KvFilter(keep=float(share))
    KvFilter(select=select or DEFAULT_SELECT)
    for name in strategy or ():
        KvFilter(strategy=parse_strategy(name)[0])


def _measure(path: Path, wanted: Wanted) -> Iterator[KvRow]:
    passed = _passed(path)
    if wanted.quality:
        yield from _quality_rows(path, wanted, wanted.quality, passed)
    if wanted.contexts:
        yield from _speed_rows(wanted, passed)


def _quality_rows(path: Path, wanted: Wanted, quality: Quality, passed: dict[str, object]) -> Iterator[KvRow]:
    from h2o_cli.bench.kv.quality import QualityRun
    from profiler.kv_eval.model import EvalModel

    model = EvalModel(path, n_threads=wanted.threads, budget_bytes=wanted.budget_bytes)
    try:
        run = QualityRun(model, _methods(model, wanted), quality, passed)
        run.check()
        with Progress(f"asking {path.name}", lambda: run.share, ahead=True), interrupts.ending(model.cancel):
            yield from run.rows()
    finally:
        model.close()


def _methods(model: EvalModel, wanted: Wanted) -> list[Method]:
    """Full attention, the filter, baselines, other filter layers, for the layers that are asked for or were found."""
    from h2o_cli.bench.kv.methods import Roles, compared_methods
    from runtime.kv.options import KvFilter

    choice = find_choice(model.file.hash)
    layers, wait, select = wanted.layers, wanted.wait, wanted.select or DEFAULT_SELECT
    if choice:
        select = wanted.select or choice.select
    if choice and not layers:
        layers, wait = choice.layers, choice.wait if wait is None else wait
    elif not layers:
        note("no filter layers were found for this model yet: `h2o kv analyze` does that; the default ones are used")
    wait = (DEFAULT_WAIT if layers else GUESSED_WAIT) if wait is None else wait
    with model.engine(KvFilter(layers=layers, wait=wait), 256) as engine:
        assert engine.kv
        numbers, roles = engine.kv.cache.filterable, engine.kv.roles
        n_dense = sum(layer not in roles.sparse for layer in numbers)
        found = Roles(roles.filters, wait, select, len(numbers), n_dense)
    methods = compared_methods(found, wanted.keeps, wanted.others)
    return [method for method in methods if not wanted.methods or method.name in wanted.methods]


def _speed_rows(wanted: Wanted, passed: dict[str, object]) -> Iterator[KvRow]:
    import platformdirs

    from h2o_cli.bench.kv.speed import FILE_TYPE, SHAPE, SpeedRun
    from h2o_cli.bench.models.make_model import make_model

    folder = Path(platformdirs.user_cache_path("h2o")) / "models"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"kv-8-layers-16-heads-{FILE_TYPE}.gguf"
    if not path.exists():
        note(f"writing {path.name}")
        make_model(SHAPE, path, file_type=FILE_TYPE)
    stores = Path(store_folder())
    stores.mkdir(parents=True, exist_ok=True)
    run = SpeedRun(
        path,
        wanted.contexts,
        wanted.speed_keeps,
        wanted.stores,
        wanted.threads,
        str(stores),
        strategies=wanted.strategies,
        select=wanted.select or DEFAULT_SELECT,
    )
    run = replace(run, methods=wanted.methods or run.methods)
    done = [0]
    n = len(wanted.contexts) * len(run.ways())
    with Progress("decoding", lambda: done[0] / n):
        for row in run.rows(passed):
            done[0] += 1
            yield row


def _passed(path: Path) -> dict[str, object]:
    """What every row says of the machine and the programs."""
    from profiler.device import device_info

    at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    machine = device_info(path) if path.exists() else None
    return {"versions": versions(), "machine": machine, "at": at}


def _open(output: Path, *, add: bool) -> Path:
    """The file for the rows. Raises UsageError."""
    rows_file = output / "rows.jsonl"
    try:
        output.mkdir(parents=True, exist_ok=True)
        with rows_file.open("ab" if add else "wb"):
            pass
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written: {error.strerror}", "choose another folder with --output"
        ) from None
    return rows_file


def _keep(row: KvRow, rows_file: Path, *, as_json: bool) -> None:
    import msgspec

    from h2o_cli.bench.kv.rows import append_row

    append_row(rows_file, row)
    if as_json:
        print_json(msgspec.to_builtins(row))


def _write(rows: list[KvRow], output: Path, *, quiet: bool) -> None:
    """Draw the pictures, where that can be done, and write the report around them."""
    from h2o_cli.bench.kv.plots import draw_rows
    from h2o_cli.bench.kv.report import report

    pictures: list[Path] = []
    try:
        pictures = draw_rows(rows, output)
    except UsageError as error:
        note(str(error))
    text = report(rows, [path.name for path in pictures])
    (output / "report.md").write_text(text)
    if not quiet:
        emit(re.sub(r"\n## Pictures.*", "", text, flags=re.DOTALL))
    note(f"rows, report and plots are in {output}")
