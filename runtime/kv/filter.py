"""The object an engine asks at every node when keys and values are filtered.

A pass over several tokens (the prompt) is dense. In a pass over one token every filter layer scores the rows of the
prompt, and the sparse layers behind it attend to the chosen rows and to all rows decoded since. Both lie in a buffer of
each sparse layer (Compact); its flash-attention node is pointed there, and so are the writes of new keys and values.

`stored` rows are where prompts are kept (the store); rows from there on, the tail, are only in the buffers until the
next prompt comes and takes them in.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass

from runtime import llama_abi as abi
from runtime.errors import EngineError, H2OError
from runtime.kv.cache import OFF, Cache, K, V, find_cache
from runtime.kv.compact import PAD, Compact, Mask
from runtime.kv.options import WINDOWED, KvFilter
from runtime.kv.roles import Roles, default_filters, layer_roles
from runtime.kv.scores import Floats, Scorer, queries
from runtime.kv.selection import Attention, Chooser, LastChooser, Queries, Selection, WindowChooser, fixed_rows
from runtime.kv.store import RamStore
from runtime.model_file import ModelFile
from runtime.settings import Settings
from runtime.sizes import page_up

Watch = Callable[[int, Floats], None]


@dataclass
class Pass:
    """The pass at hand: its first position, its tokens, whether sparse layers attend to a selection in it."""

    n_past: int = 0
    n_tokens: int = 0
    sparse: bool = False
    decode: bool = False


def open_filter(
    options: KvFilter, file: ModelFile, model: int, groups: list[dict[str, int]], settings: Settings
) -> Filter:
    """The filter of a context; groups: its cache tensors (see find_cache). Raises H2OError where it cannot work."""
    cache = find_cache(groups, file, model)
    filters = options.layers or default_filters(cache.filterable)
    roles = layer_roles(file.n_layers, filters, options.wait, cache.filterable)
    n_heads = int(abi.llama.llama_model_n_head(model))
    return Filter(options, cache, roles, settings, n_heads)


class Filter:
    """Filters the passes of one context. `stored`: rows of the prompt; rows decoded since then are always attended."""

    def __init__(self, options: KvFilter, cache: Cache, roles: Roles, settings: Settings, n_heads: int) -> None:
        self.options, self.roles, self.cache = options, roles, cache
        self.stored = 0
        self.bytes_fetched = 0
        self._n_cells = max(part.n_cells for layer in cache.filterable for part in cache.layers[layer].parts)
        self._active = options.method != "full"
        self._scorer = Scorer(settings.n_threads)
        self._n_heads = n_heads
        self._part_of = {part.root: (n, i) for n, layer in cache.layers.items() for i, part in enumerate(layer.parts)}
        self._store = RamStore(cache)
        self._mask = Mask(self._n_cells + PAD)
        sparse = roles.sparse if self._active else ()
        self._compact = {n: Compact(cache.layers[n], self._n_cells + PAD) for n in sparse}
        self._own = {address for compact in self._compact.values() for address in compact.addresses}
        self._filterable = frozenset(cache.filterable)
        self._filters = roles.filters
        self._segment_of = {n: i for i, segment in enumerate(roles.segments) for n in segment.sparse}
        self._scored = options.method == "omnikv"
        self._windowed = self._scored and options.select in WINDOWED
        self._queries: dict[int, Queries] = {n: deque(maxlen=options.window) for n in roles.filters}
        self._selections: list[Selection] = []
        self._choosers: list[Chooser] = []
        self._prepared = -1  # the `stored` that the selections are for
        self._pass = Pass()
        self._asked: dict[int, int] = {}  # nodes to be reported -> layer
        self._seen: set[int] = set()
        self._originals: dict[int, tuple[int, ...]] = {}  # flash-attention node -> its own src[1..3]
        self._watched: Collection[int] = ()
        self._watch: Watch | None = None
        self.kept_rows = 0

    # --- figures ------------------------------------------------------------------------------------------------

    @property
    def memory_bytes(self) -> int:
        """The most memory this takes beside llama.cpp's cache: buffers of chosen and decoded rows, scores."""
        scores = page_up(self._n_cells * self._n_heads * 4)
        rows = self.options.n_rows(self._n_cells) + self._most_tail + PAD
        rows = min(rows, self._n_cells + PAD)
        return scores + sum(
            page_up(rows * part.row_bytes) for n in self._compact for part in self.cache.layers[n].parts
        )

    @property
    def _most_tail(self) -> int:
        return min(self.options.tail or self._n_cells, self._n_cells)

    # --- around a pass ------------------------------------------------------------------------------------------

    def begin_pass(self, n_past: int, n_tokens: int, *, decode: bool) -> None:
        """Positions [n_past, n_past + n_tokens) come next; decode: one token that continues an answer."""
        decode = decode and self.stored > 0
        self._pass = Pass(n_past, n_tokens, decode and self._active, decode)
        self._seen.clear()
        self._asked.clear()
        if not decode or (self._active and n_past - self.stored >= self._most_tail):
            self._take_in_tail(n_past)
        if self._pass.sparse and self._prepared != self.stored:
            self._prepare()
        if self._pass.sparse and not self._scored:
            for i, selection in enumerate(self._selections):
                selection.take(fixed_rows(self.options, self.stored, i))

    def _take_in_tail(self, n_past: int) -> None:
        """Make the rows decoded since the last prompt part of it."""
        n_tail = n_past - self.stored
        if self._active and n_tail > 0 and self._prepared >= 0:
            for n, compact in self._compact.items():
                for i in (K, V):
                    self._store.put(n, i, self.stored, compact.rows[i][self.kept_rows : self.kept_rows + n_tail])
        self.stored = n_past
        self._forget()

    def _forget(self) -> None:
        self._selections = []
        self._prepared = -1
        for compact in self._compact.values():
            compact.drop()

    def _prepare(self) -> None:
        """Begin to decode behind `stored` rows: no row is in a buffer yet."""
        self.kept_rows = self.options.n_rows(self.stored)
        self._selections = [
            Selection(self.options, segment.sparse, self.stored, self._compact, self._store)
            for segment in self.roles.segments
        ]
        self._choosers = [self._chooser(n) for n in self._filters] if self._scored else []
        self._prepared = self.stored

    def _chooser(self, layer: int) -> Chooser:
        if self._windowed:
            return WindowChooser(self.options, self.stored, self._queries[layer])
        return LastChooser(self.options, self.stored)

    def end_pass(self, *, complete: bool) -> H2OError | None:
        """After the pass; an error when the nodes expected in it were not met."""
        if not complete:
            for selection in self._selections:
                selection.forget()
            return None
        if not self._pass.decode:
            self.stored = self._pass.n_past + self._pass.n_tokens
        missing = set(self.cache.filterable) - self._seen
        if missing:
            return EngineError(
                f"llama.cpp computes layer {min(missing)} without flash attention: nothing can be filtered",
                OFF,
            )
        return None

    def truncate(self, n_past: int) -> None:
        """Positions from n_past on are forgotten."""
        if n_past < self.stored:
            self.stored = n_past
            self._forget()
        for queries_ in self._queries.values():
            while queries_ and queries_[-1][0] >= n_past:
                queries_.pop()

    def watch(self, layers: Collection[int], watch: Watch | None) -> None:
        """Call watch(layer, scores [stored]) for these dense layers in every decode pass: softmax, head maximum."""
        self._watched, self._watch = (layers, watch) if watch else ((), None)

    def close(self) -> None:
        """Free everything."""
        self._forget()
        for compact in self._compact.values():
            compact.free()
        self._scorer.close()

    # --- nodes --------------------------------------------------------------------------------------------------

    def before(self, address: int) -> bool:
        """A node is going to be computed; True: report when it is done."""
        op = ctypes.c_int.from_address(address + abi.OP_OFFSET).value
        if op == abi.OP_FLASH_ATTN_EXT:
            return self._before_attention(address)
        if op == abi.OP_SET_ROWS:
            return self._before_write(address)
        return False

    def _before_write(self, address: int) -> bool:
        node = abi.Tensor.from_address(address)
        layer, part = self._part_of.get(node.view_src, (-1, 0))
        if layer not in self._compact:
            return False
        if not self._pass.sparse:
            node.data = self.cache.layers[layer].parts[part].data
            return False
        row = ctypes.c_int64.from_address(abi.Tensor.from_address(node.src[1]).data).value
        if row != self._pass.n_past:
            raise EngineError(f"llama.cpp put position {self._pass.n_past} into cell {row} of its cache", OFF)
        slot = self.kept_rows + row - self.stored
        node.data = self._compact[layer].target(part, row, slot)
        return part == V and not self._selections[self._segment_of[layer]].is_ready(layer)

    def _before_attention(self, address: int) -> bool:
        node = abi.Tensor.from_address(address)
        layer = self._layer_of(address, node)
        if layer is None:
            return False
        if layer in self._seen and layer in self._compact:
            raise EngineError(f"several layers share the keys of layer {layer}, which cannot be filtered", OFF)
        self._seen.add(layer)
        if self._pass.sparse and layer in self._compact:
            self._selections[self._segment_of[layer]].wait(layer)
            n_rows = self.kept_rows + self._pass.n_past - self.stored + 1
            n_padded = min(-(-n_rows // PAD) * PAD, self._n_cells)
            self._compact[layer].place(node, n_padded)
            self._mask.place(node, n_rows, n_padded)
            return False
        if self._wants(layer):
            self._asked[address] = layer
            return True
        return False

    def _layer_of(self, address: int, node: abi.Tensor) -> int | None:
        """The layer of a flash-attention node, whose sources are its own again; None: one with a sliding window."""
        if node.src[1] in self._own:  # llama.cpp uses a graph again as long as its shape stays
            node.src[1], node.src[2], node.src[3] = self._originals[address]
        else:
            self._originals[address] = (node.src[1], node.src[2], node.src[3])
        root = abi.Tensor.from_address(node.src[1]).view_src
        if root not in self._part_of:
            raise EngineError("an attention node does not read the cache of keys and values", OFF)
        layer = self._part_of[root][0]
        return layer if layer in self.cache.layers and layer in self._filterable else None

    def _wants(self, layer: int) -> bool:
        """Whether a dense layer's attention is looked at in this pass."""
        if not self._pass.decode:
            return self._windowed and layer in self._filters
        return layer in self._watched or (self._pass.sparse and self._scored and layer in self._filters)

    def after(self, address: int) -> None:
        """Everything up to this node has been computed."""
        layer = self._asked.pop(address, None)
        if layer is None:
            return
        node = abi.Tensor.from_address(address)
        keys = abi.Tensor.from_address(node.src[1])
        query = abi.Tensor.from_address(node.src[0])
        if not self._pass.decode:
            self._see_prompt(layer, query)
            return
        attention = Attention(self._scorer, keys, self.stored, *_parameters(node))
        own = queries(query)[0]
        if self._pass.sparse and layer in self._filters:
            i = self._filters.index(layer)
            self._selections[i].take(self._choosers[i].rows(own, self._pass.n_past, attention))
        if self._watch and layer in self._watched:
            self._watch(layer, attention.softmax(own))

    def _see_prompt(self, layer: int, query: abi.Tensor) -> None:
        """Remember the last queries of a prompt at a filter layer."""
        found = queries(query, self.options.window)
        end = self._pass.n_past + self._pass.n_tokens
        self._queries[layer].extend(zip(range(end - len(found), end), found, strict=True))


def _parameters(node: abi.Tensor) -> tuple[float, float]:
    """Scale and soft cap of a flash-attention node. Raises EngineError where its scores depend on distance."""
    scale, alibi, softcap = (ctypes.c_float * 3).from_buffer(node.op_params)
    if alibi:
        raise EngineError("this model adds a bias to its scores by distance (ALiBi), which cannot be filtered", OFF)
    return scale, softcap
