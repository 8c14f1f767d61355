"""The guest of an engine's passes that filters keys and values: it looks at every node.

A pass over several tokens (a prompt) is dense. In a pass over one token every filter layer scores the rows of the
prompt, and the sparse layers behind it attend to the chosen rows and to all rows decoded since: their flash-attention
nodes are pointed at buffers that hold just those, and so are the writes of new keys and values.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from runtime.errors import EngineError
from runtime.kv.cache import OFF, Cache, V, find_cache
from runtime.kv.dense import DenseAttention
from runtime.kv.jobs import Stopped
from runtime.kv.needs import filter_needs, turns
from runtime.kv.options import GUESS, WINDOWED, KvFilter
from runtime.kv.roles import Roles, default_filters, layer_roles
from runtime.kv.scores import Floats, Scorer, queries
from runtime.kv.selection import (
    Attention,
    Chooser,
    HeavyHitters,
    LastChooser,
    Queries,
    WindowChooser,
    fixed_rows,
)
from runtime.kv.slots import Rows
from runtime.kv.sparse import SparseRows
from runtime.llama import abi
from runtime.llama.model_file import ModelFile
from runtime.passes import Pass
from runtime.settings import Settings

Watch = Callable[[int, Floats], None]


@dataclass(frozen=True)
class CacheSource:
    """A context's cache: its tensors (name -> address) buffer by buffer, and the llama_model it belongs to."""

    groups: list[dict[str, int]]
    model: int


def open_filter(
    settings: Settings, file: ModelFile, source: CacheSource, stopped: Stopped, skip: Callable[[int], object]
) -> Filter:
    """The filter settings.kv asks for. Raises H2OError where it cannot work on this model.

    stopped: the reason why a wait shall end early, if there is one. skip: switches a node off until it was reported.
    """
    options = settings.kv or KvFilter()
    cache = find_cache(source.groups, file, source.model)
    filters = options.layers or default_filters(cache.filterable, options.wait)
    roles = layer_roles(file.head.index, filters, options.wait, cache.filterable)
    n_heads = int(abi.llama.llama_model_n_head(source.model))
    return Filter(options, cache, roles, Scorer(settings.n_threads, n_heads), stopped, skip)


