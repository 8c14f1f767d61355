"""`h2o profile`: measure a model on this machine, or take over a profile of the source system."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated

import msgspec
import typer

from h2o_cli.interrupts import interrupts
from h2o_cli.output import Progress, emit, note, table
from h2o_cli.run_memory import measure_run_memory
from h2o_cli.session.defaults import MOST_THREADS, default_threads
from h2o_cli.session.models import DEFAULT_MODEL, profiles_folder, remember_model, resolve_model
from h2o_cli.session.smallest import PROMPT, agreed
from planner.source.profile import (
    export_source,
    load_foreign,
    save_source,
)
from profiler.measure import Measurement
from profiler.model_profile import (
    HeadProfile,
    LayerProfile,
    ModelProfile,
    Spread,
    save_profile,
)
from runtime.errors import Cancelled, UsageError
from runtime.plans.budget import Budget
from runtime.sizes import MB, format_size

EPILOG = """Examples:

\b
  h2o profile model.gguf                  measure, keep the profile where the other commands find it
  h2o profile model.gguf -m 400           the same inside 400 MB
  h2o profile model.gguf -o p.json --json to a file of your own, and on standard output
  h2o profile --import config.json        take over a four-key profile (or the log it is made from)
  h2o profile --import p.json --export config.json   write a profile in the four-key form
