"""h2o's side of the benchmark's turns: an answer as `h2o run` gives it, in rounds (see h2o_cli/bench/speed/rounds.py).

A process of its own (`python -m h2o_cli.bench.speed.turns_run`), so that it can run in an emulated device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from h2o_cli.bench.speed.rounds import serve
from h2o_cli.output import note
from h2o_cli.session.caller import Caller
from h2o_cli.session.model import OpenModel
from h2o_cli.session.opening import Session, open_session
from h2o_cli.session.options import SessionOptions
from runtime.answer.generate import Request, Step
from runtime.answer.meter import Meter
from runtime.answer.sampler import Sampling
from runtime.plans.budget import Budget


class SessionAnswer:
    """What `h2o run` does for every token of an answer."""

    def __init__(self, session: Session, prompt: list[int]) -> None:
        self._session = session
        self.prompt = prompt
        self.forget()

    def forget(self) -> None:
        """Begin anew; nothing is computed yet."""
        session = self._session
        session.sequence.shorten(0)
        self._meter = Meter(session.engine, session.machine)
        self._steps: Iterator[Step] = session.answer(Request(tuple(self.prompt)))

    def next_token(self) -> int | None:
        """The next token, for the first one the prompt is computed; None: the model ended its answer."""
        step = next(self._steps, None)
        if step is None:
            return None
        self._meter.see(step)
        return step.token


def main() -> None:
    """Open the model, and do rounds."""
    arguments = _arguments()
    options = SessionOptions(
        model=arguments.model,
        budget=Budget(arguments.budget),
        plan_file=arguments.plan_file,
        threads=arguments.threads,
        sampling=Sampling(temp=0),
        speculate="off",
    )
    model = OpenModel(options, Caller(note))
    try:
        prompt = model.tokenizer.encode(arguments.prompt)
        session = open_session(model, options, arguments.ctx, len(prompt))
        try:
            serve(SessionAnswer(session, prompt))
        finally:
            session.close()
    finally:
        model.close()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--budget", type=int, required=True)
    parser.add_argument("--ctx", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--plan-file", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
