"""Attention of single tokens by llama.cpp's own nodes, aimed at copied rows: nothing is called between nodes.

Before the attention of a layer llama.cpp's graph has two nodes that compute nothing: keys and values with their
dimensions in another order. For a pass they become the nodes that copy the rows which a token of each text sees. All
layers are aimed when the first one stores its rows, and put back when the pass is over.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

from runtime.kv.cache import Cache, CacheLayer
from runtime.llama import abi
from runtime.llama.own_graph import describe

_ELEMENT_BYTES = 4
_SHAPE, _LINKS_END = abi.Tensor.ne.offset, abi.Tensor.view_offs.offset  # in a struct: sizes; operation and sources
_SECOND, _FIFTH = (abi.SRC_OFFSET + i * ctypes.sizeof(abi.POINTER) for i in (1, 4))  # sources
_MOST_BYTES = 16 * abi.TENSOR_BYTES


class InGraph:
    """The attention nodes of passes with logits. Between two passes they are as llama.cpp made them."""

    def __init__(self, cache: Cache, copied: Sequence[abi.Tensor], query: abi.Tensor, out: abi.Tensor) -> None:
        """copied: nodes that copy keys and values; query, out: of the attention to them, under a mask."""
        self._n_layers, self._own = len(cache.layers), (query, *copied, out)
        self._learned: list[_LayerNodes] = []  # in the pass at hand
        self._known: list[_LayerNodes] = []  # all layers', or none
        self._made_for = (0, 0)  # texts, rows of each
        self.is_aimed = False

    def learn(self, node: int, layer: CacheLayer) -> None:
        """Note a layer's nodes, as llama.cpp made them, for passes to come."""
        self._learned.append(_LayerNodes(abi.Tensor.from_address(node), layer))

    def is_known(self, n_tokens: int) -> bool:
        """Whether the graph at hand, a pass of so many tokens, has the nodes of all layers where they were."""
        return bool(self._known) and self.first.node.ne[2] == n_tokens and all([one.are_there() for one in self._known])

    @property
    def first(self) -> _LayerNodes:
        """The first layer's."""
        return self._known[0]

    def is_made_for(self, shape: tuple[int, int]) -> bool:
        """Whether make() was called for so many texts and rows of each, and llama.cpp's nodes are as they were then."""
        return shape == self._made_for and all([one.is_made for one in self._known])

    def make(self, shape: tuple[int, int]) -> None:
        """From now on the nodes of all layers are aimed to do what ours do."""
        own = [ctypes.string_at(ctypes.addressof(tensor), abi.TENSOR_BYTES) for tensor in self._own]
        for nodes in self._known:
            nodes.make(own, shape[0])
        self._made_for = shape

    def aim(self) -> None:
        """Have the nodes of all layers do what ours did when make() was called."""
        for nodes in self._known:
            nodes.aim()
        self.is_aimed = True

    def end(self, *, complete: bool) -> None:
        """The pass is over: put the nodes back, know those that were learned."""
        if self.is_aimed:
            for nodes in self._known:
                nodes.put_back()
            self.is_aimed = False
        learned, self._learned = self._learned, []
        if complete and len(learned) == self._n_layers:
            alike = all(nodes.can_be_aimed and nodes.shapes == learned[0].shapes for nodes in learned)
            self._known = learned if alike else []


class _LayerNodes:
    """The nodes of a layer's attention: queries, keys, values, result.

    llama.cpp builds all its graphs in the same memory, and these nodes beside each other.
    """

    def __init__(self, node: abi.Tensor, layer: CacheLayer) -> None:
        """node: the result, as llama.cpp made it."""
        self.node, self.layer = node, layer
        places = [int(node.src[i]) for i in range(3)] + [ctypes.addressof(node)]
        self._begin, self._n_bytes = min(places), max(places) + abi.TENSOR_BYTES - min(places)
        self._at = [place - self._begin for place in places]
        self._from = [abi.Tensor() for _ in layer.parts]
        for tensor, part in zip(self._from, layer.parts, strict=True):
            describe(tensor, part.data, (part.row_bytes // _ELEMENT_BYTES, part.n_cells))
        self._made = self._aimed = b""
        self.can_be_aimed = self._n_bytes <= _MOST_BYTES and self._are_views()
        if self.can_be_aimed:
            self._made = self._read()

    def _are_views(self) -> bool:
        """Whether keys and values come from nodes that compute nothing, and llama.cpp would compute one there."""
        views = [abi.Tensor.from_address(self._begin + at) for at in self._at[1:3]]
        computed = all(view.op == abi.OP_PERMUTE and view.flags & abi.FLAG_COMPUTE for view in views)
        return computed and [view.view_src for view in views] == [part.root for part in self.layer.parts]

    @property
    def shapes(self) -> list[bytes]:
        """Sizes and strides of the nodes."""
        return [self._made[at + _SHAPE : at + abi.OP_OFFSET] for at in self._at]

    def _read(self) -> bytes:
        return ctypes.string_at(self._begin, self._n_bytes)

    def are_there(self) -> bool:
        """Whether these are nodes of the graph at hand, too. Their sizes may be others."""
        made = self._read()
        if made != self._made:
            links = ([bytes_[at + abi.OP_OFFSET : at + _LINKS_END] for at in self._at] for bytes_ in (made, self._made))
            if next(links) != next(links):
                return False
            self._made, self._aimed = made, b""
        return True

    @property
    def is_made(self) -> bool:
        """Whether it is known what they are aimed to be."""
        return bool(self._aimed)

    def make(self, own: Sequence[bytes], n_texts: int) -> None:
        """Take over from structs of ours."""
        changed, (query, keys, values, out) = bytearray(self._made), self._at
        changed[query + _SHAPE : query + abi.OP_OFFSET] = own[0][_SHAPE : abi.OP_OFFSET]
        for at, copied, source in zip((keys, values), own[1:3], self._from, strict=True):
            source.ne[2], source.nb[2] = n_texts, 0
            changed[at : at + abi.NAME_OFFSET] = copied[: abi.NAME_OFFSET]
            changed[at + abi.SRC_OFFSET : at + _SECOND] = ctypes.addressof(source).to_bytes(8, sys.byteorder)
        changed[out + _SHAPE : out + abi.OP_OFFSET] = own[3][_SHAPE : abi.OP_OFFSET]
        changed[out + _SECOND : out + _FIFTH] = own[3][_SECOND:_FIFTH]  # keys, values, mask
        self._aimed = bytes(changed)

    def aim(self) -> None:
        """Make the nodes what they are aimed to be."""
        ctypes.memmove(self._begin, self._aimed, self._n_bytes)

    def put_back(self) -> None:
        """Make the nodes what they were."""
        ctypes.memmove(self._begin, self._made, self._n_bytes)
