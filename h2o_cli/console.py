"""A session in front of a terminal: notes on standard error, progress of what takes long, signals that wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from h2o_cli.interrupts import interrupts
from h2o_cli.output import Progress, note, warn
from h2o_cli.session.caller import Caller
from h2o_cli.session.opening import Session
from runtime.answer.generate import Step

CONSOLE = Caller(note, warn, Progress, interrupts.held, interrupts.ending)
SHORT_PROMPT = 64  # tokens: up to here a prompt takes one pass, and no progress is shown


def first_with_progress(session: Session, steps: Iterator[Step], prompt: Sequence[int]) -> Iterator[Step]:
    """The steps; while the first one is on its way, progress is shown: tokens x layers computed of a long prompt."""
    engine = session.engine
    n_new = len(prompt) - session.sequence.known(prompt)
    start = engine.computed_tokens

    def share() -> float:
        return (engine.computed_tokens - start) / n_new

    with Progress(f"reading the prompt ({n_new} tokens)", share, enabled=n_new > SHORT_PROMPT):
        first = next(steps, None)
    if first is not None:
        yield first
        yield from steps
