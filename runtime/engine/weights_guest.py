"""Weights under llama.cpp's nodes: the guest that is there in every pass.

Before a node that uses a weight which is not settled in memory, we wait until the store has it and point the weight's
tensor there. After the node was computed the store gets the slots back. A tensor kept in several pieces (a large
matrix) is computed piece by piece instead of by llama.cpp's own node.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from runtime.engine.guests import Guests
from runtime.errors import EngineError
from runtime.llama import abi
from runtime.llama.model_file import ModelFile, Piece
from runtime.llama.tiled_product import TiledProduct
from runtime.passes import Pass
from runtime.weights.repack import Repacker
from runtime.weights.rows import RowTable
from runtime.weights.store import LayerStore


@dataclass(eq=False)
class Weight:
    """A weight tensor that is not settled: struct address, its pieces in order (none: an embedding table)."""

    address: int
    pieces: list[Piece]
    table: RowTable | None = None


class WeightsGuest:
    """Puts the weights of a store under the nodes of one context's passes."""

    def __init__(
        self,
        file: ModelFile,
        addresses: Mapping[str, Sequence[int]],
        tables: Sequence[RowTable],
        store: LayerStore,
        guests: Guests,
        n_threads: int,
    ) -> None:
        """addresses: of the ggml_tensor structs of every weight. guests: whom this one joins."""
        self.quiet: Callable[[], object] | None = None  # for measuring: called once the readers rest, before computing
        self._guests, self._filter = guests, guests.filter
        self._store = store
        self._weights = _index(file, addresses, tables)
        self._tables = [(weight, weight.table) for weight in self._weights if weight.table]
        self._active: dict[int, Weight] = {}  # weights that are not in memory for good
        self._tiled: dict[int, Weight] = {}
        self._aliases: list[int] = []
        self._asked_bytes = self._boundary_bytes = 0
        self._repack = False
        self._product = TiledProduct(n_threads, self._filter)
        self.compute_on = self._product.compute_on
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
        self._filter.watch(address)

    def _unwatch(self, address: int) -> None:
        self._active.pop(address, None)
        self._filter.forget(address)

    # --- passes -------------------------------------------------------------------------------------------------

    def begin(self, pass_: Pass) -> None:
        """Fetch the embedding rows of the tokens."""
        self._fetch_rows(pass_.tokens)
        if self.quiet:
            self._store.settle(self.quiet)

    def end(self, *, complete: bool) -> None:
        """The pass is over; the stream goes on with the next one."""
        for address in self._aliases:
            self._unwatch(address)
        self._aliases.clear()
        self._tiled.clear()
        self._asked_bytes = 0
        self._store.end_pass(complete=complete)

    def _fetch_rows(self, tokens: Sequence[int]) -> None:
        for weight, table in self._tables:
            if weight.pieces and weight.address not in self._active:
                continue
            if weight.pieces and all(self._store.is_resident(piece) for piece in weight.pieces):
                abi.Tensor.from_address(weight.address).data = self._store.home(table.tensor.name).data
            else:
                table.fetch(tokens, self._store)
                abi.Tensor.from_address(weight.address).data = table.data

    # --- nodes --------------------------------------------------------------------------------------------------

    def before(self, node: int) -> bool:
        """Place the weights of a node; True: report when it is done."""
        if not self._active:
            return False
        sources = abi.unpack_src(ctypes.string_at(node + abi.SRC_OFFSET, abi.SRC_BYTES))
        if self._active.keys().isdisjoint(sources):
            return False
        report = False
        for source in sources:
            weight = self._active.get(source)
            if weight and self._place(node, source, weight):
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
        """A tensor in pieces: switch its node off and compute it in after(), unless all of it is in one place."""
        if all(self._store.is_resident(piece) for piece in weight.pieces):
            abi.Tensor.from_address(weight.address).data = self._store.home(weight.pieces[0].tensor.name).data
            self._settle(weight)
            return False
        if op != abi.OP_MUL_MAT:
            raise EngineError(
                f"{weight.pieces[0].tensor.name} is not used as a matrix here", "raise -m until the model fits"
            )
        self._tiled[node] = weight
        self._guests.skip(node)
        return True

    def _settle(self, weight: Weight) -> None:
        """The weight is in memory for good: llama.cpp can use it without asking us."""
        self._unwatch(weight.address)
        if self._repack and weight.table is None:
            self._repacker.repack(weight.address)

    def after(self, node: int) -> None:
        """Everything up to this node has been computed: give that back, and compute a node that was switched off."""
        self._give_back()
        weight = self._tiled.pop(node, None)
        if weight:
            self._compute_tiles(node, weight.pieces)
        self._asked_bytes = 0

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
