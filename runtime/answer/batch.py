"""Many answers on one stream of weights: every pass computes the next token of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from runtime.answer.beginning import Beginning
from runtime.answer.generate import LENGTH, Answer, Request, no_numbers
from runtime.answer.pool import Counts, SwapTimes
from runtime.answer.sampler import PENALTY_TOKENS, Sampler, Sampling
from runtime.answer.scheduler import Job, Limits, may_join, next_pass, peak_cells
from runtime.engine.engine import Engine
from runtime.llama.tokenizer import Tokenizer
from runtime.passes import Part, Pass


@dataclass(frozen=True)
class Wanted:
    """An answer that is wanted; `key` is the caller's."""

    key: int
    request: Request
    sampling: Sampling


@dataclass(frozen=True)
class Finished:
    """An answer with the number of its tokens, the end of text not counted."""

    key: int
    text: str
    finish: str
    n_prompt: int
    n_tokens: int


class Batch:
    """Answers requests, as many at once as memory, the engine's sequences and the schedule allow.

    A sequence joins when it is certain that it can go on to its end, and leaves when it ends; others take its cells.
    A text that begins as the one before it takes that beginning over.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        between_passes: Callable[[], None],
        *,
        shares: bool = True,
        in_blocks: bool = False,
    ) -> None:
        """between_passes: the place to adopt a new plan. shares: texts may have cells in common.

        in_blocks: texts begin together, as many as there is room for, and the next ones wait until all have ended; they
        have no cells in common.
        """
        self.engine = engine
        self.largest = self.n_joined = 0  # sequences in one pass, and in all
        self.counts, self.swap_times = Counts(), SwapTimes()
        self.n_tokens = self.n_prompt_tokens = self.n_shared_tokens = 0
        self._tokenizer, self._between = tokenizer, between_passes
        settings = engine.settings
        self._free = list(reversed(range(settings.n_sequences)))
        n_block = min(settings.n_ubatch, settings.n_ctx)
        apart = engine.attention is not None
        self._limits = Limits(settings.n_ctx, settings.n_sequences, engine.pass_tokens, n_block, apart)
        self._limits = replace(self._limits, in_blocks=in_blocks)
        self._running: list[Running] = []
        self._beginning = Beginning(engine, n_block, is_possible=shares and apart and not in_blocks)

    @property
    def n_running(self) -> int:
        """Answers under way."""
        return len(self._running)

    def can_ever_run(self, request: Request) -> bool:
        """Whether the cache is large enough for an answer when nothing else is in it."""
        return may_join([], Job(len(request.prompt), 0, request.n_predict), self._limits)

    def answer(self, wanted: Iterator[Wanted]) -> Iterator[Finished]:
        """Answer all that is wanted, each taken when there is room for it; in the order in which they end.

        Every one of them has to be one that can_ever_run(). Raises what Engine.compute() raises.
        """
        try:
            waiting = next(wanted, None)
            while waiting or self._running:
                while waiting and self._may_join(waiting.request):
                    self._join(waiting)
                    waiting = next(wanted, None)
                self._between()
                yield from self._step()
        finally:
            self._beginning.drop()
            for running in self._running:
                running.sampler.close()

    def _may_join(self, request: Request) -> bool:
        """Whether a text can join now. What it may take over is kept from then on."""
        beginning, jobs = self._beginning, [running.job for running in self._running]
        if not jobs:
            if not beginning.of(request.prompt) or not self._fits(request, jobs):
                beginning.drop()
            return True
        if beginning.is_possible and not beginning.of(request.prompt) and not any(job.n_shared for job in jobs):
            last = self._running[-1]
            n = beginning.common(last.wanted.request.prompt, request.prompt)
            if n > last.n_cached:
                return False  # soon it will be there
            jobs[-1] = replace(jobs[-1], n_shared=n)
            if n and peak_cells(jobs, self._limits) + n <= self._limits.n_cells:
                beginning.keep(request.prompt, last.sequence, n)
                last.n_shared = n
            jobs[-1] = last.job
        return self._fits(request, jobs)

    def _fits(self, request: Request, jobs: Sequence[Job]) -> bool:
        """Whether a text is certain to find its cells beside others, and beside the beginning that is kept."""
        n = self._beginning.of(request.prompt)
        limits = replace(self._limits, n_cells=self._limits.n_cells - len(self._beginning.tokens))
        return may_join(jobs, Job(len(request.prompt), n, request.n_predict, n), limits)

    def _join(self, wanted: Wanted) -> Running:
        answer = Answer(self._tokenizer, wanted.request, self.engine.settings.n_ctx, at_once=False)
        sampler = Sampler(wanted.sampling, self.engine.n_vocab, self._tokenizer.suppressed)
        sampler.accept(wanted.request.prompt[-PENALTY_TOKENS:])
        running = Running(self.n_joined, self._free.pop(), wanted, answer, sampler)
        self.n_joined += 1
        n = running.n_cached = running.n_shared = self._beginning.of(wanted.request.prompt)
        if n:
            self._beginning.give(running.sequence, n)
        self.n_prompt_tokens += n
        self.n_shared_tokens += n
        self._running.append(running)
        return running

    def _step(self) -> Iterator[Finished]:
        """One pass, and what is chosen after it."""
        counts = self._counts()
        taking = [(running, n) for running, n in zip(self._running, counts, strict=True) if n]
        n_block = self._limits.n_block
        parts = tuple([running.part(n, n_block) for running, n in taking])
        pass_ = Pass(parts, not any([running.n_unread for running, _ in taking]))
        self.engine.compute([pass_])
        self.largest = max(self.largest, len(taking))
        likeliest = self.engine.likeliest_of_all()
        place, n_outputs = 0, pass_.n_outputs
        for running, n in taking:
            self.n_prompt_tokens += min(n, running.n_unread)
            running.n_cached += n
            if running.n_unread:
                continue
            if likeliest and running.sampler.is_plain:
                token = likeliest[place]
            else:
                token = self._sampled(running, place - n_outputs)
            place += 1
            if finish := self._take(running, token):
                yield self._leave(running, finish)

    def _counts(self) -> list[int]:
        """How many tokens of each the next pass computes."""
        if not any([running.n_unread for running in self._running]):
            return [1] * len(self._running)
        return next_pass([running.job for running in self._running], self._limits)

    def _sampled(self, running: Running, place: int) -> int:
        """What an answer's sampler chooses from an output; below 0: its logit is no number."""
        token = running.sampler.sample(self.engine, place)
        return token if self.engine.is_number(token, place) else -1

    def _take(self, running: Running, token: int) -> str:
        """The next token of an answer was chosen; why it is the last, if it is."""
        if token < 0:
            raise no_numbers()
        step = running.answer.take(token)
        if step.text:
            running.parts.append(step.text)
        running.n_chosen += step.token is not None
        self.n_tokens += step.token is not None
        return step.finish

    def _leave(self, running: Running, finish: str) -> Finished:
        self.engine.truncate(0, running.sequence)
        self._running.remove(running)
        self._free.append(running.sequence)
        running.sampler.close()
        wanted = running.wanted
        text = "".join(running.parts)
        return Finished(wanted.key, text, finish, len(wanted.request.prompt), running.n_chosen)


