"""Where the budget goes: what the process needs under any plan, and what is left for weights."""

from __future__ import annotations

from dataclasses import dataclass

from planner.kv import KvUse, kv_needs, padded
from profiler.model_profile import ModelProfile
from runtime.plans.ledger import POSITION_BYTES, below_floor, budget_for, more_margin, usable_bytes


@dataclass(frozen=True)
class Footprint:
    """Bytes the process needs besides weights that can be streamed.

    compute_bytes is what a token needs, prompt_bytes what a prompt needs on top of it. unused_bytes are pages of
    libraries that opening a model needs and tokens do not; process_bytes is without them. kv_bytes is for a full
    context, without what a disk store spares. later_bytes is the part of kv_bytes that an answer does not need at its
    beginning.
    Weights are there until it does. filter_bytes: what filtering takes beside the cache.
    known_floor_bytes: the smallest budget where a run has said it (0: not).
    """

    process_bytes: int
    kv_bytes: int
    compute_bytes: int
    small_tensor_bytes: int
    margin_bytes: int
    smallest_window_bytes: int
    prompt_bytes: int = 0
    filter_bytes: int = 0
    known_floor_bytes: int = 0
    later_bytes: int = 0
    unused_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """What every plan needs for a token: process, full KV cache, filter, compute buffers, small tensors, margin."""
        return (
            self.process_bytes
            + self.kv_bytes
            + self.filter_bytes
            + self.compute_bytes
            + self.small_tensor_bytes
            + self.margin_bytes
        )

    @property
    def floor_bytes(self) -> int:
        """The smallest budget that works: as a run said it, else what a prompt and the smallest window need."""
        if self.known_floor_bytes:
            return self.known_floor_bytes
        return budget_for(self.fixed_bytes + self.prompt_bytes + self.unused_bytes + self.smallest_window_bytes)

    def available_bytes(self, budget_bytes: int, *, full: bool = False) -> int:
        """Bytes for resident weights and the window at the beginning of an answer; full: when the context is full.

        Raises BudgetError below the floor.
        """
        if budget_bytes < self.floor_bytes:
            raise below_floor(budget_bytes, self.floor_bytes)
        left = max(usable_bytes(budget_bytes) - self.fixed_bytes, self.smallest_window_bytes)
        return left if full else left + self.later_bytes

    def ledger(
        self, budget_bytes: int, pinned_bytes: int, window_bytes: int, *, always: bool = False
    ) -> dict[str, int]:
        """Part -> bytes. The parts add up to the budget. filter_bytes is one of them where there is a filter.

        They are those of a token at the beginning of an answer. always: those of weights that never make room for
        anything, neither for a full context nor for a prompt.
        """
        usable = usable_bytes(budget_bytes)
        later_bytes, unused_bytes, prompt_bytes = self.later_bytes, 0, 0
        if always:
            later_bytes, unused_bytes, prompt_bytes = 0, self.unused_bytes, self.prompt_bytes
        fixed_bytes = self.fixed_bytes - later_bytes + unused_bytes + prompt_bytes
        return {
            "process_bytes": self.process_bytes + unused_bytes,
            "kv_bytes": self.kv_bytes - later_bytes,
            **({"filter_bytes": self.filter_bytes} if self.filter_bytes else {}),
            "compute_bytes": self.compute_bytes + prompt_bytes,
            "small_tensor_bytes": self.small_tensor_bytes,
            "margin_bytes": self.margin_bytes + budget_bytes - usable,
            "resident_bytes": pinned_bytes,
            "window_bytes": window_bytes,
            "free_bytes": usable - fixed_bytes - pinned_bytes - window_bytes,
        }


def streamable_bytes(profile: ModelProfile) -> int:
    """All weights that are either resident or streamed: layers and head."""
    return sum(layer.bytes for layer in profile.layers) + profile.head.bytes


def measure_footprint(
    profile: ModelProfile, ctx_tokens: int, ubatch_tokens: int, kv: KvUse | None = None, floor_bytes: int = 0
) -> Footprint:
    """The footprint of a context of ctx_tokens, in passes of at most ubatch_tokens.

    kv: how keys and values are kept (None: all of them, f16). floor_bytes: the smallest budget, where it is known.
    Compute buffers grow in proportion to ubatch_tokens, and with the context by the profile's figures per token.
    """
    memory = profile.memory
    needs = kv_needs(profile, kv or KvUse(), ctx_tokens)
    more_tokens = padded(ctx_tokens) - padded(memory.ctx_tokens) if memory.ctx_tokens else 0
    prompt_bytes = max(0, memory.prompt_bytes + more_tokens * memory.prompt_bytes_per_token)
    whole = max(prompt_bytes, memory.compute_bytes + more_tokens * memory.compute_bytes_per_token)
    compute_bytes = whole - prompt_bytes
    unused_bytes = min(memory.unused_bytes, memory.process_bytes)
    if memory.ubatch_tokens:
        whole = -(-whole * ubatch_tokens // memory.ubatch_tokens)
        compute_bytes = min(whole, compute_bytes) if prompt_bytes else whole
    return Footprint(
        process_bytes=memory.process_bytes - unused_bytes + needs.process_bytes + max(0, more_tokens) * POSITION_BYTES,
        kv_bytes=needs.kv_bytes,
        compute_bytes=compute_bytes,
        small_tensor_bytes=sum(layer.resident_bytes for layer in profile.layers),
        margin_bytes=memory.margin_bytes + more_margin(ctx_tokens, 0) - more_margin(memory.ctx_tokens, 0),
        smallest_window_bytes=min(memory.min_window_bytes, streamable_bytes(profile)),
        prompt_bytes=whole - compute_bytes,
        filter_bytes=needs.filter_bytes,
        known_floor_bytes=floor_bytes,
        later_bytes=needs.later_bytes,
        unused_bytes=unused_bytes,
    )
