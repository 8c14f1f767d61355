"""Reading weights before the engine is there to use them."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace

from runtime.llama.model_file import ModelFile
from runtime.plans.ledger import usable_bytes
from runtime.plans.plan import Plan
from runtime.plans.residency import resident_pieces, streamable_bytes, window_bytes
from runtime.settings import MARGIN_BYTES, Settings
from runtime.sizes import MB, page_down
from runtime.weights.files import WeightFiles
from runtime.weights.small import SmallTensors
from runtime.weights.store import LayerStore

_GUESSED_PROCESS_BYTES = 80 * MB
_LEAST_PROCESS_BYTES = 40 * MB  # with more left than this, all weights may fit in the end
_GUESSED_HEADER_COPIES = 9  # llama.cpp's vocabulary takes about this many times its bytes in the file
_BRIEF_HEADER_COPIES = 3  # and this many times more for a moment, while it is loaded
_LAST_SHARE = 16  # this part of a model that fits comes later, about when pages of libraries are given back


@dataclass
class Weights:
    """A model's weights, as they come from the disk."""

    store: LayerStore
    small: SmallTensors

    def close(self) -> bool:
        """Stop reading and free everything; no model may compute with them afterwards.

        False where a read hangs that may still write: see LayerStore.close.
        """
        ended = self.store.close()
        self.small.free()
        return ended


def open_weights(file: ModelFile, settings: Settings, kind: type[LayerStore] = LayerStore) -> Weights:
    """The small tensors, and a store (of this kind) that reads nothing yet. Raises DiskError."""
    files = WeightFiles(file.paths, sizes=file.file_sizes)
    with ExitStack() as opened:
        opened.callback(files.close)
        small = SmallTensors(file, files)  # many short reads, each of which would wait for the long ones of the stream
        opened.callback(small.free)
        size, depth = settings.request_bytes, settings.depth
        store = kind(file, files, request_bytes=size, depth=depth, ahead=settings.overlap)
        opened.pop_all()
    return Weights(store, small)


def guessed_room(file: ModelFile, budget_bytes: int) -> int:
    """About what a budget leaves for weights, on the careful side; below 0 where that is not known to be anything."""
    guess = _GUESSED_PROCESS_BYTES + _GUESSED_HEADER_COPIES * sum(file.data_offsets) + MARGIN_BYTES
    return usable_bytes(budget_bytes) - guess


def head_start(file: ModelFile, plan: Plan, settings: Settings) -> Weights:
    """Weights that are being read while llama.cpp is still loading vocabulary and header.

    What the process will take is not measured yet, so they are read into what a careful guess leaves of the plan's
    budget. Where that is room for all, the last ones come later all the same, when loading no longer takes memory for
    a moment: the peak of the process is no higher then. The engine extends it all to the exact figure.
    """
    weights = open_weights(file, settings)
    window = page_down(window_bytes(file, plan))
    limit = guessed_room(file, plan.budget_bytes) - window
    total = streamable_bytes(file)
    if limit >= total:
        window, limit = 0, total - total // _LAST_SHARE - _BRIEF_HEADER_COPIES * sum(file.data_offsets)
    if limit > 0:
        resident = resident_pieces(file, replace(plan, pinned_bytes=limit), limit)
        most = max(plan.pinned_bytes, usable_bytes(plan.budget_bytes) - _LEAST_PROCESS_BYTES - MARGIN_BYTES)
        try:
            weights.store.apply(resident, window, everything=most >= total)
        except BaseException:
            weights.close()
            raise
    return weights
