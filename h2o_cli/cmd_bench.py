"""`h2o bench`: speed, memory and first token beside llama.cpp on an emulated device; models with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h2o_cli.cmd_bench_admission import bench_admission, quick_search
from h2o_cli.cmd_bench_batch import bench_batch
from h2o_cli.cmd_bench_distributed import bench_distributed
from h2o_cli.cmd_bench_kv import EPILOG as KV_EPILOG
from h2o_cli.cmd_bench_kv import bench_kv
from h2o_cli.cmd_bench_predict import bench_predict, predict
from h2o_cli.cmd_bench_speculation import bench_speculation
from h2o_cli.output import note

OUTPUT = Path("bench-results")

EPILOG = """Examples:

\b
  h2o bench --quick                         under 5 minutes
  h2o bench                                 under 25 minutes, once the models are made
  h2o bench --model qwen2.5-0.5b/q4_0 --budget 300 --budget 60% --disk 100
  h2o bench --model qwen2.5-0.5b --budget 734 --suite budgets --add    more rows for the same report
  h2o bench report                          the report again, from the rows
  h2o bench kv --quick                      filtered keys and values: right answers, speed, memory
  h2o bench batch --quick                   many texts at once, beside llama.cpp
  h2o bench admission --quick               how many blocks to keep free when lengths are not known
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

    Rows, a report and plots go to a folder; a summary goes to standard output. Where no model, budget, engine, suite,
    repeats or disk is given, the quick forms of `h2o bench admission` and `h2o bench predict` follow.
    """
    if context.invoked_subcommand:
        return
    from h2o_cli.bench.results import Results
    from h2o_cli.bench.speed.parts import check_devices, measure, wanted_parts
    from h2o_cli.bench.speed.report import SPEED

    parts = wanted_parts(
        quick=quick, models=model, budgets=budget, engines=engine, suites=suite, repeats=repeats, disk=disk
    )
    for part in parts:
        check_devices(part)
    results = Results(SPEED, output, json)
    results.begin(add=add)
    for part in parts:
        measure(part, results)
    results.finish(results.read())
    if not (model or budget or engine or suite or repeats) and disk is None:
        from h2o_cli.bench.predict.trained import Training

        traces = quick_search(output, add=add, json=json)
        predict(traces, Training(), output, json=json)


@app.command("report", epilog=EPILOG)
def report_again(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where a benchmark left its rows.")] = OUTPUT,
) -> None:
    """Write the report and plots of any benchmark again, from the rows in a folder; print the summary."""
    from h2o_cli.bench.admission.report import ADMISSION
    from h2o_cli.bench.batch.report import BATCH
    from h2o_cli.bench.distributed.hops import HOPS
    from h2o_cli.bench.kv.report import KV
    from h2o_cli.bench.predict.lengths import LENGTHS
    from h2o_cli.bench.predict.report import PREDICT
    from h2o_cli.bench.results import make_again
    from h2o_cli.bench.speed.report import SPEED
    from h2o_cli.bench.speed.speculation import SPECULATION

    make_again(folder, (SPEED, SPECULATION, KV, HOPS, BATCH, ADMISSION, PREDICT, LENGTHS))


@app.command("make-model", epilog=EPILOG)
def make_model(
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="A known name, or ARCH:key=value,...")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The GGUF file to write.")],
    file_type: Annotated[str, typer.Option("--type", help="f32, f16, q8_0, q4_0, q4_k_m, ...")] = "f16",
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")] = 0,
) -> None:
    """Write a model with random weights of a real shape."""
    from h2o_cli.bench.models.named import write
    from runtime.sizes import format_size

    write(shape, output, file_type, seed)
    note(f"wrote {output} ({format_size(output.stat().st_size)})")


app.command("kv", epilog=KV_EPILOG)(bench_kv)
app.command("speculation")(bench_speculation)
app.command("distributed")(bench_distributed)
app.command("batch")(bench_batch)
app.command("admission")(bench_admission)
app.command("predict")(bench_predict)
