"""The bytes of keys and values under a plan, by their type, filter and context, from the facts in a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from profiler.model_profile import PROFILE_AGAIN, KvProfile, ModelProfile
from runtime.errors import ProfileError, UsageError
from runtime.kv.needs import filter_needs
from runtime.kv.options import KvFilter
from runtime.kv.roles import default_filters, layer_roles
from runtime.plans.ledger import touched_bytes

CONTEXT_STEP = 256  # llama.cpp rounds contexts up to multiples of this
START_POSITIONS = 64  # a short prompt and the first tokens of its answer: what a plan is made for
_F16_BYTES = 2  # per element: rows in a profile are f16
_BLOCKS = {"f16": (1, 2), "f32": (1, 4), "q8_0": (32, 34), "q4_0": (32, 18)}  # elements and bytes of a block


@dataclass(frozen=True)
class KvUse:
    """How a run keeps keys and values: their type (--kv-type), and a filter (None: all are attended to)."""

    kv_type: str = "f16"
    filter: KvFilter | None = None

    def __post_init__(self) -> None:
        if self.kv_type not in _BLOCKS:
            raise UsageError(f"--kv-type {self.kv_type} is not possible", f"choose one of {', '.join(_BLOCKS)}")
        if self.filter and self.kv_type == "f32":
            raise UsageError("--kv-filter does not work with --kv-type f32", "use --kv-type f16, q8_0 or q4_0")


@dataclass(frozen=True)
class KvNeeds:
    """Bytes of llama.cpp's cache without what a disk store spares, of a filter's own memory, and of its code.

    later_bytes: the part of kv_bytes for positions from START_POSITIONS on. Weights make room for them.
    """

    kv_bytes: int
    filter_bytes: int = 0
    process_bytes: int = 0
    later_bytes: int = 0


@dataclass(frozen=True)
class _Rows:
    """Keys or values of a layer."""

    row_bytes: int
    n_cells: int
    is_half: bool


def padded(ctx_tokens: int) -> int:
    """The positions llama.cpp makes room for."""
    return -(-ctx_tokens // CONTEXT_STEP) * CONTEXT_STEP


def kv_needs(profile: ModelProfile, use: KvUse, ctx_tokens: int) -> KvNeeds:
    """What keys and values of ctx_tokens positions take.

    Raises ProfileError where the profile has no layer that a wanted filter could act on. Raises UsageError where the
    filter's layers are not possible in this model.
    """
    if profile.kv is None:
        if use.filter:
            raise ProfileError(f"{profile.model.name} has no keys and values that can be filtered", PROFILE_AGAIN)
        return KvNeeds(_row_bytes(profile.kv_bytes_per_token, use.kv_type) * padded(ctx_tokens))
    parts = _parts(profile.kv, use.kv_type, padded(ctx_tokens))
    rows = [part for both in parts.values() for part in both]
    kv_bytes = sum(part.n_cells * part.row_bytes for part in rows)
    start_bytes = sum(touched_bytes(part.row_bytes, part.n_cells, START_POSITIONS) for part in rows)
    if use.filter is None:
        return KvNeeds(kv_bytes, later_bytes=max(0, kv_bytes - start_bytes))
    filterable = [layer.layer for layer in profile.kv.layers if layer.all_positions]
    filters = use.filter.layers or default_filters(filterable, use.filter.wait)
    roles = layer_roles(profile.model.n_layers, filters, use.filter.wait, filterable)
    needs = filter_needs(use.filter, roles, parts, filterable, profile.kv.n_heads)
    kv_bytes -= needs.spared_bytes
    later_bytes = max(0, kv_bytes - start_bytes)
    return KvNeeds(kv_bytes, needs.memory_bytes, profile.memory.filter_process_bytes, later_bytes)


def _parts(kv: KvProfile, kv_type: str, n_cells: int) -> Mapping[int, Sequence[_Rows]]:
    """Keys and values of every layer. Layers with a sliding window have as many rows as the others."""
    return {
        layer.layer: tuple(
            _Rows(_row_bytes(n, kv_type), n_cells, kv_type == "f16") for n in (layer.key_bytes, layer.value_bytes)
        )
        for layer in kv.layers
    }


def _row_bytes(f16_bytes: int, kv_type: str) -> int:
    """Bytes of a row in another type."""
    n_elements, n_bytes = _BLOCKS[kv_type]
    return f16_bytes // _F16_BYTES * n_bytes // n_elements
