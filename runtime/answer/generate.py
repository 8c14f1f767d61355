"""Generation: a generator of tokens and text over the passes of one sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from runtime.answer.sampler import PENALTY_TOKENS, Sampler
from runtime.answer.speculate import Speculation
from runtime.answer.stop import LateText, StopFilter
from runtime.engine.sequence import TokenSequence
from runtime.errors import Cancelled, EngineError, PromptError
from runtime.llama.tokenizer import Tokenizer

LENGTH, STOP, EOS, CANCELLED = "length", "stop", "eos", "cancelled"


@dataclass(frozen=True)
class Request:
    """What to generate: at most n_predict tokens (negative: until the model ends or the context is full) after prompt.

    An answer ends before the first of the `stop` texts.
    """

    prompt: tuple[int, ...]
    n_predict: int = -1
    stop: tuple[str, ...] = ()


class Step(NamedTuple):
    """One generated token with the text that became certain with it; finish says why the last step is the last.

    token None: no new token (the end of text itself, a cancelled answer). Text can lag behind the tokens: incomplete
    characters and possible beginnings of a stop text are held back.

    The first step of a pass says how many tokens had been drafted for it and how long that took; `accepted` says that
    the token was one of them.
    """

    token: int | None
    text: str = ""
    finish: str = ""
    drafted: int = 0
    drafting_s: float = 0.0
    accepted: bool = False


def check_prompt(n_prompt: int, n_ctx: int) -> None:
    """Raise PromptError unless the prompt and one more token fit the context."""
    if n_prompt == 0:
        raise PromptError("the prompt is empty", "give some text with -p")
    if n_prompt >= n_ctx:
        found = n_prompt if n_prompt == n_ctx else f"more than {n_ctx}"  # of a longer one not all were counted
        raise PromptError(
            f"the prompt has {found} tokens and the context takes {n_ctx}", "raise --ctx or shorten the prompt"
        )


def generate(
    sequence: TokenSequence,
    tokenizer: Tokenizer,
    sampler: Sampler,
    request: Request,
    between_tokens: Callable[[], None] = lambda: None,
    speculation: Speculation | None = None,
) -> Iterator[Step]:
    """Yield a step per token; the last one says why it is the last.

    `between_tokens` is called before every pass: the place to adopt a new plan. A cancelled pass ends the answer with
    a step of its own; the text so far stays, and the sequence can go on.
    """
    answer = _Answer(sequence, tokenizer, sampler, request, speculation)
    try:
        between_tokens()
        answer.compute_prompt()
        if request.n_predict == 0:
            yield Step(None, "", LENGTH)
            return
        while True:
            yield from answer.steps()
            if answer.finished:
                return
            between_tokens()
            answer.compute_next()
    except Cancelled:
        sequence.engine.forget_cancel()
        yield Step(None, answer.text.finish(), CANCELLED)


class Answer:
    """The tokens and the text of an answer, as they are chosen; `tokens` begins with the prompt."""

    def __init__(self, tokenizer: Tokenizer, request: Request, n_ctx: int, *, at_once: bool = True) -> None:
        """at_once: text is given with the tokens that it belongs to, else at the end, where there are no stop texts."""
        self.tokens = list(request.prompt)
        self.n_left = request.n_predict if request.n_predict >= 0 else n_ctx
        late = not at_once and not any(request.stop)
        self.text = LateText(tokenizer) if late else StopFilter(tokenizer, request.stop)
        self._tokenizer, self._n_ctx = tokenizer, n_ctx

    def take(self, token: int) -> Step:
        """The next token was chosen. It becomes one of `tokens`, unless it ends the answer."""
        self.n_left -= 1
        if self._tokenizer.ends(token):
            return Step(None, self.text.finish(), EOS)
        new = self.text.feed(token)
        finish = STOP if self.text.stopped else ""
        if not finish and (not self.n_left or len(self.tokens) == self._n_ctx):
            new += self.text.finish()
            finish = STOP if self.text.stopped else LENGTH
        if not finish:
            self.tokens.append(token)
        return Step(token, new, finish)


class _Answer:
    """One answer: a pass for what is known and drafted (compute), then the sampler's choices in order (steps).

    A drafted token counts when the sampler chooses it; the first other choice ends the pass's tokens, and what was
    computed after it is forgotten. So the choices are those of one token per pass, with the same random numbers.
    """

    def __init__(
        self,
        sequence: TokenSequence,
        tokenizer: Tokenizer,
        sampler: Sampler,
        request: Request,
        speculation: Speculation | None,
    ) -> None:
        self._n_ctx = sequence.engine.settings.n_ctx
        check_prompt(len(request.prompt), self._n_ctx)
        sampler.accept(request.prompt[-PENALTY_TOKENS:])
        self._answer = Answer(tokenizer, request, self._n_ctx)
        self.text, self._tokens = self._answer.text, self._answer.tokens
        self.finished = False
        self._sequence, self._sampler = sequence, sampler
        self._speculation = speculation
        self._n_prompt = len(request.prompt)
        self._draft: list[int] = []

    def compute_prompt(self) -> None:
        """Compute what the cache does not have of the prompt."""
        engine = self._sequence.engine
        before = replace(engine.counters)
        self._sequence.feed(self._tokens)
        if not engine.has_numbers():
            raise no_numbers()
        if self._speculation:
            self._speculation.begin()
            self._speculation.saw_prompt(before, engine.counters, engine.streamed_bytes)

    def compute_next(self) -> None:
        """One pass for the last token and a draft of what follows it."""
        counters, speculation = self._sequence.engine.counters, self._speculation
        if not speculation:
            self._sequence.extend(self._tokens[-1:])
            return
        most = min(self._answer.n_left, self._n_ctx - len(self._tokens) + 1, self._sequence.engine.layout.most_outputs)
        self._draft = speculation.draft(self._tokens, most - 1)
        before = replace(counters)
        self._sequence.extend([self._tokens[-1], *self._draft])
        speculation.saw_pass(before, counters)

    def steps(self) -> Iterator[Step]:
        """The tokens of the last pass."""
        draft, n_before = self._draft, len(self._tokens)
        for i in range(len(draft) + 1):
            token = self._choose(i - len(draft) - 1)
            right = i < len(draft) and token == draft[i]
            step = self._step(token, i, right)
            self.finished = bool(step.finish)
            if self.finished:
                self._sequence.shorten(len(self._tokens))
            yield step
            if self.finished:
                return
            if not right:
                break
        self._sequence.shorten(len(self._tokens) - 1)
        if self._speculation and n_before > self._n_prompt:
            self._speculation.verified(len(draft), self._tokens[n_before:])

    def _choose(self, place: int) -> int:
        """The token the sampler chooses from an output of the last pass (counted from the end: negative)."""
        token = self._sampler.sample(self._sequence.engine, place)
        if not self._sequence.engine.is_number(token, place):
            raise no_numbers()
        if self._speculation and self._speculation.wants_odds:
            self._speculation.saw_odds(self._sequence.engine.odds(token, place))
        return token

    def _step(self, token: int, i: int, right: bool) -> Step:
        """The step of the last pass's i-th token; right: it had been drafted."""
        step = self._answer.take(token)
        if i == 0 and self._speculation:
            step = step._replace(drafted=len(self._draft), drafting_s=self._speculation.drafting_s)
        return step._replace(accepted=True) if right else step


def no_numbers() -> EngineError:
    """The error for NaN where logits should be."""
    return EngineError("the model computes no numbers (NaN)", "the file may be damaged: download the model again")
