"""`h2o plan` for users of the source system: its planner, its plan file, a plan by hand without a profile."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from h2o_cli.output import emit, note, print_json
from h2o_cli.plan_report import Outlook, as_json, report
from h2o_cli.session.models import need_profile, resolve_model
from runtime.errors import UsageError
from runtime.plans.file import write_plan, write_source_plan
from runtime.plans.plan import Layout, Plan
from runtime.sizes import MIB, parse_size

MOST_EPISODES = 100_000


@dataclass(frozen=True)
class SourceSearch:
    """What the flags of `h2o plan --source` say. memory: as typed; a bare number is the source system's MB, a MiB."""

    profile: Path | None
    model: str | None
    memory: str
    c: float
    episodes: int
    seed: int | None

    def __post_init__(self) -> None:
        if not 1 <= self.episodes <= MOST_EPISODES:
            raise UsageError(f"--episodes {self.episodes} is not possible", f"give 1 to {MOST_EPISODES}")
        if not 0 <= self.c < float("inf"):
            raise UsageError(f"--c {self.c} is not possible", "give 0 or more")

    @property
    def memory_mib(self) -> float:
        """The memory for layers."""
        n_bytes = parse_size(self.memory)
        try:
            return float(self.memory)
        except ValueError:
            return n_bytes / MIB


def plan_as_source(search: SourceSearch, path: Path, *, compat: bool, json: bool) -> None:
    """Find the plan of the source system, write it, and say so. Raises ProfileError, BudgetError, PlanError."""
    from planner.source.planner import source_plan
    from planner.source.profile import export_source, load_foreign
    from profiler.model_profile import load_profile

    if search.profile:
        profile = load_foreign(search.profile)
    else:
        from runtime.llama.model_file import ModelFile

        file = ModelFile.open(resolve_model(search.model))
        profile = load_profile(need_profile(file.hash, str(file.path)))
    memory = search.memory_mib
    source = export_source(profile)
    found = source_plan(source, memory, c=search.c, episodes=search.episodes, seed=search.seed)
    k, w = found.arm.k, found.arm.w
    written = write(path, Plan(k, w, model_hash=profile.model.hash), compat=compat)
    best, layers_mib = found.optimum, sum(source.layer_sizes)
    if json:
        facts = {"k": k, "w": w, "predicted_ms_per_token": found.token_ms, "memory_mib": memory, "method": "source"}
        plays = {"arms": found.n_arms, "arms_played": found.n_played, "plays_of_best": found.n_plays}
        optimum = {"optimum": {"k": best.arm.k, "w": best.arm.w, "predicted_ms_per_token": best.token_ms}}
        print_json(facts | plays | optimum | {"plan_file": str(path), "generation": written.generation})
        return
    lines = [
        f"plan: k={k} layers resident, window w={w} (the source system's planner for {profile.model.name})",
        f"memory: {memory:g} MiB of {layers_mib} MiB of layers; embedding, head, KV cache and process come on top",
        f"predicted: {found.token_ms:.0f} ms per token, by the source system's formulas",
        f"played: {found.n_played} of {found.n_arms} plans in {search.episodes} plays, {found.n_plays} of this one",
    ]
    if best.token_ms < found.token_ms:
        lines.append(f"not played: k={best.arm.k} w={best.arm.w} with {best.token_ms:.0f} ms (raise --episodes)")
    emit("\n".join(lines) + "\n")
    note(written_text(written, path))


def set_by_hand(
    plan: tuple[int, int], layout: Layout | None, path: Path, model: str | None, *, compat: bool, json: bool
) -> None:
    """Write a plan for a model without a profile; with compat and no model named, for any model."""
    k, w = plan
    model_hash = 0
    if model is not None or not compat:
        from runtime.llama.model_file import ModelFile

        file = ModelFile.open(resolve_model(model))
        check_layers(k, w, file.n_layers)
        model_hash = file.hash
    wanted = Plan(k, w, Layout.PREFIX if layout is None else layout, model_hash=model_hash)
    written = write(path, wanted, compat=compat)
    if json:
        print_json(as_json(Outlook(written), None, path))
        return
    emit(report(Outlook(written), None) + "\n")
    note(written_text(written, path))


def check_layers(k: int, w: int, n_layers: int) -> None:
    """Raise UsageError where no model of n_layers layers can have k resident and w in the window."""
    if k > n_layers or not 1 <= w <= n_layers:
        raise UsageError(f"--set {k},{w} is not possible", f"the model has {n_layers} layers: K from 0, W from 1")


def write(path: Path, plan: Plan, *, compat: bool) -> Plan:
    """Write a plan file, or (compat) the 8 bytes of the source system; the plan as it is written. Raises PlanError."""
    if not compat:
        return write_plan(path, plan)
    write_source_plan(path, plan.k, plan.w)
    return Plan(plan.k, plan.w)


def written_text(written: Plan, path: Path) -> str:
    """What is said of a plan that was written."""
    return f"plan {written.generation} written to {path}" if written.generation else f"k and w written to {path}"
