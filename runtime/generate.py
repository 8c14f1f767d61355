"""Generation: a generator of tokens and text over Engine.forward, and the figures that describe how fast it was."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.engine import Counters, Engine
from runtime.errors import BudgetError, Cancelled, EngineError, PlanError, PromptError
from runtime.plan import Plan
from runtime.plan_stats import StatsWriter
from runtime.plan_watcher import PlanWatcher
from runtime.residency import k_layers_worth, streamable_bytes, window_bytes
from runtime.sampler import PENALTY_TOKENS, Sampler
from runtime.sizes import format_size
from runtime.tokenizer import Tokenizer

LENGTH, STOP, EOS, CANCELLED = "length", "stop", "eos", "cancelled"
_RATE_STEPS = 4  # the best observed read rate is taken over this many tokens


@dataclass(frozen=True)
class Request:
    """What to generate: at most n_predict tokens (negative: until the model ends or the context is full) after prompt.

    An answer ends before the first of the `stop` texts.
    """

    prompt: tuple[int, ...]
    n_predict: int = -1
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Step:
    """One generated token with the text that became certain with it; finish says why the last step is the last.

    token None: no new token (the end of text itself, a cancelled answer). Text can lag behind the tokens: incomplete
    characters and possible beginnings of a stop text are held back.
    """

    token: int | None
    text: str = ""
    finish: str = ""


class TokenSequence:
    """The tokens whose keys and values are in an engine's cache."""

    def __init__(self, engine: Engine, note: Callable[[str], None] = print) -> None:
        self.engine = engine
        self.tokens: list[int] = []
        self._note = note

    def feed(self, tokens: Sequence[int]) -> None:
        """Make `tokens` the whole sequence: what it has in common with the old one is kept, the rest is computed."""
        if not tokens:
            raise PromptError("the prompt is empty", "give some text with -p")
        kept = min(_common_prefix(self.tokens, tokens), len(tokens) - 1)
        if kept < len(self.tokens):
            kept = self._shorten(kept)
        self._compute(tokens[kept:])

    def append(self, token: int) -> None:
        """Compute one more token."""
        self._compute([token])

    @property
    def room(self) -> int:
        """How many tokens the context still takes."""
        return self.engine.settings.n_ctx - len(self.tokens)

    def _shorten(self, n_tokens: int) -> int:
        try:
            self.engine.truncate(n_tokens)
        except EngineError:
            self._note("this model's state cannot be shortened: the conversation is read again from its beginning")
            self.engine.truncate(0)
            n_tokens = 0
        del self.tokens[n_tokens:]
        return n_tokens

    def _compute(self, tokens: Sequence[int]) -> None:
        start = self.engine.n_past
        try:
            self.engine.forward(tokens)
        finally:
            self.tokens += tokens[: self.engine.n_past - start]


def _common_prefix(old: Sequence[int], new: Sequence[int]) -> int:
    n = min(len(old), len(new))
    return next((i for i in range(n) if old[i] != new[i]), n)


def check_prompt(n_prompt: int, n_ctx: int) -> None:
    """Raise PromptError unless the prompt and one more token fit the context."""
    if n_prompt == 0:
        raise PromptError("the prompt is empty", "give some text with -p")
    if n_prompt >= n_ctx:
        raise PromptError(
            f"the prompt has {n_prompt} tokens and the context takes {n_ctx}", "raise --ctx or shorten the prompt"
        )


def generate(
    sequence: TokenSequence,
    tokenizer: Tokenizer,
    sampler: Sampler,
    request: Request,
    between_tokens: Callable[[], None] = lambda: None,
) -> Iterator[Step]:
    """Yield a step per token; the last one says why it is the last.

    `between_tokens` is called before every pass: the place to adopt a new plan. A cancelled pass ends the answer with
    a step of its own; the text so far stays, and the sequence can go on.
    """
    check_prompt(len(request.prompt), sequence.engine.settings.n_ctx)
    text = StopFilter(tokenizer, request.stop)
    sampler.accept(request.prompt[-PENALTY_TOKENS:])
    n_left = request.n_predict if request.n_predict >= 0 else sequence.engine.settings.n_ctx
    pending: Sequence[int] = request.prompt
    try:
        while True:
            between_tokens()
            if pending is request.prompt:
                sequence.feed(pending)
                _check_numbers(sequence.engine)
            else:
                sequence.append(pending[0])
            if n_left <= 0:
                yield Step(None, "", LENGTH)
                return
            token = sampler.sample(sequence.engine)
            n_left -= 1
            step = _step(text, tokenizer, token, is_last=n_left == 0 or sequence.room == 0)
            yield step
            if step.finish:
                return
            pending = (token,)
    except Cancelled:
        yield Step(None, text.finish(), CANCELLED)


def _check_numbers(engine: Engine) -> None:
    if np.isnan(engine.logits()).any():
        raise EngineError("the model computes no numbers (NaN)", "the file may be damaged: download the model again")


def _step(text: StopFilter, tokenizer: Tokenizer, token: int, *, is_last: bool) -> Step:
    """The step of one chosen token."""
    if tokenizer.ends(token):
        return Step(None, text.finish(), EOS)
    new = text.feed(token)
    if text.stopped:
        return Step(token, new, STOP)
    if not is_last:
        return Step(token, new)
    new += text.finish()
    return Step(token, new, STOP if text.stopped else LENGTH)


