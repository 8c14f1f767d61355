"""What a session is opened with: the flags that decide about model, memory, plan and sampling."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from h2o_cli.session.defaults import MOST_THREADS
from h2o_cli.session.kv_filter import KvChoice
from h2o_cli.session.smallest import PROMPT
from h2o_cli.session.team import Flags
from runtime.answer.sampler import Sampling
from runtime.errors import UsageError
from runtime.plans.budget import Budget
from runtime.plans.plan import Layout
from runtime.settings import KV_TYPES

SPECULATE = ("auto", "off")
REPACK = ("auto", "off")


@dataclass(frozen=True)
class SessionOptions:
    """What a session is opened with; None: not given.

    is_named: the user named the model. kind: of run, as the smallest budget knows them. sequences: in the cache at
    once. swap_bytes: what keys and values outside the cache may take. overlap: read while computing.
    """

    model: Path
    is_named: bool = True
    sequences: int = 1
    swap_bytes: int = 0
    resident: frozenset[int] | None = None
    overlap: bool = True
    kind: str = PROMPT
    budget: Budget = field(default_factory=lambda: Budget.parse(None))
    plan_file: Path | None = None
    ctx: int | None = None
    threads: int | None = None
    ubatch: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    layout: str = "auto"
    kv_type: str = "f16"
    speculate: str = "auto"
    draft: str | None = None
    prefetch_input: bool = False
    repack: str = "auto"
    kv: KvChoice | None = None
    devices: Flags = field(default_factory=Flags)

    @classmethod
    def of(cls, given: Mapping[str, Any], **made: Any) -> SessionOptions:
        """From parameters of a command, and what was made of some of them."""
        names = [field.name for field in fields(cls) if field.name not in made]
        return cls(**{name: given[name] for name in names}, **made)

    def __post_init__(self) -> None:
        for flag, value in (("--ctx", self.ctx), ("--threads", self.threads), ("--ubatch", self.ubatch)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} {value} is not possible", "give 1 or more")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UsageError(f"--threads {self.threads} is not possible", f"give 1 to {MOST_THREADS}")
        if self.kv_type not in KV_TYPES:
            raise UsageError(f"there is no KV type {self.kv_type!r}", f"choose one of {', '.join(KV_TYPES)}")
        if self.repack not in REPACK:
            raise UsageError(f"--repack {self.repack} is not possible", f"choose one of {', '.join(REPACK)}")
        if self.speculate not in SPECULATE:
            raise UsageError(f"--speculate {self.speculate} is not possible", f"choose one of {', '.join(SPECULATE)}")
        if self.speculate == "off" and self.draft is not None:
            raise UsageError("--draft does nothing with --speculate off", "give one of them")
        if self.kv:
            self._check_filter()
        self.devices.check(bool(self.kv or self.draft))

    def _check_filter(self) -> None:
        if self.kv_type == "f32":
            raise UsageError("--kv-filter does not work with --kv-type f32", "use --kv-type f16, q8_0 or q4_0")
        if self.draft is not None:
            raise UsageError("--draft does not work with --kv-filter", "give one of them")

    def for_answers_of(self, n_tokens: int) -> SessionOptions:
        """These options, their filter made for answers of at most n_tokens (negative: no limit)."""
        if self.kv is None or n_tokens < 0:
            return self
        return replace(self, kv=replace(self.kv, filter=replace(self.kv.filter, tail=n_tokens + 1)))

    @property
    def fixed_layout(self) -> Layout | None:
        """The layout asked for, None for "auto"."""
        return None if self.layout == "auto" else Layout.parse(self.layout)
