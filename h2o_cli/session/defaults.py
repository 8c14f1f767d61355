"""Defaults that commands share: a plan is made for the same sizes a run uses."""

from __future__ import annotations

import os
from pathlib import Path

from runtime.settings import FULL_TILES

PROMPT_CONTEXT = 512  # what a short prompt and N_PREDICT tokens take
CONVERSATION_CONTEXT = 2048
N_PREDICT = 256  # most tokens of an answer
UBATCH = 512  # llama.cpp's default; memory may not allow it, down to LEAST_UBATCH
LEAST_UBATCH = FULL_TILES
MOST_THREADS = 512  # GGML_MAX_N_THREADS
_CPU = Path("/sys/devices/system/cpu")


def default_threads() -> int:
    """The physical cores this process may use."""
    usable = os.sched_getaffinity(0)
    try:
        siblings = {(_CPU / f"cpu{i}" / "topology" / "thread_siblings_list").read_text() for i in usable}
    except OSError:
        return len(usable)
    return len(siblings)
