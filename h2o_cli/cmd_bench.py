"""`h2o bench`: speed, memory and first token beside llama.cpp on an emulated device; models with random weights."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from h2o_cli.cmd_bench_kv import EPILOG as KV_EPILOG
from h2o_cli.cmd_bench_kv import bench_kv
from h2o_cli.cmd_bench_speculation import bench_speculation
from h2o_cli.output import Progress, duration, emit, note, print_json, table, versions
from h2o_cli.session.defaults import default_threads
from runtime.errors import UsageError

if TYPE_CHECKING:
    from h2o_cli.bench.speed.rows import Row, Suite
    from h2o_cli.bench.speed.runs import Settings

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
OUTPUT = Path("bench-results")
ROWS, TIMELINES = "rows.jsonl", "timelines.jsonl"
DISK_MB_PER_S = 400.0

EPILOG = """Examples:

\b
  h2o bench --quick                         under 5 minutes
  h2o bench                                 under 25 minutes, once the models are made
  h2o bench --model qwen2.5-0.5b/q4_0 --budget 300 --budget 60% --disk 100
  h2o bench --model qwen2.5-0.5b --budget 734 --suite budgets --add    more rows for the same report
  h2o bench report                          the report again, from the rows
  h2o bench kv --quick                      filtered keys and values: right answers, speed, memory
  h2o bench make-model qwen2.5-0.5b -o model.gguf
  h2o bench make-model llama-7b -o model.gguf --type q4_0
  h2o bench make-model llama:layers=4,dim=256,ffn=512,heads=4,vocab=512 -o tiny.gguf
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.callback(epilog=EPILOG, invoke_without_command=True)
def bench(  # noqa: PLR0913, PLR0917 - one parameter per flag
    context: typer.Context,
    quick: Annotated[bool, typer.Option("--quick", help="One small model, few budgets, one repeat.")] = False,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", metavar="NAME", help="SHAPE, SHAPE/TYPE or FILE.gguf; repeatable."),
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", metavar="SIZE", help="floor, 60% (of the file) or a size; repeatable."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option("--engine", metavar="NAME", help="h2o, 'llama.cpp mmap' or 'llama.cpp direct-io'; repeatable."),
    ] = None,
    suite: Annotated[
        list[str] | None,
        typer.Option("--suite", metavar="NAME", help="budgets, 'first token' or resident; repeatable."),
    ] = None,
    repeats: Annotated[int | None, typer.Option("--repeats", metavar="N", min=1, help="Runs in every budget.")] = None,
    disk: Annotated[
        float | None,
        typer.Option(
            "--disk", metavar="MB/s", min=0, help="Disk speed; 0: as it is. [default: 400, and in a full run also 0]"
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="For rows, report and plots.")] = OUTPUT,
    add: Annotated[bool, typer.Option("--add", help="Keep the rows that are in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every row as a JSON object instead of a table.")] = False,
) -> None:
    """Measure h2o beside llama.cpp on an emulated device: limited memory, a slow disk. Needs root.

    Rows, a report and plots go to a folder; a summary goes to standard output.
    """
    if context.invoked_subcommand:
        return
    settings = _settings(model, budget, quick=quick)
    settings = _only(replace(settings, bench=_this_command()), engine, suite)
    rate = DISK_MB_PER_S if disk is None else disk
    settings = replace(settings, read_bytes_per_s=int(rate * 10**6))
    parts = [settings] if quick or model or budget else _by_model(settings)
    if disk is None and not quick and "budgets" in settings.suites:
        parts.append(_unthrottled(settings, settings.budgets if budget else UNTHROTTLED_BUDGETS))
    if repeats:
        parts = [replace(part, repeats=repeats, llama_repeats=repeats) for part in parts]
    for part in parts:
        _check_devices(part)
    rows_file = _open_output(output, add=add)
    for part in parts:
        _run(part, rows_file, json=json)
    rows = _draw(output)
    if not json:
        emit(_summary(rows) + "\n")
    note(f"rows, report and plots are in {output}")


@app.command("report", epilog=EPILOG)
def report_again(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where a benchmark left its rows.")] = OUTPUT,
) -> None:
    """Write report and plots again, from the rows in a folder; print the summary."""
    emit(_summary(_draw(folder)) + "\n")


def _by_model(settings: Settings) -> list[Settings]:
    """A part for each model with its own budgets; what is resident goes with the first."""
    first, *others = [replace(settings, models=(m,), budgets=MODELS[m.name]) for m in settings.models]
    return [first, *(replace(part, suites=_streaming(part)) for part in others if _streaming(part))]


def _streaming(settings: Settings) -> tuple[Suite, ...]:
    return tuple(suite for suite in settings.suites if suite != "resident")


def _unthrottled(settings: Settings, budgets: tuple[str, ...]) -> Settings:
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


def _this_command() -> str:
    from h2o_cli.bench.speed.children import shown_command

    return shown_command([sys.executable, "-m", "h2o_cli.main", *sys.argv[1:]])


def _settings(models: list[str] | None, budgets: list[str] | None, *, quick: bool) -> Settings:
    """What the flags ask for. Raises UsageError."""
    import platformdirs

    from h2o_cli.bench.speed.runs import Settings, bench_model, check_budget

    folder = Path(platformdirs.user_cache_path("h2o")) / "models"
    names = models or list(MODELS)[: 1 if quick else None]
    resident = names if models or quick else RESIDENT_MODELS
    settings = Settings(
        models=tuple(bench_model(name, folder) for name in names),
        resident_models=tuple(bench_model(name, folder) for name in resident),
        threads=default_threads(),
        flags=_plain_flags(),
        versions=versions(),
    )
    if quick:
        settings = replace(settings, budgets=QUICK_BUDGETS, repeats=1, llama_repeats=1, profile_repeats=1)
    for text in budgets or ():
        check_budget(text)
    return replace(settings, budgets=tuple(budgets)) if budgets else settings


