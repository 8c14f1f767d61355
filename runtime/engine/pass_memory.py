"""What a pass needs besides weights, keys and values: buffers that grow with its tokens.

llama.cpp reserves its compute buffer for the longest pass, and an output for the logits of as many tokens as are ever
drafted. It is memory that is touched lazily: a short pass (a token and its drafts) takes a small part of the first, a
pass without drafts one row of the second. What was touched and is not needed is given back, and weights take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from runtime.kv.cache_memory import CacheMemory
from runtime.llama.context import Context
from runtime.llama.model_file import ModelFile, TensorInfo
from runtime.llama.scratch import Scratch
from runtime.plans.ledger import Ledger, embedding_rows_bytes, more_margin, sampler_bytes
from runtime.settings import SHORT_PASS, Settings
from runtime.sizes import MB, PAGE, page_up
from runtime.weights.rows import RowTable

if TYPE_CHECKING:
    from runtime.kv.apart import SequenceAttention
    from runtime.kv.filter import Filter

_KEPT_ROWS = 64  # embedding rows of past tokens that stay in memory
_SPREAD = 1.25  # a short pass touches pages here and there: at most this times its share of the buffer (measured)


class Use(NamedTuple):
    """What memory is laid out for.

    long: passes of a prompt; else of a token and its drafts, or of a few tokens (PassMemory.short). rows: of logits.
    """

    long: bool
    rows: int = 1

    def with_(self, other: Use) -> Use:
        """For both."""
        return Use(self.long or other.long, max(self.rows, other.rows))


PROMPT, TOKEN = Use(long=True), Use(long=False)


def rows_for(n_logits: int, most: int) -> int:
    """Rows of logits that memory is laid out for: one, half of the most, or the most. A change is paid with reads."""
    half = -(-most // 2)
    return 1 if n_logits <= 1 else half if n_logits <= half else most


@dataclass(frozen=True)
class PassMemory:
    """Bytes that the passes of a context need.

    scratch: ggml's. one_row_bytes: of the buffers where the context makes one row of logits at most. Nothing else in
    them grows with the rows, and rows that a pass does not make are not touched.
    """

    file: ModelFile
    settings: Settings
    context: Context
    scratch: Scratch
    one_row_bytes: int

    def short(self, rows: int) -> int:
        """Tokens up to which a pass with so many rows of logits counts as short: products take no tiles, unless for as
        many tokens as rows."""
        return max(self.scratch.untiled(SHORT_PASS), rows)

    def compute(self, use: Use) -> int:
        """Compute and output buffers, and scratch."""
        n_tokens, row_bytes = self.context.n_tokens, 4 * self.context.n_vocab
        logits, n_short = row_bytes * use.rows, max(SHORT_PASS, use.rows)
        n_scratch = n_tokens if use.long else min(n_tokens, self.short(use.rows))
        others = max(0, self.one_row_bytes - row_bytes)
        share = 1.0 if use.long else _SPREAD * min(1.0, n_short / n_tokens)
        buffer = min(self.context.scratch_bytes, logits + int(share * others) + MB // 4)
        return buffer + logits + self.scratch.bytes_for(n_scratch, use.rows)

    def embedding(self, table: TensorInfo, *, long: bool) -> int:
        """An input embedding's rows: of one pass and some of the passes before; or all of it."""
        if self.settings.prefetch_input:
            return page_up(table.n_bytes) + PAGE
        n_rows = (self.context.n_tokens if long else SHORT_PASS) + _KEPT_ROWS
        return min(embedding_rows_bytes(table.row_bytes, n_rows), page_up(table.n_bytes) + PAGE)


class Needs(NamedTuple):
    """What an engine needs besides weights.

    process_bytes: measured with library, header, vocabulary and context loaded. cached_bytes: file pages of reads.
    """

    passes: PassMemory
    cache: CacheMemory
    kv: Filter | None
    attention: SequenceAttention | None
    tables: Sequence[RowTable]
    process_bytes: int
    cached_bytes: int

    def ledger(self, use: Use) -> Ledger:
        """The ledger of a full context, without weights."""
        passes, settings = self.passes, self.passes.settings
        n_lists = settings.n_sequences if settings.lists_tokens else 0
        return Ledger(
            process_bytes=self.process_bytes,
            kv_bytes=self.kv_bytes(self.cache.n_cells),
            compute_bytes=passes.compute(use),
            embedding_bytes=sum(passes.embedding(table.tensor, long=use.long) for table in self.tables),
            sampler_bytes=sampler_bytes(passes.context.n_vocab, n_lists),
            draft_bytes=settings.draft_bytes,
            filter_bytes=self.kv.memory_bytes if self.kv else 0,
            attention_bytes=self.attention.memory_bytes if self.attention else 0,
            swap_bytes=settings.swap_bytes,
            snapshot_bytes=settings.snapshot_bytes,
            cache_bytes=self.cached_bytes,
            margin_bytes=settings.margin_bytes + more_margin(settings.n_ctx, settings.n_threads),
        )

    def kv_bytes(self, n_positions: int) -> int:
        """What n_positions take of the cache."""
        spared = self.kv.spared_bytes if self.kv else 0
        return min(self.cache.n_bytes - spared, self.cache.bytes_for(n_positions))

    @property
    def most_bytes(self) -> int:
        """For a prompt or for drafts, whichever takes more; several sequences may have both in one pass."""
        most = self.passes.settings.n_logits
        uses = [PROMPT, Use(long=False, rows=most)]
        if self.passes.settings.n_sequences > 1:
            uses = [Use(long=True, rows=most)]
        return max(self.ledger(use).fixed_bytes for use in uses)
