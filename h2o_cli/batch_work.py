"""Prompts on their way to answers, in one engine."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from h2o_cli.session.batch_files import BadLine, BatchRequest, answered, refused
from h2o_cli.session.opening import Session
from runtime.answer.batch import Batch, Finished, Wanted, finish_reason
from runtime.answer.generate import Request
from runtime.errors import PromptError
from runtime.llama.chat import Chat


class Sink(Protocol):
    """Where answers go. done: the custom_id of those that are there."""

    @property
    def done(self) -> Collection[str]:
        """Those that are there."""
        ...

    def add(self, answer: Mapping[str, Any]) -> None:
        """Take one."""
        ...


@dataclass
class Totals:
    """Lines that were answered, that got an error, that were answered before."""

    answers: int = 0
    errors: int = 0
    skipped: int = 0

    @property
    def n_done(self) -> int:
        """All of them."""
        return self.answers + self.errors + self.skipped


class Work:
    """Answers requests of a file. n_predict: most tokens of an answer whose line does not say."""

    def __init__(self, session: Session, batch: Batch, answers: Sink, n_predict: int) -> None:
        self.session, self.batch, self.totals = session, batch, Totals()
        self._answers, self._n_predict = answers, n_predict
        self._chat: Chat | None = None
        self._requests: dict[int, BatchRequest] = {}  # those under way

    def answer(self, items: Iterable[BatchRequest | BadLine]) -> None:
        """Answer all that is not answered yet."""
        for done in self.batch.answer(self._wanted(items)):
            self._take(done)

    def _wanted(self, items: Iterable[BatchRequest | BadLine]) -> Iterator[Wanted]:
        """What is to be answered, line by line; lines that cannot be get their error at once."""
        for item in items:
            if item.custom_id in self._answers.done:
                self.totals.skipped += 1
                continue
            try:
                if isinstance(item, BadLine):
                    raise PromptError(f"line {item.number}: {item.problem}")
                request = self._request(item)
            except PromptError as error:
                self.totals.errors += 1
                self._answers.add(refused(item.custom_id, str(error)))
                continue
            self._requests[item.number] = item
            yield Wanted(item.number, request, item.sampling)

    def _request(self, item: BatchRequest) -> Request:
        """The tokens of a prompt. Raises PromptError where they do not fit."""
        model, tokenizer = self.session.model, self.session.model.tokenizer
        n_ctx = min(self.session.engine.settings.n_ctx, model.n_positions)
        stop = item.stop
        if item.messages:
            self._chat = self._chat or Chat(tokenizer, model.caller.note)
            tokens = self._chat.encode(item.messages, n_ctx)
            stop += self._chat.stop
        else:
            tokens = tokenizer.encode(item.prompt, most=n_ctx)
        request = Request(tuple(tokens), item.n_predict or self._n_predict, stop)
        if not tokens:
            raise PromptError("the prompt is empty")
        if len(tokens) + request.n_predict > n_ctx or not self.batch.can_ever_run(request):
            wanted = f"{len(tokens)} tokens and {request.n_predict} of an answer"
            raise PromptError(f"{wanted} do not fit {n_ctx} positions", "raise --ctx, or lower max_tokens")
        return request

    def _take(self, done: Finished) -> None:
        item = self._requests.pop(done.key)
        name = self.session.model.file.path.name
        self._answers.add(answered(item, done.text, finish_reason(done.finish), done.n_prompt, done.n_tokens, name))
        self.totals.answers += 1
