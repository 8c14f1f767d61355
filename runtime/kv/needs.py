"""What a filter of keys and values needs, from sizes alone: for the filter itself, and for plans made without a model.

A part is the keys (0) or the values (1) of a layer: n_cells rows of row_bytes bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from runtime.kv.options import WINDOWED, KvFilter
from runtime.kv.roles import Roles
from runtime.sizes import PAGE, page_up

BOUNCE_BYTES = 2**20  # of each thread of a disk store
_F32_BYTES, _HALF_BYTES = 4, 2
_SCORES_STEP = 64  # a product along so many positions has no rest in any of ggml's kernels
_MOST_NEW = 3  # every slot is filled anew when more than one row in so many is new


class Part(Protocol):
    """Keys or values of a layer."""

    @property
    def row_bytes(self) -> int:
        """Bytes of one position."""

    @property
    def n_cells(self) -> int:
        """Positions there is room for."""

    @property
    def is_half(self) -> bool:
        """Whether they are 16-bit numbers."""


@dataclass(frozen=True)
class FilterNeeds:
    """Bytes: memory beside llama.cpp's cache at its most, and what of that cache is never touched."""

    memory_bytes: int
    spared_bytes: int


def filter_needs(
    options: KvFilter, roles: Roles, parts: Mapping[int, Sequence[Part]], filterable: Collection[int], n_heads: int
) -> FilterNeeds:
    """What a filter with these roles needs. parts: keys and values of every layer; filterable: see Cache."""
    n_cells = max(part.n_cells for layer in filterable for part in parts[layer])
    scores_bytes = page_up(padded_scores(n_cells) * n_heads * _F32_BYTES)
    memory_bytes = scores_bytes
    dense = [parts[layer][1] for layer in filterable if layer not in roles.sparse]
    turned = [values for values in dense if turns(options, values)]
    if turned:
        memory_bytes += scores_bytes + sum(_turned_bytes(part) for part in turned)
    if options.method == "omnikv" and options.select in WINDOWED:
        memory_bytes += n_cells * (options.window + 1) * len(roles.filters) * _F32_BYTES
    if options.method == "heavy":
        memory_bytes += n_cells * len(roles.sparse) * _F32_BYTES
    if options.method == "full":
        return FilterNeeds(memory_bytes, 0)
    sparse = [parts[layer] for layer in roles.sparse]
    n_rows = min(options.n_rows(n_cells) + most_tail(options, n_cells), n_cells)
    buffers = sum(page_up(n_rows * part.row_bytes) for both in sparse for part in both)
    if options.store == "ram":
        return FilterNeeds(memory_bytes + buffers + page_up(staging_bytes(options, sparse)), 0)
    all_bytes = [[part.n_cells * part.row_bytes for part in both] for both in sparse]
    slot = sum(max(map(page_up, sizes)) for sizes in zip(*all_bytes, strict=True))  # of a prompt, one layer at a time
    bounces = (options.readers + 1) * BOUNCE_BYTES  # one more for the thread that writes
    return FilterNeeds(memory_bytes + max(buffers, slot) + bounces, sum(map(sum, all_bytes)))


def turns(options: KvFilter, values: Part) -> bool:
    """Whether dense layers attend by products: not where all rows are kept, which gives llama.cpp's own bits."""
    return options.method == "omnikv" and not options.keeps_all and values.is_half


def _turned_bytes(values: Part) -> int:
    """Memory for values with positions innermost, beside the cache, which they leave page by page: a page for each."""
    n_values = values.row_bytes // _HALF_BYTES
    return page_up(n_values * min(PAGE, padded_scores(values.n_cells) * _HALF_BYTES)) + PAGE


def padded_scores(n_rows: int) -> int:
    """The scores of n_rows positions there is room for."""
    return -(-n_rows // _SCORES_STEP) * _SCORES_STEP


def most_tail(options: KvFilter, n_cells: int) -> int:
    """Most rows that are decoded before they become part of the prompt."""
    return min(options.tail or n_cells, n_cells)


def most_new(n_slots: int) -> int:
    """The most new rows that are copied one by one into n_slots slots."""
    return n_slots // _MOST_NEW


def staging_bytes(options: KvFilter, layers: Iterable[Iterable[Part]]) -> int:
    """Memory that few new rows of one part go through when they are copied."""
    return max((most_new(options.n_rows(p.n_cells)) * p.row_bytes for both in layers for p in both), default=0)
