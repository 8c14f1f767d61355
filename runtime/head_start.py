"""Reading weights before the engine is there to use them."""

from __future__ import annotations

from dataclasses import replace

from runtime.aligned_io import WeightFiles
from runtime.layer_store import LayerStore
from runtime.ledger import MARGIN_BYTES
from runtime.model_file import ModelFile
from runtime.plan import Plan
from runtime.residency import resident_pieces, streamable_bytes, window_bytes
from runtime.settings import Settings
from runtime.sizes import MB, page_down

_GUESSED_PROCESS_BYTES = 80 * MB
_GUESSED_HEADER_COPIES = 9  # llama.cpp's vocabulary takes about this many times its bytes in the file


def open_store(file: ModelFile, settings: Settings) -> LayerStore:
    """The store of a model's weights; nothing is read yet."""
    files = WeightFiles(file.paths, settings.io_mode, file.file_sizes)
    return LayerStore(file, files, request_bytes=settings.request_bytes, depth=settings.depth)


def head_start(file: ModelFile, plan: Plan, settings: Settings) -> LayerStore:
    """A store that reads already while llama.cpp is still loading vocabulary and header.

    What the process will take is not measured yet, so it reads into what a careful guess leaves of the plan's budget;
    the engine then extends that to the exact figure.
    """
    store = open_store(file, settings)
    guess = _GUESSED_PROCESS_BYTES + _GUESSED_HEADER_COPIES * sum(file.data_offsets) + MARGIN_BYTES
    window = page_down(window_bytes(file, plan))
    limit = plan.budget_bytes - guess - window
    if limit > 0 and limit < streamable_bytes(file):
        plan = replace(plan, pinned_bytes=limit)
        store.apply(resident_pieces(file, plan, limit), window)
    return store
