"""Decode speed and memory against context and budget, on a generated model; a process per figure."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from h2o_cli.bench.commands import environment, last_words, python, shown_command
from h2o_cli.bench.kv.methods import COMPARED, FULL, OMNIKV
from h2o_cli.bench.kv.rows import KvRow
from h2o_cli.bench.kv.speed_run import Speed, Turns
from h2o_cli.bench.rows import circumstances
from runtime.errors import EngineError
from runtime.kv.options import DEFAULT_SELECT

SHAPE = "llama:layers=8,dim=1024,ffn=1024,heads=16,kv_heads=8,vocab=1024,ctx=131072"
FILE_TYPE = "q4_0"
LAYERS, WAIT = (0,), 0  # weights are random: any filter layer is as good as another
USUAL = "multi"
_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Way:
    """How one row is measured: part of the prompt kept (0: full attention), store and strategy."""

    keep: float = 0.0
    store: str = ""
    strategy: str = ""

    @property
    def label(self) -> str:
        """Name for people; the strategy is named where it is not the usual one."""
        if not self.keep:
            return FULL
        return f"omnikv {self.keep:.0%}, {self.store}" + (f", {self.strategy}" if self.strategy != USUAL else "")


@dataclass(frozen=True)
class SpeedRun:
    """Contexts in tokens, budgets, stores and the disk store's strategies that are measured.

    Strategies other than the usual one are measured at one budget: the one that is compared everywhere, where it is
    among the budgets.
    """

    model: Path
    contexts: tuple[int, ...]
    keeps: tuple[float, ...]
    stores: tuple[str, ...]
    threads: int
    folder: str
    strategies: tuple[str, ...] = (USUAL,)
    select: str = DEFAULT_SELECT
    n_tokens: int = 32
    methods: tuple[str, ...] = (FULL, OMNIKV)

    def ways(self) -> list[Way]:
        """Every method; full attention has no store."""
        every = [Way(), *(Way(keep, store, USUAL) for store in self.stores for keep in self.keeps)]
        if "disk" in self.stores and self.keeps:
            keep = COMPARED if COMPARED in self.keeps else self.keeps[0]
            every += [Way(keep, "disk", name) for name in self.strategies if name != USUAL]
        return [way for way in every if (OMNIKV if way.keep else FULL) in self.methods]

    def rows(self) -> Iterator[KvRow]:
        """Rows as they are measured, contexts outside, methods inside. Raises EngineError."""
        for context in self.contexts:
            turns = {threads: self._turns(context, threads) for threads in {1, self.threads}}
            for way in self.ways():
                command, found = self._measure(context, way)
                fields: dict[str, Any] = {
                    "suite": "speed",
                    "model": self.model.name,
                    "method": OMNIKV if way.keep else FULL,
                    "label": way.label,
                    "layers": LAYERS if way.keep else (),
                    "select": self.select if way.keep else "",
                    "store": way.store,
                    "strategy": way.strategy,
                    "keep": way.keep or 1.0,
                    "length": context,
                    "n": self.n_tokens,
                    "threads": self.threads,
                    **(_faster(turns, way, self.threads) if way.store == "ram" and way.keep else {}),
                    "commands": (shown_command(command),),
                    **msgspec.to_builtins(found),
                    **circumstances(self.model),
                }
                yield KvRow(**fields)

    def _turns(self, context: int, threads: int) -> Turns | None:
        """Filters beside full attention with everything in memory, where both are measured."""
        if not {FULL, OMNIKV} <= set(self.methods) or "ram" not in self.stores or not self.keeps:
            return None
        keeps = [part for keep in self.keeps for part in ("--keep", str(keep))]
        command = self._command(context, threads, ["--turns", *keeps, *self._roles()])
        return msgspec.json.decode(self._said(command, context), type=Turns)

    def _measure(self, context: int, way: Way) -> tuple[list[str], Speed]:
        """The command of a process of its own, and what it measured."""
        store = ["--store", way.store, "--strategy", way.strategy, "--folder", self.folder]
        kv = ["--keep", str(way.keep), *store, *self._roles()] if way.keep else []
        command = self._command(context, self.threads, kv)
        return command, msgspec.json.decode(self._said(command, context), type=Speed)

    def _roles(self) -> list[str]:
        return ["--layers", ",".join(map(str, LAYERS)), "--wait", str(WAIT), "--select", self.select]

    def _command(self, context: int, threads: int, flags: Sequence[str]) -> list[str]:
        sizes = ["--context", context, "--tokens", self.n_tokens, "--threads", threads]
        return python("h2o_cli.bench.kv.speed_run", self.model, *sizes, *flags)

    @staticmethod
    def _said(command: Sequence[str], context: int) -> bytes:
        """What a command prints. Raises EngineError."""
        done = subprocess.run(
            command,
            env=environment(),
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            reason = last_words(done.stderr.decode(errors="replace"), done.returncode)
            raise EngineError(f"the measurement at {context} tokens failed: {reason}", "give a smaller --context")
        return done.stdout


def _faster(turns: Mapping[int, Turns | None], way: Way, threads: int) -> dict[str, float]:
    """The fields of a row that compare it with full attention, in turns."""
    fields: dict[str, float] = {}
    keep = str(way.keep)
    for n_threads, name in ((threads, ""), (1, "_one_thread")):
        found = turns[n_threads]
        if found:
            fields |= {f"faster{name}": found.faster[keep], f"faster_again{name}": found.faster_again[keep]}
    return fields
