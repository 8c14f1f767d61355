"""The prompt's speed in h2o's engine once all weights are in memory, as one JSON object.

A process of its own (`python -m profiler.bench.warm_prefill_run`), so that it can run in an emulated device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

from profiler.bench.llama_cpp_run import N_WARM_PROMPTS
from runtime.engine import Engine
from runtime.hollow import HollowModel
from runtime.model_file import ModelFile
from runtime.plan import Plan
from runtime.settings import Settings
from runtime.tokenizer import Tokenizer

_UBATCH = 512  # llama.cpp's default


def main() -> None:
    """Compute a prompt again and again, and print its speed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    settings = Settings(n_ctx=arguments.ctx, n_ubatch=_UBATCH, n_threads=arguments.threads, repack=True)
    print(json.dumps({"prefill_tokens_per_s": measure(arguments.model, arguments.prompt, arguments.budget, settings)}))


def measure(path: Path, prompt: str, budget_bytes: int, settings: Settings) -> float:
    """Prompt tokens per second once the weights are in memory: the median of some times. Raises H2OError."""
    file = ModelFile.open(path)
    hollow = HollowModel(file)
    try:
        tokens = Tokenizer(hollow, file).encode(prompt)
        engine = Engine(file, hollow, Plan(k=0, w=1, budget_bytes=budget_bytes), settings)
        try:
            engine.forward(tokens)
            rates = []
            for _ in range(N_WARM_PROMPTS):
                engine.truncate(0)
                start_s = time.monotonic()
                engine.forward(tokens)
                rates.append(len(tokens) / (time.monotonic() - start_s))
            return statistics.median(rates)
        finally:
            engine.close()
    finally:
        hollow.free()


if __name__ == "__main__":
    main()
