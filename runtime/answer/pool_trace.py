"""A trace of a pool, one JSON object a line: written, checked by playing it again, and in the source's forms."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from runtime.answer.pool import ALLOCATE, APPEND, EVENTS, FAST, FREE, SLOW, SWAP_IN, SWAP_OUT, Event, Pool
from runtime.errors import LIMITS, H2OError

_OTHER = {FAST: SLOW, SLOW: FAST}
_SOURCE_NAMES = {
    ALLOCATE: "Allocate sequence",
    APPEND: "Appended slots",
    SWAP_OUT: "Swapped out blocks",
    SWAP_IN: "Swapped in blocks",
    FREE: "Freed block",
}


class TraceError(H2OError):
    """A trace that breaks a rule of the pool, or is none."""


@dataclass
class Replay:
    """What a trace did: how often each event came, the most blocks held in each tier, and sequences never freed."""

    events: dict[str, int] = field(default_factory=lambda: dict.fromkeys(EVENTS, 0))
    most: dict[str, int] = field(default_factory=lambda: {FAST: 0, SLOW: 0})
    left: list[int] = field(default_factory=list)


def check(trace: Iterable[Mapping[str, Any]], *, whole: bool = True) -> Replay:
    """Play a trace again. whole: it ended when all sequences had.

    Raises TraceError at the first event that breaks a rule: a block has one owner, exists in its tier, and is given
    back by its owner; a sequence is in one tier, gives back all that it has when it moves or ends, and gets as many
    blocks where it moves to. At the end of a whole trace nobody holds anything.
    """
    lines = iter(trace)
    first = next(lines, None)
    sizes = {tier: (first or {}).get(tier) for tier in (FAST, SLOW)}
    if not first or first.get("event") != "pool" or not all(_is_count(n) for n in sizes.values()):
        raise TraceError("this is no trace: its first line does not say how large the pool is")
    state = _State({tier: int(n or 0) for tier, n in sizes.items()})
    replay = Replay()
    for number, line in enumerate(lines, 2):
        try:
            state.apply(_event(line))
        except TraceError as error:
            raise TraceError(f"line {number}: {error.message}") from None
        replay.events[line["event"]] += 1
        for tier, owners in state.owners.items():
            replay.most[tier] = max(replay.most[tier], len(owners))
    replay.left = sorted(state.held)
    if whole and replay.left:
        raise TraceError(f"at the end sequence {replay.left[0]} still holds blocks ({len(replay.left)} in all do)")
    return replay


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _event(line: Mapping[str, Any]) -> Event:
    """A line as an event. Raises TraceError."""
    found = [line.get("event"), line.get("sequence"), line.get("blocks"), line.get("tier"), line.get("freed", [])]
    kind, sequence, blocks, tier, freed = found
    if kind not in EVENTS or tier not in _OTHER or not _is_count(sequence):
        raise TraceError(f"{dict(line)} is no event")
    for numbers in (blocks, freed):
        if not isinstance(numbers, list) or not all(_is_count(n) for n in numbers):
            raise TraceError(f"{dict(line)} is no event")
    return Event(kind, line["sequence"], tuple(line["blocks"]), tier, tuple(line.get("freed", [])))


class _State:
    """Who owns what, from the events alone: this shares nothing with Pool, which it checks."""

    def __init__(self, sizes: dict[str, int]) -> None:
        self._sizes = sizes
        self.owners: dict[str, dict[int, int]] = {FAST: {}, SLOW: {}}
        self.held: dict[int, tuple[str, set[int]]] = {}

    def apply(self, event: Event) -> None:
        """Raises TraceError."""
        kind, sequence, tier = event.event, event.sequence, event.tier
        at = self.held.get(sequence, ("", set()))[0]
        came_from = {ALLOCATE: "", APPEND: FAST, SWAP_OUT: FAST, SWAP_IN: SLOW, FREE: tier}[kind]
        goes_to = SLOW if kind == SWAP_OUT else tier if kind == FREE else FAST
        if at != came_from or tier != goes_to:
            raise TraceError(f"{kind} in the {tier} tier of sequence {sequence}, which is in {at or 'none'}")
        if bool(event.freed) != (kind in (SWAP_IN, SWAP_OUT)) or not event.blocks:
            raise TraceError(f"{kind} of sequence {sequence} with blocks {event.blocks}, freed {event.freed}")
        if kind == FREE:
            self._give_back(sequence, tier, event.blocks)
            return
        if event.freed:
            if len(event.freed) != len(event.blocks):
                raise TraceError(f"{kind} of sequence {sequence}: {len(event.freed)} blocks became {len(event.blocks)}")
            self._give_back(sequence, _OTHER[tier], event.freed)
        self._get(sequence, tier, event.blocks)

    def _get(self, sequence: int, tier: str, blocks: tuple[int, ...]) -> None:
        owners = self.owners[tier]
        mine = self.held.setdefault(sequence, (tier, set()))[1]
        for block in blocks:
            if block >= self._sizes[tier]:
                raise TraceError(f"there is no block {block} in the {tier} tier")
            if block in owners:
                raise TraceError(f"block {block} of the {tier} tier is sequence {owners[block]}'s, not {sequence}'s")
            owners[block] = sequence
            mine.add(block)

    def _give_back(self, sequence: int, tier: str, blocks: tuple[int, ...]) -> None:
        mine = self.held.pop(sequence)[1]
        if len(set(blocks)) != len(blocks) or set(blocks) != mine:
            there = sorted(mine)
            raise TraceError(f"sequence {sequence} gives back {sorted(blocks)} of the {tier} tier, it has {there}")
        for block in blocks:
            del self.owners[tier][block]


def read_trace(file: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The objects of a trace's lines. Raises TraceError."""
    for number, line in enumerate(file, 1):
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise TraceError(f"line {number} of the trace is no JSON object")
        yield found


class TraceWriter:
    """Writes a pool's events to a file as they happen."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def begin(self, pool: Pool) -> None:
        """The first line."""
        self._file.write(json.dumps(pool.header()) + "\n")

    def __call__(self, event: Event) -> None:
        """One more line."""
        self._file.write(json.dumps(event.as_dict()) + "\n")


@contextmanager
def open_trace(path: Path) -> Iterator[TraceWriter]:
    """A trace in a file, written anew. Raises H2OError where it cannot be written."""
    try:
        with path.open("w", encoding="utf-8") as file:
            yield TraceWriter(file)
    except OSError as error:
        step = LIMITS.get(error.errno or 0, "give another --trace")
        raise H2OError(f"the trace {path} cannot be written: {error.strerror}", step) from None


def write_operations(trace: Iterable[Mapping[str, Any]], file: TextIO) -> None:
    """The source's output.csv: operation, in its words, and sequence of each event."""
    file.write("operation,sequence_id\n")
    for line in trace:
        if line["event"] in _SOURCE_NAMES:
            file.write(f"{_SOURCE_NAMES[line['event']]},{line['sequence']}\n")


def write_swap_ins(trace: Iterable[Mapping[str, Any]], file: TextIO) -> None:
    """The source's pure_sequence.csv: the sequences that were swapped in, in that order."""
    file.write("sequence_id\n")
    file.writelines(f"{line['sequence']}\n" for line in trace if line["event"] == SWAP_IN)
