"""The chosen rows of one segment: who chooses them, and how they get into the buffers of its sparse layers."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np

from runtime.kv.compact import Compact
from runtime.kv.jobs import Job, Jobs, Stopped, settle
from runtime.kv.options import KvFilter
from runtime.kv.scores import Floats, Scorer, raw_scores, softmax_scores, top_rows, weights
from runtime.kv.slots import Move, Rows, Slots
from runtime.kv.store import Store
from runtime.llama import abi

Queries = deque[tuple[int, Floats]]  # positions and queries [n_heads, head_dim] of the last tokens


@dataclass
class Attention:
    """The keys of a layer's first n_rows positions, and how its node turns products into weights.

    known: a query and its products with these keys and perhaps more, for the first who asks.
    """

    scorer: Scorer
    keys: abi.Tensor
    n_rows: int
    scale: float
    softcap: float
    known: tuple[Floats, Floats] | None = None

    def _logits(self, query: Floats, n_rows: int) -> Floats:
        known, self.known = self.known, None
        if known and known[0] is query:
            return known[1][:, :n_rows]
        return self.scorer.logits(query, self.keys, n_rows)

    def raw(self, query: Floats) -> Floats:
        """Scores [n_rows] by product."""
        return raw_scores(self._logits(query, self.n_rows), self.scale)

    def softmax(self, query: Floats, n_rows: int = 0) -> Floats:
        """Scores [n_rows] by attention weight; n_rows: of the first ones only, the others are 0."""
        n = min(n_rows or self.n_rows, self.n_rows)
        found = softmax_scores(self._logits(query, n), self.scale, self.softcap)
        return found if n == self.n_rows else np.pad(found, (0, self.n_rows - n))


class Chooser(Protocol):
    """Turns the query of a decoded token into rows."""

    def rows(self, query: Floats, position: int, attention: Attention) -> Rows:
        """The rows to attend to, rising; always the same number."""


class LastChooser:
    """By the query of the current token alone: "last" and "softmax"."""

    def __init__(self, options: KvFilter, n_prompt: int) -> None:
        self._options = options
        self._n = options.n_rows(n_prompt)
        self._kept = _always(options, n_prompt)

    def rows(self, query: Floats, position: int, attention: Attention) -> Rows:
        """The best rows for this query."""
        scores = attention.raw(query) if self._options.select == "last" else attention.softmax(query)
        return top_rows(scores, self._n, self._kept, self._options.block)


class WindowChooser:
    """By the queries of the last `window` tokens, each at its own position: "uniform" and "exp".

    "uniform" adds up their softmax scores; "exp" halves the sum before each new one. Prompt rows that are still inside
    the window are always taken, as part of the budget.
    """

    def __init__(self, options: KvFilter, n_prompt: int, before: Iterable[tuple[int, Floats]]) -> None:
        self._options, self._n_prompt = options, n_prompt
        self._n = options.n_rows(n_prompt)
        self._before = list(before)
        self._scores: deque[Floats] = deque(maxlen=options.window)
        self._sum: Floats | None = None

    def rows(self, query: Floats, position: int, attention: Attention) -> Rows:
        """The best rows for the window that ends with this query."""
        for place, earlier in self._before:
            self._add(attention.softmax(earlier, place + 1))
        self._before = []
        self._add(attention.softmax(query))
        inside = (max(0, position - self._options.window + 1), self._n_prompt)
        kept = [*_always(self._options, self._n_prompt), *([inside] if inside[0] < inside[1] else [])]
        scores = self._sum if self._sum is not None else np.sum(self._scores, axis=0)
        return top_rows(scores, self._n, kept, self._options.block)

    def _add(self, scores: Floats) -> None:
        if self._options.select == "uniform":
            self._scores.append(scores)
        elif self._sum is None:
            self._sum = scores
        else:
            self._sum = self._sum * np.float32(0.5) + scores


def _always(options: KvFilter, n_prompt: int) -> list[tuple[int, int]]:
    """Ranges of rows that are taken whatever their score."""
    ranges = [(0, min(options.sinks, n_prompt)), (max(0, n_prompt - options.recent), n_prompt)]
    return [(start, end) for start, end in ranges if end > start]


def fixed_rows(options: KvFilter, n_prompt: int, number: int) -> Rows:
    """The rows of a method that looks at no scores, for segment `number`: "sinks" (first and last rows) and "random".

    The first one is StreamingLLM's (Xiao et al., "Efficient Streaming Language Models with Attention Sinks", ICLR
    2024), with positions as they are; without --kv-sinks it keeps 4 sinks.
    """
    n = options.n_rows(n_prompt)
    if options.method == "random":
        chosen = np.random.default_rng([options.seed, number, n_prompt]).choice(n_prompt, n, replace=False)
        return np.sort(chosen).astype(np.int64)
    n_sinks = min(options.sinks or 4, n)
    return np.concatenate([np.arange(n_sinks), np.arange(n_prompt - (n - n_sinks), n_prompt)]).astype(np.int64)


@dataclass(frozen=True)
class Buffers:
    """Where chosen rows go, where they come from, and the threads that bring them."""

    compact: Mapping[int, Compact]
    store: Store
    jobs: Jobs
    stopped: Stopped


class HeavyHitters:
    """Attention that every row of a prompt got in one layer, summed over heads and queries.

    After Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", NeurIPS
    2023: half of the budget is for the rows with the largest sums, half for the last ones. There a row that was dropped
    never comes back; here it is the same, since the choice is made once for a prompt.
    """

    def __init__(self, n_cells: int) -> None:
        self._sums = np.zeros(n_cells, np.float32)

    def see(self, found: Floats, first: int, attention: Attention) -> None:
        """Add the attention of queries [n, n_heads, head_dim] at positions first, first + 1, ..."""
        self._sums[first:] = 0
        for i, query in enumerate(found):
            n_rows = first + i + 1
            logits = attention.scorer.logits(query, attention.keys, n_rows)
            weights(logits, attention.scale, attention.softcap)
            self._sums[:n_rows] += logits.sum(axis=0)

    def rows(self, options: KvFilter, n_prompt: int) -> Rows:
        """The rows of a prompt that stay."""
        n = options.n_rows(n_prompt)
        kept = [*_always(options, n_prompt), (n_prompt - (options.recent or n // 2), n_prompt)]
        return top_rows(self._sums[:n_prompt], n, kept, options.block)


class Selection:
    """Rows in the buffers of a segment's sparse layers."""

    def __init__(
        self,
        options: KvFilter,
        layers: tuple[int, ...],
        n_prompt: int,
        buffers: Buffers,
    ) -> None:
        self._strategy, self._threshold = options.strategy, options.lazy_threshold
        self._layers, self._buffers, self._store = layers, buffers, buffers.store
        self._slots = Slots(options.n_rows(n_prompt), n_prompt)
        self._filled = False
        self._put_off: dict[int, Move] = {}
        self._running: dict[int, Job] = {}
        self._stale: list[Job] = []

    def take(self, rows: Rows) -> None:
        """Make these the chosen rows; what the buffers do not have is fetched."""
        if self._strategy == "lazy" and self._filled and self._slots.overlap(rows) > self._threshold:
            return
        if self._strategy in ("without_pack", "brutal"):
            self._slots.forget()
        self.settle()
        move = self._slots.choose(rows)
        self._filled = True
        if not move:
            return
        if self._strategy == "without_pack":
            self._put_off = dict.fromkeys(self._layers, move)
        elif self._store.aside:
            for layer in self._layers:
                self._running[layer] = self._buffers.jobs.start(partial(self._fetch, (layer,), move))
        else:
            self._fetch(self._layers, move)

    def _fetch(self, layers: tuple[int, ...], move: Move) -> None:
        self._store.fetch(self._buffers.compact, layers, move)

    def is_ready(self, layer: int) -> bool:
        """Whether nothing is on its way to this layer's buffer."""
        return layer not in self._running or self._running[layer].done

    def wait(self, layer: int) -> None:
        """Return when the rows of a layer are there."""
        late = self._put_off.pop(layer, None)
        if late:
            self._fetch((layer,), late)
        job = self._running.get(layer)
        if job:
            job.wait(self._buffers.stopped)
            del self._running[layer]

    def settle(self) -> None:
        """Wait until nothing writes into the buffers any more."""
        settle(self._stale, self._buffers.stopped)

    def forget(self) -> None:
        """After a pass that failed: nothing in the buffers can be relied on."""
        self._put_off.clear()
        self._stale += self._running.values()
        self._running.clear()
        self._slots.forget()
        self._filled = False
