"""`h2o plan`: choose what stays in memory and what is streamed, and tell running processes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from h2o_cli.defaults import CONVERSATION_CONTEXT, LEAST_UBATCH, default_budget
from h2o_cli.interrupts import interrupts
from h2o_cli.models import need_profile, resolve_model
from h2o_cli.output import emit, note, print_json, table
from runtime.errors import BudgetError, H2OError, ModelError, PlanError, ProfileError, UsageError
from runtime.plan import Layout, Plan
from runtime.plan_file import default_plan_path, read_plan, write_plan
from runtime.plan_stats import Overtaken, PlanStats, RunningProcess
from runtime.sizes import MB, format_size, parse_size

if TYPE_CHECKING:
    from planner.arms import Arm
    from planner.choose import Choice
    from planner.replan import LiveSearch, Pulled
    from profiler.model_profile import ModelProfile

MOST_ARMS_SHOWN = 16

EPILOG = """Examples:

\b
  h2o plan -m 400                 plan for 400 MB; running processes of this model take it over
  h2o plan -m 2GB --explain       with the plans that were compared
  h2o plan --set 10,2             exactly 10 layers resident, a window of 2 layers
  h2o plan --show                 the plan in force
  h2o plan --live                 try plans on the process that is running, keep the fastest
  h2o plan -c profile.json -m 1GB --json
"""


@dataclass(frozen=True)
class PlanOptions:
    """What the flags of `h2o plan` say."""

    budget_bytes: int
    plan_file: Path
    layout: Layout | None
    ctx: int | None
    by_hand: tuple[int, int] | None


@dataclass(frozen=True)
class Outlook:
    """A plan with what it should reach on the profiled machine. ledger: part -> bytes."""

    plan: Plan
    ms_per_token: float | None = None
    ttft_s: float | None = None
    limit_ms: float | None = None
    budget_bytes: int = 0
    floor_bytes: int = 0
    ledger: dict[str, int] | None = None
    helps: tuple[str, ...] = ()
    method: str = ""
    live: dict[str, Any] | None = None  # what --live adds to the JSON object


def plan(  # noqa: PLR0913, PLR0917 - one parameter per flag
    model: Annotated[str | None, typer.Argument(metavar="MODEL", show_default=False, help="A profiled model.")] = None,
    memory: Annotated[
        str | None,
        typer.Option("-m", "--memory", metavar="SIZE", help="Memory of a process: 400 (MB), 1.5GB. [default: 60 %]"),
    ] = None,
    profile: Annotated[
        Path | None, typer.Option("-c", "--profile", metavar="PROFILE", help="A profile from `h2o profile`.")
    ] = None,
    plan_file: Annotated[
        Path | None, typer.Option("-s", "--plan-file", metavar="PLANFILE", help="Write the plan there.")
    ] = None,
    by_hand: Annotated[
        str | None, typer.Option("--set", metavar="K,W", help="K layers resident, a window of W layers.")
    ] = None,
    show: Annotated[bool, typer.Option("--show", help="Show the plan in the plan file, write nothing.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Show the plans that were compared.")] = False,
    live: Annotated[bool, typer.Option("--live", help="Try plans on the running process, keep the fastest.")] = False,
    layout: Annotated[str, typer.Option("--layout", help="auto, prefix, even or balanced.")] = "auto",
    ctx: Annotated[int | None, typer.Option("--ctx", metavar="N", help="Context in tokens.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose what stays in memory and what is streamed, for a budget.

    The plan goes into the plan file; `h2o run` takes it over, also while it is running.
    """
    if show and (by_hand or memory):
        raise UsageError("--show writes no plan", "leave out -m and --set, or --show")
    if live and (show or by_hand):
        raise UsageError("--live finds the plan by itself", "leave out --set and --show, or --live")
    if ctx is not None and ctx < 1:
        raise UsageError(f"--ctx {ctx} is not possible", "give 1 or more")
    options = PlanOptions(
        budget_bytes=parse_size(memory) if memory else 0,
        plan_file=plan_file or default_plan_path(),
        layout=None if layout == "auto" else Layout.parse(layout),
        ctx=ctx,
        by_hand=_parse_set(by_hand) if by_hand else None,
    )
    if show:
        _show(options, profile, model, json=json)
    elif live:
        _live(options, _load(profile, model), explain=explain, json=json)
    else:
        _make(options, _load(profile, model), explain=explain, json=json)


