"""`h2o bench speculation`: tokens per pass and speed of the drafters on the bundled model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from h2o_cli.session.defaults import default_threads
from h2o_cli.session.models import BUNDLED_MODEL

if TYPE_CHECKING:
    from h2o_cli.bench.box import Device
    from h2o_cli.bench.speed.speculation import SpeculationRow

DISK_MB_PER_S = 16.0
REPEATS = 3


def bench_speculation(
    disk: Annotated[float, typer.Option("--disk", metavar="MB/s", min=1, help="Disk speed.")] = DISK_MB_PER_S,
    repeats: Annotated[
        int, typer.Option("--repeats", metavar="N", min=1, help="Runs of plain text without drafts and with look-up.")
    ] = REPEATS,
    output: Annotated[Path, typer.Option("--output", metavar="FOLDER", help="For rows and report.")] = Path(
        "bench-results"
    ),
    json: Annotated[bool, typer.Option("--json", help="Print every row as a JSON object instead of a table.")] = False,
) -> None:
    """Measure look-up and --draft auto on the bundled model, streamed from a slow disk. Needs root; 4 minutes.

    Recall, quotes and plain text, each also with one token per pass, in turns.
    """
    from h2o_cli.bench.box import Device, check_rights
    from h2o_cli.bench.results import Results
    from h2o_cli.bench.speed.speculation import SPECULATION

    device = Device(0, int(disk * 10**6), BUNDLED_MODEL.parent)
    check_rights(device)
    results = Results(SPECULATION, output, json)
    results.begin()
    results.keep(_rows(device, repeats))
    results.finish(results.read())


def _rows(device: Device, repeats: int) -> Iterator[SpeculationRow]:
    """Measure in a device without a memory limit of its own: -m is the budget."""
    from h2o_cli.bench.speed.children import Children
    from h2o_cli.bench.speed.speculation import measure

    with tempfile.TemporaryDirectory(prefix="h2o-bench-") as work:
        yield from measure(Children(Path(work)), BUNDLED_MODEL, device, default_threads(), repeats)
