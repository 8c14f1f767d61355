"""What `h2o bench kv` measures, quick or in full: the questions, the methods, the contexts; and doing it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from h2o_cli.bench.kv.methods import NAMES, Method, Roles, compared_methods
from h2o_cli.bench.kv.quality import Quality, QualityRun
from h2o_cli.bench.kv.rows import KvRow
from h2o_cli.bench.kv.speed import FILE_TYPE, SHAPE, SpeedRun
from h2o_cli.bench.models.named import BenchModel, models_folder
from h2o_cli.bench.results import check_names
from h2o_cli.interrupts import interrupts
from h2o_cli.output import Progress, note
from h2o_cli.session.defaults import default_threads
from h2o_cli.session.kv_filter import store_folder
from h2o_cli.session.kv_layers import find_choice
from profiler.kv_eval.model import EvalModel
from profiler.kv_eval.needles import TASKS as KNOWN_TASKS
from runtime.kv.options import (
    DEFAULT_SELECT,
    DEFAULT_WAIT,
    GUESSED_WAIT,
    STORES,
    STRATEGIES,
    KvFilter,
    parse_strategy,
)
from runtime.plans.budget import default_bytes

KEEPS, QUICK_KEEPS = (0.3, 0.2, 0.1, 0.05), (1.0, 0.1)
LENGTHS, QUICK_LENGTHS = (256, 512, 1024), (512,)
TASKS, QUICK_TASKS = ("needle", "recall", "two-stage"), ("needle", "recall")
CONTEXTS, QUICK_CONTEXTS = (1024, 2048, 4096, 8192, 16384), (1024,)
SPEED_KEEPS, QUICK_SPEED_KEEPS = (0.3, 0.1, 0.05), (0.1,)
SUITES = ("quality", "speed")
QUICK_TRIALS, TRIALS = 4, 20
QUICK_TEXTS, TEXTS = 3, 6


@dataclass(frozen=True)
class Wanted:
    """What is asked for. quality None, contexts (): not that. Layers, wait, select not given: those that were found."""

    quality: Quality | None
    keeps: tuple[float, ...]
    contexts: tuple[int, ...]
    speed_keeps: tuple[float, ...]
    layers: tuple[int, ...] = ()
    wait: int | None = None
    select: str | None = None
    others: tuple[tuple[int, ...], ...] = ()
    methods: tuple[str, ...] = ()
    stores: tuple[str, ...] = STORES
    strategies: tuple[str, ...] = STRATEGIES
    threads: int | None = None


def check(wanted: Wanted, suites: Sequence[str] | None) -> None:
    """Raise UsageError for names and shares that do not exist."""
    check_names("suite", suites, SUITES)
    check_names("task", wanted.quality.tasks if wanted.quality else None, KNOWN_TASKS)
    check_names("method", wanted.methods, NAMES)
    check_names("store", wanted.stores, STORES)
    for share in (*wanted.keeps, *wanted.speed_keeps):
        KvFilter(keep=float(share))
    KvFilter(select=wanted.select or DEFAULT_SELECT)
    for name in wanted.strategies:
        KvFilter(strategy=parse_strategy(name)[0])


def measure(path: Path, wanted: Wanted) -> Iterator[KvRow]:
    """Rows as they are measured: answers of the model, speed of a generated one. Raises H2OError."""
    if wanted.quality:
        yield from _quality_rows(path, wanted, wanted.quality)
    if wanted.contexts:
        yield from _speed_rows(wanted)


def _quality_rows(path: Path, wanted: Wanted, quality: Quality) -> Iterator[KvRow]:
    model = EvalModel(path, n_threads=wanted.threads or default_threads(), budget_bytes=default_bytes())
    try:
        run = QualityRun(model, _methods(model, wanted), quality)
        run.check()
        with Progress(f"asking {path.name}", lambda: run.share, ahead=True), interrupts.ending(model.cancel):
            yield from run.rows()
    finally:
        model.close()


def _methods(model: EvalModel, wanted: Wanted) -> list[Method]:
    """Full attention, the filter, baselines, other filter layers, for the layers that are asked for or were found."""
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


def _speed_rows(wanted: Wanted) -> Iterator[KvRow]:
    path = models_folder() / f"kv-8-layers-16-heads-{FILE_TYPE}.gguf"
    BenchModel(path.stem, path, SHAPE, FILE_TYPE).prepare()
    stores = Path(store_folder())
    stores.mkdir(parents=True, exist_ok=True)
    run = SpeedRun(
        path,
        wanted.contexts,
        wanted.speed_keeps,
        wanted.stores,
        wanted.threads or default_threads(),
        str(stores),
        strategies=wanted.strategies,
        select=wanted.select or DEFAULT_SELECT,
    )
    run = replace(run, methods=wanted.methods or run.methods)
    done = [0]
    n = len(wanted.contexts) * len(run.ways())
    with Progress("decoding", lambda: done[0] / n):
        for row in run.rows():
            done[0] += 1
            yield row
