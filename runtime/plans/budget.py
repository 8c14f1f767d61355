"""The memory budget of a process: what -m says, or a share of the memory that is there."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.memory import available_bytes
from runtime.plans.plan import Plan
from runtime.sizes import parse_size

SHARE = 0.6  # of the memory the process could take, where no budget is given


@dataclass(frozen=True)
class Budget:
    """Bytes of the whole process, decided once. is_given: -m named them, and no plan gets more."""

    n_bytes: int
    is_given: bool = True

    @classmethod
    def parse(cls, text: str | None) -> Budget:
        """From -m (None: not given). Raises UsageError."""
        return cls(default_bytes(), is_given=False) if text is None else cls(parse_size(text))

    @property
    def cap_bytes(self) -> int:
        """The most that any plan gets; 0: no cap."""
        return self.n_bytes if self.is_given else 0

    def following(self, plan: Plan | None) -> int:
        """Bytes of a process that follows a plan, which may name its own."""
        return (plan.budget_bytes if plan else 0) or self.n_bytes


def default_bytes() -> int:
    """The budget of a process when none is given."""
    return int(SHARE * available_bytes())
