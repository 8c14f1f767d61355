"""`h2o worker`: compute some layers of a model for `h2o run --workers` on another machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from h2o_cli.interrupts import interrupts
from h2o_cli.output import note, print_json
from h2o_cli.session.defaults import MOST_THREADS, default_threads
from h2o_cli.session.models import DEFAULT_MODEL, find_profile, resolve_model
from h2o_cli.session.smallest import of_worker
from h2o_cli.worker_log import one_line_each
from runtime.answer.follower import PlanFollower
from runtime.engine.engine import Engine
from runtime.errors import H2OError, UsageError
from runtime.llama.model_file import ModelFile
from runtime.plans.budget import Budget
from runtime.plans.plan import Plan
from runtime.plans.watcher import PlanWatcher
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
PlanFile = Annotated[
    Path | None, typer.Option("-s", "--plan-file", metavar="PLANFILE", help="Follow the plans in this file, up to -m.")
]
IdleS = Annotated[
    float | None,
    typer.Option(
        "--idle", metavar="S", show_default=False, help="Give the layers' memory back after S s without a root."
    ),
]
IdleAbove = Annotated[
    str, typer.Option("--idle-above", metavar="SIZE", help="With --idle: only where the layers take more than this.")
]
Tls = Annotated[
    Path | None,
    typer.Option("--tls", metavar="DIR", help="This machine's keys; needed for any address but this machine's own."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object when it listens.")]


def worker(  # noqa: PLR0913, PLR0917 - one parameter per flag
    model: Model = None,
    listen: Listen = "127.0.0.1:9999",
    memory: Memory = None,
    threads: Threads = None,
    plan_file: PlanFile = None,
    idle: IdleS = None,
    idle_above: IdleAbove = "500",
    tls: Tls = None,
    json: Json = False,
) -> None:
    """Compute some layers of a model for a root, inside a memory budget.

    Which layers is the root's choice. They stay in memory, as far as the budget allows, from one root to the next. It
    serves one root at a time, until Ctrl-C. Without MODEL it also takes a model that was profiled here, if the root's
    is one.
    """
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UsageError(f"--threads {threads} is not possible", f"give 1 to {MOST_THREADS}")
    if idle is not None and idle <= 0:
        raise UsageError(f"--idle {idle:g} is not possible", "give seconds, more than 0")
    back = None if idle is None else (idle, parse_size(idle_above))
    budget = Budget.parse(memory).n_bytes
    limits = budget, threads or default_threads()
    raise typer.Exit(_serve(model, listen, tls, limits, plan_file, back, json))


def _serve(
    model: str | None,
    listen: str,
    tls: Path | None,
    limits: tuple[int, int],
    plan_file: Path | None,
    back: tuple[float, int] | None,
    json: bool,
) -> int:
    with one_line_each(note):
        from runtime.distributed.offer import measure
        from runtime.distributed.wire import Listener, keys_for
        from runtime.distributed.worker import Idle, Worker

        keys = keys_for(listen, tls)
        with interrupts.held():
            file = ModelFile.open(resolve_model(model))
            offer = measure(file, *limits, of_worker)
        follow = _following(plan_file, limits[0]) if plan_file else None
        worker = Worker(_finder(file, is_named=model is not None), offer, note, follow, Idle(*back) if back else None)
        listener = Listener(listen, keys, worker.begin)
        try:
            _say(listener.address, file.hash, json)
            note(f"{file.path.name} at {listener.address}, at most {format_size(limits[0])}; Ctrl-C ends it")
            return 128 + _work(worker.work, worker.stop)
        finally:
            listener.close()


class _OwnPlans(PlanWatcher):
    """Plans for a whole model, cut to the layers that are here."""

    def __init__(self, path: Path, model_hash: int, n_layers: int) -> None:
        super().__init__(path, model_hash)
        self._n_layers = n_layers

    def poll(self) -> Plan | None:
        """A newer valid plan for this model, or None."""
        plan, most = super().poll(), self._n_layers
        return replace(plan, k=min(plan.k, most), w=min(plan.w, most)) if plan else None


def _following(path: Path, budget_bytes: int) -> Callable[[Engine, int], PlanFollower]:
    """What makes the one that follows the plans in a file, for an engine with layers of the model with a hash."""

    def follow(engine: Engine, model_hash: int) -> PlanFollower:
        watcher = _OwnPlans(path, model_hash, engine.file.n_layers)
        return PlanFollower(engine, watcher, budget_bytes, note, cap_bytes=budget_bytes)

    return follow


def _finder(file: ModelFile, *, is_named: bool) -> Callable[[int], ModelFile | None]:
    """What gives the model with a hash: this file, or without a name one that was profiled here."""
    known = {file.hash: file}

    def find(model_hash: int) -> ModelFile | None:
        if model_hash not in known and not is_named:
            found = _profiled(model_hash)
            if found:
                known[model_hash] = found
        return known.get(model_hash)

    return find


def _profiled(model_hash: int) -> ModelFile | None:
    """The model with this hash where its profile says it is, and it still is the same."""
    path = find_profile(model_hash)
    if path is None:
        return None
    from profiler.model_profile import load_profile

    with suppress(H2OError):
        file = ModelFile.open(load_profile(path).model.path)
        return file if file.hash == model_hash else None
    return None


def _work(work: Callable[[], int], stop: Callable[[int], None]) -> int:
    """Work until a signal comes; its number."""
    with interrupts.ending(stop):
        number = work()
    interrupts.take()
    return number


def _say(address: str, model: int, json: bool) -> None:
    if json:
        print_json({"listening": address, "pid": os.getpid(), "model": model})
