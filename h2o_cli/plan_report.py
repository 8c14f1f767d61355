"""What `h2o plan` says about a plan: what it should reach, where the bytes go, what it was compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h2o_cli.output import table
from h2o_cli.session.defaults import LEAST_UBATCH
from runtime.plans.plan import Plan
from runtime.sizes import MB, format_size

if TYPE_CHECKING:
    from planner.choose import Choice
    from planner.kv import KvUse
    from profiler.model_profile import ModelProfile
    from runtime.kv.options import KvFilter

MOST_ARMS_SHOWN = 16
SAME_SPEED = 0.02  # relative; a full context that makes no more of a difference is not told apart


@dataclass(frozen=True)
class Outlook:
    """A plan with what it should reach on the profiled machine. ledger: part -> bytes.

    full_ms: per token when the context of ctx tokens is full (None: not known); all other times are for the start of an
    answer.
    """

    plan: Plan
    ms_per_token: float | None = None
    full_ms: float | None = None
    ctx: int = 0
    ttft_s: float | None = None
    limit_ms: float | None = None
    budget_bytes: int = 0
    floor_bytes: int = 0
    ledger: dict[str, int] | None = None
    helps: tuple[str, ...] = ()
    method: str = ""
    kv: KvUse | None = None  # how keys and values are kept, where that is known
    live: dict[str, Any] | None = None  # what --live adds to the JSON object

    def known(self, profile: ModelProfile) -> Outlook:
        """Without what the profile cannot know: one of the source system has layers only."""
        if profile.knows_memory:
            return self
        weights = {part: n for part, n in (self.ledger or {}).items() if part in ("resident_bytes", "window_bytes")}
        return replace(self, floor_bytes=0, ttft_s=None, full_ms=None, ledger=weights)


def outlook_of(
    profile: ModelProfile, wanted: Plan, budget: int, ctx: int, kv: KvUse | None = None, floor_bytes: int = 0
) -> Outlook:
    """What a plan should reach in a context of ctx tokens whose keys and values are kept as kv says.

    A plan made for a budget is filled to it, as a run does. floor_bytes: the smallest budget, where it is known better
    than from the profile (0: not).
    """
    from planner.arms import filled, in_bytes, when_full
    from planner.footprint import measure_footprint, streamable_bytes
    from planner.simulator import first_token_s, limit_s, token_s

    arm = full = in_bytes(profile, wanted)
    footprint = measure_footprint(profile, ctx, LEAST_UBATCH, kv, floor_bytes)
    if wanted.budget_bytes and budget >= footprint.floor_bytes:
        arm = filled(profile, arm, footprint.available_bytes(budget))
        full = when_full(profile, arm, footprint.available_bytes(budget, full=True))
    return Outlook(
        wanted,
        1000 * token_s(profile, arm),
        1000 * token_s(profile, full),
        ctx,
        first_token_s(profile, arm, LEAST_UBATCH, LEAST_UBATCH),
        1000 * limit_s(profile, streamable_bytes(profile) - arm.pinned_bytes),
        budget,
        footprint.floor_bytes,
        footprint.ledger(budget, arm.pinned_bytes, arm.window_bytes, always=not wanted.budget_bytes),
        kv=kv,
    ).known(profile)


def as_json(outlook: Outlook, profile: ModelProfile | None, path: Path) -> dict[str, Any]:
    """What `--json` prints."""
    from planner.kv import START_POSITIONS

    chosen, kv = outlook.plan, outlook.kv
    return {
        "k": chosen.k,
        "w": chosen.w,
        "layout": chosen.layout.label,
        "predicted_ms_per_token": outlook.ms_per_token,
        "predicted_positions": START_POSITIONS if outlook.full_ms else None,
        "predicted_full_ms_per_token": outlook.full_ms,
        "ctx_tokens": outlook.ctx or None,
        "predicted_ttft_s": outlook.ttft_s,
        "limit_ms_per_token": outlook.limit_ms,
        "budget_bytes": outlook.budget_bytes,
        "floor_bytes": outlook.floor_bytes or None,
        "ledger": outlook.ledger or {},
        "model": profile.model.path if profile else None,
        "plan_file": str(path),
        "generation": chosen.generation,
        "method": outlook.method,
        "what_helps": list(outlook.helps),
        "kv_type": kv.kv_type if kv else None,
        "kv_filter": _filter_facts(kv.filter) if kv and kv.filter else None,
        **(outlook.live or {}),
    }


def _filter_facts(options: KvFilter) -> dict[str, Any]:
    """What of a filter decides about bytes."""
    names = ("method", "layers", "wait", "keep", "select", "store")
    return {name: getattr(options, name) for name in names}


def report(outlook: Outlook, profile: ModelProfile | None) -> str:
    """The plan for people."""
    chosen = outlook.plan
    where = f" for {profile.model.name} ({profile.model.n_layers} layers)" if profile else ""
    lines = [f"plan: k={chosen.k} layers resident, window w={chosen.w}, layout {chosen.layout.label}{where}"]
    if outlook.budget_bytes:
        lines.append(f"budget: {format_size(outlook.budget_bytes)}")
    if outlook.ms_per_token and outlook.limit_ms is not None:
        share = outlook.limit_ms / outlook.ms_per_token
        first = "" if outlook.ttft_s is None else f", first token after {outlook.ttft_s:.2f} s"
        lines += [
            f"predicted: {outlook.ms_per_token:.1f} ms per token ({1000 / outlook.ms_per_token:.1f} tokens/s)"
            f"{_where(outlook, outlook.ms_per_token)}{first}",
            f"limit: {outlook.limit_ms:.1f} ms per token ({share:.0%} of it reached)",
        ]
    if outlook.method:
        lines.append(f"found by: {outlook.method}")
    if outlook.kv and outlook.kv.filter and outlook.kv.filter.store == "disk":
        lines.append("not in these times: keys and values read from the disk")
    if outlook.live:
        lines.append(f"measured: {outlook.live['measured_ms_per_token']:.1f} ms per token")
    if outlook.floor_bytes:
        lines.append(f"smallest budget: -m {-(-outlook.floor_bytes // MB)}")
    if profile and not profile.knows_memory:
        lines.append("not in this profile: process, KV cache, head and embedding (measure with `h2o profile MODEL`)")
    if outlook.ledger:
        rows = [(part.removesuffix("_bytes").replace("_", " "), format_size(n)) for part, n in outlook.ledger.items()]
        lines += ["memory:", *(f"  {line}" for line in table(rows, right=(1,)).split("\n"))]
    if outlook.helps:
        lines += ["what would help:", *(f"  {line}" for line in outlook.helps)]
    return "\n".join(lines)


def _where(outlook: Outlook, ms_per_token: float) -> str:
    """Where in its context an answer is that fast, and how fast it is at the end of it."""
    from planner.kv import START_POSITIONS

    if not outlook.full_ms:
        return ""
    if abs(outlook.full_ms - ms_per_token) <= SAME_SPEED * ms_per_token:
        return f" in all of a context of {outlook.ctx}"
    return f" at {START_POSITIONS} positions, {outlook.full_ms:.1f} ms at {outlook.ctx} (full)"


def explain_choice(choice: Choice) -> str:
    """The plans the bandit compared, best first, and beside them the one of the exact search."""
    from planner.choose import BESIDE, NEAR

    rows: list[Sequence[str]] = [("k", "w", "layout", "resident", "window", "ms/token", "+-", "plays")]
    for seen in sorted(choice.statistics, key=lambda s: s.mean_ms)[:MOST_ARMS_SHOWN]:
        arm = seen.arm
        sizes = (format_size(arm.pinned_bytes), format_size(arm.window_bytes))
        times = (f"{seen.mean_ms:.2f}", f"{seen.sd_ms:.2f}", str(seen.n_plays))
        rows.append((str(arm.k), str(arm.w), arm.layout.label, *sizes, *times))
    lines = [
        f"compared by the bandit, with the disk at {BESIDE:.0%} of its speed (of those within {NEAR - 1:.0%} of the",
        "fastest, balanced ones come first, and the one with most resident is taken):",
        table(rows, right=(0, 1, 3, 4, 5, 6, 7)),
    ]
    left_out = len(choice.statistics) - MOST_ARMS_SHOWN
    if left_out > 0:
        lines.append(f"... and {left_out} more")
    arm, window = choice.exact.arm, format_size(choice.exact.arm.window_bytes)
    lines.append(f"exact search: k={arm.k} w={arm.w} {arm.layout.label}, window {window}: ")
    lines[-1] += f"predicted {choice.exact.token_ms:.1f} ms per token"
    return "\n".join(lines)
