"""`h2o bench distributed`: what a stage at a worker costs, beside an echo over plain TCP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h2o_cli.session.models import BUNDLED_MODEL

PAIRS = 500


def bench_distributed(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", show_default=False, help="A GGUF file. [default: the bundled model]")
    ] = BUNDLED_MODEL,
    pairs: Annotated[int, typer.Option("--pairs", metavar="N", min=2, help="Steps and echoes of each size.")] = PAIRS,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="For rows and report.")] = Path(
        "bench-results"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print every row as a JSON object instead of a table.")] = False,
) -> None:
    """Measure what a stage at a worker on this machine costs besides computing, without and with TLS. 20 seconds."""
    from h2o_cli.bench.distributed.hops import HOPS, measure
    from h2o_cli.bench.results import Results

    results = Results(HOPS, output, json)
    results.begin()
    results.keep(measure(model, pairs))
    results.finish(results.read())
