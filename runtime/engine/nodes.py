"""Weights under llama.cpp's nodes: what the callback of a pass does.

llama.cpp asks before it computes a node; when the node uses a weight that is not settled in memory, we wait until the
store has it and point the weight's tensor there. After the node was computed the store gets the slots back. A tensor
kept in several pieces (a large matrix) is computed piece by piece instead of by llama.cpp's own node.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from runtime.engine.trace import LayerTrace
from runtime.errors import EngineError
from runtime.llama import abi
from runtime.llama.model_file import ModelFile, Piece
from runtime.llama.node_filter import NodeFilter
from runtime.llama.tiled_product import TiledProduct
from runtime.weights.repack import Repacker
from runtime.weights.rows import RowTable
from runtime.weights.store import LayerStore

if TYPE_CHECKING:
    from runtime.kv.filter import Filter


@dataclass(eq=False)
class Weight:
    """A weight tensor that is not settled: struct address, its pieces in order (none: an embedding table)."""

    address: int
    pieces: list[Piece]
    table: RowTable | None = None


class Nodes:
    """The nodes of one context's passes. `filter` is for llama.cpp; `stop` ends the pass and is raised after it."""

    def __init__(
        self,
        file: ModelFile,
        addresses: Mapping[str, Sequence[int]],
        tables: Sequence[RowTable],
        store: LayerStore,
        n_threads: int,
    ) -> None:
        """addresses: of the ggml_tensor structs of every weight."""
        self.filter = NodeFilter(self._on_node)
        self._stop: BaseException | None = None
        self.trace: LayerTrace | None = None
        self.quiet: Callable[[], object] | None = None  # for measuring: called once the readers rest, before computing
        self.kv: Filter | None = None
        self._store = store
        self._weights = _index(file, addresses, tables)
        self._tables = [(weight, weight.table) for weight in self._weights if weight.table]
        self._active: dict[int, Weight] = {}  # weights that are not in memory for good
        self._tiled: dict[int, Weight] = {}
        self._skipped: dict[int, int] = {}
        self._aliases: list[int] = []
        self._asked_bytes = self._boundary_bytes = 0
        self._repack = False
        self._product = TiledProduct(n_threads)
        self._repacker = Repacker()

    # --- plans --------------------------------------------------------------------------------------------------

    def spoilt_by(self, resident: frozenset[int]) -> frozenset[int]:
        """Pieces whose bytes were rearranged together with others that `resident` leaves out: of no use alone."""
        repacked = [weight for weight in self._weights if self._repacker.has(weight.address)]
        numbers = [frozenset(piece.number for piece in weight.pieces) for weight in repacked]
        return frozenset().union(*(n for n in numbers if not n <= resident))

    def forget(self, resident: frozenset[int]) -> None:
        """Pieces outside `resident` have lost their memory: give up what was made of them."""
        for weight in self._weights:
            if any(piece.number not in resident for piece in weight.pieces):
                self._repacker.forget(weight.address)

    def watch_all(self, *, repack: bool, boundary_bytes: int) -> None:
        """After a new plan: look at every weight again.

        repack: rearrange each one that is there for good. boundary_bytes: most bytes asked for between two reports.
        """
        self._repack, self._boundary_bytes = repack, boundary_bytes
        for address in list(self._active):
            self._unwatch(address)
        for weight in self._weights:
            if weight.pieces:
                self._watch(weight.address, weight)

    def _watch(self, address: int, weight: Weight) -> None:
        self._active[address] = weight
        self.filter.watch(address)

    def _unwatch(self, address: int) -> None:
        self._active.pop(address, None)
        self.filter.forget(address)

    # --- passes -------------------------------------------------------------------------------------------------

    @property
    def stop(self) -> BaseException | None:
        """What ends the pass, or None. It may be set from a signal handler, in the middle of a pass."""
        return self._stop

    @stop.setter
    def stop(self, reason: BaseException | None) -> None:
        self._stop = reason
        if reason is not None:
            self.filter.pass_on_everything(True)  # the next node, whatever it is, ends the pass

    @property
    def are_watched(self) -> bool:
        """Whether there is anything to do at a node; not when every weight is in memory for good."""
        return bool(self._active or self.trace or self.kv)

    def begin_pass(self, tokens: Sequence[int]) -> None:
        """Fetch the embedding rows of the tokens."""
        self.filter.pass_on_everything(bool(self.trace or self.kv))
        if self.stop:  # looked at last: it may come at any moment
            self.filter.pass_on_everything(True)
        self._fetch_rows(tokens)
        if self.quiet:
            self._store.settle(self.quiet)
        if self.trace:
            self.trace.begin_pass(self._store.wait_s)

    def end_pass(self, *, complete: bool) -> None:
        """The pass is over; complete: llama.cpp computed all of it."""
        complete = complete and self.stop is None
        if self.trace:
            self.trace.end_pass(self._store.wait_s)
        for address in self._aliases:
            self._unwatch(address)
        self._aliases.clear()
        self._tiled.clear()
        for address in list(self._skipped):
            self._unskip(address)  # llama.cpp may use its graph again
        self._asked_bytes = 0
        self._store.end_pass(complete=complete)
        if self.kv:
            self.stop = self.kv.end_pass(complete=complete) or self.stop

    def _fetch_rows(self, tokens: Sequence[int]) -> None:
        for weight, table in self._tables:
            if weight.pieces and weight.address not in self._active:
                continue
            if weight.pieces and all(self._store.is_resident(piece) for piece in weight.pieces):
                abi.Tensor.from_address(weight.address).data = self._store.home(table.tensor.name).data
            else:
                table.fetch(tokens, self._store)
                abi.Tensor.from_address(weight.address).data = table.data

    # --- llama.cpp calls back -----------------------------------------------------------------------------------

    def _on_node(self, address: int, ask: bool, _data: int) -> bool:
        if ask and not (self.stop or self.are_watched):
            return False
        try:
            if self.stop is None:
                return self._before(address) if ask else self._after(address)
        except BaseException as error:  # noqa: BLE001 - ctypes would swallow it: kept, and raised after the pass
            self.stop = error
        return self.skip(address) if ask else self._unskip(address)

    def _before(self, address: int) -> bool:
        """A node is going to be computed: place its weights. True makes llama.cpp report when it is done."""
        report = self.kv.before(address) if self.kv else False
        if not self._active and not self.trace:
            return report
        sources = abi.unpack_src(ctypes.string_at(address + abi.SRC_OFFSET, abi.SRC_BYTES))
        if self.trace and self.trace.before(sources):
            report = True
        if self._active.keys().isdisjoint(sources):
            return report
        for source in sources:
            weight = self._active.get(source)
            if weight and self._place(address, source, weight):
                report = True
        return report

    def _place(self, node: int, source: int, weight: Weight) -> bool:
        """Point one weight of a node at its bytes; whether the node's end has to be reported."""
        op = ctypes.c_int.from_address(node + abi.OP_OFFSET).value
        if op == abi.OP_GET_ROWS and weight.table:
            return False  # its rows were fetched before the pass
        if abi.Tensor.from_address(node).ne[1] == 0:
            return False  # no outputs are wanted: nothing is computed
        if len(weight.pieces) > 1:
            return self._place_tiled(node, op, weight)
        piece = weight.pieces[0]
        data = self._store.need(piece)
        tensor = abi.Tensor.from_address(weight.address)
        tensor.data = data
        if source != weight.address:
            alias = abi.Tensor.from_address(source)
            alias.data = data + alias.view_offs
        if op in abi.VIEW_OPS:
            view_node = abi.Tensor.from_address(node)
            view_node.data = data + view_node.view_offs
            self._watch(node, weight)
            self._aliases.append(node)
        elif self._store.is_resident(piece) and source == weight.address:
            self._settle(weight)
        self._asked_bytes += piece.span_bytes
        return self._asked_bytes > self._boundary_bytes or not self._store.next_is_there()

    def _place_tiled(self, node: int, op: int, weight: Weight) -> bool:
        """A tensor in pieces: switch its node off and compute it in _after, unless all of it is in one place."""
        if all(self._store.is_resident(piece) for piece in weight.pieces):
            abi.Tensor.from_address(weight.address).data = self._store.home(weight.pieces[0].tensor.name).data
            self._settle(weight)
            return False
        if op != abi.OP_MUL_MAT:
            raise EngineError(
                f"{weight.pieces[0].tensor.name} is not used as a matrix here", "raise -m until the model fits"
            )
        self._tiled[node] = weight
        self.skip(node)
        return True

    def _settle(self, weight: Weight) -> None:
        """The weight is in memory for good: llama.cpp can use it without asking us."""
        self._unwatch(weight.address)
        if self._repack and weight.table is None:
            self._repacker.repack(weight.address)

    def _after(self, address: int) -> bool:
        """Everything up to this node has been computed."""
        weight = self._tiled.pop(address, None)
        if weight:
            self._unskip(address)
            self._give_back()
            self._compute_tiles(address, weight.pieces)
        else:
            self._give_back()
        self._asked_bytes = 0
        if self.kv:
            self.kv.after(address)
            self._unskip(address)
        if self.trace:
            self.trace.after(self._store.wait_s)
        return True

    def _compute_tiles(self, node: int, pieces: Sequence[Piece]) -> None:
        """Compute a product piece by piece; resident neighbours lie one behind the other and are computed at once."""
        self._product.begin(node)
        resident = self._store.is_resident
        for stays, run in groupby(pieces, resident):
            parts = list(run)
            for part in [parts] if stays else [[piece] for piece in parts]:
                addresses = [self._store.need(piece) for piece in part]
                self._product.compute(addresses[0], part[0].first_row, sum(piece.n_rows for piece in part))
                self._give_back()

    def _give_back(self) -> None:
        """Everything asked for has been computed with."""
        self._store.computed()
        if self.quiet:
            self._store.settle(self.quiet)

    def skip(self, address: int) -> bool:
        """Switch a node off until it is reported."""
        op = ctypes.c_int.from_address(address + abi.OP_OFFSET)
        self._skipped.setdefault(address, op.value)
        op.value = abi.OP_NONE
        return True

    def _unskip(self, address: int) -> bool:
        op = self._skipped.pop(address, None)
        if op is not None:
            ctypes.c_int.from_address(address + abi.OP_OFFSET).value = op
        return False

    def close(self) -> None:
        """Free what was made of weights."""
        self._product.close()
        self._repacker.close()


def _index(file: ModelFile, addresses: Mapping[str, Sequence[int]], tables: Sequence[RowTable]) -> list[Weight]:
    by_name = {table.tensor.name: table for table in tables}
    pieces: dict[str, list[Piece]] = {}
    for piece in file.pieces:
        pieces.setdefault(piece.tensor.name, []).append(piece)
    names = dict.fromkeys((*pieces, *by_name))
    return [Weight(a, pieces.get(name, []), by_name.get(name)) for name in names for a in addresses.get(name, ())]
