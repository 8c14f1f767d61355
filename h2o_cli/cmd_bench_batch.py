"""`h2o bench batch`: tokens per second against the batch size, beside llama.cpp with the same streams."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from h2o_cli.session.models import BUNDLED_MODEL
from runtime.errors import UsageError
from runtime.sizes import MB

if TYPE_CHECKING:
    from h2o_cli.bench.batch.runs import Settings

MODEL = "qwen2.5-0.5b/f16"
BUDGETS = ("419", "60%", "112%")
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
CUT, DISK_MB_PER_S = 6, 400.0
QUICK_BUDGETS, QUICK_SIZES, QUICK_DISK = ("floor", "200"), (1, 4, 16), 16.0
GEN_LEN = 64


def bench_batch(  # noqa: PLR0913, PLR0917 - one parameter per flag
    quick: Annotated[bool, typer.Option("--quick", help="The bundled model, under 2 minutes.")] = False,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help=f"SHAPE, SHAPE/TYPE or FILE.gguf. [default: {MODEL}]")
    ] = None,
    budget: Annotated[
        list[str] | None,
        typer.Option("--budget", metavar="SIZE", help="floor, 60% (of the file) or a size; repeatable."),
    ] = None,
    batch_size: Annotated[
        list[int] | None, typer.Option("--batch-size", metavar="N", min=1, max=32, help="Texts at once; repeatable.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", metavar="NAME", help="h2o or 'llama.cpp mmap'; repeatable.")
    ] = None,
    prompt_len: Annotated[int, typer.Option("--prompt-len", metavar="N", min=1, help="Tokens of each prompt.")] = 32,
    gen_len: Annotated[int, typer.Option("--gen-len", metavar="N", min=2, help="Tokens of each answer.")] = GEN_LEN,
    cut_gen_len: Annotated[
        int | None,
        typer.Option(
            "--cut-gen-len", metavar="N", min=0, help="Make only so many of them, and project; 0: all. [default: 6]"
        ),
    ] = None,
    disk: Annotated[
        float | None,
        typer.Option("--disk", metavar="MB/s", min=0, help="Disk speed; 0: as it is. [default: 400, quick: 16]"),
    ] = None,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="For rows, report and plots.")] = Path(
        "bench-results"
    ),
    add: Annotated[bool, typer.Option("--add", help="Keep the rows that are in the folder.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print every row as a JSON object instead of a table.")] = False,
) -> None:
    """Measure batches beside llama.cpp with the same streams, on an emulated device. Needs root.

    Speed and latency against the number of texts that are answered at once, in several budgets.
    """
    given = locals()
    from h2o_cli.bench.batch.report import BATCH
    from h2o_cli.bench.batch.runs import BatchBench
    from h2o_cli.bench.box import Device, check_rights
    from h2o_cli.bench.results import Results
    from h2o_cli.output import Progress

    settings = _settings(given)
    settings.model.path.parent.mkdir(parents=True, exist_ok=True)
    check_rights(Device(0, settings.read_bytes_per_s, settings.model.path.parent))
    results = Results(BATCH, output, json)
    results.begin(add=add)
    settings.model.prepare()
    with tempfile.TemporaryDirectory(prefix="h2o-bench-") as work:
        measuring = BatchBench(settings, Path(work))
        with Progress("the benchmark", lambda: measuring.share, ahead=True):
            results.keep(measuring.run())
    results.finish(results.read())


def _settings(given: Mapping[str, Any]) -> Settings:
    """What to measure, by the flags as given. Raises UsageError."""
    from h2o_cli.bench.batch.runs import ENGINES, Settings
    from h2o_cli.bench.models.named import bench_model
    from h2o_cli.bench.results import check_names
    from h2o_cli.bench.speed.runs import check_budget
    from h2o_cli.session.defaults import default_threads

    quick, engine, cut, disk = given["quick"], given["engine"], given["cut_gen_len"], given["disk"]
    check_names("engine", engine, ENGINES)
    for text in given["budget"] or ():
        check_budget(text)
    if cut is None:
        cut = 0 if quick else CUT
    if cut == 1:
        raise UsageError("--cut-gen-len 1 is not possible", "give 0, or 2 or more")
    rate = (QUICK_DISK if quick else DISK_MB_PER_S) if disk is None else disk
    return Settings(
        bench_model(given["model"] or (str(BUNDLED_MODEL) if quick else MODEL)),
        tuple(given["budget"] or (QUICK_BUDGETS if quick else BUDGETS)),
        tuple(given["batch_size"] or (QUICK_SIZES if quick else BATCH_SIZES)),
        tuple(name for name in ENGINES if not engine or name in engine),
        given["prompt_len"],
        given["gen_len"],
        cut if cut < given["gen_len"] else 0,
        int(rate * MB),
        default_threads(),
    )
