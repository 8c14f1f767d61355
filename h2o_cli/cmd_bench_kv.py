"""`h2o bench kv`: how good, how fast and how small answers are when keys and values are filtered."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h2o_cli.session.defaults import MOST_THREADS
from h2o_cli.session.models import BUNDLED_MODEL
from runtime.kv.options import STORES, STRATEGIES, parse_layers

EPILOG = """Examples:

\b
  h2o bench kv --quick                       under 5 minutes, the bundled model
  h2o bench kv model.gguf --length 4000 --task needle --trials 4
  h2o bench kv model.gguf --data hotpotqa.jsonl --data passkey.jsonl --length 8000
  h2o bench kv --suite speed --context 16384 --context 32768
"""
OUTPUT = Path("bench-results/kv")
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
Wait = Annotated[int | None, typer.Option("--wait", metavar="N", min=0, help="Layers after each that see everything.")]
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
    from h2o_cli.bench.kv import runs
    from h2o_cli.bench.kv.quality import Quality, examples_of
    from h2o_cli.bench.kv.report import KV
    from h2o_cli.bench.results import Results

    suites = suite or (["quality"] if data or model else list(runs.SUITES))
    lengths = tuple(length or (runs.QUICK_LENGTHS if quick else runs.LENGTHS))
    quality = Quality(
        tasks=tuple(task or (() if data else runs.QUICK_TASKS if quick else runs.TASKS)),
        lengths=lengths,
        trials=trials or (runs.QUICK_TRIALS if quick else runs.TRIALS),
        texts=0 if data and not task else runs.QUICK_TEXTS if quick else runs.TEXTS,
        examples=examples_of(data or [], examples),
        example_tokens=max(lengths) if data else 0,
        seed=seed,
    )
    wanted = runs.Wanted(
        quality=quality if "quality" in suites else None,
        keeps=tuple(keep or (runs.QUICK_KEEPS if quick else runs.KEEPS)),
        contexts=tuple(context or (runs.QUICK_CONTEXTS if quick else runs.CONTEXTS)) if "speed" in suites else (),
        speed_keeps=tuple(k for k in keep or (runs.QUICK_SPEED_KEEPS if quick else runs.SPEED_KEEPS) if k < 1),
        layers=parse_layers(layers),
        wait=wait,
        select=select,
        others=tuple(parse_layers(text) for text in other or ()),
        methods=tuple(method or ()),
        stores=tuple(store or STORES),
        strategies=tuple(strategy or (STRATEGIES[:1] if quick else STRATEGIES)),
        threads=threads,
    )
    runs.check(wanted, suites)
    results = Results(KV, output, as_json)
    results.begin(add=add)
    results.keep(runs.measure(Path(model).expanduser() if model else BUNDLED_MODEL, wanted))
    results.finish(results.read())
