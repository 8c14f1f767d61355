"""Which texts of a batch are computed together: what --schedule, --batch-size, --num-batches and --overlap say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import UsageError

if TYPE_CHECKING:
    from runtime.engine.timeline import Timeline

CONTINUOUS, ZIGZAG = "continuous", "zigzag"
MOST_SEQUENCES = 32
_SWITCH = {"on": True, "off": False}


@dataclass(frozen=True)
class Schedule:
    """batch_size: texts of a batch; num_batches: batches of a block (continuous: 1). overlap: read while computing."""

    name: str
    batch_size: int
    num_batches: int
    overlap: bool

    @classmethod
    def parse(cls, name: str, batch_size: int, num_batches: int | None, overlap: str, *, swaps: bool) -> Schedule:
        """From the flags as given. swaps: texts may be swapped out. Raises UsageError."""
        if name not in (CONTINUOUS, ZIGZAG):
            raise UsageError(f"there is no --schedule {name}", f"give {CONTINUOUS} or {ZIGZAG}")
        if overlap not in _SWITCH:
            raise UsageError(f"--overlap {overlap} is not possible", f"give {' or '.join(_SWITCH)}")
        if not 1 <= batch_size <= MOST_SEQUENCES:
            raise UsageError(f"--batch-size {batch_size} is not possible", f"give 1 to {MOST_SEQUENCES}")
        if name == CONTINUOUS and num_batches is not None:
            raise UsageError("--num-batches is the size of a block", f"add --schedule {ZIGZAG}")
        if name == ZIGZAG and swaps:
            raise UsageError("the texts of a block are never swapped out", "leave --admission out")
        found = cls(name, batch_size, 1 if num_batches is None else num_batches, _SWITCH[overlap])
        if not 1 <= found.sequences <= MOST_SEQUENCES:
            asked = f"--num-batches {num_batches} of {batch_size} texts"
            raise UsageError(f"{asked} is not possible", f"give blocks of 1 to {MOST_SEQUENCES} texts")
        return found

    @property
    def in_blocks(self) -> bool:
        """Whether a block ends before the next one begins."""
        return self.name == ZIGZAG

    @property
    def sequences(self) -> int:
        """Most texts at once."""
        return self.batch_size * self.num_batches


@contextmanager
def timeline_in(path: Path | None) -> Iterator[Timeline | None]:
    """The timeline of --timeline, where it is given; around all that is opened. Raises H2OError."""
    if path is None:
        yield None
        return
    from runtime.engine.timeline import open_timeline

    with open_timeline(path) as timeline:
        yield timeline
