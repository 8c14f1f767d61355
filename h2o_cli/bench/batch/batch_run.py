"""h2o's side of the benchmark of batches: streams as `h2o batch` answers them, step by step.

A process of its own (`python -m h2o_cli.bench.batch.batch_run`), so that it can run in an emulated device.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from h2o_cli.bench.batch.streams import add_arguments, answer, prompt
from h2o_cli.output import note
from h2o_cli.session.caller import Caller
from h2o_cli.session.model import OpenModel
from h2o_cli.session.opening import Session, open_session
from h2o_cli.session.options import SessionOptions
from h2o_cli.session.smallest import CONVERSATION
from runtime.answer.batch import Batch, Wanted
from runtime.answer.generate import Request
from runtime.answer.sampler import Sampling
from runtime.llama.tokenizer import Tokenizer
from runtime.plans.budget import Budget
from runtime.settings import FULL_TILES

CTX_STEP = 256


class Endless:
    """A tokenizer whose texts do not end."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def ends(self, _token: int) -> bool:
        """Whether a token ends a text."""
        return False


class Enough(Exception):
    """All steps are done."""


class At(NamedTuple):
    """The state between two passes. Seconds since some time, of passes, of waits for reads."""

    now_s: float
    n_prompt_tokens: int
    passes_s: float
    wait_s: float
    bytes_read: int


class Streams:
    """Streams that are answered together until all prompts are read and so many steps are done."""

    def __init__(self, session: Session, n_steps: int) -> None:
        tokenizer: Any = Endless(session.model.tokenizer)
        self._engine, self._n_steps = session.engine, n_steps
        self._batch = Batch(session.engine, tokenizer, self._between)
        self._seen: list[At] = []
        self._n_prompt_tokens = 0

    def run(self, requests: list[Request]) -> dict[str, Any]:
        """The figures."""
        self._n_prompt_tokens = sum(len(request.prompt) for request in requests)
        try:
            for _ in self._batch.answer(self._wanted(requests)):
                raise AssertionError("an answer ended before all steps were done")
        except Enough:
            pass
        read = next(i for i, at in enumerate(self._seen) if at.n_prompt_tokens == self._n_prompt_tokens)
        begin, end = self._seen[read], self._seen[-1]
        steps_s = [b.now_s - a.now_s for a, b in pairwise(self._seen[read:])]
        wait_s, passes_s = end.wait_s - begin.wait_s, end.passes_s - begin.passes_s
        return answer(
            begin.now_s - self._seen[0].now_s,
            steps_s,
            end.bytes_read - begin.bytes_read,
            prompt_passes=read,
            wait_s=wait_s,
            compute_s=passes_s - wait_s,
            choose_s=sum(steps_s) - passes_s,
            at_once=self._batch.n_running,
            ledger=self._engine.ledger.as_dict(),
            streamed_bytes=self._engine.streamed_bytes,
        )

    def _wanted(self, requests: list[Request]) -> Iterator[Wanted]:
        for i, request in enumerate(requests):
            yield Wanted(i, request, Sampling(temp=0))

    def _between(self) -> None:
        counters, batch = self._engine.counters, self._batch
        now = time.perf_counter()
        self._seen.append(At(now, batch.n_prompt_tokens, counters.seconds, counters.wait_s, counters.bytes_read))
        n_read = sum(at.n_prompt_tokens == self._n_prompt_tokens for at in self._seen)
        if n_read > self._n_steps:
            raise Enough


def main() -> None:
    """Open the model as `h2o batch` does, and answer."""
    arguments = _arguments()
    n_streams, n_prompt = arguments.streams, arguments.prompt_len
    # the first streams go on while the last ones' prompts are read, a long part of which fits every pass
    n_predict = arguments.steps + 2 + n_streams * n_prompt // (FULL_TILES // 2)
    n_ctx = -(-n_streams * (n_prompt + n_predict) // CTX_STEP) * CTX_STEP
    options = SessionOptions(
        model=arguments.model,
        sequences=n_streams,
        kind=CONVERSATION,
        budget=Budget(arguments.budget),
        plan_file=arguments.plan_file,
        ctx=n_ctx,
        threads=arguments.threads,
        sampling=Sampling(temp=0),
        speculate="off",
    )
    model = OpenModel(options, Caller(note))
    try:
        session = open_session(model, options, n_ctx, n_ctx)
        try:
            n_vocab = session.engine.n_vocab
            requests = [Request(tuple(prompt(i, n_prompt, n_vocab)), n_predict) for i in range(n_streams)]
            print(json.dumps(Streams(session, arguments.steps).run(requests)), flush=True)
        finally:
            session.close()
    finally:
        model.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--plan-file", type=Path, required=True)
    add_arguments(parser)
    return parser.parse_args()


if __name__ == "__main__":
    main()
