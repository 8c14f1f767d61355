"""Where weights, keys and values lie, as --percent says: shares in memory, the rest on disk."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from h2o_cli.session.opening import Session
from runtime.errors import BudgetError, UsageError
from runtime.llama import abi
from runtime.llama.model_file import Layer, ModelFile, TensorInfo
from runtime.plans.ledger import usable_bytes
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import resident_pieces, smallest_window, streamable_bytes
from runtime.sizes import format_size

EXACT, MIDPOINT = "exact", "midpoint"
Six = tuple[int, int, int, int, int, int]
_NAMES = ("W_GPU", "W_CPU", "KV_GPU", "KV_CPU", "ACT_GPU", "ACT_CPU")
_ORDER = ("norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Placement:
    """weights: percent of them in memory. midpoint: whole tensors by the source system's rule, else by bytes."""

    weights: int
    midpoint: bool

    @classmethod
    def parse(cls, percent: Six | None, rule: str | None) -> Placement | None:
        """From the flags as given; None: no --percent. Raises UsageError."""
        if rule not in (None, EXACT, MIDPOINT):
            raise UsageError(f"there is no --placement {rule}", f"give {EXACT} or {MIDPOINT}")
        if percent is None:
            if rule:
                raise UsageError("--placement is a rule for --percent", "give --percent, too")
            return None
        asked = dict(zip(_NAMES, percent, strict=True))
        for kind in ("W", "KV", "ACT"):
            gpu, cpu = asked[f"{kind}_GPU"], asked[f"{kind}_CPU"]
            if min(gpu, cpu) < 0 or gpu + cpu > 100:
                raise UsageError(f"{kind}_GPU {gpu} and {kind}_CPU {cpu} are no shares", "give 0 to 100 in all")
            if gpu:
                raise UsageError(f"{kind}_GPU {gpu} is not possible: {_no_gpu()}", "give 0 for all three GPU shares")
        if asked["KV_CPU"] != 100:
            raise UsageError(
                "KV_CPU has to be 100: every text in a pass has its keys and values in memory",
                "texts that wait lie on disk with --admission none --swap disk",
            )
        if asked["ACT_CPU"] != 100:
            raise UsageError("ACT_CPU has to be 100: activations are used at once", "give 0 100 for them")
        return cls(asked["W_CPU"], rule == MIDPOINT)

    def pieces(self, file: ModelFile) -> frozenset[int]:
        """The numbers of the pieces that stay in memory."""
        if self.midpoint:
            return frozenset().union(*(_by_midpoint(group, self.weights) for group in file.groups))
        target = streamable_bytes(file) * self.weights // 100
        return resident_pieces(file, Plan(0, 1, Layout.BALANCED, max(1, target)), target) if target else frozenset()

    def check(self, session: Session) -> None:
        """Raise BudgetError where the budget does not hold these weights beside all that passes ever need."""
        engine = session.engine
        file, asked = engine.file, engine.settings.resident or frozenset()
        need = sum(piece.span_bytes for piece in file.pieces if piece.number in asked)
        room = usable_bytes(session.budget_bytes) - engine.layout.fixed_bytes - smallest_window(file, asked)
        if session.budget_bytes and need > room:
            raise BudgetError(
                f"W_CPU {self.weights} is {format_size(need)} of weights, the budget has room for"
                f" {format_size(max(0, room))}",
                "lower W_CPU, --ctx or --batch-size, or raise -m",
            )

    def figures(self, session: Session) -> dict[str, Any]:
        """Asked shares and real bytes of each tier."""
        layout, total = session.engine.layout, streamable_bytes(session.engine.file)
        in_memory = total - layout.streamed_bytes
        return {
            "rule": MIDPOINT if self.midpoint else EXACT,
            "weights_asked_percent": self.weights,
            "weights_real_percent": 100 * in_memory / total,
            "weights_memory_bytes": in_memory,
            "weights_disk_bytes": layout.streamed_bytes,
            "kv_memory_bytes": layout.needs.kv_bytes(layout.needs.cache.n_cells),
            "kv_disk_bytes": 0,
            "activations_memory_bytes": session.engine.ledger.compute_bytes,
        }

    def told(self, session: Session) -> str:
        """The same in words."""
        found = self.figures(session)
        sizes = {name: format_size(found[name]) for name in found if name.endswith("_bytes")}
        return (
            f"weights: {self.weights} % asked, {found['weights_real_percent']:.1f} % real:"
            f" {sizes['weights_memory_bytes']} in memory, {sizes['weights_disk_bytes']} on disk;"
            f" keys and values: {sizes['kv_memory_bytes']} in memory; activations:"
            f" {sizes['activations_memory_bytes']} in memory; nothing on a GPU"
        )


def _no_gpu() -> str:
    supports = abi.llama.llama_supports_gpu_offload
    supports.restype = ctypes.c_bool
    if supports():
        return "weights that are streamed are computed on the CPU"
    return "this llama.cpp computes on no GPU (llama_supports_gpu_offload says so)"


def _by_midpoint(group: Layer, percent: int) -> frozenset[int]:
    """The pieces of a layer in memory: attention and the rest are placed apart, as the source system does."""
    from planner.source.midpoint import DISK, place

    names = {piece.tensor.name: piece.tensor for piece in group.pieces} | {info.name: info for info in group.small}
    in_memory = set()
    for part in ("attention", "rest"):
        infos = [info for info in names.values() if ("attn" in info.name) == (part == "attention")]
        infos.sort(key=lambda info: (_place_in_order(info), info.name))
        tiers = place([_n_elements(info) for info in infos], (0, percent))
        in_memory |= {info.name for info, tier in zip(infos, tiers, strict=True) if tier != DISK}
    return frozenset(piece.number for piece in group.pieces if piece.tensor.name in in_memory)


def _place_in_order(info: TensorInfo) -> int:
    name = info.name.rsplit(".", 1)[0]
    return next((i for i, end in enumerate(_ORDER) if name.endswith(end)), len(_ORDER))


def _n_elements(info: TensorInfo) -> int:
    n = 1
    for size in info.shape:
        n *= size
    return n
