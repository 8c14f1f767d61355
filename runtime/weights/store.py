"""Where the weights are: resident pieces, and the stream of all others through the ring.

One cyclic stream serves everything. Reader threads walk the pieces in the order of their use, pass after pass and
across tokens. A piece that shall be resident and is not there is read into its home; any other goes into a slot of
the ring until it has been computed with. So the first pass loads the resident pieces, and a plan needs no loading code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar

from runtime.errors import EngineError
from runtime.llama.model_file import ModelFile, Piece
from runtime.passes import Pass
from runtime.sizes import PAGE, page_down
from runtime.weights.files import WeightFiles
from runtime.weights.homes import Home, Homes
from runtime.weights.loads import NONE, Chunk, Load, Numbers
from runtime.weights.readers import Observer, Readers
from runtime.weights.ring import Ring


class LayerStore:
    """The streamable pieces of a model, or of the part that is owned, read from the first apply() on.

    **Threads.** One thread computes: it alone may call apply, expect_passes, need, next_is_there, computed, settle,
    end_pass, read_now and close. Readers (`readers.py`) call start_load, begins and loaded. Any thread may set
    `interrupt` and look at `share_used` and the figures.

    **The lock** is the readers'. Every attribute below is read and written with it held, but for these:

    - `_wanted`, `_ring` and `_homes` change in apply and close only. The computing thread calls those, so it may look
      without the lock.
    - A number enters `_resident` when a reader has read the piece, and leaves it in apply only. So a yes of
      is_resident, which takes no lock, is true until the next apply; a no may be a read late.
    - `share_used` and the figures are for people and for measuring: anybody looks, and may be a step late.

    **Addresses.** What `need` returns is used without the lock. A slot of the ring that was asked for is given back by
    `computed` only, a home by `apply`: both are called by the thread that uses the address.

    **Always**, with the lock held:

    - A piece is in `_loads` (on its way, or in the ring) or in `_resident` (at home) or in neither, never in both.
    - `_pass <= _load_pass <= _pass + 2`: the stream is at most one pass ahead; at 2 it has come to the end of that one.
    - A slot is taken as long as its load is in `_loads`, or was dropped and a read of it is under way.

    **Between two passes** also: `_pending` is empty, `_place` is 0, no load was asked for, and none belongs to a pass
    that is over. The readers go on all the time, but not while apply changes the plan.
    """

    read_observer: ClassVar[Observer | None] = None  # of the stores that are opened from now on

    def __init__(
        self, model: ModelFile, files: WeightFiles, *, request_bytes: int = 2**21, depth: int = 4, ahead: bool = True
    ) -> None:
        """ahead: read what comes next while the computation goes on; else only what it waits for."""
        self.files = files
        self._reads_ahead = ahead
        self._pieces = {piece.number: piece for piece in model.pieces}
        self._head = frozenset(piece.number for piece in model.head.pieces)
        self._share_before = {group.index: i / max(1, model.n_layers) for i, group in enumerate(model.groups)}
        self._request_bytes = max(PAGE, page_down(request_bytes))
        self._order = list(self._pieces)  # of use, as far as it is known
        self._homes = Homes()
        self._ring: Ring | None = None
        self._wanted = NONE
        self._resident: set[int] = set()
        self._missing: list[int] = []  # wanted and not read yet, the last one first
        self._loads: dict[int, Load] = {}
        self._pending: list[Load] = []  # asked for, and maybe not computed with yet
        self._ahead: Load | None = None  # of a resident piece that the stream has not come to yet
        self._passes_without_head: set[int] = set()
        self._pass = 0  # the pass being computed
        self._place = 0  # in _order: where the computation is
        self._surprised = False  # a piece of this pass was not used where _order has it
        self._load_pass = self._load_place = 0  # where the stream is
        self.wait_s = 0.0
        self._readers = Readers(files, self, depth, LayerStore.read_observer)
        self._lock = self._readers.lock

    # --- plans --------------------------------------------------------------------------------------------------

    def apply(self, wanted: Numbers, window_bytes: int, *, everything: bool = False, spoilt: Numbers = NONE) -> None:
        """From now on keep the pieces in `wanted` resident and stream the others through window_bytes.

        everything: a later plan is going to keep all of them. spoilt: pieces whose bytes in memory are of no use.

        Called between two passes. What is no longer wanted is freed before anything new is loaded; new residents
        arrive with the next pass. When there is no address space for them (EngineError), or an interrupt comes first,
        the plan in force stays. Reads under way go on, those aside that have no place in the new plan.
        """
        with self._lock:
            self._readers.pause()
            try:
                same_ring = window_bytes == self.window_bytes
                while any(c.load and not c.load.has_place(wanted, same_ring) for c in self._readers.flying):
                    self._readers.check()
                    self._readers.wait()
                everything = everything or len(wanted) == len(self._pieces)
                self._homes.expect((self._pieces[number] for number in sorted(wanted)), everything=everything)
                ring = self._ring if same_ring else Ring(window_bytes) if window_bytes else None
                self._drop_homes(wanted - spoilt)
                self._drop_loads(wanted, same_ring)
                if self._ring and ring is not self._ring:
                    self._ring.free()
                self._wanted, self._ring = wanted, ring
                self._missing = [n for n in reversed(self._order) if n in wanted and n not in self._resident]
                self._load_pass, self._load_place = self._pass, 0
            finally:
                self._readers.go_on()

    def _drop_homes(self, wanted: Numbers) -> None:
        """Free what is at home, as a whole or in part, and not wanted."""
        at_home = self._resident | {number for number, load in self._loads.items() if load.slot is None}
        self._homes.drop((self._pieces[n] for n in at_home - wanted), (self._pieces[n] for n in at_home & wanted))
        self._resident &= wanted

    def _drop_loads(self, wanted: Numbers, same_ring: bool) -> None:
        """Forget what was read, or is going to be, for a place that the new plan does not have."""
        for number, load in list(self._loads.items()):
            load.pass_number = self._pass
            if not load.has_place(wanted, same_ring):
                del self._loads[number]
                self._readers.take_out(load)

    # --- the computation's side ---------------------------------------------------------------------------------

    def expect_passes(self, passes: Iterable[Pass]) -> None:
        """These passes come next; passes not announced need the output head."""
        with self._lock:
            self._passes_without_head = {self._pass + i for i, pass_ in enumerate(passes) if not pass_.needs_head}
            self._readers.feed()

    def need(self, piece: Piece) -> int:
        """The address of the piece's bytes; waits until they are there. Raises DiskError when reading failed."""
        with self._lock:
            self._follow(piece.number)
            if piece.number not in self._resident:
                self._wait_for(piece)
            load = self._loads.get(piece.number)
            if load is None:
                return self._homes[piece.tensor.name].data + piece.first_row * piece.tensor.row_bytes
            if not load.asked:
                load.asked = True
                self._pending.append(load)
            return load.address + piece.offset - piece.span[0]

    def _follow(self, number: int) -> None:
        """Keep the computation's place in the order; where the order was guessed wrong, correct it."""
        order, place = self._order, self._place
        while place < len(order) and order[place] != number and order[place] in self._resident:
            place += 1
        if place < len(order) and order[place] == number:
            self._place = place + 1
        elif number in order[: self._place] and (number in self._loads or number in self._resident):
            load = self._loads.get(number)  # used a second time and still there, or there for the next pass
            self._surprised |= load is not None and not load.asked
        else:
            self._expect_now(number)

    def _expect_now(self, number: int) -> None:
        """Move a piece to the computation's place in the order."""
        order = self._order
        if number in order:
            self._place -= order.index(number) < self._place
            order.remove(number)
        order.insert(self._place, number)
        self._place += 1
        self._surprised = True

    def _wait_for(self, piece: Piece) -> None:
        """A read ahead that failed is tried again; what fails while it is waited for is an error."""
        start, tried = time.perf_counter(), False
        while piece.number not in self._resident:
            self._readers.check()
            load = self._loads.get(piece.number)
            if load and load.error:
                self._drop(load)
                if tried:
                    raise load.error
                load = None
            if load is None:
                tried = True
                self._load_now(piece)
            elif load.chunks_left == 0:
                break
            self._readers.wait()
        self.wait_s += time.perf_counter() - start

    def _load_now(self, piece: Piece) -> None:
        """The stream is not at this piece (a wrong guess): go on from there, and drop what fills the ring for later."""
        self._load_pass, self._load_place = self._pass, self._place - 1
        if self._start(piece):
            return
        for load in list(self._loads.values()):
            if load.slot and not load.asked:
                self._drop(load)
        if not self._start(piece) and not self._readers.flying:
            raise EngineError("the streaming window is smaller than one tensor", "raise -m")

    def next_is_there(self) -> bool:
        """Whether the piece that is used next has arrived. False once this pass has shown that nobody knows which."""
        order = self._order
        with self._lock:
            if self._surprised:
                return False
            place = self._place
            while place < len(order) and order[place] in self._resident:
                place += 1
            if place == len(order):
                return True
            return bool((load := self._loads.get(order[place])) and load.chunks_left == 0 and not load.error)

    def computed(self) -> None:
        """Everything asked for so far has been computed with: give its slots back to the readers."""
        with self._lock:
            pending, self._pending = self._pending, []
            for load in pending:
                if self._loads.get(load.piece.number) is load:
                    del self._loads[load.piece.number]
                self._give_back(load)
            if pending:
                self._readers.feed()

    def settle(self, then: Callable[[], object] = lambda: None) -> None:
        """Wait until the readers have filled the window and rest, then call `then`: a wait, too (for measuring)."""
        start = time.perf_counter()
        with self._lock:
            while self._readers.queue or self._readers.flying or self.start_load():
                self._readers.check()
                self._readers.wait()
        then()
        self.wait_s += time.perf_counter() - start

    def end_pass(self, *, complete: bool) -> None:
        """The pass is over (or was ended early: not complete). Pieces that no node used leave the stream."""
        self.computed()
        with self._lock:
            if complete and self._pass not in self._passes_without_head and len(self._resident) < len(self._order):
                self._order[self._place :] = [n for n in self._order[self._place :] if n in self._resident]
            self._passes_without_head.discard(self._pass)
            if not complete:
                self._passes_without_head.clear()
            self._pass += 1
            self._place = 0
            self._surprised = False
            for load in [load for load in self._loads.values() if load.error or load.pass_number < self._pass]:
                if load.slot or load.error:
                    self._drop(load)
                else:
                    load.pass_number = self._pass
            if self._load_pass < self._pass:
                self._load_pass, self._load_place = self._pass, 0
            self._readers.feed()

    def _drop(self, load: Load) -> None:
        """Take a load out of the stream. Its slot comes back at once, or when the reads under way have ended."""
        del self._loads[load.piece.number]
        self._readers.take_out(load)
        if load.chunks_left == 0:
            self._give_back(load)

    def _give_back(self, load: Load) -> None:
        if load.slot and self._ring:
            self._ring.give_back(load.slot)

    def read_now(self, chunks: Sequence[tuple[int, int, int, int]]) -> None:
        """Read (file, offset, address, bytes) ranges before anything else, and wait for them. Raises DiskError."""
        start = time.perf_counter()
        with self._lock:
            self._readers.read_now(chunks)
        self.wait_s += time.perf_counter() - start

    # --- the readers' side: called with the lock held -----------------------------------------------------------

    def start_load(self) -> bool:
        """Queue the reads of the next piece: of the stream, or while there is no room for that, of a resident one."""
        if not self._reads_ahead:
            return False
        piece = self._next_piece()
        if piece and self._start(piece):
            self._load_place += 1
            return True
        piece = self._next_missing()
        if piece is None or not self._start(piece):
            return False
        self._ahead = self._loads[piece.number]
        return True

    def begins(self, chunk: Chunk) -> None:
        """Where a piece is read ahead of the stream, which has room again, queue what the stream needs before it."""
        if self._ahead and chunk.load is self._ahead:
            piece = self._next_piece()
            if piece and self._ahead and self._start(piece):
                self._load_place += 1

    def loaded(self, load: Load) -> None:
        """All reads of a load have ended."""
        number = load.piece.number
        if self._loads.get(number) is not load:
            self._give_back(load)  # it was dropped while it was read
        elif load.slot is None and not load.error:
            del self._loads[number]
            self._resident.add(number)

    def _start(self, piece: Piece) -> bool:
        """Queue the reads of a piece, before all others; False when it needs the ring and there is no room."""
        slot = None
        if piece.number in self._wanted:
            address = self._homes[piece.tensor.name].span_address(piece)
        else:
            slot = self._ring.take(piece.span_bytes) if self._ring else None
            if slot is None or self._ring is None:
                return False
            address = self._ring.address(slot)
        load = self._loads[piece.number] = Load(piece, self._load_pass, address, slot)
        self._readers.put_first(load.cut(self._request_bytes))
        return True

    def _next_piece(self) -> Piece | None:
        """The next piece of the stream that is not in memory; the stream runs at most one pass ahead."""
        if len(self._resident) == len(self._order):  # all of it is in memory: asked for after every pass
            return None
        while self._load_pass <= self._pass + 1:
            if self._load_place >= len(self._order):
                self._load_pass, self._load_place = self._load_pass + 1, 0
                continue
            number = self._order[self._load_place]
            load = self._loads.get(number)
            skip_head = number in self._head and self._load_pass in self._passes_without_head
            if load and load is self._ahead:
                self._ahead = None  # the stream has come to it: nothing is used before it any more
            if skip_head or number in self._resident or (load and load.pass_number >= self._load_pass):
                self._load_place += 1
            elif load:
                return None  # still in use by the pass before
            else:
                return self._pieces[number]
        return None

    def _next_missing(self) -> Piece | None:
        """The next piece that shall be resident and was not read yet."""
        while self._missing and (self._missing[-1] in self._resident or self._missing[-1] in self._loads):
            self._missing.pop()
        return self._pieces[self._missing[-1]] if self._missing else None

    # --- facts and the end --------------------------------------------------------------------------------------

    @property
    def wanted(self) -> Numbers:
        """Numbers of the pieces that are, or are going to be, resident."""
        return self._wanted

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Address ranges of all weights, present or not."""
        with self._lock:
            return self._homes.ranges + ([self._ring.range] if self._ring else [])

    def is_resident(self, piece: Piece) -> bool:
        """Whether the piece is in memory for good."""
        return piece.number in self._resident

    def home(self, tensor_name: str) -> Home:
        """The place of a tensor's resident pieces."""
        return self._homes[tensor_name]

    @property
    def share_used(self) -> float:
        """The share of the layers that are behind the computation, by the weights it asks for (for any thread)."""
        place = min(self._place, len(self._order))
        return self._share_before[self._pieces[self._order[place - 1]].layer] if place else 0.0

    @property
    def window_bytes(self) -> int:
        """Bytes of the ring."""
        return self._ring.n_bytes if self._ring else 0

    @property
    def interrupt(self) -> BaseException | None:
        """Set it from anywhere: who waits for a read raises it, soon."""
        return self._readers.interrupt

    @interrupt.setter
    def interrupt(self, reason: BaseException | None) -> None:
        self._readers.interrupt = reason

    @property
    def bytes_read(self) -> int:
        """Bytes read until now."""
        return self._readers.bytes_read

    @property
    def busy_s(self) -> float:
        """Seconds in which at least one read was under way."""
        return self._readers.busy_s

    def close(self) -> bool:
        """Stop the readers, close the files and free all memory.

        False after an interrupt while a read still hangs: what it may write to stays until the process ends.
        """
        if not self._readers.close():
            return False
        if self._ring:
            self._ring.free()
        self._homes.free()
        self.files.close()
        return True