def _only(settings: Settings, engines: list[str] | None, suites: list[str] | None) -> Settings:
    """The settings with these engines and suites only. Raises UsageError for names that are none."""
    for names, known in ((engines, settings.engines), (suites, settings.suites)):
        for name in names or ():
            if name not in known:
                raise UsageError(f"{name!r} is not known", f"choose one of {', '.join(known)}")
    return replace(
        settings,
        engines=tuple(name for name in settings.engines if not engines or name in engines),
        suites=tuple(name for name in settings.suites if not suites or name in suites),
    )


def _plain_flags() -> tuple[str, ...]:
    """Flags that make `h2o run` compute one token per pass."""
    import inspect

    from h2o_cli.cmd_run import run

    return ("--speculate", "off") if "speculate" in inspect.signature(run).parameters else ()


def _run(settings: Settings, rows_file: Path, *, json: bool) -> None:
    """Make the models, and measure; rows and timelines go to files."""
    import tempfile

    import msgspec

    from h2o_cli.bench.speed.children import Children
    from h2o_cli.bench.speed.rows import append_line
    from h2o_cli.bench.speed.runs import Bench

    _make_models(settings)
    with tempfile.TemporaryDirectory(prefix="h2o-bench-") as work:
        measuring = Bench(settings, Children(Path(work)))
        with Progress("the benchmark", lambda: measuring.share, ahead=True):
            for row in measuring.run():
                append_line(rows_file, row)
                note(_told(row))
                if json:
                    print_json(msgspec.to_builtins(row))
    for timeline in measuring.timelines:
        append_line(rows_file.with_name(TIMELINES), timeline)
    for line in measuring.notes:
        note(line)


def _check_devices(settings: Settings) -> None:
    """Raise H2OError where this process cannot emulate the device, before anything is written."""
    from h2o_cli.bench.box import Device, check_rights

    for folder in {model.path.parent for model in (*settings.models, *settings.resident_models)}:
        folder.mkdir(parents=True, exist_ok=True)
        check_rights(Device(0, settings.read_bytes_per_s, folder))


def _make_models(settings: Settings) -> None:
    """Write the generated models that are not there yet."""
    from h2o_cli.bench.speed.runs import prepare

    written = [0, 1]

    def count(done: int, total: int) -> None:
        written[:] = done, total

    for model in dict.fromkeys((*settings.models, *settings.resident_models)):
        with Progress(f"writing {model.path.name}", lambda: written[0] / max(1, written[1])):
            prepare(model, count)


def _open_output(output: Path, *, add: bool) -> Path:
    """The file for the rows; without `add`, nothing of an earlier benchmark is left. Raises UsageError."""
    rows, timelines = output / ROWS, output / TIMELINES
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not add:
            timelines.unlink(missing_ok=True)
            rows.unlink(missing_ok=True)
        rows.open("ab").close()
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written: {error.strerror}", "choose another folder with --output"
        ) from None
    return rows


def _draw(output: Path) -> list[Row]:
    """Draw the pictures, where that can be done, and write the report around them; the rows."""
    from h2o_cli.bench.speed.plots import draw
    from h2o_cli.bench.speed.report import report
    from h2o_cli.bench.speed.rows import read_rows, read_timelines

    rows, timelines = read_rows(output / ROWS), read_timelines(output / TIMELINES)
    pictures: list[Path] = []
    try:
        pictures = draw(rows, timelines, output)
    except UsageError as error:
        note(str(error))
    (output / "report.md").write_text(report(rows, [path.name for path in pictures]))
    return rows


def _told(row: Row) -> str:
    """A finished run in one line."""
    what = f"{row.model}, {row.budget}, {row.engine}"
    if row.status != "ok":
        return f"{what}: {row.status} ({row.note})"
    parts = [f"{row.ms_per_token:.0f} ms per token"] if row.ms_per_token else []
    parts += [f"first token after {row.ttft_s:.1f} s"] if row.ttft_s is not None else []
    parts += [f"{row.yield_:.1%} of the limit"] if row.yield_ else []
    if row.in_turns:
        decode, prefill = row.in_turns.decode.ratio, row.in_turns.prefill.ratio
        parts.append(f"{decode:.3f} x llama.cpp, prompt {prefill:.3f} x")
    return f"{what}: {', '.join(parts)} ({duration(row.wall_s)})"


def _summary(rows: list[Row]) -> str:
    """The medians, one line per model, budget and engine."""
    from h2o_cli.bench.speed.report import summary_rows

    return table(summary_rows(rows), right=(3, 4, 5, 6, 7))


@app.command("make-model", epilog=EPILOG)
def make_model(
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="A known name, or ARCH:key=value,...")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The GGUF file to write.")],
    file_type: Annotated[str, typer.Option("--type", help="f32, f16, q8_0, q4_0, q4_k_m, ...")] = "f16",
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")] = 0,
) -> None:
    """Write a model with random weights of a real shape."""
    from h2o_cli.bench.models.make_model import make_model as write_model
    from runtime.sizes import format_size

    written = [0, 1]

    def count(done: int, total: int) -> None:
        written[:] = done, total

    with Progress(f"writing {output}", lambda: written[0] / max(1, written[1])):
        write_model(shape, output, file_type=file_type, seed=seed, progress=count)
    note(f"wrote {output} ({format_size(output.stat().st_size)})")


app.command("kv", epilog=KV_EPILOG)(bench_kv)
app.command("speculation")(bench_speculation)