class Running:
    """An answer under way, the number-th: `sequence` is its number in the cache, which has n_cached of its tokens."""

    def __init__(self, number: int, sequence: int, wanted: Wanted, answer: Answer, sampler: Sampler) -> None:
        self.number = number
        self.sequence, self.wanted, self.answer, self.sampler = sequence, wanted, answer, sampler
        self.n_cached = self.n_shared = self.n_chosen = 0
        self.parts: list[str] = []
        self._n_prompt = len(wanted.request.prompt)

    @property
    def n_unread(self) -> int:
        """Tokens of the prompt that are not computed yet."""
        return max(0, self._n_prompt - self.n_cached)

    @property
    def job(self) -> Job:
        """As the scheduler sees it."""
        return Job(self._n_prompt, self.n_cached, self.answer.n_left, self.n_shared)

    def part(self, n_tokens: int, n_block: int) -> Part:
        """The next n_tokens in a pass; logits are wanted where they are the last that are known."""
        first, known = self.n_cached, self.answer.tokens
        end = first + n_tokens
        is_long = self.n_unread > 0 and self.job.block(n_block)[1]
        return Part(self.sequence, first, tuple(known[first:end]), int(end == len(known)), is_long)


def finish_reason(finish: str) -> str:
    """The end of an answer in OpenAI's words."""
    return "length" if finish == LENGTH else "stop"
