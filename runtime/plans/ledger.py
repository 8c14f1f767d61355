"""Where the bytes of the budget go."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import BudgetError
from runtime.settings import MARGIN_BYTES
from runtime.sizes import MB, PAGE, format_size, page_up

POSITION_BYTES = 48  # what llama.cpp keeps per position of a context, without keys and values
_THREAD_BYTES = 80 * 2**10  # what a thread that computes takes: stack, page tables, kernel memory
_THREADS_IN_MARGIN = 16
_TEXT_BYTES = 64  # per token of a text, to find its like in the text again
_TEXT_IN_MARGIN = 8192  # tokens
_TABLE_ENTRY_BYTES = 8  # per page of memory
_TABLES_IN_MARGIN = 250 * MB  # of a budget: the margin has room for their page tables
SAMPLER_BYTES_PER_TOKEN = 12  # llama.cpp's candidate list: token id, logit, probability per vocabulary entry


@dataclass(frozen=True)
class Ledger:
    """Bytes by part.

    process: measured after everything but weights was loaded, vocabulary included. draft: a draft model's weights, keys
    and values, and buffers. filter, attention: what filtering keys and values, and the attention of several sequences,
    take beside the cache. swap: keys and values that were swapped out to memory, and a block on its way. snapshot: keys
    and values that come from workers, on their way to a file. cache: file pages of reads under way, where the file
    system has no direct ones.
    """

    process_bytes: int
    kv_bytes: int
    compute_bytes: int
    embedding_bytes: int
    sampler_bytes: int
    draft_bytes: int = 0
    filter_bytes: int = 0
    attention_bytes: int = 0
    swap_bytes: int = 0
    snapshot_bytes: int = 0
    cache_bytes: int = 0
    window_bytes: int = 0
    resident_bytes: int = 0
    margin_bytes: int = MARGIN_BYTES

    @property
    def fixed_bytes(self) -> int:
        """Everything but streamable weights."""
        return (
            self.process_bytes
            + self.kv_bytes
            + self.compute_bytes
            + self.embedding_bytes
            + self.sampler_bytes
            + self.draft_bytes
            + self.filter_bytes
            + self.attention_bytes
            + self.swap_bytes
            + self.snapshot_bytes
            + self.cache_bytes
            + self.margin_bytes
        )

    @property
    def total_bytes(self) -> int:
        """The most this process will take."""
        return self.fixed_bytes + self.window_bytes + self.resident_bytes

    def as_dict(self) -> dict[str, int]:
        """Part -> bytes, for people and for --json."""
        optional = {
            "draft_bytes": self.draft_bytes,
            "filter_bytes": self.filter_bytes,
            "attention_bytes": self.attention_bytes,
            "swap_bytes": self.swap_bytes,
            "snapshot_bytes": self.snapshot_bytes,
            "cache_bytes": self.cache_bytes,
        }
        return {
            "process_bytes": self.process_bytes,
            "kv_bytes": self.kv_bytes,
            "compute_bytes": self.compute_bytes,
            "embedding_bytes": self.embedding_bytes,
            "sampler_bytes": self.sampler_bytes,
            "margin_bytes": self.margin_bytes,
            "window_bytes": self.window_bytes,
            "resident_bytes": self.resident_bytes,
        } | {part: n_bytes for part, n_bytes in optional.items() if n_bytes}

    def weights_bytes(self, budget_bytes: int, smallest_window: int) -> int:
        """What the budget leaves for window and resident pieces. Raises BudgetError below the floor."""
        usable, floor = usable_bytes(budget_bytes), self.fixed_bytes + smallest_window
        if usable < floor:
            raise below_floor(budget_bytes, floor_for(floor))
        return usable - self.fixed_bytes


def more_margin(n_ctx: int, n_threads: int) -> int:
    """Bytes that a long context and many threads take beyond what the margin has room for."""
    threads, tokens = n_threads - _THREADS_IN_MARGIN, n_ctx - _TEXT_IN_MARGIN
    return max(0, threads) * _THREAD_BYTES + max(0, tokens) * _TEXT_BYTES


def usable_bytes(budget_bytes: int) -> int:
    """A budget without the page tables the kernel charges to a process; those of the first 250 MB are in the margin."""
    return budget_bytes - max(0, budget_bytes - _TABLES_IN_MARGIN) * _TABLE_ENTRY_BYTES // PAGE


def budget_for(usable: int) -> int:
    """The smallest budget, to a few bytes, that leaves so many usable bytes."""
    more = max(0, usable - _TABLES_IN_MARGIN) * _TABLE_ENTRY_BYTES
    return usable + -(-more // (PAGE - _TABLE_ENTRY_BYTES))


def floor_for(need_bytes: int) -> int:
    """The smallest budget that is named, in whole MB, where need_bytes were measured: the fixed bytes and the smallest
    window. It has room for page tables and for what differs from run to run."""
    return -(-(budget_for(need_bytes) + MB) // MB) * MB


def below_floor(budget_bytes: int, floor_bytes: int, lowered_by: str = "") -> BudgetError:
    """The error for a budget below floor_bytes, the smallest that works. lowered_by: flags that make it smaller."""
    hint = f" ({lowered_by} lowers it)" if lowered_by else ""
    return BudgetError(
        f"{format_size(budget_bytes)} is too small for this model",
        f"the smallest budget that works here is -m {-(-floor_bytes // MB)}{hint}",
        floor_bytes=floor_bytes,
    )


def sampler_bytes(n_vocab: int, n_texts: int) -> int:
    """The list of candidates; where there are several texts one more, as some of them may sort all candidates."""
    return min(n_texts, 2) * n_vocab * SAMPLER_BYTES_PER_TOKEN


def embedding_rows_bytes(row_bytes: int, n_tokens: int) -> int:
    """Memory for the embedding rows of n_tokens, in whole pages."""
    return n_tokens * (row_bytes // PAGE + 2) * PAGE


def touched_bytes(row_bytes: int, n_cells: int, n_positions: int) -> int:
    """The most bytes of memory that the first n_positions of n_cells rows take: whole pages, from any address."""
    return min(row_bytes * n_cells, page_up(row_bytes * n_positions) + PAGE)
