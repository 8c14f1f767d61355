"""The ways to attend that are compared: full attention, the filter at several budgets, and baselines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.kv.options import KvFilter

FULL, OMNIKV = "full attention", "omnikv"
SINKS, HEAVY, RANDOM = "sinks + window", "heavy hitters", "random"
EVERYWHERE, OTHERS = "sinks + window, all layers", "omnikv, other layers"
NAMES = (FULL, OMNIKV, SINKS, HEAVY, RANDOM, EVERYWHERE, OTHERS)
BASELINES = {SINKS: "sinks", HEAVY: "heavy", RANDOM: "random"}
COMPARED = 0.1  # the part of the prompt that baselines keep in every run


@dataclass(frozen=True)
class Method:
    """A way to attend. kv None: llama.cpp as it is. keep: part of the prompt in sparse layers, 1 for all of it."""

    name: str
    kv: KvFilter | None
    keep: float = 1.0

    @property
    def label(self) -> str:
        """Name and budget for people."""
        layers = f" ({','.join(map(str, self.kv.layers))})" if self.name == OTHERS and self.kv else ""
        return self.name + layers if self.kv is None else f"{self.name}{layers} {self.keep:.0%}"


@dataclass(frozen=True)
class Roles:
    """Filter layers, wait, and how they select; n_layers of the model see all positions, n_dense of them stay dense."""

    layers: tuple[int, ...]
    wait: int
    select: str
    n_layers: int
    n_dense: int

    def filter(self, keep: float, **changes: object) -> KvFilter:
        """A filter with these roles. keep 1.0 keeps everything; a share is kept of short prompts, too."""
        fields = {"layers": self.layers, "wait": self.wait, "select": self.select, "keep": float(keep), "least": 1}
        return KvFilter(**{**fields, **changes})  # type: ignore[arg-type]


def compared_methods(roles: Roles, keeps: Sequence[float], others: Sequence[tuple[int, ...]] = ()) -> list[Method]:
    """Full attention, the filter at every budget, and the baselines with the same sparse layers at the compared budget.

    "All layers" is StreamingLLM as published: every layer but the first keeps first and last rows only, as many as
    make the same total of keys and values as the filter. others: more filter layers, at the compared budget.
    """
    methods = [Method(FULL, None)]
    methods += [Method(OMNIKV, roles.filter(keep), keep) for keep in keeps]
    compared = COMPARED if COMPARED in keeps else min(keeps)
    for name, method in BASELINES.items():
        methods.append(Method(name, roles.filter(compared, method=method), compared))
    total = roles.n_dense + (roles.n_layers - roles.n_dense) * compared
    rest = max(0.01, (total - 1) / (roles.n_layers - 1))
    if rest < 1:
        methods.append(Method(EVERYWHERE, roles.filter(rest, method="sinks", layers=(0,), wait=0), compared))
    for layers in others:
        methods.append(Method(OTHERS, roles.filter(COMPARED, layers=layers), COMPARED))
    return methods
