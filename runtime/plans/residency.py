"""Which pieces a plan keeps resident. Pure functions over the index of a model, or of the part that is owned."""

from __future__ import annotations

from collections.abc import Iterable

from runtime.llama.model_file import Layer, ModelFile, Piece
from runtime.memory import HUGE_PAGE
from runtime.plans.plan import Layout, Plan
from runtime.sizes import PAGE

_AHEAD_S = 0.00115
_MOST_EXCHANGES = 4  # the first ones gain most
_MOST_OUT = 4  # tensors for one that is larger
_WORTH_A_READ = 20  # of all bytes that are read, one more read has to save this part


def layer_bytes(layer: Layer) -> int:
    """Bytes a group of pieces takes in memory (whole pages)."""
    return sum(piece.span_bytes for piece in layer.pieces)


def streamable_bytes(model: ModelFile) -> int:
    """Bytes of all layers and the head in memory."""
    return sum(layer_bytes(group) for group in model.groups)


def whole_layers(n_layers: int, k: int, layout: Layout) -> list[int]:
    """The layers that are resident as a whole: the first k, or k spread evenly."""
    k = min(k, n_layers)
    if layout is Layout.PREFIX:
        return list(range(k))
    return [(2 * i + 1) * n_layers // (2 * k) for i in range(k)]


def k_layers_worth(model: ModelFile, k: int, layout: Layout) -> int:
    """Bytes of k resident layers: of the very layers, or (balanced) of k mean layers."""
    sizes = [layer_bytes(layer) for layer in model.layers]
    if layout is Layout.BALANCED:
        return sum(sizes) * min(k, len(sizes)) // max(1, len(sizes))
    return sum(sizes[i] for i in whole_layers(len(sizes), k, layout))


def layers_in(model: ModelFile, pinned_bytes: int) -> int:
    """k: how many mean layers pinned_bytes are worth."""
    total = sum(layer_bytes(layer) for layer in model.layers)
    return min(model.n_layers, pinned_bytes * model.n_layers // total) if total else model.n_layers


def resident_pieces(
    model: ModelFile,
    plan: Plan,
    limit_bytes: int | None = None,
    keep: frozenset[int] = frozenset(),
    among: frozenset[int] | None = None,
) -> frozenset[int]:
    """The numbers of the pieces that stay in memory under this plan, together at most limit_bytes.

    Among equals the pieces in `keep` (there already) are preferred. among: no others are chosen (None: of all).
    """
    target = plan.pinned_bytes or k_layers_worth(model, plan.k, plan.layout)
    if limit_bytes is not None:
        target = min(target, limit_bytes)
    if target >= streamable_bytes(model) and among is None:
        return frozenset(piece.number for piece in model.pieces)
    allowed = frozenset(piece for piece in model.pieces if among is None or piece.number in among)
    if plan.layout is Layout.BALANCED:
        chosen = _balanced(model, target, keep, allowed)
    else:
        k = plan.k if not plan.pinned_bytes else max(plan.k, layers_in(model, target))
        order = whole_layers(model.n_layers, k, plan.layout)
        chosen = _fill([p for i in order for p in model.layers[i].pieces if p in allowed], target)
    if plan.pinned_bytes:
        chosen = _fill((p for p in model.head.pieces if p in allowed), target, chosen)
        chosen = _fill((p for layer in model.layers for p in layer.pieces if p in allowed), target, chosen)
    if plan.pinned_bytes and plan.layout is Layout.BALANCED:
        chosen = _exchange(allowed, target, chosen)
    return frozenset(piece.number for piece in chosen)


def _fill(candidates: Iterable[Piece], target: int, chosen: frozenset[Piece] = frozenset()) -> frozenset[Piece]:
    """chosen, and every candidate that still fits. Tiles of one tensor are taken in order, without gaps."""
    taken, used = set(chosen), sum(piece.span_bytes for piece in chosen)
    closed: set[str] = set()
    for piece in candidates:
        if piece in taken or piece.tensor.name in closed:
            continue
        if used + piece.span_bytes <= target:
            taken.add(piece)
            used += piece.span_bytes
        else:
            closed.add(piece.tensor.name)
    return frozenset(taken)


def _balanced(model: ModelFile, target: int, keep: frozenset[int], allowed: frozenset[Piece]) -> frozenset[Piece]:
    """The same share of every layer and of the head: what one layer cannot take exactly, the next ones make up for.

    When everything in `keep` fits, it stays and only what is missing is shared out. Small tensors are taken first: few
    large ones are then streamed, and every read costs the computation a part of a core.
    """
    share = target / streamable_bytes(model)
    kept = {piece for piece in allowed if piece.number in keep}
    if sum(piece.span_bytes for piece in kept) > target:
        kept = set()
    room = target - sum(piece.span_bytes for piece in kept)
    chosen = set(kept)
    seen = used = 0
    for group in model.groups:
        seen += layer_bytes(group)
        used += sum(piece.span_bytes for piece in group.pieces if piece in kept)
        closed: set[str] = set()
        for piece in sorted(group.pieces, key=lambda p: (p.number not in keep, p.tensor.n_bytes, p.number)):
            if piece in kept or piece not in allowed or piece.tensor.name in closed:
                continue
            if used + piece.span_bytes <= share * seen and piece.span_bytes <= room:
                chosen.add(piece)
                used += piece.span_bytes
                room -= piece.span_bytes
            else:
                closed.add(piece.tensor.name)
    return frozenset(chosen)


def _exchange(allowed: frozenset[Piece], target: int, chosen: frozenset[Piece]) -> frozenset[Piece]:
    """chosen, with some tensors exchanged for larger ones, each time such that least of the target stays unused.

    A few small ones make room for a large one where that saves a good part of what is read: each is a read more.
    """
    taken = set(chosen)
    worth = (sum(piece.span_bytes for piece in allowed) - sum(piece.span_bytes for piece in taken)) // _WORTH_A_READ
    room = target - sum(piece.span_bytes for piece in taken)
    whole = sorted((p for p in allowed if p.n_rows == p.tensor.n_rows), key=lambda p: p.number)
    for _ in range(_MOST_EXCHANGES):
        inside: dict[int, list[Piece]] = {}
        for piece in whole:
            if piece in taken:
                inside.setdefault(piece.span_bytes, []).append(piece)
        outside = {piece.span_bytes: piece for piece in whole if piece not in taken}
        few = [(n, a) for a, found in inside.items() for n in range(1, min(len(found), _MOST_OUT) + 1)]
        least = {n: max(PAGE, (n - 1) * worth) for n in range(1, _MOST_OUT + 1)}
        gains = ((b - n * a, -n, a, b) for n, a in few for b in outside if least[n] <= b - n * a <= room)
        gain, n, out, into = max(gains, default=(0, 0, 0, 0))
        if not gain:
            break
        taken = taken - set(inside[out][n:]) | {outside[into]}
        room -= gain
    return frozenset(taken)


def smallest_window(model: ModelFile, resident: frozenset[int] = frozenset()) -> int:
    """Bytes of the smallest ring that can stream what is not resident: its largest piece."""
    return max((p.span_bytes for p in model.pieces if p.number not in resident), default=0)


def overlapping_window(largest: int, disk_bytes_per_s: float) -> int:
    """Bytes of a window that lets the disk work on while pieces of up to `largest` bytes are computed.

    Two such pieces, one read while the other is computed, and as many as the disk reads until it is told of free room
    (docs/planner.md has the measurements). A slot holds a whole piece, so parts of one would be of no use.
    """
    ahead = int(_AHEAD_S * disk_bytes_per_s / largest) if largest else 0
    return in_huge_pages((2 + ahead) * largest, disk_bytes_per_s)


def in_huge_pages(window_bytes: int, disk_bytes_per_s: float) -> int:
    """Bytes of a window as large, or larger where that puts all of it into huge pages and costs less than _AHEAD_S.

    A direct read into small pages can take twice as long, and twice the processor's time.
    """
    whole = -(-window_bytes // HUGE_PAGE) * HUGE_PAGE
    return whole if whole - window_bytes <= _AHEAD_S * disk_bytes_per_s else window_bytes


def first_window(model: ModelFile, budget_bytes: int) -> int:
    """Bytes of a window where nothing is known of the disk: two of the largest pieces, at most a quarter of the budget.

    An engine that may makes it wider where the disk is fast (Settings.fit_window).
    """
    return min(2 * smallest_window(model), budget_bytes // 4)


def window_bytes(model: ModelFile, plan: Plan) -> int:
    """Bytes of the ring a plan asks for: w times the largest layer, unless the plan says it in bytes."""
    largest = max(map(layer_bytes, model.layers), default=0)
    return max(plan.window_bytes or plan.w * largest, smallest_window(model))
