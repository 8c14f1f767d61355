"""Decode speed and memory against context and budget, on a generated model; a process per figure."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from profiler.kv_eval.methods import FULL, OMNIKV
from profiler.kv_eval.rows import KvRow
from profiler.kv_eval.speed_run import Speed
from runtime.errors import EngineError

ROOT = Path(__file__).resolve().parent.parent.parent
SHAPE = "llama:layers=8,dim=1024,ffn=1024,heads=16,kv_heads=8,vocab=1024,ctx=131072"
LAYERS, WAIT = (0,), 0  # weights are random: any filter layer is as good as another
_TIMEOUT_S = 3600


@dataclass(frozen=True)
class SpeedRun:
    """Contexts in tokens, budgets (0: no filter) and stores that are measured."""

    model: Path
    contexts: tuple[int, ...]
    keeps: tuple[float, ...]
    stores: tuple[str, ...]
    threads: int
    folder: str
    n_tokens: int = 32
    methods: tuple[str, ...] = (FULL, OMNIKV)

    def ways(self) -> list[tuple[float, str]]:
        """(keep, store) of every method; full attention has no store."""
        every = [(0.0, ""), *((keep, store) for store in self.stores for keep in self.keeps)]
        return [(keep, store) for keep, store in every if (OMNIKV if keep else FULL) in self.methods]

    def rows(self, passed: dict[str, object]) -> Iterator[KvRow]:
        """Rows as they are measured, contexts outside, methods inside. Raises EngineError."""
        for context in self.contexts:
            for keep, store in self.ways():
                found = self._measure(context, keep, store)
                fields: dict[str, object] = {
                    "suite": "speed",
                    "model": self.model.name,
                    "method": OMNIKV if keep else FULL,
                    "label": f"omnikv {keep:.0%}, {store}" if keep else FULL,
                    "layers": LAYERS if keep else (),
                    "store": store,
                    "keep": keep or 1.0,
                    "length": context,
                    "n": self.n_tokens,
                    **msgspec.to_builtins(found),
                }
                yield KvRow(**{**fields, **passed})  # type: ignore[arg-type]

    def _measure(self, context: int, keep: float, store: str) -> Speed:
        command: Sequence[str] = [sys.executable, "-m", "profiler.kv_eval.speed_run", str(self.model)]
        sizes = ["--context", str(context), "--tokens", str(self.n_tokens), "--threads", str(self.threads)]
        layers = ["--layers", ",".join(map(str, LAYERS)), "--wait", str(WAIT)]
        kv = ["--keep", str(keep), "--store", store, "--folder", self.folder, *layers] if keep else []
        paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        done = subprocess.run(
            [*command, *sizes, *kv],
            env={**os.environ, "PYTHONPATH": paths},
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode != 0:
            lines = done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"]
            raise EngineError(f"the measurement at {context} tokens failed: {lines[-1]}", "give a smaller --context")
        return msgspec.json.decode(done.stdout, type=Speed)