def _make(options: PlanOptions, profile: ModelProfile, *, explain: bool, json: bool) -> None:
    """Decide, write the plan file, and say so."""
    outlook, choice = _decide(profile, options)
    written = write_plan(options.plan_file, outlook.plan)
    outlook = replace(outlook, plan=written)
    if json:
        print_json(_as_json(outlook, profile, options.plan_file))
        return
    emit(_report(outlook, profile) + "\n")
    if explain and choice:
        emit("\n" + _explain(choice) + "\n")
    note(f"plan {written.generation} written to {options.plan_file}")


def _live(options: PlanOptions, profile: ModelProfile, *, explain: bool, json: bool) -> None:
    """Try plans on the process that follows the plan file, and leave the best one in force, also after Ctrl-C."""
    from planner.arms import h2o_arms
    from planner.replan import LiveSearch, Pulled, search, smaller_windows

    process = RunningProcess(options.plan_file, profile.model.hash, note, write=_write_whole)
    stats = process.stats()
    budget = options.budget_bytes or stats.budget_bytes
    least = stats.fixed_bytes + profile.memory.min_window_bytes
    if budget < least:
        raise BudgetError(f"{format_size(budget)} is too little for process {stats.pid}", f"give -m {-(-least // MB)}")
    layouts = tuple(Layout) if options.layout is None else (options.layout,)
    arms = h2o_arms(profile, budget - stats.fixed_bytes, layouts)
    found = LiveSearch(profile, arms, smaller_windows(profile, arms))

    def as_plan(arm: Arm) -> Plan:
        return Plan(arm.k, arm.w, arm.layout, arm.pinned_bytes, arm.window_bytes, budget, profile.model.hash)

    def pull(arm: Arm) -> Pulled:
        measured = process.measure(as_plan(arm))
        return Pulled(measured.pass_ms, measured.wait_ms)

    try:
        search(found, pull, lambda arm, pulled, word: note(_pull_line(found, arm, pulled, word)))
    except Overtaken:
        raise
    except H2OError:
        if process.written:
            process.keep(as_plan(found.best))
            note(f"stopped after {found.n_pulls} pulls; the best plan so far stays in {options.plan_file}")
        raise
    outlook = _live_outlook(found, profile, process.keep(as_plan(found.best)), stats)
    if json:
        print_json(_as_json(outlook, profile, options.plan_file))
        return
    emit(_report(outlook, profile) + "\n")
    if explain:
        emit("\n" + _explain_live(found) + "\n")
    note(f"plan {outlook.plan.generation} stays in {options.plan_file}: {outlook.method}")


def _write_whole(path: str | os.PathLike[str], wanted: Plan) -> Plan:
    """Write a plan; a signal waits for the end of it."""
    with interrupts.held():
        return write_plan(path, wanted)


def _pull_line(found: LiveSearch, arm: Arm, pulled: Pulled, word: str) -> str:
    said = {
        "": "",
        "surprise": ", far from what was expected: looking again",
        "noise": ", a disturbance",
        "change": ", the machine has changed: starting again",
    }
    times = f"{pulled.pass_ms:.1f} ms per token, {pulled.wait_ms:.1f} of it waiting"
    return f"pull {found.n_pulls}: {_arm_text(arm)}: {times}{said[word]}"


def _arm_text(arm: Arm) -> str:
    return f"k={arm.k} w={arm.w} {arm.layout.label}, window {format_size(arm.window_bytes)}"


def _live_outlook(found: LiveSearch, profile: ModelProfile, written: Plan, stats: PlanStats) -> Outlook:
    """The plan the search ended with: predicted from the profile, measured, and where the process's bytes go."""
    row = found.best_row
    budget, weights = written.budget_bytes, row.arm.pinned_bytes + row.arm.window_bytes
    ledger = {
        "fixed_bytes": stats.fixed_bytes,
        "resident_bytes": row.arm.pinned_bytes,
        "window_bytes": row.arm.window_bytes,
        "free_bytes": budget - stats.fixed_bytes - weights,
    }
    facts = {
        "measured_ms_per_token": row.measured_ms,
        "pulls": found.n_pulls,
        "restarts": found.n_restarts,
        "settled": found.is_settled,
        "pid": stats.pid,
    }
    measured = sum(row.n > 0 for row in found.rows)
    how = f"{found.n_pulls} pulls of {measured} plans on process {stats.pid}"
    return replace(
        _outlook(profile, written, row.arm, LEAST_UBATCH, budget),
        budget_bytes=budget,
        floor_bytes=stats.fixed_bytes + profile.memory.min_window_bytes,
        ledger=ledger,
        method=how + (", settled" if found.is_settled else ", others may be as good"),
        live=facts,
    )


