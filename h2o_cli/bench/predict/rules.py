"""Rules that say which sequence is swapped in next. Nothing is learnt, and nothing from later is known."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from h2o_cli.bench.predict.sequences import SwapIns, Waiting

BAR = "previous id - 1"
KNOWN_THEN = ", known then"  # ends the names of rules that look just before the swap-in
HISTORY, SPLIT = 32, 8  # of the majority prefetcher: steps that it knows, and its first window is a part of them

Guesses = list[int | None]  # for each swap-in; None: the rule says nothing, and is wrong


def guesses(swap_ins: SwapIns) -> dict[str, Guesses]:
    """What every rule says before each swap-in; those of who waits only where a trace told it."""
    ids = swap_ins.ids
    found = {
        BAR: _after(ids, -1),
        "previous id + 1": _after(ids, 1),
        "repeat": _after(ids, 0),
        "majority of steps": majority(ids),
    }
    for moment, waiting in (("", swap_ins.before), (KNOWN_THEN, swap_ins.at)):
        if waiting:
            found[f"first swapped out{moment}"] = _each(waiting, lambda who: next(iter(who.sequences), None))
            found[f"first to arrive{moment}"] = _each(waiting, lambda who: who.first_arrived)
    return found


def _after(ids: Sequence[int], step: int) -> Guesses:
    return [None, *(number + step for number in ids[:-1])]


def _each(waiting: Sequence[Waiting], chosen: Callable[[Waiting], int | None]) -> Guesses:
    return [chosen(who) for who in waiting]


def majority(ids: Sequence[int], history: int = HISTORY, split: int = SPLIT) -> Guesses:
    """The last id and the step that most of the last steps were, after Leap (Al Maruf and Chowdhury, 2020).

    The majority is looked for in the last history / split steps, then in twice as many, and so on up to history.
    Without one, the last that there was goes on; before the first one nothing is said.
    """
    found: Guesses = [None] * min(1, len(ids))
    steps = [after - before for before, after in itertools.pairwise(ids)]
    last: int | None = None
    for i in range(1, len(ids)):
        newest = trend(steps[max(0, i - 1 - history) : i - 1], history // split)
        last = last if newest is None else newest
        found.append(None if last is None else ids[i - 1] + last)
    return found


def trend(steps: Sequence[int], first_window: int) -> int | None:
    """The step that more than half of the last ones are, in the smallest window that has such a one."""
    window = max(1, first_window)
    while steps:
        recent = steps[-window:]
        candidate = boyer_moore(recent)
        if 2 * sum(step == candidate for step in recent) > len(recent):
            return candidate
        if window >= len(steps):
            break
        window *= 2
    return None


def boyer_moore(values: Sequence[int]) -> int:
    """The value that more than half of them have, if one does; else any (Boyer and Moore, 1981)."""
    candidate, votes = values[0], 0
    for value in values:
        if not votes:
            candidate = value
        votes += 1 if value == candidate else -1
    return candidate
