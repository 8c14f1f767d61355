"""The parts of a speed benchmark: which models in which budgets on which disk, quick or in full, and doing them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from h2o_cli.bench.box import Device, check_rights
from h2o_cli.bench.models.named import bench_model
from h2o_cli.bench.results import Results, check_names
from h2o_cli.bench.rows import append_line
from h2o_cli.bench.speed.children import Children
from h2o_cli.bench.speed.report import TIMELINES
from h2o_cli.bench.speed.rows import SpeedRow
from h2o_cli.bench.speed.runs import Bench, Settings, check_budget
from h2o_cli.output import Progress, note
from h2o_cli.session.defaults import default_threads

MODELS = {
    "qwen2.5-0.5b/f16": ("floor", "40%", "419", "524", "60%", "734", "80%", "100%", "106%", "112%"),
    "qwen2.5-1.5b/q8_0": ("floor", "40%", "60%", "80%"),
}
"""What a full run measures: models, and the budgets of each."""
RESIDENT_MODELS = ("qwen2.5-0.5b/f16", "qwen2.5-0.5b/q8_0", "qwen2.5-0.5b/q4_0", "qwen2.5-0.5b/q4_k_m")
QUICK_BUDGETS = ("floor", "40%", "80%")
UNTHROTTLED_BUDGETS = ("40%", "80%", "100%", "106%", "112%")
UNTHROTTLED_REPEATS, UNTHROTTLED_TOKENS = 3, 12
UNTHROTTLED_ENGINES = ("h2o", "llama.cpp mmap")
DISK_MB_PER_S = 400.0


def wanted_parts(
    *,
    quick: bool = False,
    models: Sequence[str] | None = None,
    budgets: Sequence[str] | None = None,
    engines: Sequence[str] | None = None,
    suites: Sequence[str] | None = None,
    repeats: int | None = None,
    disk: float | None = None,
) -> list[Settings]:
    """What to run, in order; None is for what is usual. disk: MB/s, 0 as it is. Raises UsageError."""
    rate = DISK_MB_PER_S if disk is None else disk
    settings = _only(_settings(models, budgets, quick=quick), engines, suites)
    settings = replace(settings, read_bytes_per_s=int(rate * 10**6))
    parts = [settings] if quick or models or budgets else by_model(settings)
    if disk is None and not quick and "budgets" in settings.suites:
        parts.append(unthrottled(settings, settings.budgets if budgets else UNTHROTTLED_BUDGETS))
    if repeats:
        parts = [replace(part, repeats=repeats, llama_repeats=repeats) for part in parts]
    return parts


def _settings(models: Sequence[str] | None, budgets: Sequence[str] | None, *, quick: bool) -> Settings:
    names = models or list(MODELS)[: 1 if quick else None]
    resident = names if models or quick else RESIDENT_MODELS
    settings = Settings(
        models=tuple(bench_model(name) for name in names),
        resident_models=tuple(bench_model(name) for name in resident),
        threads=default_threads(),
    )
    if quick:
        settings = replace(settings, budgets=QUICK_BUDGETS, repeats=1, llama_repeats=1, profile_repeats=1)
    for text in budgets or ():
        check_budget(text)
    return replace(settings, budgets=tuple(budgets)) if budgets else settings


def _only(settings: Settings, engines: Sequence[str] | None, suites: Sequence[str] | None) -> Settings:
    """The settings with these engines and suites only. Raises UsageError for names that are none."""
    check_names("engine", engines, settings.engines)
    check_names("suite", suites, settings.suites)
    return replace(
        settings,
        engines=tuple(name for name in settings.engines if not engines or name in engines),
        suites=tuple(name for name in settings.suites if not suites or name in suites),
    )


def by_model(settings: Settings) -> list[Settings]:
    """A part for each model with its own budgets; what is resident goes with the first."""
    first, *others = [replace(settings, models=(m,), budgets=MODELS[m.name]) for m in settings.models]
    streaming = tuple(suite for suite in settings.suites if suite != "resident")
    return [first, *(replace(part, suites=streaming) for part in others if streaming)]


def unthrottled(settings: Settings, budgets: tuple[str, ...]) -> Settings:
    """The first model on the disk as it is: shorter and less even runs, so more of them."""
    return replace(
        settings,
        read_bytes_per_s=0,
        models=settings.models[:1],
        suites=("budgets",),
        budgets=budgets,
        engines=tuple(engine for engine in settings.engines if engine in UNTHROTTLED_ENGINES),
        n_predict=UNTHROTTLED_TOKENS,
        repeats=UNTHROTTLED_REPEATS,
        llama_repeats=UNTHROTTLED_REPEATS,
    )


def check_devices(part: Settings) -> None:
    """Raise H2OError where this process cannot emulate the device, before anything is measured."""
    for folder in {model.path.parent for model in (*part.models, *part.resident_models)}:
        folder.mkdir(parents=True, exist_ok=True)
        check_rights(Device(0, part.read_bytes_per_s, folder))


def measure(part: Settings, results: Results[SpeedRow]) -> None:
    """Make the models of a part, and measure; rows and timelines go to the results. Raises H2OError."""
    for model in dict.fromkeys((*part.models, *part.resident_models)):
        model.prepare()
    with tempfile.TemporaryDirectory(prefix="h2o-bench-") as work:
        measuring = Bench(part, Children(Path(work)))
        with Progress("the benchmark", lambda: measuring.share, ahead=True):
            results.keep(measuring.run())
    for timeline in measuring.timelines:
        append_line(results.folder / TIMELINES, timeline)
    for line in measuring.notes:
        note(line)
