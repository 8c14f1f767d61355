"""Attention of several sequences in one cache, each alone: with the bits that it has in a cache of its own.

llama.cpp attends over all cells under a mask, in their order, and rounds sums to 16 bits. Where a sequence's positions
lie in other cells than alone, or where a pass has tokens of others, its sums are made in another order or by another
kernel. So every part of a pass has an attention of its own. Where all of them are short, as the tokens of answers, a
function in C sums the positions in their order (see CellAttention). Else keys and values of each part are copied
together in that order, and ggml's own kernel is given that part alone.
"""

from __future__ import annotations

import array
import ctypes
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

from runtime.errors import EngineError, ModelError
from runtime.kv.cache import Cache, CacheLayer, K, V, find_cache
from runtime.llama import abi, cell_attention
from runtime.llama.cell_attention import F16, MOST_TOKENS, NO_LOGIT, PADDED, SEEN, CellAttention
from runtime.llama.model_file import ModelFile
from runtime.llama.own_graph import OwnGraph, cut_off, describe, operate
from runtime.memory import Region, view
from runtime.passes import Part, Pass
from runtime.settings import Settings

_ELEMENT_BYTES = 4  # rows are copied as 32-bit numbers, whatever they are
_HALF_BYTES = 2
_I32 = 26
_LONG = MOST_TOKENS + 1  # tokens from which on the other kernel computes
_GRAPH_BYTES = 2**20
_WHAT, _NEXT = "the attention of a batch", "answer the prompts one by one with `h2o run`"


class Calls(NamedTuple):
    """What the guest says to those who call it. skip: switch a node off until it was reported. watch: the operations
    whose nodes it is asked about from now on. attend: who turns nodes before anybody is asked about them."""

    skip: Callable[[int], object]
    watch: Callable[[Sequence[int]], object]
    attend: Callable[[CellAttention], object]


def open_attention(
    settings: Settings, file: ModelFile, groups: list[dict[str, int]], model: int, calls: Calls
) -> SequenceAttention | None:
    """What computes attention sequence by sequence; None for one sequence, and where a model's cache is a special one:
    with windows, without flash attention, of rows that are no whole number of elements.

    groups: cache tensors (name -> address) of each buffer.
    """
    if settings.n_sequences == 1:
        return None
    try:
        cache = find_cache(groups, file, model)
    except ModelError:
        return None
    parts = [part for layer in cache.layers.values() for part in layer.parts]
    if len(cache.filterable) < len(cache.layers) or any(part.row_bytes % _ELEMENT_BYTES for part in parts):
        return None
    heads = file.hyper_parameter("attention.head_count")
    width = file.hyper_parameter("attention.key_length") or file.hyper_parameter("embedding_length") // max(1, heads)
    return SequenceAttention(settings, cache, heads * width * _ELEMENT_BYTES, calls)


