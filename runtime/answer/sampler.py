"""Choosing the next token, by llama.cpp's own samplers in llama.cpp's own order."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.engine.engine import Engine
from runtime.errors import UsageError
from runtime.llama import abi
from runtime.llama.compiled import LIBRARY

PENALTY_TOKENS = 64  # how many of the last tokens the repeat penalty looks at
_SEEDS = 2**32 - 1  # llama.cpp reads 2^32 - 1 as "choose one"


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the defaults are llama.cpp's. temp 0: always the most likely one. seed None: random."""

    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = (
            (0 <= self.temp < math.inf, f"--temp {self.temp}", "0 or more"),
            (self.top_k >= 0, f"--top-k {self.top_k}", "0 (off) or more"),
            (0 < self.top_p <= 1, f"--top-p {self.top_p}", "above 0, at most 1 (off)"),
            (0 <= self.min_p <= 1, f"--min-p {self.min_p}", "from 0 (off) to 1"),
            (0 < self.repeat_penalty < math.inf, f"--repeat-penalty {self.repeat_penalty}", "above 0; 1 is off"),
            (self.seed is None or 0 <= self.seed < _SEEDS, f"--seed {self.seed}", f"from 0 to {_SEEDS - 1}"),
        )
        for good, what, allowed in checks:
            if not good:
                raise UsageError(f"{what} is not possible", f"give a value {allowed}")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temp == 0

    @property
    def lists_tokens(self) -> bool:
        """Whether llama.cpp's samplers choose, from a list of all tokens; else it is the largest logit that counts."""
        return not self.greedy or self.repeat_penalty != 1 or LIBRARY is None


_CHAIN = abi.llama.llama_sampler_chain_init(abi.llama.llama_sampler_chain_default_params())
"""All samplers choose in this chain, one after the other: it keeps the only list of candidates."""


class Sampler:
    """llama.cpp's samplers in a row. `seed` is the one in use (chosen here when none was given).

    is_plain: nothing but the largest logit counts, so there is nothing to remember.
    """

    def __init__(self, sampling: Sampling, n_vocab: int, suppressed: Sequence[int] = ()) -> None:
        self.sampling = sampling
        self.seed = int.from_bytes(os.urandom(4), "little") % _SEEDS if sampling.seed is None else sampling.seed
        self._n_vocab = n_vocab
        self.is_plain = not sampling.lists_tokens and not suppressed
        self._steps: list[Any] = [*self._before(suppressed), *self._choosing()]

    def _before(self, suppressed: Sequence[int]) -> Iterable[Any]:
        """Samplers that change logits before anything is cut away."""
        if suppressed:
            bias = (abi.llama.llama_logit_bias * len(suppressed))(*((token, -math.inf) for token in suppressed))
            yield abi.llama.llama_sampler_init_logit_bias(self._n_vocab, len(suppressed), bias)
        if self.sampling.repeat_penalty != 1:
            penalty = self.sampling.repeat_penalty
            yield abi.llama.llama_sampler_init_penalties(self._n_vocab, PENALTY_TOKENS, penalty, 0.0, 0.0)

    def _choosing(self) -> Iterable[Any]:
        sampling, llama = self.sampling, abi.llama
        if sampling.greedy:
            yield llama.llama_sampler_init_greedy()
            return
        yield llama.llama_sampler_init_top_k(sampling.top_k)
        yield self._top_p()
        yield llama.llama_sampler_init_min_p(sampling.min_p, 0)
        yield llama.llama_sampler_init_temp(sampling.temp)
        yield llama.llama_sampler_init_dist(self.seed)

    def _top_p(self) -> Any:
        return abi.llama.llama_sampler_init_top_p(self.sampling.top_p, 0)

    def sample(self, engine: Engine, i: int = -1) -> int:
        """Choose from an output of the last forward (counted from the end: negative), and remember the choice."""
        token = engine.likeliest(i) if self.is_plain else None
        if token is not None:
            return token
        llama = abi.llama
        for step in self._steps:
            llama.llama_sampler_chain_add(_CHAIN, step)
        try:
            token = int(llama.llama_sampler_sample(_CHAIN, engine.context, i))
        finally:
            for _ in self._steps:
                llama.llama_sampler_chain_remove(_CHAIN, 0)
        if not (self.sampling.greedy or self.sampling.top_k) and self.sampling.top_p < 1:
            self._forget_sorted()
        return token

    def _forget_sorted(self) -> None:
        """Top-p keeps a list of its own where nothing was cut away before it: a new one does not have it yet."""
        place = len(self._steps) - 4
        abi.llama.llama_sampler_free(self._steps[place])
        self._steps[place] = self._top_p()

    def accept(self, tokens: Iterable[int]) -> None:
        """Remember tokens that were not chosen here (the prompt), for the repeat penalty."""
        if self.sampling.repeat_penalty != 1:
            for token in tokens:
                for step in self._steps:
                    abi.llama.llama_sampler_accept(step, token)

    def close(self) -> None:
        """Free the samplers."""
        while self._steps:
            abi.llama.llama_sampler_free(self._steps.pop())
