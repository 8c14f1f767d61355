"""`h2o plan --live`: try plans on the process that follows the plan file, keep the fastest."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.interrupts import interrupts
from h2o_cli.output import emit, note, print_json, table
from h2o_cli.plan_report import Outlook, as_json, outlook_of, report
from h2o_cli.session.defaults import LEAST_UBATCH
from planner.running_process import Overtaken, RunningProcess
from runtime.errors import BudgetError, H2OError
from runtime.plans.file import write_plan
from runtime.plans.plan import Layout, Plan
from runtime.sizes import MB, format_size

if TYPE_CHECKING:
    from planner.replan import LiveSearch, Pulled
    from profiler.model_profile import ModelProfile
    from runtime.plans.stats import PlanStats


def plan_live(
    profile: ModelProfile, path: Path, budget_bytes: int, layout: Layout | None, *, show_arms: bool, json: bool
) -> None:
    """Try plans on the process that follows the plan file, and leave the best one in force, also after Ctrl-C."""
    from planner.arms import h2o_arms
    from planner.replan import LiveSearch, Pulled, search, smaller_windows

    process = RunningProcess(path, profile.model.hash, note, write=_write_whole)
    stats = process.stats()
    budget = budget_bytes or stats.budget_bytes
    floor = _floor(profile, stats)
    if budget < floor:
        raise BudgetError(
            f"{format_size(budget)} is too little for process {stats.pid}",
            f"the smallest budget that works for it is -m {-(-floor // MB)}",
            floor,
        )
    layouts = tuple(Layout) if layout is None else (layout,)
    arms = h2o_arms(profile, budget - stats.fixed_bytes, layouts)
    found = LiveSearch(profile, arms, smaller_windows(profile, arms))

    def as_plan(arm: Plan) -> Plan:
        return replace(arm, budget_bytes=budget, model_hash=profile.model.hash)

    def pull(arm: Plan) -> Pulled:
        measured = process.measure(as_plan(arm))
        return Pulled(measured.pass_ms, measured.wait_ms, budget - measured.fixed_bytes)

    try:
        search(found, pull, lambda arm, pulled, word: note(_pull_line(found, arm, pulled, word)))
    except Overtaken:
        raise
    except H2OError:
        if process.written:
            process.keep(as_plan(found.best))
            note(f"stopped after {found.n_pulls} pulls; the best plan so far stays in {path}")
        raise
    outlook = _live_outlook(found, profile, process.keep(as_plan(found.best)), stats)
    if json:
        print_json(as_json(outlook, profile, path))
        return
    emit(report(outlook, profile) + "\n")
    if show_arms:
        emit("\n" + _explain_live(found) + "\n")
    note(f"plan {outlook.plan.generation} stays in {path}")


def _floor(profile: ModelProfile, stats: PlanStats) -> int:
    """The smallest budget of the process as it is: at its most, for a prompt and a full context."""
    return max(stats.floor_bytes, stats.fixed_bytes + profile.memory.min_window_bytes)


def _write_whole(path: str | os.PathLike[str], wanted: Plan) -> Plan:
    """Write a plan; a signal waits for the end of it."""
    with interrupts.held():
        return write_plan(path, wanted)


def _pull_line(found: LiveSearch, arm: Plan, pulled: Pulled, word: str) -> str:
    said = {
        "": "",
        "surprise": ", far from what was expected: looking again",
        "noise": ", a disturbance",
        "change": ", the machine has changed: starting again",
    }
    times = f"{pulled.pass_ms:.1f} ms per token, {pulled.wait_ms:.1f} of it waiting"
    return f"pull {found.n_pulls}: {_arm_text(arm)}: {times}{said[word]}"


def _arm_text(arm: Plan) -> str:
    return f"k={arm.k} w={arm.w} {arm.layout.label}, window {format_size(arm.window_bytes)}"


def _live_outlook(found: LiveSearch, profile: ModelProfile, written: Plan, stats: PlanStats) -> Outlook:
    """The plan the search ended with: predicted from the profile, measured, and where the process's bytes go.

    All of it is for what the process leaves for weights as it is.
    """
    from planner.footprint import streamable_bytes
    from planner.simulator import limit_s, token_s

    row = found.best_row
    budget = written.budget_bytes
    fixed = budget - found.available_bytes
    ledger = {
        "fixed_bytes": fixed,
        "resident_bytes": row.arm.pinned_bytes,
        "window_bytes": row.arm.window_bytes,
        "free_bytes": found.available_bytes - row.arm.pinned_bytes - row.arm.window_bytes,
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
        outlook_of(profile, written, budget, LEAST_UBATCH),
        ms_per_token=1000 * token_s(profile, row.arm),
        full_ms=None,
        limit_ms=1000 * limit_s(profile, streamable_bytes(profile) - row.arm.pinned_bytes),
        budget_bytes=budget,
        floor_bytes=_floor(profile, stats),
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
