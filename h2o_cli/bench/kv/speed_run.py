"""Times of decode passes at one context, as one JSON object, in a process of its own.

`python -m h2o_cli.bench.kv.speed_run` measures one method, with its memory; with --turns full attention and the filter
at several budgets are open side by side and decode one token each in turns, so that they share whatever else the
machine does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from h2o_cli.bench.kv.short_prompt import short_attention
from profiler.kv_eval.model import EvalModel, begin, start_of
from runtime.engine.engine import Engine
from runtime.kv.options import DEFAULT_SELECT, KvFilter, parse_layers, parse_strategy
from runtime.sizes import MB

_WARM = 4
_TOKEN_STEP, _TOKENS = 37, 400
_BUDGET = 10**6 * MB  # all weights stay in memory: attention is measured, not the disk


class Speed(msgspec.Struct, frozen=True):
    """Times in ms or s, bytes of keys and values, of the process's anonymous memory after decoding, read per token."""

    ms_per_token: float
    ms_least: float
    prefill_s: float
    kv_bytes: int
    anonymous_bytes: int
    read_bytes: int


class Turns(msgspec.Struct, frozen=True):
    """Budget -> how many times faster than full attention: median over the tokens of the ratio of both times.

    faster: every token another one, so that with random weights nearly all chosen rows are new; faster_again: the same
    token again and again, so that most chosen rows stay, as they do in trained models.
    """

    faster: dict[str, float]
    faster_again: dict[str, float]


def main() -> None:
    """Prefill, decode, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--keep", type=float, action="append", default=[], help="none: no filter")
    parser.add_argument("--layers", default="auto")
    parser.add_argument("--wait", type=int, default=1)
    parser.add_argument("--select", default=DEFAULT_SELECT)
    parser.add_argument("--store", default="ram")
    parser.add_argument("--strategy", default="multi")
    parser.add_argument("--folder", default="")
    parser.add_argument("--turns", action="store_true")
    flags = parser.parse_args()
    strategy, threshold = parse_strategy(flags.strategy)
    filters = [
        KvFilter(
            layers=parse_layers(flags.layers),
            wait=flags.wait,
            keep=keep,
            least=1,
            select=flags.select,
            store=flags.store,
            strategy=strategy,
            lazy_threshold=threshold,
            folder=flags.folder,
            tail=256,
        )
        for keep in flags.keep
    ]
    run = Run(flags.model, flags.context, flags.tokens, flags.threads)
    found = run.turns(filters) if flags.turns else run.measure(filters[0] if filters else None)
    print(msgspec.json.encode(found).decode())


class Run:
    """n_tokens decode passes after a prompt of `context` tokens."""

    def __init__(self, path: Path, context: int, n_tokens: int, threads: int) -> None:
        self._path, self._context, self._n_tokens, self._threads = path, context, n_tokens, threads
        self._n_ctx = -(-(context + 2 * (n_tokens + _WARM)) // 256) * 256

    def measure(self, kv: KvFilter | None) -> Speed:
        """Times and memory of one method. Raises H2OError."""
        with ExitStack() as stack:
            engine = self._open(stack, kv)
            start = time.perf_counter()
            with short_attention(engine):
                engine.forward(self._prompt(engine))
            prefill_s = time.perf_counter() - start
            times = [self._decode(engine, 7 * i) for i in range(_WARM + self._n_tokens)][_WARM:]
            if engine.kv:
                figures = engine.kv.figures()
                kv_bytes, read_bytes = int(figures["bytes_in_memory"]), int(figures["bytes_read_per_token"])
            else:
                kv_bytes, read_bytes = engine.layout.needs.kv_bytes(engine.n_past), 0
            return Speed(
                statistics.median(times), min(times), prefill_s, kv_bytes, _anonymous_bytes(), read_bytes=read_bytes
            )

    def turns(self, filters: Sequence[KvFilter]) -> Turns:
        """Full attention and filters, one token of each in turns. Raises H2OError."""
        with ExitStack() as stack:
            full = self._open(stack, None)
            with short_attention(full):
                start = start_of(full, self._prompt(full))
            engines = [full, *(self._open(stack, kv) for kv in filters)]
            for engine in engines:
                begin(engine, start)
            faster, again = self._ratios(engines), self._ratios(engines, step=0)
        names = [str(kv.keep) for kv in filters]
        return Turns(dict(zip(names, faster, strict=True)), dict(zip(names, again, strict=True)))

    def _ratios(self, engines: Sequence[Engine], step: int = 7) -> list[float]:
        """Of the first engine's times and those of every other one."""
        rounds = [[self._decode(engine, step * i) for engine in engines] for i in range(_WARM + self._n_tokens)][_WARM:]
        return [statistics.median(times[0] / times[i] for times in rounds) for i in range(1, len(engines))]

    def _open(self, stack: ExitStack, kv: KvFilter | None) -> Engine:
        """An engine on a model of its own: engines with all weights in memory cannot share one."""
        model = EvalModel(self._path, n_threads=self._threads, budget_bytes=_BUDGET)
        stack.callback(model.close)
        return stack.enter_context(model.engine(kv, self._n_ctx))

    def _prompt(self, engine: Engine) -> list[int]:
        return [_token(i, engine.n_vocab) for i in range(self._context)]

    def _decode(self, engine: Engine, i: int) -> float:
        """Milliseconds of one token."""
        start = time.perf_counter()
        engine.forward([_token(i, engine.n_vocab)])
        return 1000 * (time.perf_counter() - start)


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