"""

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help=f"Path of a GGUF file. {DEFAULT_MODEL}")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "-o", "--output", metavar="FILE", help="Write the profile to this file. [default: in the folder H2O_PROFILES]"
    ),
]
Repeats = Annotated[int, typer.Option("--repeats", metavar="N", min=1, help="Measure everything N times.")]
Memory = Annotated[
    str | None,
    typer.Option("-m", "--memory", metavar="SIZE", help="Memory to measure in: 400 (MB), 1.5GB. [default: as needed]"),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "-t", "--threads", metavar="N", min=1, max=MOST_THREADS, help="Computing threads. [default: physical cores]"
    ),
]
Import = Annotated[
    Path | None, typer.Option("--import", metavar="FILE", help="Measure nothing: read a four-key profile or its log.")
]
Export = Annotated[Path | None, typer.Option("--export", metavar="FILE", help="Also write the four-key profile.")]
Json = Annotated[bool, typer.Option("--json", help="Print the profile as one JSON object instead of a summary.")]


def profile(
    model: Model = None,
    output: Output = None,
    repeats: Repeats = 3,
    memory: Memory = None,
    threads: Threads = None,
    import_file: Import = None,
    export_file: Export = None,
    as_json: Json = False,
) -> None:
    """Measure how fast this machine reads and computes a model, layer by layer. `h2o plan` and `h2o run` use it."""
    if import_file and model:
        raise UsageError("--import measures nothing, so it takes no MODEL", "leave one of the two away")
    path = import_file or resolve_model(model)
    target = output or profiles_folder() / f"{path.stem}.json"
    for file in (target, export_file):
        check_writable(file, make_folder=output is None)
    resident_release_s = None
    if import_file:
        found = load_foreign(import_file)
    else:
        measurement = Measurement(
            path,
            repeats,
            n_threads=threads or default_threads(),
            budget_bytes=Budget.parse(memory).cap_bytes,
            run_memory=measure_run_memory(),
        )
        found = _measured(measurement)
        resident_release_s = measurement.resident_release_s
    if target != import_file:
        save_profile(found, target)
    if export_file:
        save_source(export_source(found), export_file)
    if not import_file:
        remember_model(path)
    if as_json:
        emit(_as_json(found) + "\n")
    else:
        emit(summary(found, resident_release_s) + "\n")
        note(f"the profile is in {target}")


def _measured(measurement: Measurement) -> ModelProfile:
    """Run a measurement with progress on standard error; a signal ends it within a pass."""
    what = f"measuring {measurement.path.name}"
    with Progress(what, lambda: measurement.share, ahead=True), interrupts.ending(measurement.cancel):
        found = measurement.run()
    stopped = interrupts.take()
    if stopped:
        raise Cancelled(stopped)
    for line in measurement.notes:
        note(line)
    settings, need = measurement.settings, measurement.need_bytes
    floor = agreed(found.model.hash, settings, PROMPT, need)
    return msgspec.structs.replace(found, floor_bytes=floor)


def check_writable(path: Path | None, *, make_folder: bool) -> None:
    """Raise UsageError now, not after minutes of measuring, where a file cannot be written."""
    if path is None:
        return
    try:
        if make_folder:
            path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} is not a regular file", "give another file with -o")
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "give another file with -o") from None


# --- the summary ----------------------------------------------------------------------------------------------------


def _as_json(found: ModelProfile) -> str:
    return msgspec.json.encode(found).decode()


def summary(found: ModelProfile, resident_release_s: Spread | None = None) -> str:
    """The profile for people: the disk, a mean layer, the head, memory, and the limit with everything streamed."""
    model, disk = found.model, found.disk
    tied = ", head = embedding" if model.tied_head else ""
    lines = [
        f"{model.name} ({model.architecture}, {model.n_layers} layers, {format_size(model.file_bytes)}{tied})",
        f"{found.device.cpu}, {found.device.n_cores} cores, {format_size(found.device.memory_bytes)}",
        f"disk {_rate(disk.bytes_per_s)}: {disk.mode} reads of {disk.request_bytes // 1024} KiB, {disk.depth} at once",
        "",
        table(_rows(found), right=(1, 2, 3, 4, 5)),
        f"decode: one token; prefill: {found.prefill_tokens} tokens of a prompt at once; ± standard deviation",
        "",
        *_memory_lines(found),
        *_limit_lines(found),
    ]
    if resident_release_s:
        lines.insert(-1, f"freeing a resident layer takes {_ms(resident_release_s)} ms")
    return "\n".join(lines)


def _rows(found: ModelProfile) -> list[list[str]]:
    rows = [["", "bytes", "read ms", "decode ms", "prefill ms", "release ms"]]
    n = len(found.layers)
    columns = [
        [layer.io_s for layer in found.layers],
        [layer.decode_compute_s for layer in found.layers],
        [layer.prefill_compute_s for layer in found.layers],
        [layer.release_s for layer in found.layers],
    ]
    size = sum(layer.bytes for layer in found.layers)
    rows.append(["layer (mean)", format_size(size / n), *(_ms(_mean(column)) for column in columns)])
    head = found.head
    spreads = (head.io_s, head.decode_compute_s, head.prefill_compute_s, head.release_s)
    rows.append(["head", format_size(head.bytes), *(_ms(spread) for spread in spreads)])
    rows.append(["embedding row", format_size(found.embedding.row_bytes), _ms(found.embedding.io_s), "", "", ""])
    rows.append(["rest of a pass", "", "", _ms(found.overhead_s), "", ""])
    return rows


def _mean(spreads: list[Spread]) -> Spread:
    """The mean layer: means of means, and of the spreads over the repeats."""
    n = len(spreads)
    return Spread(
        sum(s.mean for s in spreads) / n,
        sum(s.sd for s in spreads) / n,
        min(s.n for s in spreads),
        min(s.minimum for s in spreads),
        max(s.maximum for s in spreads),
    )


def _memory_lines(found: ModelProfile) -> list[str]:
    memory = found.memory
    if not memory.ctx_tokens:
        return []
    return [
        f"memory: process {format_size(memory.process_bytes)}, compute {format_size(memory.compute_bytes)}"
        f" (prompt in passes of {memory.ubatch_tokens}), KV {format_size(found.kv_bytes_per_token)} per token",
        f"smallest budget: -m {-(-found.floor_bytes // MB)} (context of {memory.ctx_tokens} tokens)",
    ]


def _limit_lines(found: ModelProfile) -> list[str]:
    """Both sides of the limit T >= max(bytes / disk rate, compute)."""
    streamed = sum(layer.bytes for layer in found.layers) + found.head.bytes
    disk_s = streamed / found.disk.bytes_per_s.mean
    units: list[LayerProfile | HeadProfile] = [*found.layers, found.head]
    compute_s = sum(unit.decode_compute_s.mean for unit in units) + found.overhead_s.mean
    slower = "the disk" if disk_s > compute_s else "computing"
    return [
        f"a token with everything streamed ({format_size(streamed)}): disk {disk_s * 1000:.1f} ms,"
        f" compute {compute_s * 1000:.1f} ms; {slower} sets the pace"
    ]


def _ms(spread: Spread) -> str:
    digits = 1 if spread.mean >= 0.01 else 3
    return f"{spread.mean * 1000:.{digits}f} ± {spread.sd * 1000:.{digits}f}"


def _rate(spread: Spread) -> str:
    return f"{format_size(spread.mean)}/s ± {format_size(spread.sd)}/s"
