"""Workers of a run, where there are some: gRPC is loaded then, and not before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h2o_cli.session.caller import Caller
from h2o_cli.session.defaults import default_threads
from runtime.engine.engine import Engine
from runtime.errors import UsageError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.budget import Budget

LOCAL = "local"
HIDDEN_KINDS = ("f32", "f16")

if TYPE_CHECKING:
    from h2o_cli.session.members import Team


@dataclass(frozen=True)
class Flags:
    """What the flags say of workers. None: not given. priority: names, separated by commas.

    slower: no flag; devices that were seen to take so many times as long as measured.
    """

    workers: str | None = None
    devices: Path | None = None
    spare: str | None = None
    split: str | None = None
    tls: Path | None = None
    priority: str | None = None
    by_memory: bool = False
    cluster: str | None = None
    refresh: bool = False
    hidden: str = "f32"
    slower: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Flags:
        """From the flags as a command was given them, some of which it may not have."""
        names = {"devices": "device_file", "by_memory": "prioritize_by_memory"}
        wanted = {one.name: names.get(one.name, one.name) for one in fields(cls)}
        return cls(**{name: given[flag] for name, flag in wanted.items() if flag in given})

    @property
    def are_given(self) -> bool:
        """Whether there are workers."""
        return self.workers is not None or self.devices is not None or self.cluster is not None

    def check(self, others: bool = False) -> None:
        """Raise UsageError for what goes not together. others: flags of a filter or of a draft model are given."""
        if sum(named is not None for named in (self.workers, self.devices, self.cluster)) > 1:
            raise UsageError("the devices were named twice", "give one of --workers, --devices and --cluster")
        if self.cluster is not None and (self.spare is not None or self.tls is not None or self.refresh):
            raise UsageError(
                "--cluster starts its workers itself, with keys of their own, and measures them",
                "leave --spare, --tls and --refresh out",
            )
        if self.devices is None and (self.priority is not None or self.by_memory):
            raise UsageError("an order of devices is for --devices", "--workers names them in their order")
        if self.hidden not in HIDDEN_KINDS:
            raise UsageError(f"--hidden {self.hidden} is not possible", f"give {' or '.join(HIDDEN_KINDS)}")
        flags = (("--spare", self.spare), ("--split", self.split), ("--tls", self.tls))
        alone = next((flag for flag, value in flags if value is not None), None)
        alone = alone or ("--refresh" if self.refresh else "--hidden" if self.hidden != HIDDEN_KINDS[0] else None)
        if not self.are_given and alone:
            raise UsageError(f"{alone} is for --workers", "name some")
        if self.are_given and others:
            raise UsageError("--workers does not work with --kv-filter or --draft", "leave those out")

    def addresses(self, *, once_more: bool = False) -> str:
        """The devices in the order of their priority, as --workers names them. Raises UsageError, H2OError.

        once_more: the file may have lost devices that --priority names.
        """
        if self.devices is None:
            return self.workers or ""
        from h2o_cli.session.device_file import in_order, read_devices

        entries = read_devices(self.devices)
        priority = [name.strip() for name in (self.priority or "").split(",") if name.strip()]
        if once_more:
            priority = [name for name in priority if any(name in (e.address, e.place) for e in entries)]
        return ",".join(e.place for e in in_order(entries, priority, by_memory=self.by_memory))

    def naming(self, addresses: str) -> Flags:
        """The same with --workers instead of a file, and without --refresh: what was measured now holds."""
        return replace(self, workers=addresses, devices=None, priority=None, by_memory=False, refresh=False)


def join(
    file: ModelFile, flags: Flags, budget: Budget, n_threads: int | None, note: Callable[[str], None]
) -> Team | None:
    """The workers, greeted, and None without any. n_threads None: as by default.

    Raises UsageError, WorkerError, BudgetError.
    """
    if not flags.are_given:
        return None
    from h2o_cli.session.members import Devices, Team

    n_threads = n_threads or default_threads()
    if flags.cluster is not None:
        from h2o_cli.session.ray_workers import join_cluster

        return join_cluster(flags.cluster, flags.split, flags.hidden, file, budget.n_bytes, n_threads, note)
    addresses = flags.addresses()
    if flags.devices is not None:
        note(f"order of the devices: {addresses}")
    if addresses == LOCAL:
        note("no other device is named: this machine computes alone")
        return None
    devices = Devices(addresses, flags.spare, flags.tls, flags.split, flags.refresh, flags.hidden, flags.slower)
    return Team.join(file, devices, budget.n_bytes, n_threads, note)


def set_up(team: Team, engine: Engine, hollow: HollowModel, cleanup: ExitStack, caller: Caller) -> None:
    """Give the workers their layers; where that fails `cleanup` is closed. Raises H2OError."""
    try:
        with caller.ending(engine.cancel):
            team.set_up(engine, hollow, caller.note)
    except BaseException:
        cleanup.close()
        raise
