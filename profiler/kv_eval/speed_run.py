"""One method at one context: times of decode passes and memory, as one JSON object.

A process of its own (`python -m profiler.kv_eval.speed_run`), so that its memory is its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import msgspec

from profiler.kv_eval.model import EvalModel
from runtime.kv.options import KvFilter
from runtime.sizes import MB

_WARM = 4
_TOKEN_STEP, _TOKENS = 37, 400
_BUDGET = 10**6 * MB  # all weights stay in memory: attention is measured, not the disk


class Speed(msgspec.Struct, frozen=True):
    """Times in ms or s, bytes of keys and values and of the process's anonymous memory after decoding."""

    ms_per_token: float
    ms_least: float
    prefill_s: float
    kv_bytes: int
    anonymous_bytes: int


def main() -> None:
    """Prefill, decode, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=float, default=0.0, help="0: no filter")
    parser.add_argument("--layers", type=str, default="")
    parser.add_argument("--wait", type=int, default=1)
    parser.add_argument("--store", default="ram")
    parser.add_argument("--folder", default="")
    flags = parser.parse_args()
    kv = None
    if flags.keep:
        layers = tuple(int(layer) for layer in flags.layers.split(",") if layer)
        kv = KvFilter(layers=layers, wait=flags.wait, keep=flags.keep, store=flags.store, folder=flags.folder, tail=256)
    print(msgspec.json.encode(measure(flags.model, kv, flags.context, flags.tokens, flags.threads)).decode())


def measure(path: Path, kv: KvFilter | None, context: int, n_tokens: int, threads: int) -> Speed:
    """Times of n_tokens decode passes behind a prompt of `context` tokens. Raises H2OError."""
    model = EvalModel(path, n_threads=threads, budget_bytes=_BUDGET)
    try:
        n_ctx = -(-(context + n_tokens + _WARM) // 256) * 256
        with model.engine(kv, n_ctx) as engine:
            start = time.perf_counter()
            engine.forward([_token(i, engine.n_vocab) for i in range(context)])
            prefill_s = time.perf_counter() - start
            times = []
            for i in range(_WARM + n_tokens):
                start = time.perf_counter()
                engine.forward([_token(7 * i, engine.n_vocab)])
                times.append(1000 * (time.perf_counter() - start))
            if engine.kv:
                kv_bytes = int(engine.kv.figures()["bytes_in_memory"])
            else:
                kv_bytes = engine.ledger.kv_bytes * (context + n_tokens + _WARM) // n_ctx
            times = times[_WARM:]
            return Speed(statistics.median(times), min(times), prefill_s, kv_bytes, _anonymous_bytes())
    finally:
        model.close()


def _token(i: int, n_vocab: int) -> int:
    return 10 + i * _TOKEN_STEP % min(_TOKENS, n_vocab - 10)


def _anonymous_bytes() -> int:
    """Anonymous memory of this process, as the kernel counts it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return 0


if __name__ == "__main__":
    main()