class Filter:
    """Filters the passes of one context."""

    def __init__(
        self,
        options: KvFilter,
        cache: Cache,
        roles: Roles,
        scorer: Scorer,
        stopped: Stopped,
        skip: Callable[[int], object],
    ) -> None:
        self.options, self.roles, self.cache = options, roles, cache
        self._scorer, self._skip = scorer, skip
        self._heavy: dict[int, HeavyHitters] = {}
        with ExitStack() as opened:
            opened.callback(scorer.close)
            parts = {n: layer.parts for n, layer in cache.layers.items()}
            self._needs = filter_needs(options, roles, parts, cache.filterable, scorer.n_heads)
            self._sparse = self._open_sparse(stopped) if options.method != "full" else None
            if self._sparse:
                opened.callback(self._sparse.close)
            dense = [n for n in cache.filterable if n not in roles.sparse]
            values = {n: parts[n][V] for n in dense if turns(options, parts[n][V])}
            self._dense = DenseAttention(scorer.n_threads, values) if values else None
            if self._dense:
                opened.callback(self._dense.close)
            self._opened = opened.pop_all()
        self._fixed: list[Rows] = []
        self._layers = frozenset(self._sparse.layers) if self._sparse else frozenset()
        self._own = self._sparse.own if self._sparse else set()
        self._part_of = {part.root: (n, i) for n, both in parts.items() for i, part in enumerate(both)}
        self._filterable = frozenset(cache.filterable)
        self._scored = options.method == "omnikv"
        self._windowed = self._scored and options.select in WINDOWED
        self._queries: dict[int, Queries] = {n: deque(maxlen=options.window) for n in roles.filters}
        self._choosers: dict[int, Chooser] = {}
        self._n_past = self._n_tokens = 0  # of the pass at hand: positions before it, its own
        self._decode = False
        self._stored = 0
        self._asked: dict[int, int] = {}  # nodes to be reported -> layer
        self._seen: set[int] = set()
        self._originals: dict[int, tuple[int, ...]] = {}  # flash-attention node -> its own src[1..3]
        self._watched: Collection[int] = ()
        self._watch: Watch | None = None
        self._n_decoded = self._read_before = self._fetched_before = 0

    def _open_sparse(self, stopped: Stopped) -> SparseRows:
        segments = tuple(segment.sparse for segment in self.roles.segments)
        if self.options.method == "heavy":
            segments = tuple((layer,) for layer in self.roles.sparse)
            n_cells = max(self.cache.layers[layer].parts[0].n_cells for layer in self.roles.sparse)
            self._heavy = {layer: HeavyHitters(n_cells) for layer in self.roles.sparse}
        return SparseRows(self.options, self.cache, segments, stopped, self._scorer.n_threads)

    # --- figures ------------------------------------------------------------------------------------------------

    @property
    def stored(self) -> int:
        """Rows of the prompt; rows decoded since then are always attended."""
        return self._sparse.stored if self._sparse else self._stored

    @property
    def kept_rows(self) -> int:
        """Rows of the prompt that sparse layers attend to in decode passes."""
        return self._sparse.kept if self._sparse else self._stored

    @property
    def memory_bytes(self) -> int:
        """The most memory this takes beside llama.cpp's cache."""
        return self._needs.memory_bytes

    @property
    def spared_bytes(self) -> int:
        """Bytes of llama.cpp's cache that are never touched."""
        return self._needs.spared_bytes

    @property
    def summary(self) -> str:
        """One phrase for people."""
        share = f"{len(self._layers)} of {len(self.cache.layers)} layers"
        return f"{self.kept_rows} of {self.stored} prompt positions attended in {share}"

    @property
    def guesses(self) -> bool:
        """Whether positions are left out, and who chooses them is a guess."""
        return self.options.layers_from == GUESS and self.kept_rows < self.stored

    def figures(self) -> dict[str, Any]:
        """The figures of `--json`. Bytes per token are those of the decode passes since the last prompt."""
        options, sparse, n = self.options, self._sparse, self._n_decoded
        n_past = self._n_past + self._n_tokens
        dense_bytes = sum(min(n_past, c.parts[0].n_cells) * c.row_bytes for c in self.cache.layers.values())
        return {
            "method": options.method,
            "layers": list(self.roles.filters),
            "layers_from": options.layers_from,
            "wait": options.wait,
            "sparse_layers": sorted(self._layers),
            "keep": options.keep,
            "select": options.select,
            "strategy": options.strategy,
            "block": options.block,
            "store": options.store,
            "prompt_rows": self.stored,
            "kept_rows": self.kept_rows,
            "bytes_in_memory": sparse.bytes_in_memory(n_past) if sparse else dense_bytes,
            "bytes_on_disk": sparse.bytes_on_disk if sparse else 0,
            "bytes_fetched_per_token": (sparse.store.fetched_bytes - self._fetched_before) / n if sparse and n else 0,
            "bytes_read_per_token": (sparse.store.read_bytes - self._read_before) / n if sparse and n else 0,
        }

    # --- around a pass ------------------------------------------------------------------------------------------

    def begin(self, pass_: Pass) -> None:
        """A pass comes: what it attends to is chosen where it is for one token that continues an answer."""
        part = pass_.only
        n_past, n_tokens = self._n_past, self._n_tokens = part.first, len(part.tokens)
        decode = self._decode = pass_.decode and n_tokens == 1 and self.stored > 0
        self._seen.clear()
        self._asked.clear()
        if not decode:
            self._n_decoded = 0
            if self._sparse:
                self._sparse.begin_prompt(n_past, n_tokens)
            return
        if self._sparse:
            if self._sparse.begin_decode(n_past):
                self._choosers = {n: self._chooser(n) for n in self.roles.filters} if self._scored else {}
                self._fixed = [] if self._scored else self._fixed_rows()
            for i, rows in enumerate(self._fixed):
                self._sparse.take(i, rows)
            if not self._n_decoded:
                self._read_before = self._sparse.store.read_bytes
                self._fetched_before = self._sparse.store.fetched_bytes
        self._n_decoded += 1

    def _fixed_rows(self) -> list[Rows]:
        """The rows of every segment, for a method that does not look at the tokens decoded."""
        if self._heavy:
            return [heavy.rows(self.options, self.stored) for heavy in self._heavy.values()]
        return [fixed_rows(self.options, self.stored, i) for i in range(len(self.roles.segments))]

    def _chooser(self, layer: int) -> Chooser:
        if self._windowed:
            return WindowChooser(self.options, self.stored, self._queries[layer])
        return LastChooser(self.options, self.stored)

    def end(self, *, complete: bool) -> None:
        """After the pass. Raises EngineError when the nodes expected in it were not met."""
        if not complete:
            if self._sparse:
                self._sparse.failed()
            return
        missing = self._filterable - self._seen
        if missing:
            raise EngineError(
                f"llama.cpp computes layer {min(missing)} without flash attention: nothing can be filtered", OFF
            )
        if not self._decode:
            self._stored = self._n_past + self._n_tokens
            if self._sparse:
                self._sparse.stored = self._stored

    def truncate(self, n_past: int) -> None:
        """Positions from n_past on are forgotten."""
        self._stored = min(self._stored, n_past)
        if self._sparse:
            self._sparse.truncate(n_past)
        if self._dense:
            self._dense.truncate(n_past)
        for window in self._queries.values():
            while window and window[-1][0] >= n_past:
                window.pop()

    def watch(self, layers: Collection[int], watch: Watch | None) -> None:
        """Call watch(layer, scores [stored]) for these dense layers in every decode pass: softmax, head maximum."""
        wrong = self._layers.intersection(layers) | (set(layers) - self._filterable)
        if wrong:
            raise EngineError(f"layer {min(wrong)} has no scores of all positions", "watch dense layers")
        self._watched, self._watch = (frozenset(layers), watch) if watch else ((), None)

    def close(self) -> None:
        """Free everything."""
        self._opened.close()

    # --- nodes --------------------------------------------------------------------------------------------------

    def before(self, address: int) -> bool:
        """A node is going to be computed; True: report when it is done."""
        op = ctypes.c_int.from_address(address + abi.OP_OFFSET).value
        if op == abi.OP_FLASH_ATTN_EXT:
            return self._before_attention(address)
        if op == abi.OP_SET_ROWS and self._sparse:
            return self._before_write(abi.Tensor.from_address(address), self._sparse)
        return False

    def _before_write(self, node: abi.Tensor, sparse: SparseRows) -> bool:
        layer, part = self._part_of.get(node.view_src, (-1, 0))
        if layer not in self._layers:
            return False
        row = ctypes.c_int64.from_address(abi.Tensor.from_address(node.src[1]).data).value  # an input: there already
        if row != self._n_past:
            raise EngineError(f"llama.cpp put position {self._n_past} into cell {row} of its cache", OFF)
        if self._decode:
            return sparse.write_decoded(node, layer, part, row)
        return sparse.write_prompt(node, layer, part)

    def _before_attention(self, address: int) -> bool:
        node = abi.Tensor.from_address(address)
        layer = self._layer_of(address, node)
        if layer not in self._filterable:
            return False
        if layer in self._seen and layer in self._layers:
            raise EngineError(f"several layers share the keys of layer {layer}, which cannot be filtered", OFF)
        self._seen.add(layer)
        report = self._wants(layer)
        if self._sparse and layer in self._layers:
            if self._decode:
                self._sparse.attend_selected(node, layer, self._n_past)
            else:
                report = self._sparse.attend_prompt(node) or bool(self._heavy)
        if self._multiplies(layer, node):
            report = True
            self._skip(address)
        elif self._dense:
            self._dense.give_back(layer)
        if report:
            self._asked[address] = layer
        return report

    def _multiplies(self, layer: int, node: abi.Tensor) -> bool:
        """Whether a node's attention is computed here, by products."""
        if not self._dense or not self._decode or self.kept_rows == self.stored:
            return False
        if not self._dense.pays(layer, self._n_past + 1):
            return False
        softcap, sinks = _parameters(node)[1], node.src[4]
        return not softcap and not sinks

    def _layer_of(self, address: int, node: abi.Tensor) -> int:
        """The layer of a flash-attention node, whose sources are its own again."""
        if node.src[1] in self._own:  # llama.cpp uses a graph again as long as its shape stays
            node.src[1], node.src[2], node.src[3] = self._originals[address]
        else:
            self._originals[address] = (node.src[1], node.src[2], node.src[3])
        root = abi.Tensor.from_address(node.src[1]).view_src
        if root not in self._part_of:
            raise EngineError("an attention node does not read the cache of keys and values", OFF)
        return self._part_of[root][0]

    def _wants(self, layer: int) -> bool:
        """Whether a dense layer's attention is looked at in this pass."""
        filters = self._sparse and self._scored and layer in self.roles.filters
        if not self._decode:
            return bool(filters and self._windowed)
        return bool(filters) or layer in self._watched

    def after(self, address: int) -> None:
        """Everything up to this node has been computed."""
        layer = self._asked.pop(address, None)
        if layer is None:
            return
        node = abi.Tensor.from_address(address)
        query = abi.Tensor.from_address(node.src[0])
        if self._sparse and layer in self._layers:
            if self._heavy:
                found = queries(query, self._n_tokens)
                self._heavy[layer].see(found, self._n_past, self._attention(node))
            self._sparse.computed_prompt(layer)
            return
        if not self._decode:
            self._see_prompt(layer, query)
            return
        attention = self._attention(node)
        own = queries(query)[0]
        if self._dense and self._multiplies(layer, node):
            logits = self._scorer.logits(own, attention.keys, self._n_past + 1)
            self._dense.compute(layer, logits, attention.scale, node)
            attention.known = (own, logits)
        if self._sparse and layer in self._choosers:
            rows = self._choosers[layer].rows(own, self._n_past, attention)
            if self._windowed:
                self._queries[layer].append((self._n_past, own))
            self._sparse.take(self.roles.filters.index(layer), rows)
        if self._watch and layer in self._watched:
            self._watch(layer, attention.softmax(own))

    def _attention(self, node: abi.Tensor) -> Attention:
        return Attention(self._scorer, abi.Tensor.from_address(node.src[1]), self.stored, *_parameters(node))

    def _see_prompt(self, layer: int, query: abi.Tensor) -> None:
        """Remember the last queries of a prompt at a filter layer (those of decoded tokens are, too)."""
        found = queries(query, self.options.window)
        end = self._n_past + self._n_tokens
        self._queries[layer].extend(zip(range(end - len(found), end), found, strict=True))


def _parameters(node: abi.Tensor) -> tuple[float, float]:
    """Scale and soft cap of a flash-attention node. Raises EngineError where its scores depend on distance."""
    scale, alibi, softcap = (ctypes.c_float * 3).from_buffer(node.op_params)
    if alibi:
        raise EngineError("this model adds a bias to its scores by distance (ALiBi), which cannot be filtered", OFF)
    return scale, softcap
