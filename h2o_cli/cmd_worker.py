"""`h2o worker`: compute some layers of a model for `h2o run --workers` on another machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from h2o_cli.interrupts import interrupts
from h2o_cli.output import note, print_json
from h2o_cli.session.defaults import MOST_THREADS, default_budget, default_threads
from h2o_cli.session.models import DEFAULT_MODEL, resolve_model
from h2o_cli.worker_log import one_line_each
from runtime.errors import UsageError
from runtime.sizes import format_size, parse_size

EPILOG = """Examples:

\b
  h2o worker model.gguf -m 2GB                 for roots on this machine
  h2o worker model.gguf --listen 192.168.1.7:9999 --tls alpha   for other machines (see `h2o keys`)
"""

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help=f"Path of a GGUF file. {DEFAULT_MODEL}")
]
Listen = Annotated[
    str, typer.Option("--listen", metavar="HOST:PORT", help="Where roots reach it; port 0: any that is free.")
]
Memory = Annotated[
    str | None,
    typer.Option("-m", "--memory", metavar="SIZE", help="Memory of the whole process: 400 (MB), 1.5GB, 512MiB."),
]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", metavar="N", help="Computing threads. [default: physical cores]")
]
Tls = Annotated[
    Path | None,
    typer.Option("--tls", metavar="DIR", help="This machine's keys; needed for any address but this machine's own."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object when it listens.")]


def worker(
    model: Model = None,
    listen: Listen = "127.0.0.1:9999",
    memory: Memory = None,
    threads: Threads = None,
    tls: Tls = None,
    json: Json = False,
) -> None:
    """Compute some layers of a model for a root, inside a memory budget.

    Which layers is the root's choice. They stay in memory, as far as the budget allows, from one root to the next. It
    serves one root at a time, until Ctrl-C.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"--threads {threads} is not possible", f"give 1 to {MOST_THREADS}")
    budget = parse_size(memory) if memory else default_budget()
    raise typer.Exit(_serve(resolve_model(model), listen, tls, (budget, threads or default_threads()), json))


def _serve(path: Path, listen: str, tls: Path | None, limits: tuple[int, int], json: bool) -> int:
    with one_line_each(note):
        from runtime.distributed.offer import measure
        from runtime.distributed.wire import Listener, keys_for
        from runtime.distributed.worker import Worker
        from runtime.llama.model_file import ModelFile

        keys = keys_for(listen, tls)
        with interrupts.held():
            file = ModelFile.open(path)
            offer = measure(file, *limits)
        worker = Worker(lambda model: file if model == file.hash else None, offer, note)
        listener = Listener(listen, keys, worker.converse)
        try:
            _say(listener.address, file.hash, json)
            note(f"{file.path.name} at {listener.address}, at most {format_size(limits[0])}; Ctrl-C ends it")
            return 128 + _work(worker.work, worker.stop)
        finally:
            listener.close()


def _work(work: Callable[[], int], stop: Callable[[int], None]) -> int:
    """Work until a signal comes; its number."""
    with interrupts.ending(stop):
        number = work()
    interrupts.take()
    return number


def _say(address: str, model: int, json: bool) -> None:
    if json:
        print_json({"listening": address, "pid": os.getpid(), "model": model})
