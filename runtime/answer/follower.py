"""New plans while a process answers: taken over between two passes, inside its budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from runtime.answer.plan_stats import StatsWriter
from runtime.engine.engine import Engine
from runtime.errors import BudgetError, EngineError, H2OError, PlanError
from runtime.memory import memory_bytes
from runtime.plans.plan import Plan
from runtime.plans.watcher import PlanWatcher
from runtime.sizes import MB, format_size


class PlanFollower:
    """Adopts new plans from a plan file between two passes, inside the budget; says once what it could not use."""

    def __init__(
        self,
        engine: Engine,
        watcher: PlanWatcher,
        budget_bytes: int,
        note: Callable[[str], None],
        stats: StatsWriter | None = None,
        cap_bytes: int = 0,
    ) -> None:
        """budget_bytes: of the plan in force. cap_bytes: the most that any plan gets (0: no cap)."""
        self.engine = engine
        self.budget_bytes = budget_bytes
        self._cap_bytes = cap_bytes
        self._stats = stats
        self._generation, self._refused = engine.plan.generation, 0
        self._watcher = watcher
        self._note = note
        self._asked = replace(engine.plan, generation=0)
        self._told: set[str] = set()

    def __call__(self) -> None:
        """Look for a new plan, and publish what was measured under the one in force."""
        self._follow()
        if self._stats:
            self._stats.publish(self.engine, self.budget_bytes, self._generation, self._refused)

    def close(self) -> None:
        """Look no more."""
        self._watcher.close()

    def _follow(self) -> None:
        plan = self._watcher.poll()
        problem = self._watcher.take_problem()
        if problem:
            self._tell(problem)
        if plan is None:
            return
        try:
            plan.check(self.engine.file.n_layers, memory_bytes())
            plan = plan.capped(self._cap_bytes, self._tell)
            if replace(plan, generation=0) == self._asked:
                self._generation = plan.generation
                return
            check_budget(self.engine, plan, self.budget_bytes)
            self.engine.apply(plan)
        except (BudgetError, EngineError, PlanError) as error:
            self._refused = plan.generation
            self._tell(f"the new plan was not taken: {_why_not(plan, error)}")
            return
        self._generation = plan.generation
        self._asked = replace(plan, generation=0)
        self.budget_bytes = plan.budget_bytes or self.budget_bytes

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._note(text)


def _why_not(plan: Plan, error: H2OError) -> str:
    """Why this process cannot follow a plan: it keeps its context and passes, so its floor is not that of the model."""
    if plan.budget_bytes and isinstance(error, BudgetError) and error.floor_bytes:
        floor, size = -(-error.floor_bytes // MB), format_size(plan.budget_bytes)
        return f"{size} is too small for this process; the smallest budget that works for it is -m {floor}"
    return str(error)


def check_budget(engine: Engine, plan: Plan, budget_bytes: int) -> None:
    """Raise BudgetError when a plan that names no budget of its own does not fit the process's."""
    if plan.budget_bytes or not budget_bytes:
        return
    need = engine.layout.needed_bytes(plan)
    if need > budget_bytes:
        raise BudgetError(
            f"k={plan.k}, w={plan.w} needs {format_size(need)}, the budget is {format_size(budget_bytes)}",
            "raise -m or lower k and w",
            floor_bytes=need,
        )
