"""Where the budget goes: what the process needs whatever the plan, and what is left for weights."""

from __future__ import annotations

from dataclasses import dataclass

from profiler.model_profile import ModelProfile
from runtime.errors import BudgetError
from runtime.sizes import MB, format_size


@dataclass(frozen=True)
class Footprint:
    """Bytes the process needs besides weights that can be streamed.

    compute_bytes is what a token needs, prompt_bytes what a prompt needs on top of it.
    """

    process_bytes: int
    kv_bytes: int
    compute_bytes: int
    small_tensor_bytes: int
    margin_bytes: int
    smallest_window_bytes: int
    prompt_bytes: int = 0

    @property
    def fixed_bytes(self) -> int:
        """What every plan needs for a token: process, KV cache, compute buffers, small tensors, margin."""
        return self.process_bytes + self.kv_bytes + self.compute_bytes + self.small_tensor_bytes + self.margin_bytes

    @property
    def floor_bytes(self) -> int:
        """The smallest budget that works: what a prompt needs, and the smallest window."""
        return self.fixed_bytes + self.prompt_bytes + self.smallest_window_bytes

    def available_bytes(self, budget_bytes: int) -> int:
        """Bytes for resident weights and the window. Raises BudgetError below the floor."""
        if budget_bytes < self.floor_bytes:
            raise BudgetError(
                f"{format_size(budget_bytes)} is too little for this model and context",
                f"the smallest budget that works is -m {-(-self.floor_bytes // MB)} (MB)",
                self.floor_bytes,
            )
        return budget_bytes - self.fixed_bytes

    def ledger(self, budget_bytes: int, pinned_bytes: int, window_bytes: int) -> dict[str, int]:
        """Part -> bytes; the parts add up to the budget."""
        return {
            "process_bytes": self.process_bytes,
            "kv_bytes": self.kv_bytes,
            "compute_bytes": self.compute_bytes,
            "small_tensor_bytes": self.small_tensor_bytes,
            "margin_bytes": self.margin_bytes,
            "resident_bytes": pinned_bytes,
            "window_bytes": window_bytes,
            "free_bytes": budget_bytes - self.fixed_bytes - pinned_bytes - window_bytes,
        }


def streamable_bytes(profile: ModelProfile) -> int:
    """All weights that are either resident or streamed: layers and head."""
    return sum(layer.bytes for layer in profile.layers) + profile.head.bytes


def measure_footprint(
    profile: ModelProfile, ctx_tokens: int, ubatch_tokens: int, kv_bytes: int | None = None
) -> Footprint:
    """The footprint of a context of ctx_tokens, in passes of at most ubatch_tokens.

    KV is kv_bytes_per_token * ctx_tokens unless kv_bytes says otherwise (another KV type); compute buffers grow with
    ubatch_tokens in proportion from the measured point.
    """
    memory = profile.memory
    compute_bytes, prompt_bytes = memory.compute_bytes - memory.prompt_bytes, memory.prompt_bytes
    if memory.ubatch_tokens:
        whole = -(-memory.compute_bytes * ubatch_tokens // memory.ubatch_tokens)
        compute_bytes = min(whole, compute_bytes) if prompt_bytes else whole
        prompt_bytes = whole - compute_bytes
    return Footprint(
        process_bytes=memory.process_bytes,
        kv_bytes=profile.kv_bytes_per_token * ctx_tokens if kv_bytes is None else kv_bytes,
        compute_bytes=compute_bytes,
        small_tensor_bytes=sum(layer.resident_bytes for layer in profile.layers),
        margin_bytes=memory.margin_bytes,
        smallest_window_bytes=min(memory.min_window_bytes, streamable_bytes(profile)),
        prompt_bytes=prompt_bytes,
    )