class SequenceAttention:
    """A guest of passes over several sequences; `cells` has the cell of every position, sequence by sequence."""

    ops = (abi.OP_SET_ROWS, abi.OP_FLASH_ATTN_EXT)  # it looks at nodes of these

    def __init__(self, settings: Settings, cache: Cache, query_bytes: int, calls: Calls) -> None:
        """query_bytes: of a token, in all heads."""
        self.cells: dict[int, array.array[int]] = {}
        self._n_cells = 0  # that are taken; below 0: to be counted
        self._head = 0  # where llama.cpp looks for the next empty cell
        self._calls = calls
        self._part_of = {part.root: (n, i) for n, layer in cache.layers.items() for i, part in enumerate(layer.parts)}
        self._first = next(iter(cache.layers.values())).parts[K].root
        self._cache = cache
        self._pass = Pass(())
        self._placed = False
        self._asked: set[int] = set()
        self._shape: tuple[bytes, ...] = ()  # of the nodes that the parts' tensors are made for
        self._ends = 0, 0  # addresses of the queries and results that they point into
        n_cells = max(layer.parts[K].n_cells for layer in cache.layers.values()) + PADDED
        row_bytes = [max(layer.parts[i].row_bytes for layer in cache.layers.values()) for i in (K, V)]
        with ExitStack() as opened:
            self._rows = [Region(n * n_cells) for n in row_bytes]
            for region in self._rows:
                opened.callback(region.free)
            self.memory_bytes = sum(row_bytes) * n_cells + 2 * _HALF_BYTES * n_cells + _GRAPH_BYTES
            self.memory_bytes += 2 * _LONG * query_bytes
            self._few = Region(2 * _LONG * query_bytes)
            opened.callback(self._few.free)
            # position p's mask: p + 1 zeros, then no logits: it begins p + 1 before the end of the zeros
            self._mask = array.array("H", [SEEN] * n_cells + [NO_LOGIT] * n_cells)
            self._zeros_end = self._mask.buffer_info()[0] + n_cells * _HALF_BYTES
            self._copies: list[_Copied] = []  # of the pass at hand: several where its rows do not fit at once
            self._most_rows = n_cells - PADDED
            self._from, self._copied = _tensors(2), _tensors(2)
            self._which = abi.Tensor()
            self._parts = [_Part() for _ in range(settings.n_sequences)]
            for source, copied in zip(self._from, self._copied, strict=True):
                operate(copied, abi.OP_GET_ROWS, source, self._which)
            self._active: list[_Part] = []  # in the pass at hand; none: no node needed them yet
            self._joined, self._masks = _Part(), array.array("H", [NO_LOGIT]) * (PADDED * settings.n_sequences)
            self._all_parts = (*self._parts, self._joined)
            for part in self._all_parts:
                operate(part.out, abi.OP_FLASH_ATTN_EXT, part.query, *part.rows, part.mask)
            self._graph = OwnGraph(settings.n_threads, [*self._copied, *(part.out for part in self._all_parts)])
            opened.callback(self._graph.close)
            self._long = _Part()
            operate(self._long.out, abi.OP_FLASH_ATTN_EXT, self._long.query, *self._long.rows, self._long.mask)
            self._long_graph = OwnGraph(settings.n_threads, [self._long.out])
            opened.callback(self._long_graph.close)
            self._opened = opened.pop_all()
        self._short = self._attention_of_short_parts(settings)

    def _attention_of_short_parts(self, settings: Settings) -> CellAttention | None:
        """The function in C, where there is one for these keys and values."""
        roots = [layer.parts[K].root for layer in self._cache.layers.values()]
        kind = abi.Tensor.from_address(roots[0]).type  # of values, too (Context)
        if not cell_attention.is_right(kind):
            return None
        short = CellAttention(roots, kind, settings.n_ubatch)
        self._calls.attend(short)
        return short

    @property
    def n_cells(self) -> int:
        """Cells of the cache that are taken; those that sequences share count once."""
        if self._n_cells < 0:
            self._n_cells = len({cell for cells in self.cells.values() for cell in cells})
        return self._n_cells

    @property
    def position_bytes(self) -> int:
        """Keys and values of a position, in all layers."""
        return sum(layer.row_bytes for layer in self._cache.layers.values())

    def compute_on(self, backend: int) -> None:
        """Compute on another backend from now on."""
        self._graph.compute_on(backend)
        self._long_graph.compute_on(backend)

    def share(self, source: int, target: int, n: int) -> None:
        """Another sequence, which has no positions, begins with the first n of one."""
        self.cells[target] = self.cells[source][:n]

    def truncate(self, n_past: int, sequence: int) -> None:
        """A sequence's positions from n_past on are forgotten."""
        cells = self.cells_of(sequence)
        self._head, self._n_cells = min([self._head, *cells[n_past:]]), -1
        del cells[n_past:]

    def cells_of(self, sequence: int) -> array.array[int]:
        """The cell of every position of a sequence."""
        return self.cells.setdefault(sequence, array.array("i"))

    def next_cells(self, n: int) -> list[int]:
        """The cells that llama.cpp will give to the next n positions."""
        used = {cell for cells in self.cells.values() for cell in cells}
        head = 0 if self._head > len(used) + 2 * n else self._head
        n_cells = next(iter(self._cache.layers.values())).parts[K].n_cells
        return [cell for cell in (*range(head, n_cells), *range(head)) if cell not in used][:n]

    def put_back(self, sequence: int, positions: Sequence[int], cells: Sequence[int]) -> None:
        """llama.cpp has put positions of a sequence, those behind its others, into these cells, in this order."""
        cell_of = dict(zip(positions, cells, strict=True))
        self.cells_of(sequence).extend(cell_of[position] for position in sorted(positions))
        self._head, self._n_cells = cells[-1] + 1, -1

    def check_of(self, cell: int) -> int:
        """A checksum of the keys of one layer in a cell."""
        part = next(iter(self._cache.layers.values())).parts[K]
        return zlib.crc32(view(part.data + cell * part.row_bytes, part.row_bytes))

    def close(self) -> None:
        """Free everything."""
        self._opened.close()

    # --- a guest's calls ----------------------------------------------------------------------------------------

    def begin(self, pass_: Pass) -> None:
        """A pass comes."""
        self._pass, self._placed, self._shape, self._active = pass_, False, (), []
        self._asked.clear()
        self._calls.watch(self.ops)

    def before(self, address: int) -> bool:
        """A node is going to be computed; True: report when it is done."""
        op = ctypes.c_int.from_address(address + abi.OP_OFFSET).value
        if op == abi.OP_SET_ROWS and not self._placed:
            node = abi.Tensor.from_address(address)
            if node.view_src == self._first:
                self._place(abi.Tensor.from_address(node.src[1]).data)
        if op != abi.OP_FLASH_ATTN_EXT or not self._placed:
            return False
        alibi = ctypes.c_float.from_address(address + abi.Tensor.op_params.offset + _ELEMENT_BYTES).value
        if alibi:
            return False
        self._calls.skip(address)
        self._asked.add(address)
        return True

    def after(self, address: int) -> None:
        """Everything up to this node has been computed."""
        if address in self._asked:
            self._asked.remove(address)
            self._attend(abi.Tensor.from_address(address))

    def end(self, *, complete: bool) -> None:
        """The pass is over; the engine takes one back that failed."""
        if self._short:
            self._short.put_back()

    # --- one pass -----------------------------------------------------------------------------------------------

    def _place(self, numbers: int) -> None:
        """Note the cells that llama.cpp has found for the pass, and which of them the tokens of short parts see."""
        n, n_taken, lines = 0, self.n_cells, []
        found = (ctypes.c_int64 * self._pass.n_tokens).from_address(numbers)
        for part in self._pass.parts:
            cells, n_tokens = self.cells_of(part.sequence), len(part.tokens)
            if len(cells) != part.first:
                raise EngineError(f"sequence {part.sequence} has {len(cells)} positions, not {part.first}", _NEXT)
            cells.extend(found[n : n + n_tokens])
            n += n_tokens
        self._head, self._n_cells = found[n - 1] + 1, n_taken + n
        self._placed = True
        if self._short and all([len(part.tokens) < _LONG and not part.long for part in self._pass.parts]):
            for part in self._pass.parts:
                lines += self._short.lines(self.cells[part.sequence], part.first, len(part.tokens))
            self._short.see(lines)
        self._calls.watch((abi.OP_FLASH_ATTN_EXT,))  # each of the other layers has two more nodes that store rows

    def _place_parts(self) -> None:
        """Every part attends to rows of its own."""
        if self._join_single_tokens():
            return
        n, copied = 0, _Copied([], array.array("i"))
        self._copies = [copied]
        for part, own in zip(self._pass.parts, self._parts, strict=False):
            cells = self.cells[part.sequence]
            if len(copied.cells) + len(cells) > self._most_rows:  # what texts share is copied for each of them
                copied = _Copied([], array.array("i"))
                self._copies.append(copied)
            own.place(part, n, len(copied.cells), self._zeros_end)
            copied.parts.append(own)
            copied.cells.extend(cells)
            n += len(part.tokens)
        self._active = self._parts[: len(self._pass.parts)]
        self._copy_next(self._copies[0])

    def _join_single_tokens(self) -> bool:
        """Where every part is one token that the same kernel computes, one node computes all of them, in less time: a
        part is a sequence of that, with as many rows as the longest. Whether it is so."""
        parts = self._pass.parts
        n_texts, n_rows = len(parts), max(part.end for part in parts)
        is_possible = n_rows <= PADDED and n_texts * n_rows <= self._most_rows
        if n_texts == 1 or self._pass.n_tokens > n_texts or not is_possible:
            return False
        copied = _Copied([self._joined], array.array("i"))
        for i, part in enumerate(parts):
            cells, more = self.cells[part.sequence], n_rows - part.end
            copied.cells.extend(cells + cells[:1] * more)
            line = [SEEN] * part.end + [NO_LOGIT] * (PADDED - part.end)
            self._masks[PADDED * i : PADDED * (i + 1)] = array.array("H", line)
        self._joined.join(n_texts, n_rows, self._masks.buffer_info()[0])
        self._active, self._copies = [self._joined], [copied]
        self._copy_next(copied)
        return True

    def _copy_next(self, copied: _Copied) -> None:
        """Have the graph copy these rows, and compute the parts that attend to them."""
        for own in self._all_parts:
            own.out.op = abi.OP_NONE
        for own in copied.parts:
            own.out.op = abi.OP_NONE if own.is_padded else abi.OP_FLASH_ATTN_EXT
        describe(self._which, copied.cells.buffer_info()[0], (len(copied.cells),), _I32)
        for tensor in self._copied:
            describe(tensor, tensor.data, (tensor.ne[0], len(copied.cells)))

    def _attend(self, node: abi.Tensor) -> None:
        """Compute a layer's attention, part by part."""
        if not self._active:
            self._place_parts()
        query, keys, values = (abi.Tensor.from_address(node.src[i]) for i in range(3))
        self._aim(self._layer_of(node), node)
        for copied in self._copies:
            if len(self._copies) > 1:
                self._copy_next(copied)
            self._graph.compute(_WHAT, _NEXT)
            for own in copied.parts:
                if own.is_padded:
                    self._attend_long(own, node, query, (keys, values))

    def _layer_of(self, node: abi.Tensor) -> CacheLayer:
        """The layer whose attention a node is."""
        keys, values = (abi.Tensor.from_address(node.src[i]) for i in (1, 2))
        if keys.view_src not in self._part_of or keys.view_offs or values.view_offs:
            raise EngineError("an attention node does not read the cache of keys and values", _NEXT)
        return self._cache.layers[self._part_of[keys.view_src][0]]

    def _aim(self, layer: CacheLayer, node: abi.Tensor) -> None:
        """Have the graph compute a layer's node."""
        query, *rows = (abi.Tensor.from_address(node.src[i]) for i in range(3))
        shape = tuple(_shape(tensor) for tensor in (node, query, *rows))
        if shape != self._shape:
            self._shape, self._ends = shape, (0, 0)
            for own in self._active:
                own.copy(node, query, rows)
            self._point_at_rows(layer)
        for part, source in zip(layer.parts, self._from, strict=True):
            source.data = part.data
        if (query.data, node.data) != self._ends:  # mostly they are those of the layer before
            self._ends = query.data, node.data
            for own in self._active:
                own.query.data = query.data + own.n * query.nb[1]
                own.out.data = node.data + own.n * node.nb[2]
        if node.src[4] or self._active[0].out.src[4]:
            for own in self._active:
                own.out.src[4] = node.src[4]

    def _attend_long(self, own: _Part, node: abi.Tensor, query: abi.Tensor, rows: Sequence[abi.Tensor]) -> None:
        """Compute the attention of few tokens by the kernel for many: others are added that nobody looks at."""
        few, results = self._few.address, self._few.address + _LONG * query.nb[1]
        ctypes.memmove(few, own.query.data, own.n_tokens * query.nb[1])
        self._long.take(own)
        self._long.copy(node, query, rows)
        for i in (K, V):
            self._long.rows[i].data = own.rows[i].data
        self._long.query.data, self._long.out.data, self._long.out.src[4] = few, results, node.src[4]
        self._long_graph.compute(_WHAT, _NEXT)
        ctypes.memmove(own.out.data, results, own.n_tokens * node.nb[2])

    def _point_at_rows(self, layer: CacheLayer) -> None:
        """Have the rows of layers like this one copied, and every part find its own."""
        for i, part in enumerate(layer.parts):
            width, address = part.row_bytes // _ELEMENT_BYTES, self._rows[i].address
            describe(self._from[i], part.data, (width, part.n_cells))
            describe(self._copied[i], address, (width, self._which.ne[0]))
            for own in self._active:
                own.rows[i].data = address + own.row * part.row_bytes


