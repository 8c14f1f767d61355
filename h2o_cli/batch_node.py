"""One node's engine in `h2o batch --cluster`: `python -m h2o_cli.batch_node`, the child of an actor.

Requests come on standard input and answers leave on standard output, pickled, some at a time. The first thing that
comes is a Setup; what leaves first is None, or the error that ended it.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from typing import Any

from h2o_cli.batch_work import Work
from h2o_cli.session.batch_files import BatchRequest
from h2o_cli.session.batch_pool import default_positions
from h2o_cli.session.caller import Caller
from h2o_cli.session.model import OpenModel
from h2o_cli.session.opening import open_session
from h2o_cli.session.options import SessionOptions
from runtime.answer.batch import Batch
from runtime.answer.drafters import can_take_back
from runtime.errors import H2OError, ModelError


@dataclass(frozen=True)
class Setup:
    """What an engine is opened with. n_predict: most tokens of an answer whose line does not say."""

    options: SessionOptions
    n_predict: int


@dataclass
class Kept:
    """Answers to some requests."""

    answers: list[Mapping[str, Any]] = field(default_factory=list)
    done: tuple[str, ...] = ()

    def add(self, answer: Mapping[str, Any]) -> None:
        """Take one."""
        self.answers.append(answer)


def main() -> None:
    """Answer until standard input ends."""
    source, target = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer

    def tell(what: object) -> None:
        pickle.dump(what, target)
        target.flush()

    with ExitStack() as opened:
        try:
            setup: Setup = pickle.load(source)
            model = opened.enter_context(closing(OpenModel(setup.options, Caller())))
            if not can_take_back(model.hollow):
                raise ModelError("this model keeps a state without positions, which answers cannot share")
            n_ctx = setup.options.ctx or default_positions(model.file, setup.options)
            session = open_session(model, replace(setup.options, ctx=n_ctx), n_ctx, n_ctx)
            opened.callback(session.close)
            batch = Batch(session.engine, model.tokenizer, session.follower)
        except H2OError as error:
            tell(f"{error.message} ({error.next_step})")
            return
        tell(None)
        while requests := _next(source):
            kept = Kept()
            Work(session, batch, kept, setup.n_predict).answer(requests)
            tell(kept.answers)


def _next(source: Any) -> list[BatchRequest]:
    try:
        found: list[BatchRequest] = pickle.load(source)
    except EOFError:
        return []
    return found


if __name__ == "__main__":
    main()