class StopFilter:
    """Text of an answer up to the first stop text; a possible beginning of one is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.decoder()
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain to belong to the answer once this token is known."""
        return self._release(self._decoder.feed(token))

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that is a beginning of stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class PlanFollower:
    """Adopts new plans from a plan file between two passes, inside the budget; says once what it could not use."""

    def __init__(
        self,
        engine: Engine,
        watcher: PlanWatcher,
        budget_bytes: int,
        note: Callable[[str], None],
        stats: StatsWriter | None = None,
    ) -> None:
        self.engine = engine
        self.budget_bytes = budget_bytes
        self._stats = stats
        self._generation, self._refused = engine.plan.generation, 0
        self._watcher = watcher
        self._note = note
        self._asked = replace(engine.plan, generation=0)
        self._told: set[str] = set()

    def __call__(self) -> None:
        """Look for a new plan, and publish what was measured under the one in force."""
        self._follow()
        if self._stats:
            self._stats.publish(self.engine, self.budget_bytes, self._generation, self._refused)

    def _follow(self) -> None:
        plan = self._watcher.poll()
        problem = self._watcher.take_problem()
        if problem:
            self._tell(problem)
        if plan is None:
            return
        if replace(plan, generation=0) == self._asked:
            self._generation = plan.generation
            return
        try:
            check_budget(self.engine, plan, self.budget_bytes)
            self.engine.apply(plan)
        except (BudgetError, PlanError) as error:
            self._refused = plan.generation
            self._tell(f"the new plan was not taken: {error}")
            return
        self._generation = plan.generation
        self._asked = replace(plan, generation=0)
        self.budget_bytes = plan.budget_bytes or self.budget_bytes

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._note(text)


def check_budget(engine: Engine, plan: Plan, budget_bytes: int) -> None:
    """Raise BudgetError when a plan that names no budget of its own does not fit the process's."""
    if plan.budget_bytes or not budget_bytes:
        return
    file, total = engine.file, streamable_bytes(engine.file)
    pinned = min(total, plan.pinned_bytes or k_layers_worth(file, plan.k, plan.layout))
    need = engine.ledger.fixed_bytes + pinned + min(window_bytes(file, plan), total - pinned)
    if need > budget_bytes:
        raise BudgetError(
            f"k={plan.k}, w={plan.w} needs {format_size(need)}, the budget is {format_size(budget_bytes)}",
            "raise -m or lower k and w",
            floor_bytes=need,
        )


@dataclass(frozen=True)
class Statistics:
    """How fast an answer was. None: too few tokens to say.

    limit_ms_per_token is the least a token can take when reading and computing overlap fully: the larger of
    streamed bytes per pass / disk bytes per second, and the computing time (pass time minus waiting for the disk).
    """

    n_tokens: int = 0
    ttft_s: float | None = None
    decode_ms_per_token: float | None = None
    tokens_per_s: float | None = None
    bytes_read_per_token: float | None = None
    disk_wait_ms_per_token: float | None = None
    limit_ms_per_token: float | None = None

    @property
    def yield_(self) -> float | None:
        """How close the answer came to the limit: limit / measured."""
        if not self.decode_ms_per_token or self.limit_ms_per_token is None:
            return None
        return self.limit_ms_per_token / self.decode_ms_per_token


class Meter:
    """Watches the steps of one answer. disk_bytes_per_s 0: not known, the best rate seen counts."""

    def __init__(self, engine: Engine, disk_bytes_per_s: float = 0) -> None:
        self._engine = engine
        self._disk_bytes_per_s = disk_bytes_per_s
        self._start_s = time.perf_counter()
        self._first: tuple[float, Counters] | None = None
        self._last: tuple[float, Counters] | None = None
        self._recent: deque[tuple[float, int]] = deque(maxlen=_RATE_STEPS)
        self._best_bytes_per_s = 0.0
        self.n_tokens = 0

    def see(self, step: Step) -> None:
        """Take note of a step, when it is there."""
        self.n_tokens += step.token is not None
        now = (time.perf_counter(), replace(self._engine.counters))
        if step.finish == CANCELLED:
            return
        if self._first is None:
            self._first = now
        self._last = now
        self._recent.append((now[0], now[1].bytes_read))
        seconds = self._recent[-1][0] - self._recent[0][0]
        if len(self._recent) == _RATE_STEPS and seconds > 0:
            rate = (self._recent[-1][1] - self._recent[0][1]) / seconds
            self._best_bytes_per_s = max(self._best_bytes_per_s, rate)

    def statistics(self) -> Statistics:
        """The figures so far. The first token counts for ttft_s only."""
        if self._first is None or self._last is None:
            return Statistics(self.n_tokens)
        ttft_s = self._first[0] - self._start_s
        (first_s, first), (last_s, last) = self._first, self._last
        n = last.passes - first.passes
        if n <= 0:
            return Statistics(self.n_tokens, ttft_s)
        decode_s, wait_s = (last.seconds - first.seconds) / n, (last.wait_s - first.wait_s) / n
        seen = (last.bytes_read - first.bytes_read) / (last_s - first_s)
        rate = self._disk_bytes_per_s or max(self._best_bytes_per_s, seen)
        disk_s = self._engine.streamed_bytes / rate if rate else 0.0
        return Statistics(
            n_tokens=self.n_tokens,
            ttft_s=ttft_s,
            decode_ms_per_token=1000 * decode_s,
            tokens_per_s=n / (last_s - first_s),
            bytes_read_per_token=(last.bytes_read - first.bytes_read) / n,
            disk_wait_ms_per_token=1000 * wait_s,
            limit_ms_per_token=1000 * max(disk_s, decode_s - wait_s),
        )