def _explain_live(found: LiveSearch) -> str:
    """The plans that were tried, best first."""
    rows: list[Sequence[str]] = [("k", "w", "layout", "resident", "window", "predicted", "measured", "pulls")]
    for row in sorted((row for row in found.rows if row.n), key=lambda row: row.measured_ms):
        sizes = (format_size(row.arm.pinned_bytes), format_size(row.arm.window_bytes))
        times = (f"{row.predicted_ms:.1f}", f"{row.measured_ms:.1f}", str(row.n))
        rows.append((str(row.arm.k), str(row.arm.w), row.arm.layout.label, *sizes, *times))
    return "tried (ms per token):\n" + table(rows, right=(0, 1, 3, 4, 5, 6, 7))


def _parse_set(text: str) -> tuple[int, int]:
    parts = text.split(",")
    if len(parts) != 2 or not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--set {text} is not possible", "give two numbers: --set K,W, such as 10,2")
    return int(parts[0]), int(parts[1])


def _load(path: Path | None, model: str | None) -> ModelProfile:
    """The profile named, or the one of the model. Raises ProfileError."""
    from profiler.model_profile import load_profile

    if path is None:
        from runtime.model_file import ModelFile

        file = ModelFile.open(resolve_model(model))
        path = need_profile(file.hash, str(file.path))
    return load_profile(path)


def _context(options: PlanOptions, profile: ModelProfile) -> int:
    return options.ctx or profile.memory.ctx_tokens or CONVERSATION_CONTEXT


def _decide(profile: ModelProfile, options: PlanOptions) -> tuple[Outlook, Choice | None]:
    """The planner's choice, or the plan given by hand."""
    if options.by_hand:
        return _by_hand(profile, options, options.budget_bytes or default_budget()), None
    budget = options.budget_bytes or _budget_in(options.plan_file, profile.model.hash) or default_budget()
    from planner.choose import choose

    ctx = _context(options, profile)
    choice = choose(profile, budget, ctx_tokens=ctx, ubatch_tokens=LEAST_UBATCH, layout=options.layout)
    outlook = Outlook(
        choice.plan,
        choice.predicted_ms_per_token,
        choice.predicted_ttft_s,
        choice.limit_ms_per_token,
        budget,
        choice.floor_bytes,
        choice.ledger,
        choice.what_helps,
        choice.method,
    )
    return outlook, choice


def _budget_in(path: Path, model_hash: int) -> int:
    """The budget of the plan in force for this model; 0 when there is none."""
    try:
        old = read_plan(path)
    except PlanError:
        return 0
    return old.budget_bytes if old.model_hash in (0, model_hash) else 0


def _by_hand(profile: ModelProfile, options: PlanOptions, budget: int) -> Outlook:
    """A plan with exactly these k and w. Raises BudgetError when it does not fit the budget."""
    from planner.arms import set_arm

    k, w = options.by_hand or (0, 1)
    n_layers = profile.model.n_layers
    if k > n_layers or not 1 <= w <= n_layers:
        raise UsageError(f"--set {k},{w} is not possible", f"the model has {n_layers} layers: K from 0, W from 1")
    layout = Layout.PREFIX if options.layout is None else options.layout
    wanted = Plan(k, w, layout, model_hash=profile.model.hash)
    arm = set_arm(profile, k, w, layout)
    outlook = _outlook(profile, wanted, arm, _context(options, profile), budget)
    if options.budget_bytes and outlook.ledger and outlook.ledger["free_bytes"] < 0:
        need = options.budget_bytes - outlook.ledger["free_bytes"]
        raise BudgetError(
            f"k={k}, w={w} needs {format_size(need)}, more than {format_size(options.budget_bytes)}",
            "raise -m or lower K and W",
            floor_bytes=need,
        )
    return outlook


def _outlook(profile: ModelProfile, wanted: Plan, arm: Arm, ctx: int, budget: int) -> Outlook:
    """What a plan should reach."""
    from planner.footprint import measure_footprint, streamable_bytes
    from planner.simulator import first_token_s, limit_s, token_s

    footprint = measure_footprint(profile, ctx, LEAST_UBATCH)
    return Outlook(
        wanted,
        1000 * token_s(profile, arm),
        first_token_s(profile, arm, LEAST_UBATCH, LEAST_UBATCH),
        1000 * limit_s(profile, streamable_bytes(profile) - arm.pinned_bytes),
        budget,
        footprint.floor_bytes,
        footprint.ledger(budget, arm.pinned_bytes, arm.window_bytes),
    )


