"""What giving memory back costs: a streamed layer's slots (every pass), a resident layer's pages (a change of plan)."""

from __future__ import annotations

import ctypes
import threading

from profiler.model_profile import Spread
from profiler.timing import seconds_of
from runtime.llama.model_file import Layer
from runtime.plans.residency import layer_bytes
from runtime.weights.homes import Homes
from runtime.weights.ring import Ring, Slot


def slot_release(layer: Layer, repeats: int) -> Spread:
    """Seconds to give the slots of one layer back to the readers, one warm-up dropped. The ring is never touched."""
    ring = Ring(max(1, layer_bytes(layer)))
    readable = threading.Condition()
    samples = []
    try:
        for _ in range(repeats + 1):
            slots = [slot for piece in layer.pieces if (slot := ring.take(piece.span_bytes))]

            def give_back(slots: list[Slot] = slots) -> None:
                for slot in slots:
                    with readable:
                        ring.give_back(slot)
                        readable.notify_all()

            samples.append(seconds_of(give_back))
    finally:
        ring.free()
    return Spread.of(samples[1:])


def resident_release(layer: Layer, repeats: int) -> Spread:
    """Seconds to free the pages of one resident layer. Takes the layer's bytes of memory while it runs."""
    samples = []
    for _ in range(repeats + 1):
        homes = Homes()
        homes.expect(layer.pieces, everything=False)
        for piece in layer.pieces:
            ctypes.memset(homes[piece.tensor.name].span_address(piece), 1, piece.span_bytes)

        def drop(homes: Homes = homes) -> None:
            for piece in layer.pieces:
                homes[piece.tensor.name].drop(piece, ())

        samples.append(seconds_of(drop))
        homes.free()
    return Spread.of(samples[1:])