class _Copied(NamedTuple):
    """Rows that are copied at once, by their cells, and the parts that attend to them."""

    parts: list[_Part]
    cells: array.array[int]


class _Part:
    """The tensors of one part of a pass: token n of the pass is its first, `row` the first of its rows copied.

    is_padded: it has too few tokens for the kernel that computes it alone.
    """

    def __init__(self) -> None:
        self.query, self.mask, self.out = abi.Tensor(), abi.Tensor(), abi.Tensor()
        self.rows = _tensors(2)
        self.n = self.row = self.n_tokens = self._n_rows = self._n_joined = self._row_step = 0
        self.is_padded = False

    def place(self, part: Part, n: int, row: int, zeros_end: int) -> None:
        """What it attends to in a pass. As alone, where llama.cpp's own mask ends at a multiple of some cells."""
        self.n, self.row, self.n_tokens = n, row, len(part.tokens)
        self.is_padded = part.long and self.n_tokens < _LONG
        self._n_rows = -(-part.end // PADDED) * PADDED
        self._see(zeros_end - (part.first + 1) * _HALF_BYTES)

    def take(self, other: _Part) -> None:
        """Be another part, with as many tokens as the kernel for many needs."""
        self.n, self.row, self.n_tokens, self._n_rows = other.n, other.row, _LONG, other._n_rows
        self._see(other.mask.data)

    def join(self, n_texts: int, n_rows: int, masks: int) -> None:
        """Be single tokens of so many texts, each with n_rows rows, one behind the other, and a line of masks."""
        self.n_tokens, self._n_rows, self._n_joined, self._row_step = 1, PADDED, n_texts, n_rows
        self._see(masks)
        self.mask.ne[3], self.mask.nb[3] = n_texts, PADDED * _HALF_BYTES

    def _see(self, mask: int) -> None:
        """A line of the mask is the one before it, begun one zero earlier: so all of them are one array."""
        describe(self.mask, mask, (self._n_rows, self.n_tokens), F16)
        self.mask.nb[1] = -_HALF_BYTES  # a step back: it wraps around as in C
        self.mask.nb[2] = self.mask.nb[3] = 0

    def copy(self, node: abi.Tensor, query: abi.Tensor, rows: Sequence[abi.Tensor]) -> None:
        """Take shapes and parameters over from llama.cpp's node and its sources."""
        flags = self.out.flags
        for own, other in zip((self.query, *self.rows, self.out), (query, *rows, node), strict=True):
            ctypes.memmove(ctypes.addressof(own), ctypes.addressof(other), abi.TENSOR_BYTES)
            cut_off(own)
        self.query.ne[1] = self.out.ne[2] = self.n_tokens
        for tensor in self.rows:
            tensor.ne[1] = self._n_rows
        if self._n_joined:
            self.query.nb[3], self.out.nb[3] = self.query.nb[1], self.out.nb[2]
            for tensor in self.rows:
                tensor.nb[3] = self._row_step * tensor.nb[1]
            for tensor in (self.query, self.out, *self.rows):
                tensor.ne[3] = self._n_joined
        operate(self.out, abi.OP_NONE if self.is_padded else abi.OP_FLASH_ATTN_EXT, self.query, *self.rows, self.mask)
        self.out.flags = flags


def _tensors(n: int) -> list[abi.Tensor]:
    return [abi.Tensor() for _ in range(n)]


_FROM, _TO = abi.Tensor.ne.offset, abi.Tensor.flags.offset


def _shape(tensor: abi.Tensor) -> bytes:
    """Sizes, strides and parameters of a tensor."""
    return ctypes.string_at(ctypes.addressof(tensor) + _FROM, _TO - _FROM)
