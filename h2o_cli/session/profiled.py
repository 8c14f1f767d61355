"""What a run takes from the profile of its model: a child reads the profile, plans and predicts.

The code for that takes 2 MB, and every megabyte of a run's process is one that its weights do not have (limited.py).
"""

from __future__ import annotations

import marshal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h2o_cli.session.defaults import LEAST_UBATCH
from h2o_cli.session.models import find_profile, profiles_folder
from runtime.errors import BudgetError, EngineError, ProfileError
from runtime.kv.options import KvFilter
from runtime.limited import Child, Failed
from runtime.llama.model_file import ModelFile
from runtime.plans.ledger import Ledger
from runtime.plans.plan import Layout, Plan
from runtime.settings import Machine, Settings
from runtime.sizes import MB

if TYPE_CHECKING:
    from profiler.model_profile import ModelProfile

_MORE_BYTES = 256 * MB  # a profile has at most 64 MiB
_SECONDS = 30.0


@dataclass
class Profiled:
    """A profile as the run's own process knows it. depth: requests at once."""

    path: Path
    model_paths: tuple[Path, ...]
    machine: Machine = field(default_factory=Machine)
    request_bytes: int = 0
    depth: int = 1
    _child: Child | None = None

    @classmethod
    def find(cls, file: ModelFile, note: Callable[[str], None], child: Child | None = None) -> Profiled | None:
        """The newest profile of this model, if there is one that can be used. child: an early_child, taken over."""
        path = find_profile(file.hash)
        if path is None:
            if child:
                child.close()
            return None
        found = cls(path, tuple(file.paths), _child=child)
        try:
            *machine, found.request_bytes, found.depth = found._ask("facts")
        except (Failed, EngineError) as error:
            note(f"the profile {path.name} was not used: {str(error) or 'it could not be read'}")
            return None
        found.machine = Machine(*machine)
        return found

    def plan(self, budget_bytes: int, settings: Settings, layout: Layout | None) -> Plan | None:
        """The planner's choice (layout None: the best); None where the profile's figures say that the budget is too
        small (the engine decides)."""
        kv = vars(settings.kv) if settings.kv else None
        ubatch = min(LEAST_UBATCH, settings.n_ubatch)
        layout_number = None if layout is None else int(layout)
        with suppress(Failed, EngineError):
            plan = self._ask("plan", budget_bytes, settings.n_ctx, ubatch, layout_number, settings.kv_type, kv)
            return Plan(**plan | {"layout": Layout(plan["layout"])}) if plan else None
        return None

    def token_ms(self, plan: Plan, ledger: Ledger) -> float | None:
        """What a token takes in memory as it is shared out, in ms; None where there is no memory to compute that."""
        with suppress(Failed, EngineError):
            arm = (plan.k, plan.w, int(plan.layout), ledger.resident_bytes, ledger.window_bytes)
            return float(self._ask("token_ms", *arm))
        return None

    def batch_size(self, budget_bytes: int, n_cells: int, kv_type: str) -> tuple[int, float] | None:
        """How many texts to answer at once in a cache of n_cells positions (0: as usual), and tokens per second of all
        of them; None where the profile's figures say that none fits."""
        with suppress(Failed, EngineError):
            found = self._ask("batch_size", budget_bytes, n_cells, kv_type)
            return (int(found[0]), float(found[1])) if found else None
        return None

    def rest(self) -> None:
        """Free the child's memory. It is started again for another question."""
        child, self._child = self._child, None
        if child:
            child.close()

    def _ask(self, *question: Any) -> Any:
        """The answer to a question: the name of a method of _Reader, and what it takes. Raises Failed, EngineError."""
        self._child = self._child or _start()
        whose = str(self.path), [str(path) for path in self.model_paths]
        try:
            return marshal.loads(self._child.ask(marshal.dumps((whose, question))))
        except Failed:
            self.rest()
            raise


def early_child() -> Child | None:
    """A child that loads the planner while this process reads a model's index; None where there is no profile."""
    with suppress(EngineError):
        return _start() if any(profiles_folder().glob("*.json")) else None
    return None


def _start() -> Child:
    reader = _Reader()
    return Child(reader.load, reader.answer, _MORE_BYTES, _SECONDS, "the planner")


class _Reader:
    """The child's side."""

    profile: ModelProfile

    @staticmethod
    def load() -> None:
        """Load the code."""
        import planner.choose  # noqa: F401

    def answer(self, question: bytes) -> bytes:
        """What the method that a question names makes of the rest of it. Raises ProfileError."""
        (path, model_paths), (name, *arguments) = marshal.loads(question)
        if "profile" not in vars(self):
            from profiler.model_profile import load_profile

            self.profile = load_profile(path).checked(list(map(Path, model_paths)))
        return marshal.dumps(getattr(self, name)(*arguments))

    def facts(self) -> tuple[float, float, int, int]:
        """Machine's two figures, and how to read."""
        machine, disk = self.profile.machine, self.profile.disk
        return machine.disk_bytes_per_s, machine.compute_s, disk.request_bytes, max(1, disk.depth)

    def plan(
        self, budget_bytes: int, ctx: int, ubatch: int, layout: int | None, kv_type: str, kv: dict[str, Any] | None
    ) -> dict[str, int] | None:
        """A plan's fields."""
        from planner.choose import choose_exactly
        from planner.kv import KvUse

        use = KvUse(kv_type, KvFilter(**kv) if kv else None)
        wanted = None if layout is None else Layout(layout)
        with suppress(BudgetError, ProfileError):
            plan = choose_exactly(
                self.profile, budget_bytes, ctx_tokens=ctx, ubatch_tokens=ubatch, layout=wanted, kv=use
            )
            return {name: int(value) for name, value in vars(plan).items()}
        return None

    def batch_size(self, budget_bytes: int, n_cells: int, kv_type: str) -> tuple[int, float] | None:
        """The best batch."""
        from planner.batches import POSITIONS_EACH, SIZES, best, predict, predict_inside
        from planner.kv import KvUse

        with suppress(BudgetError):
            if n_cells:
                found = predict_inside(self.profile, budget_bytes, n_cells, KvUse(kv_type))
            else:
                found = predict(self.profile, budget_bytes, SIZES, POSITIONS_EACH, KvUse(kv_type))
            chosen = best(found) if found else None
            return (chosen.n_texts, chosen.tokens_per_s) if chosen else None
        return None

    def token_ms(self, k: int, w: int, layout: int, pinned_bytes: int, window_bytes: int) -> float:
        """The simulator's time for a token."""
        from planner.simulator import token_s

        return 1000 * token_s(self.profile, Plan(k, w, Layout(layout), pinned_bytes, window_bytes))
