"""Workers of a run, where there are some: gRPC is loaded then, and not before."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.interrupts import interrupts
from h2o_cli.session.defaults import default_budget
from runtime.engine.engine import Engine
from runtime.errors import UsageError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile

if TYPE_CHECKING:
    from h2o_cli.session.members import Team


def check_flags(workers: str | None, spare: str | None, tls: Path | None, others: bool) -> None:
    """Raise UsageError for flags that say nothing together. others: those of a filter or of a draft model are given."""
    if workers is None and (spare is not None or tls is not None):
        raise UsageError(f"{'--tls' if spare is None else '--spare'} is for --workers", "name some")
    if workers is not None and others:
        raise UsageError("--workers does not work with --kv-filter or --draft", "leave those out")


def join(
    file: ModelFile,
    workers: str | None,
    spare: str | None,
    tls: Path | None,
    budget_bytes: int,
    note: Callable[[str], None],
) -> Team | None:
    """The workers, greeted, and None without any. Raises UsageError, WorkerError."""
    if workers is None:
        return None
    from h2o_cli.session.members import Devices, Team

    return Team.join(file, Devices(workers, spare, tls), budget_bytes or default_budget(), note)


def set_up(team: Team, engine: Engine, hollow: HollowModel, cleanup: ExitStack, note: Callable[[str], None]) -> None:
    """Give the workers their layers; where that fails `cleanup` is closed. Raises H2OError."""
    try:
        with interrupts.ending(engine.cancel):
            team.set_up(engine, hollow, note)
    except BaseException:
        cleanup.close()
        raise
