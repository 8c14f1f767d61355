"""`h2o bench speculation`: tokens per pass and speed of the drafters on the bundled model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from h2o_cli.output import emit, note, print_json, table
from h2o_cli.session.defaults import default_threads
from h2o_cli.session.models import BUNDLED_MODEL
from runtime.errors import UsageError

if TYPE_CHECKING:
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
    import msgspec

    from h2o_cli.bench.speed.speculation import report, table_rows

    rows: list[SpeculationRow] = []
    try:
        output.mkdir(parents=True, exist_ok=True)
        with (output / "speculation.jsonl").open("wb") as file:
            for row in _rows(disk, repeats):
                rows.append(row)
                file.write(msgspec.json.encode(row) + b"\n")
                file.flush()
                note(_told(row))
                if json:
                    print_json(msgspec.to_builtins(row))
        (output / "speculation.md").write_text(report(rows, BUNDLED_MODEL.name))
    except OSError as error:
        raise UsageError(
            f"{output} cannot be written: {error.strerror}", "choose another folder with --output"
        ) from None
    if not json:
        emit(table(table_rows(rows), right=(2, 3, 4, 5, 6, 7)) + "\n")
    note(f"rows and report are in {output}")


def _rows(disk: float, repeats: int) -> Iterator[SpeculationRow]:
    """Measure, in a device of this disk speed and without a memory limit of its own: -m is the budget."""
    import tempfile

    from h2o_cli.bench.box import Device, check_rights
    from h2o_cli.bench.speed.children import Children
    from h2o_cli.bench.speed.speculation import measure

    device = Device(0, int(disk * 10**6), BUNDLED_MODEL.parent)
    check_rights(device)

    def rows() -> Iterator[SpeculationRow]:
        with tempfile.TemporaryDirectory(prefix="h2o-bench-") as work:
            yield from measure(Children(Path(work)), BUNDLED_MODEL, device, default_threads(), repeats)

    return rows()


def _told(row: SpeculationRow) -> str:
    """A finished run in one line."""
    what = f"{row.kind} {row.prompt + 1}, {row.mode}"
    if row.status != "ok":
        return f"{what}: {row.status} ({row.note})"
    return f"{what}: {row.tokens_per_pass or 1:.2f} tokens per pass, {row.ms_per_token or 0:.0f} ms per token"
