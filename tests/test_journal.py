"""What a root keeps of a text for a worker that takes over."""

from __future__ import annotations

from contextlib import closing

from runtime.distributed.journal import Journal
from runtime.distributed.messages import BLOCK
from runtime.passes import Part


def block(layer, first, cell_bytes=2):
    return bytes([layer, first % 256]) * (BLOCK * cell_bytes // 2)


def test_blocks_of_positions_layer_by_layer():
    with closing(Journal()) as journal:
        for first, n in ((0, 20), (20, 20), (40, 1), (41, 1)):
            journal.begin(Part(0, first, (1,) * n))
        keep, cells = journal.snapshot, {3: 2, 5: 4}
        assert journal.positions_of(cells) == 0
        for first in (0, 16, 32):
            keep.put(3, first, block(3, first))
        keep.put(5, 0, block(5, 0, 4))
        keep.put(5, 32, block(5, 32, 4))  # not the next one: passed over
        assert (keep.n_positions(3, 2), keep.n_positions(5, 4), keep.n_positions(5, 2)) == (48, 16, 0)
        assert journal.positions_of(cells) == 0  # 16 is in the middle of the first pass
        keep.put(5, 16, block(5, 16, 4))
        keep.put(5, 32, block(5, 32, 4))
        assert journal.positions_of(cells) == 41
        assert journal.positions_of({3: 2, 5: 2}) == journal.positions_of({}) == journal.positions_of({4: 2}) == 0
        assert all(keep.get(layer, first) == block(layer, first, cells[layer]) for layer in cells for first in (0, 32))


def test_what_is_computed_anew_is_forgotten_and_takes_the_same_room():
    with closing(Journal()) as journal:
        journal.begin(Part(0, 0, (1,) * 40))
        keep = journal.snapshot
        for first in (0, 16):
            keep.put(3, first, block(3, first))
        end = keep._end
        journal.begin(Part(0, 20, (1,) * 20))
        assert keep.n_positions(3, 2) == 16
        keep.put(3, 16, block(9, 9))
        assert (keep.get(3, 0), keep.get(3, 16), keep._end) == (block(3, 0), block(9, 9), end)
