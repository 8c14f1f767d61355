"""What a run says when an answer is there: figures for programs, and two lines for people."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from typing import Any

from h2o_cli.output import versions
from h2o_cli.session.opening import Session
from runtime.answer.meter import Statistics
from runtime.answer.speculate import DRAFT, OFF
from runtime.errors import BudgetError, Cancelled
from runtime.memory import peak_bytes
from runtime.plans.plan import Layout
from runtime.sizes import MB, format_size

WIDTH, LINES = 80, 2
DRAFT_LOSS = 0.02  # of an answer's time that a draft model may cost before that is said
_INDENT = "  "
_PREDICTION_BYTES = 16 * MB  # what predicting takes, or more


def figures(session: Session, statistics: Statistics, meter_start_s: float) -> dict[str, Any]:
    """The figures of `h2o run --json`, at its end. meter_start_s: the age of the process when the answer began."""
    plan, team = session.engine.plan, session.model.team
    found = {
        "ttft_s": statistics.ttft_s,
        "ttft_process_s": None if statistics.ttft_s is None else meter_start_s + statistics.ttft_s,
        "prefill_tokens_per_s": statistics.prefill_tokens_per_s,
        "decode_ms_per_token": statistics.decode_ms_per_token,
        "predicted_ms_per_token": None,
        "tokens_per_s": statistics.tokens_per_s,
        "bytes_read_per_token": statistics.bytes_read_per_token,
        "bytes_asked_per_token": statistics.bytes_asked_per_token,
        "streamed_bytes": session.engine.streamed_bytes,
        "streamed_bytes_per_pass": statistics.streamed_bytes_per_pass,
        "disk_wait_ms_per_token": statistics.disk_wait_ms_per_token,
        "peak_memory_bytes": peak_bytes(),
        "budget_bytes": session.budget_bytes,
        "limit_ms_per_token": statistics.limit_ms_per_token,
        "yield": statistics.yield_,
        "plan": {"k": plan.k, "w": plan.w, "layout": plan.layout.label, "generation": plan.generation},
        "plan_changes": session.engine.layout.plan_changes,
        "model": str(session.model.file.path),
        "threads": session.engine.settings.n_threads,
        "versions": versions(),
        "load_s": session.load_s,
        "seed": session.sampler.seed,
        "speculation": speculation(session, statistics),
        "tokens_per_pass": statistics.tokens_per_pass,
        "drafted": statistics.drafted,
        "accepted": statistics.accepted,
        "draft_saved_s": draft_saved_s(session),
        "ledger": session.engine.ledger.as_dict(),
        "plan_origin": session.plan_origin,
        "kv": session.engine.kv.figures() if session.engine.kv else None,
        **({"devices": team.figures(statistics.bytes_read_per_token), "hidden": team.hidden} if team else {}),
    }
    return found | {"predicted_ms_per_token": predicted_ms(session, statistics, last=True)}


def speculation(session: Session, statistics: Statistics) -> str:
    """Who drafted the tokens of an answer; "off" when nothing was drafted."""
    used = session.speculation if statistics.drafted else None
    return used.drafter.name if used else OFF


def draft_saved_s(session: Session) -> float | None:
    """Seconds that a draft model has saved (negative: lost), beside one token per pass; None without one."""
    used = session.speculation
    return used.saved_s if used and used.drafter.name == DRAFT else None


def predicted_ms(session: Session, statistics: Statistics, *, last: bool = False) -> float | None:
    """What the profile says of a token in memory as it was shared out during this answer; None without a profile.

    last: nothing else is computed, so where there is no memory to work that out, weights make room.
    """
    profile, engine = session.model.profile, session.engine
    if session.model.team:
        return 1000 * session.model.team.place.token_s or None
    if profile is None:
        return None
    streamed = statistics.streamed_bytes_per_pass
    more = 0 if streamed is None else engine.streamed_bytes - int(streamed)  # than there are at the end of the answer
    ledger = replace(engine.ledger, resident_bytes=engine.ledger.resident_bytes + more)
    plan = engine.plan
    try:
        found = profile.token_ms(plan, ledger)
        if found is None and last:
            with suppress(BudgetError, Cancelled):
                engine.layout.make_room(_PREDICTION_BYTES)
                found = profile.token_ms(plan, ledger)
        return found
    finally:
        profile.rest()


def closing_line(session: Session, statistics: Statistics, *, cut: bool = False, last: bool = False) -> str:
    """The figures of an answer, for people: at most two lines of 80 columns. cut: -n ended the answer. last: it is the
    only one, or the last one."""
    kept = _kept(session)  # by now: predicting may change it
    parts = [] if session.model.is_named else [(0, f"model {session.model.file.path.name}")]
    parts.append((0, f"{statistics.n_tokens} token{'' if statistics.n_tokens == 1 else 's'}"))
    if cut:
        parts.append((0, "cut by -n"))
    if statistics.ttft_s is not None:
        parts.append((0, f"first {_digits(statistics.ttft_s, 2)} s"))
    if statistics.decode_ms_per_token and statistics.tokens_per_s:
        parts += _speed(session, statistics, statistics.decode_ms_per_token, last=last)
    if session.engine.kv:
        parts.append((3, session.engine.kv.summary))
        if session.engine.kv.guesses:
            parts.append((0, "filter layers guessed"))
    parts.append((0, f"peak {_whole(peak_bytes())} of {_whole(session.budget_bytes)} MB"))
    parts.append((2, kept))
    return f"h2o: {fit(parts, WIDTH - len('h2o: '))}"


def _speed(session: Session, statistics: Statistics, measured_ms: float, *, last: bool) -> list[tuple[int, str]]:
    """How fast the tokens came, beside what could be expected."""
    predicted = None if statistics.accepted else predicted_ms(session, statistics, last=last)
    beside = f" (predicted {_digits(predicted)})" if predicted else ""
    parts = [
        (0, f"then {_digits(measured_ms)} ms each{beside}"),
        (3, f"{_digits(statistics.tokens_per_s or 0)} tokens/s"),
    ]
    if statistics.bytes_asked_per_token:
        parts.append((1, f"{format_size(statistics.bytes_read_per_token or 0)} read each"))
    if statistics.disk_wait_ms_per_token and statistics.disk_wait_ms_per_token >= 0.05:
        parts.append((4, f"{_digits(statistics.disk_wait_ms_per_token)} ms waited"))
    saved_s = draft_saved_s(session)
    if statistics.tokens_per_pass and (statistics.drafted or saved_s is not None):
        parts.append((0, f"{statistics.tokens_per_pass:.2f} tokens per pass ({speculation(session, statistics)})"))
        if saved_s is not None and -saved_s * 1000 > DRAFT_LOSS * measured_ms * statistics.n_tokens:
            parts.append((0, f"{_digits(-saved_s)} s lost by --draft"))
    elif statistics.bytes_asked_per_token and statistics.yield_ is not None:
        parts.append((2, f"{statistics.yield_:.0%} of the limit"))
    return parts


def _kept(session: Session) -> str:
    """The plan; where nothing is streamed, no plan matters."""
    plan = session.engine.plan
    if not session.engine.streamed_bytes:
        return "all in memory"
    layout = "" if plan.layout == Layout.BALANCED else f" {plan.layout.label}"
    return f"k={plan.k} w={plan.w}{layout}"


def fit(parts: list[tuple[int, str]], first_width: int) -> str:
    """The parts in order, wrapped; while two lines do not hold them, the part with the highest number is left out."""
    while True:
        lines = _wrap([text for _, text in parts], first_width)
        rank = max(rank for rank, _ in parts)
        if len(lines) <= LINES or rank == 0:
            return "\n".join(lines)
        parts.remove(next(part for part in reversed(parts) if part[0] == rank))


def _wrap(texts: list[str], first_width: int) -> list[str]:
    lines = [""]
    for i, text in enumerate(texts):
        end = "," if i < len(texts) - 1 else ""
        width = first_width if len(lines) == 1 else WIDTH
        longer = f"{lines[-1]} {text}" if lines[-1].strip() else lines[-1] + text
        if len(longer) + len(end) > width and lines[-1].strip():
            lines.append(_INDENT + text + end)
        else:
            lines[-1] = longer + end
    return lines


def _digits(value: float, most: int = 1) -> str:
    """A number with three figures, at most `most` of them after the point."""
    return f"{value:.{min(most, 0 if value >= 100 else 1 if value >= 10 else 2)}f}"


def _whole(n_bytes: int) -> str:
    return f"{n_bytes / MB:.0f}"
