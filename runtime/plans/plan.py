"""The plan: which weights stay in memory and how many bytes are streamed ahead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

from runtime.errors import PlanError, UsageError
from runtime.sizes import format_size, page_down

NEXT_STEP = "make one with `h2o plan -m SIZE`"


class Layout(IntEnum):
    """Where the k resident layers' worth of bytes is taken from."""

    PREFIX = 0  # the first k layers, whole (the source system's choice)
    EVEN = 1  # k whole layers, spread evenly over the model
    BALANCED = 2  # the same share of every layer and of the head, tensor by tensor

    @classmethod
    def parse(cls, name: str) -> Layout:
        """The layout called name. Raises UsageError."""
        try:
            return cls[name.upper()]
        except KeyError:
            names = ", ".join(layout.label for layout in cls)
            raise UsageError(f"there is no layout {name!r}", f"choose one of {names}") from None

    @property
    def label(self) -> str:
        """The name a user writes."""
        return self.name.lower()


@dataclass(frozen=True)
class Plan:
    """k layers resident, at most w streamed layers held at once (the one computing included).

    pinned_bytes refines k: bytes of layers and head kept resident (0: exactly k layers' worth).
    window_bytes refines w: bytes of the streaming window (0: w times the largest streamed layer).
    budget_bytes is the whole process's budget the plan was made for (0: none was given).
    model_hash names the model (0: any); generation grows with every plan written to a plan file.
    """

    k: int
    w: int
    layout: Layout = Layout.PREFIX
    pinned_bytes: int = 0
    window_bytes: int = 0
    budget_bytes: int = 0
    model_hash: int = 0
    generation: int = 0

    def __post_init__(self) -> None:
        if self.k < 0 or self.w < 1:
            raise PlanError(f"k={self.k}, w={self.w} is not a plan", "k must be 0 or more and w at least 1")
        if min(self.pinned_bytes, self.window_bytes, self.budget_bytes, self.model_hash, self.generation) < 0:
            raise PlanError("a plan has no negative sizes", "make a new plan with `h2o plan -m SIZE`")

    def check(self, n_layers: int, memory_bytes: int) -> None:
        """Raise PlanError unless a model of n_layers layers on a machine with so much memory can follow this plan."""
        if self.k > n_layers or self.w > max(n_layers, 1):
            raise PlanError(f"k={self.k}, w={self.w} is no plan for {n_layers} layers", NEXT_STEP)
        if page_down(self.budget_bytes) > memory_bytes:  # the kernel's limits are whole pages
            budget, most = format_size(self.budget_bytes), format_size(memory_bytes)
            raise PlanError(f"a budget of {budget} is more than the {most} of this machine", NEXT_STEP)

    def capped(self, cap_bytes: int, note: Callable[[str], None]) -> Plan:
        """This plan with a budget of at most cap_bytes (0: any), which is said where it was made for more."""
        if not 0 < cap_bytes < self.budget_bytes:
            return self
        asked, most = format_size(self.budget_bytes), format_size(cap_bytes)
        note(f"the plan is for {asked}: it is followed inside the {most} of -m")
        return replace(self, budget_bytes=cap_bytes)
