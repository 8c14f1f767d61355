"""How an engine runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.sizes import MB

if TYPE_CHECKING:
    from runtime.kv.options import KvFilter

MARGIN_BYTES = 5 * MB  # thread stacks, kernel memory charged to the process, heap growth while it runs
TURNS_MARGIN_BYTES = 8 * MB  # of a conversation: a turn is rendered and tokenised while the engine is open
KV_TYPES = {"f32": 0, "f16": 1, "q8_0": 8, "q4_0": 2}
SHORT_PASS = 16  # tokens up to which a pass counts as no prompt: a token and a few drafts
FULL_TILES = 128  # memory never makes passes shorter than this; see passes.cut


@dataclass(frozen=True)
class Settings:
    """How an engine runs. Sizes in tokens; request_bytes and depth are the profile's.

    n_ubatch: prompt tokens per pass, as llama.cpp cuts them; the engine makes them fewer where the budget needs it.
    prefetch_input: keep the whole input embedding in memory instead of reading the rows of the tokens at hand.
    repack: rearrange weights for the fastest kernels while everything is resident, as llama.cpp does by default.
    fit_window: the first plan's window is a guess: widen it to what the disk needs, as fast as it was until then.
    draft_bytes: what a draft model in the same process will take.
    lists_tokens: llama.cpp's samplers may choose, from a list of all tokens; else always the likeliest one is taken.
    margin_bytes: what is kept free for all that nothing else in the ledger counts.
    kv: which keys and values a decode pass attends to (None: all).
    n_sequences: texts in the cache at once; they share its n_ctx positions.
    swap_bytes: what keys and values outside the cache may take.
    snapshot_bytes: what keys and values that come from workers take on their way.
    resident: numbers of the pieces that stay in memory whatever the plan says, as far as the budget holds them.
    overlap: read weights ahead while others are computed with; else each one only when the computation waits for it.
    """

    n_ctx: int = 512
    n_ubatch: int = 128
    n_threads: int = 2
    kv_type: str = "f16"
    n_logits: int = 1
    request_bytes: int = 2**21
    depth: int = 4
    prefetch_input: bool = False
    repack: bool = True
    fit_window: bool = False
    draft_bytes: int = 0
    lists_tokens: bool = True
    margin_bytes: int = MARGIN_BYTES
    kv: KvFilter | None = None
    n_sequences: int = 1
    swap_bytes: int = 0
    snapshot_bytes: int = 0
    resident: frozenset[int] | None = None
    overlap: bool = True


@dataclass(frozen=True)
class Machine:
    """What a profile says: disk bytes per second, and seconds the resident model computes a token. 0: not known."""

    disk_bytes_per_s: float = 0.0
    compute_s: float = 0.0
