"""Who holds which blocks of the cache, in the fast tier or the slow one: exact accounting, nothing else.

A block is room for some tokens of one sequence. Blocks in the fast tier are positions of llama.cpp's cache, whichever
cells those are; blocks in the slow tier are places of saved keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from runtime.errors import EngineError

BLOCK_TOKENS = 16
FAST, SLOW = "fast", "slow"
ALLOCATE, APPEND, SWAP_OUT, SWAP_IN, FREE = EVENTS = ("allocate", "append", "swap_out", "swap_in", "free")


class Event(NamedTuple):
    """What happened to a sequence: the blocks that it got, or gave back with "free", in a tier.

    freed: the blocks that a swap gave back in the other tier.
    """

    event: str
    sequence: int
    blocks: tuple[int, ...]
    tier: str
    freed: tuple[int, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For a line of a trace."""
        found: dict[str, Any] = {
            "event": self.event,
            "sequence": self.sequence,
            "blocks": list(self.blocks),
            "tier": self.tier,
        }
        return found | {"freed": list(self.freed)} if self.event in (SWAP_IN, SWAP_OUT) else found


@dataclass
class Counts:
    """What was swapped since the pool was made; blocks count on each way."""

    swaps_out: int = 0
    swaps_in: int = 0
    blocks_out: int = 0
    blocks_in: int = 0


@dataclass
class SwapTimes:
    """Seconds of swaps on each way, in which nothing is computed; read_s: of those in, the slow tier's."""

    out_s: float = 0.0
    in_s: float = 0.0
    read_s: float = 0.0


class Pool:
    """Blocks 0 to `fast` - 1 and 0 to `slow` - 1. Each belongs to one sequence or is free; a sequence is in one tier.

    What is not possible raises EngineError and changes nothing.
    """

    def __init__(
        self, fast: int, slow: int, block_tokens: int = BLOCK_TOKENS, record: Callable[[Event], None] | None = None
    ) -> None:
        """record: gets every event, after it has happened."""
        self.size = {FAST: fast, SLOW: slow}
        self.block_tokens = block_tokens
        self.counts = Counts()
        self._record = record
        self._free = {tier: list(reversed(range(n))) for tier, n in self.size.items()}
        self._held: dict[int, tuple[str, list[int]]] = {}

    def header(self) -> dict[str, Any]:
        """The first line of a trace."""
        return {"event": "pool", FAST: self.size[FAST], SLOW: self.size[SLOW], "block_tokens": self.block_tokens}

    def blocks_for(self, n_tokens: int) -> int:
        """How many blocks so many tokens take."""
        return -(-n_tokens // self.block_tokens)

    def n_free(self, tier: str = FAST) -> int:
        """Blocks that nobody holds."""
        return len(self._free[tier])

    def held(self, sequence: int) -> tuple[int, ...]:
        """The blocks of a sequence, in the order of its tokens."""
        return tuple(self._held[sequence][1]) if sequence in self._held else ()

    def tier_of(self, sequence: int) -> str:
        """Where a sequence is; "" if nowhere."""
        return self._held[sequence][0] if sequence in self._held else ""

    def resident(self) -> list[int]:
        """The sequences in the fast tier."""
        return [sequence for sequence, (tier, _) in self._held.items() if tier == FAST]

    # --- what can happen ----------------------------------------------------------------------------------------

    def missing(self, sequence: int, n_tokens: int) -> int:
        """How many more blocks a sequence needs to hold so many tokens."""
        return max(0, self.blocks_for(n_tokens) - len(self.held(sequence)))

    def hold(self, sequence: int, n_tokens: int) -> None:
        """Have a sequence in the fast tier, or a new one, hold blocks for so many tokens."""
        if self.tier_of(sequence) == SLOW:
            raise EngineError(f"sequence {sequence} is swapped out")
        n_blocks = self.missing(sequence, n_tokens)
        if not n_blocks:
            return
        blocks = self._take(FAST, n_blocks)
        kind = APPEND if sequence in self._held else ALLOCATE
        self._held.setdefault(sequence, (FAST, []))[1].extend(blocks)
        self._tell(Event(kind, sequence, tuple(blocks), FAST))

    def swap_out(self, sequence: int) -> tuple[int, ...]:
        """Move a sequence to as many blocks of the slow tier: these."""
        event = self._move(SWAP_OUT, sequence, FAST, SLOW)
        self.counts.swaps_out += 1
        self.counts.blocks_out += len(event.blocks)
        return event.blocks

    def swap_in(self, sequence: int) -> tuple[int, ...]:
        """Move a sequence back; the blocks of the slow tier that it leaves."""
        event = self._move(SWAP_IN, sequence, SLOW, FAST)
        self.counts.swaps_in += 1
        self.counts.blocks_in += len(event.blocks)
        return event.freed

    def free(self, sequence: int) -> None:
        """A sequence is gone, from whichever tier; nothing where it holds nothing."""
        tier, blocks = self._held.pop(sequence, ("", []))
        if blocks:
            self._free[tier] += reversed(blocks)
            self._tell(Event(FREE, sequence, tuple(blocks), tier))

    def _move(self, kind: str, sequence: int, start: str, end: str) -> Event:
        tier, old = self._held.get(sequence, ("", []))
        if tier != start:
            raise EngineError(f"sequence {sequence} is not in the {start} tier")
        new = self._take(end, len(old))
        self._free[start] += reversed(old)
        self._held[sequence] = end, new
        event = Event(kind, sequence, tuple(new), end, tuple(old))
        self._tell(event)
        return event

    def _take(self, tier: str, n_blocks: int) -> list[int]:
        free = self._free[tier]
        if n_blocks > len(free):
            raise EngineError(f"{n_blocks} blocks are needed in the {tier} tier, {len(free)} are free")
        return [free.pop() for _ in range(n_blocks)]

    def _tell(self, event: Event) -> None:
        if self._record:
            self._record(event)
