"""What both sides of a benchmark of batches are asked for, and the lines they answer with. Standard library only.

A side computes the prompts of all streams, and then steps: one token of every stream. Texts do not end.
"""

from __future__ import annotations

import argparse
from typing import Any


def prompt(stream: int, n_tokens: int, n_vocab: int) -> list[int]:
    """The tokens of a stream's prompt: no text, and others for every stream."""
    return [1 + (7919 * (stream + 1) + 104729 * i) % (n_vocab - 1) for i in range(n_tokens)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """--streams, --prompt-len and --steps."""
    parser.add_argument("--streams", type=int, default=0, help="texts at once")
    parser.add_argument("--prompt-len", type=int, default=32, help="tokens of each prompt")
    parser.add_argument("--steps", type=int, default=8, help="tokens of each stream behind the first")


def answer(prefill_s: float, steps_s: list[float], bytes_read: int, **more: Any) -> dict[str, Any]:
    """The figures of a side. bytes_read: in all steps; more: seconds in all steps, function by function."""
    return {"prefill_s": prefill_s, "steps_s": steps_s, "bytes_read_per_step": bytes_read / len(steps_s), **more}