def _show(options: PlanOptions, profile: Path | None, model: str | None, *, json: bool) -> None:
    """Print the plan in the plan file, with its outlook where there is a profile of its model."""
    from planner.arms import Arm, set_arm

    current = read_plan(options.plan_file)
    outlook, found = Outlook(current, budget_bytes=current.budget_bytes), None
    try:
        found = _load(profile, model)
        found.check_model(current.model_hash)
    except (ModelError, ProfileError) as error:
        note(f"no prediction: {error}")
    else:
        arm = set_arm(found, current.k, current.w, current.layout)
        if current.pinned_bytes or current.window_bytes:
            arm = Arm(current.k, current.w, current.layout, current.pinned_bytes, current.window_bytes)
        outlook = _outlook(found, current, arm, _context(options, found), current.budget_bytes or default_budget())
    if json:
        print_json(_as_json(outlook, found, options.plan_file))
    else:
        emit(_report(outlook, found) + "\n")


def _as_json(outlook: Outlook, profile: ModelProfile | None, path: Path) -> dict[str, Any]:
    chosen = outlook.plan
    return {
        "k": chosen.k,
        "w": chosen.w,
        "layout": chosen.layout.label,
        "predicted_ms_per_token": outlook.ms_per_token,
        "predicted_ttft_s": outlook.ttft_s,
        "limit_ms_per_token": outlook.limit_ms,
        "budget_bytes": outlook.budget_bytes,
        "floor_bytes": outlook.floor_bytes,
        "ledger": outlook.ledger or {},
        "model": profile.model.path if profile else None,
        "plan_file": str(path),
        "generation": chosen.generation,
        "method": outlook.method,
        "what_helps": list(outlook.helps),
        **(outlook.live or {}),
    }


def _report(outlook: Outlook, profile: ModelProfile | None) -> str:
    """The plan for people."""
    chosen = outlook.plan
    where = f" for {profile.model.name} ({profile.model.n_layers} layers)" if profile else ""
    lines = [f"plan: k={chosen.k} layers resident, window w={chosen.w}, layout {chosen.layout.label}{where}"]
    if outlook.budget_bytes:
        lines.append(f"budget: {format_size(outlook.budget_bytes)}")
    if outlook.ms_per_token and outlook.ttft_s is not None and outlook.limit_ms is not None:
        share = outlook.limit_ms / outlook.ms_per_token
        lines += [
            f"predicted: {outlook.ms_per_token:.1f} ms per token ({1000 / outlook.ms_per_token:.1f} tokens/s), "
            f"first token after {outlook.ttft_s:.2f} s",
            f"limit: {outlook.limit_ms:.1f} ms per token ({share:.0%} of it reached)",
        ]
    if outlook.live:
        lines.append(f"measured: {outlook.live['measured_ms_per_token']:.1f} ms per token")
    if outlook.floor_bytes:
        lines.append(f"smallest budget: {format_size(outlook.floor_bytes)}")
    if outlook.ledger:
        rows = [(part.removesuffix("_bytes").replace("_", " "), format_size(n)) for part, n in outlook.ledger.items()]
        lines += ["memory:", *(f"  {line}" for line in table(rows, right=(1,)).split("\n"))]
    if outlook.helps:
        lines += ["what would help:", *(f"  {line}" for line in outlook.helps)]
    return "\n".join(lines)


def _explain(choice: Choice) -> str:
    """The plans the planner compared, best first."""
    rows: list[Sequence[str]] = [("k", "w", "layout", "resident", "window", "ms/token", "+-", "plays")]
    for seen in sorted(choice.statistics, key=lambda s: s.mean_ms)[:MOST_ARMS_SHOWN]:
        arm = seen.arm
        sizes = (format_size(arm.pinned_bytes), format_size(arm.window_bytes))
        times = (f"{seen.mean_ms:.2f}", f"{seen.sd_ms:.2f}", str(seen.n_plays))
        rows.append((str(arm.k), str(arm.w), arm.layout.label, *sizes, *times))
    left_out = len(choice.statistics) - MOST_ARMS_SHOWN
    lines = [f"compared ({choice.method}):", table(rows, right=(0, 1, 3, 4, 5, 6, 7))]
    return "\n".join(lines + ([f"... and {left_out} more"] if left_out > 0 else []))
