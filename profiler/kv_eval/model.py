"""A model under evaluation: opened once, with one engine after another on it, each with a filter of its own."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from runtime.engine.engine import Engine
from runtime.errors import Cancelled, EngineError, UsageError
from runtime.kv.options import WINDOWED, KvFilter
from runtime.llama import abi
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.llama.tokenizer import Tokenizer
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import first_window
from runtime.settings import Settings

Floats = npt.NDArray[np.float32]
UBATCH = 256
OWN_TOKENS = 2  # last tokens of a prompt that every engine computes itself: one alone would be a decode pass
_STATES_PART = 4  # a fourth of the budget may hold states


@dataclass(frozen=True)
class Start:
    """A prompt, and the keys and values of all but its last tokens; None where there was no memory left for them."""

    prompt: list[int]
    state: ctypes.Array[ctypes.c_uint8] | None = None


class EvalModel:
    """The model at a path; its weights stay in memory as far as budget_bytes allows. Raises H2OError."""

    def __init__(self, path: Path, *, n_threads: int, budget_bytes: int) -> None:
        self.file = ModelFile.open(path)
        self._hollow = HollowModel(self.file)
        self._n_threads, self._budget_bytes = n_threads, budget_bytes
        self._engine: Engine | None = None
        self._cancelled = 0
        self.tokenizer = Tokenizer(self._hollow, self.file)

    @contextmanager
    def engine(self, kv: KvFilter | None, n_ctx: int, kv_type: str = "f16") -> Iterator[Engine]:
        """An engine with this filter inside the block."""
        self._check()
        budget = self._budget_bytes
        plan = Plan(0, 1, Layout.BALANCED, window_bytes=first_window(self.file, budget), budget_bytes=budget)
        settings = Settings(n_ctx=n_ctx, n_ubatch=min(UBATCH, n_ctx), n_threads=self._n_threads, kv_type=kv_type, kv=kv)
        self._engine = Engine(self.file, self._hollow, plan, settings)
        try:
            self._check()
            yield self._engine
        finally:
            engine, self._engine = self._engine, None
            engine.close()

    def count(self, text: str) -> int:
        """Tokens of a text, without a begin-of-text token."""
        return len(self.tokenizer.encode(text, add_special=False))

    @property
    def states_bytes(self) -> int:
        """How much of the budget may hold computed prompts."""
        return self._budget_bytes // _STATES_PART

    def starts(self, prompts: Sequence[list[int]], n_ctx: int) -> list[Start]:
        """Prompts computed once, for engines of n_ctx positions to begin with."""
        room = self.states_bytes
        found = []
        with self.engine(None, n_ctx) as engine:
            for prompt in prompts:
                start = start_of(engine, prompt) if room > 0 and len(prompt) > OWN_TOKENS else Start(prompt)
                room -= len(start.state or ())
                found.append(start)
        return found

    def answer(self, engine: Engine, n_predict: int) -> list[int]:
        """Greedy tokens from where the engine is, until an end token or the end of a sentence.

        The last token is not computed: the engine stands before it.
        """
        tokens: list[int] = []
        while True:
            tokens.append(int(engine.logits().argmax()))
            if len(tokens) >= n_predict or self.tokenizer.ends(tokens[-1]) or self._is_sentence(tokens):
                return tokens
            engine.forward(tokens[-1:])

    def _is_sentence(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return "." in text or "\n" in text.strip(" ")

    def cancel(self, signal_number: int) -> None:
        """End the work soon (from a signal handler): what is going on raises Cancelled."""
        self._cancelled = signal_number
        if self._engine:
            self._engine.cancel(signal_number)

    def _check(self) -> None:
        if self._cancelled:
            raise Cancelled(self._cancelled)

    def close(self) -> None:
        """Free the model."""
        self._hollow.free()


def check_length(model: EvalModel, n_tokens: int) -> None:
    """Raise UsageError where a model was not made for so many tokens."""
    most = model.file.hyper_parameter("context_length")
    if most and n_tokens > most:
        raise UsageError(f"{n_tokens} tokens do not fit the context of this model, {most}", "give a smaller --length")


def start_of(engine: Engine, prompt: list[int]) -> Start:
    """Compute a prompt but for its last tokens, and keep that for other engines."""
    engine.truncate(0)
    engine.forward(prompt[:-OWN_TOKENS])
    n_bytes = abi.llama.llama_state_seq_get_size(engine.context, 0)
    state = (ctypes.c_uint8 * n_bytes)()
    if abi.llama.llama_state_seq_get_data(engine.context, state, n_bytes, 0) != n_bytes:
        raise EngineError("llama.cpp did not give the state of a prompt", "give a smaller --length")
    return Start(prompt, state)


def begin(engine: Engine, start: Start) -> None:
    """Compute a prompt anew, or only its end where its beginning is known and the engine need not see all of it."""
    engine.truncate(0)
    known = start.prompt[:-OWN_TOKENS]
    if start.state is not None and not _needs_prompts(engine.settings.kv):
        if not abi.llama.llama_state_seq_set_data(engine.context, start.state, len(start.state), 0):
            raise EngineError("llama.cpp did not take back the state of a prompt", "give a smaller --length")
    elif known:
        engine.forward(known)
    engine.forward(start.prompt[-OWN_TOKENS:])


def _needs_prompts(kv: KvFilter | None) -> bool:
    """Whether a filter looks at all of a prompt while it is computed, or has a place of its own for it."""
    if kv is None:
        return False
    looks = kv.method == "heavy" or (kv.method == "omnikv" and kv.select in WINDOWED)
    return looks or kv.store == "disk"


def forced(engine: Engine, start: Start, tokens: Sequence[int]) -> Iterator[Floats]:
    """Log-probabilities [n_vocab] after each of the tokens, which are given one by one after the prompt."""
    begin(engine, start)
    for token in tokens:
        engine.forward([token])
        yield log_softmax(engine.logits())


def log_softmax(logits: Floats) -> Floats:
    """Log-probabilities [n_vocab] in nats."""
    shifted = logits - logits.max()
    found: Floats = shifted - np.log(np.exp(shifted).sum())
    return found


def divergence(full: Floats, other: Floats) -> float:
    """Kullback-Leibler divergence in nats of `other` from `full`, log-probabilities [n_vocab]; never below 0."""
    return max(0.0, float(np.sum(np.exp(full) * (full - other), dtype=np.float64)))


def kept_share(engine: Engine, n_prompt: int) -> float:
    """Part of the keys and values of a prompt that a decode pass attends to, over all layers of the cache."""
    if engine.kv is None or engine.kv.options.method == "full":
        return 1.0
    sparse = set(engine.kv.roles.sparse)
    n_bytes = {layer: both.row_bytes for layer, both in engine.kv.cache.layers.items()}
    part = engine.kv.options.n_rows(n_prompt) / n_prompt
    kept = sum(size * (part if layer in sparse else 1.0) for layer, size in n_bytes.items())
    return kept / sum(n_bytes.values())
