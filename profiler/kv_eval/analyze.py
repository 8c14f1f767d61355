"""Find the filter layers of a model: record scores, propose by similarity, measure the proposals, choose.

The rule: similarity (see similarity.py) proposes filter layers, the divergence of the filtered answers from those with
full attention judges them, and a local search goes on from the best. The choice is the smallest part of dense layers
whose divergence is at most `most_kl`; where none is that good, the smallest divergence. Recording and similarity are
OmniKV's (ICLR 2025); the rule is this project's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from profiler.kv_eval.layers_file import SCHEMA, Candidate, LayerChoice
from profiler.kv_eval.model import EvalModel, Floats, check_length, divergence, forced, log_softmax
from profiler.kv_eval.needles import ANSWER_TOKENS, NEEDLE, RECALL, make_trials
from profiler.kv_eval.similarity import curves, mean_similarity, propose, served_by, similarity
from runtime.errors import ModelError, UsageError
from runtime.kv.options import KvFilter

DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_ROOM = ANSWER_TOKENS + 8


@dataclass(frozen=True)
class Search:
    """What is looked for and how long. Lengths in tokens, most_kl in nats per token.

    most_dense: largest part of the layers that may be dense. checks: filter layers that are measured. texts: prompts of
    the user's own; without them needle prompts are made.
    """

    length: int = 512
    n_prompts: int = 12
    keep: float = 0.1
    select: str = "last"
    most_dense: float = 0.5
    most_filters: int = 3
    waits: tuple[int, ...] = (0, 1)
    checks: int = 16
    most_kl: float = 0.01
    seed: int = 0
    texts: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()


@dataclass
class _Sample:
    """A prompt, what the model says with full attention, and its log-probabilities [n_vocab] at every step."""

    prompt: list[int]
    answer: list[int]
    steps: list[Floats] = field(default_factory=list)


class Analysis:
    """One search on one model. `share` says how much is done."""

    def __init__(self, model: EvalModel, search: Search) -> None:
        self._model, self._search = model, search
        self._done = 0
        self._numbers: tuple[int, ...] = ()
        self._matrix: Floats = np.zeros((0, 0), np.float32)

    @property
    def share(self) -> float:
        """Part of the work that is done, 0 to 1."""
        return self._done / (self._search.n_prompts * (1 + self._search.checks))

    def run(self) -> LayerChoice:
        """Do everything. Raises H2OError."""
        check_length(self._model, self._search.length + _ROOM)
        prompts = self._prompts()
        self._search = replace(self._search, n_prompts=len(prompts))
        n_ctx = -(-(max(map(len, prompts)) + _ROOM) // 256) * 256
        samples, matrices = self._record(prompts, n_ctx)
        self._matrix = np.mean(matrices, axis=0)
        measured = list(self._measure_all(samples, n_ctx))
        return self._result(measured, len(matrices))

    def _prompts(self) -> list[list[int]]:
        search, model = self._search, self._model
        if search.texts:
            encoded = [model.tokenizer.encode(text)[: search.length] for text in search.texts]
            return [tokens for tokens in encoded if len(tokens) > 1][: search.n_prompts]
        each = -(-search.n_prompts // (2 * len(DEPTHS)))
        trials = [
            trial
            for task in (NEEDLE, RECALL)
            for trial in make_trials(
                task, length=search.length, depths=DEPTHS, repeats=each, count=model.count, seed=search.seed
            )
        ]
        spread = [trials[i * len(trials) // search.n_prompts] for i in range(search.n_prompts)]
        return [model.tokenizer.encode(trial.prompt) for trial in spread]

    def _record(self, prompts: Sequence[list[int]], n_ctx: int) -> tuple[list[_Sample], list[Floats]]:
        """Answers with full attention, and a similarity matrix for every decode step."""
        samples, matrices = [], []
        seen: dict[int, Floats] = {}
        with self._model.engine(KvFilter(layers=self._any_layer(n_ctx), wait=0, method="full"), n_ctx) as engine:
            assert engine.kv
            self._numbers = engine.kv.cache.filterable
            if len(self._numbers) < 2:
                raise ModelError("this model has fewer than two layers that see all positions", "run without a filter")
            engine.kv.watch(self._numbers, lambda layer, scores: seen.__setitem__(layer, scores.copy()))
            for prompt in prompts:
                sample = _Sample(prompt, self._model.answer(engine, prompt, ANSWER_TOKENS)[:-1])
                engine.truncate(len(prompt))
                for token in sample.answer:
                    engine.forward([token])
                    sample.steps.append(log_softmax(engine.logits()))
                    scores = np.stack([seen[layer] for layer in self._numbers])
                    matrices.append(similarity(scores, max(1, int(self._search.keep * scores.shape[1]))))
                samples.append(sample)
                self._done += 1
        if not matrices:
            raise UsageError("the model ends every answer at once: there are no scores", "give other --prompts")
        return samples, matrices

    def _any_layer(self, n_ctx: int) -> tuple[int, ...]:
        """A layer that may filter, for an engine that filters nothing."""
        with self._model.engine(KvFilter(wait=0), n_ctx) as engine:
            assert engine.kv
            return engine.kv.cache.filterable[:1]

    # --- proposals ----------------------------------------------------------------------------------------------

    def _measure_all(self, samples: Sequence[_Sample], n_ctx: int) -> Iterator[Candidate]:
        """Half of the checks for what similarity proposes, the others around the best of all until then."""
        search, numbers = self._search, self._numbers
        most_dense = int(search.most_dense * len(numbers))
        proposals = propose(
            self._matrix, numbers, most_dense=most_dense, most_filters=search.most_filters, waits=search.waits
        )
        if not proposals:
            raise UsageError(
                f"a dense part of {search.most_dense:.0%} allows no filter layer in {len(numbers)} layers",
                "raise --dense",
            )
        ranked = [(proposal.layers, proposal.wait) for proposal in proposals]
        measured: dict[tuple[int, ...], Candidate] = {}
        while len(measured) < search.checks:
            untried = [way for way in ranked if served_by(numbers, *way) not in measured]
            if len(measured) >= search.checks // 2:
                near = neighbours(numbers, choose(measured.values(), search.most_kl), search, most_dense)
                near = [way for way in near if served_by(numbers, *way) not in measured]
                untried = sorted(near, key=lambda way: -mean_similarity(self._matrix, numbers, *way)) or untried
            if not untried:
                break
            candidate = self._measure(samples, n_ctx, *untried[0])
            measured[served_by(numbers, *untried[0])] = candidate
            yield candidate

    def _measure(self, samples: Sequence[_Sample], n_ctx: int, layers: tuple[int, ...], wait: int) -> Candidate:
        """The mean divergence of these filter layers over all steps."""
        found = []
        kv = KvFilter(layers=layers, wait=wait, keep=self._search.keep, select=self._search.select)
        with self._model.engine(kv, n_ctx) as engine:
            for sample in samples:
                steps = forced(engine, sample.prompt, sample.answer)
                found += [divergence(full, other) for full, other in zip(sample.steps, steps, strict=True)]
                self._done += 1
        by = served_by(self._numbers, layers, wait)
        return Candidate(
            layers=layers,
            wait=wait,
            dense_share=sum(who < 0 for who in by) / len(by),
            similarity=min(1.0, mean_similarity(self._matrix, self._numbers, layers, wait)),
            kl=float(np.mean(found)),
        )

    def _result(self, measured: list[Candidate], n_steps: int) -> LayerChoice:
        search, file = self._search, self._model.file
        chosen = choose(measured, search.most_kl)
        return LayerChoice(
            schema=SCHEMA,
            model_hash=file.hash,
            model=file.path.name,
            n_layers=file.n_layers,
            layers=chosen.layers,
            wait=chosen.wait,
            keep=search.keep,
            n_prompts=search.n_prompts,
            n_steps=n_steps,
            layer_numbers=self._numbers,
            similarity=tuple(_shares(row) for row in self._matrix),
            curves={n: _shares(curve) for n, curve in curves(self._matrix).items()},
            candidates=tuple(sorted(measured, key=lambda c: (c.kl, c.dense_share))),
            versions=dict(search.versions),
        )


def _shares(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(min(max(float(value), 0.0), 1.0), 4) for value in values)


def choose(candidates: Iterable[Candidate], most_kl: float) -> Candidate:
    """The smallest dense part with a divergence of at most most_kl; the smallest divergence where none has that."""
    known = [(candidate.kl, candidate) for candidate in candidates if candidate.kl is not None]
    good = [(candidate.dense_share, kl, candidate) for kl, candidate in known if kl <= most_kl]
    if good:
        return min(good, key=lambda found: found[:2])[2]
    return min(known, key=lambda found: found[0])[1]


def neighbours(
    numbers: Sequence[int], best: Candidate, search: Search, most_dense: int
) -> list[tuple[tuple[int, ...], int]]:
    """Filter layers and waits one step from the best: a filter moved by one layer, added or left out, another wait."""
    places = [numbers.index(layer) for layer in best.layers]
    steps: list[tuple[list[int], int]] = [(places, wait) for wait in search.waits]
    for i, place in enumerate(places):
        rest = places[:i] + places[i + 1 :]
        steps += [(sorted({*rest, moved}), best.wait) for moved in (place - 1, place + 1)] + [(rest, best.wait)]
    if len(places) < search.most_filters:
        steps += [(sorted({*places, added}), best.wait) for added in range(len(numbers))]
    found = []
    for way, wait in steps:
        if way and way[0] >= 0 and way[-1] < len(numbers):
            layers = tuple(numbers[i] for i in way)
            n_dense = sum(who < 0 for who in served_by(numbers, layers, wait))
            apart = all(b - a > wait for a, b in itertools.pairwise(layers))
            if n_dense <= most_dense and n_dense < len(numbers) and apart:
                found.append((layers, wait))
    return found
