"""Find the filter layers of a model: record scores, propose by similarity, measure the proposals, choose.

The rule: similarity (see similarity.py) proposes filter layers, the divergence of the filtered answers from those with
full attention judges them, with every selector, and a local search goes on from the best. The best of all are measured
on more prompts. The choice is the smallest part of dense layers whose divergence is at most `most_kl`; where none is
that good, the smallest divergence. Recording and similarity are
OmniKV's (ICLR 2025); the rule is this project's own.

The first sample says how long all of it takes, and how much of it fits where the time is limited.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np

from profiler.kv_eval.layers_file import SCHEMA, Candidate, LayerChoice
from profiler.kv_eval.model import (
    OWN_TOKENS,
    EvalModel,
    Floats,
    Start,
    begin,
    check_length,
    divergence,
    forced,
    log_softmax,
    start_of,
)
from profiler.kv_eval.needles import ANSWER_TOKENS, NEEDLE, RECALL, make_trials
from profiler.kv_eval.similarity import curves, mean_similarity, propose, served_by, similarity
from profiler.kv_eval.time_needed import Costs, Work, fitted, seconds
from runtime.errors import Cancelled, ModelError, UsageError
from runtime.kv.options import GUESSED_WAIT, KvFilter
from runtime.kv.roles import default_filters

SELECTS = ("softmax", "last")
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_ROOM = ANSWER_TOKENS + 8
_PARENTS = 2  # of the best candidates, the neighbours are tried


@dataclass(frozen=True)
class Search:
    """What is looked for and how long. Lengths of sample prompts in tokens, most_kl in nats per token.

    selects: the selectors that are tried. most_dense: largest part of the layers that may be dense. checks: filter
    layers that are measured, with every selector. texts: prompts of the user's own; without them needle prompts are
    made, others than those of `h2o bench kv` unless the seed is the same. finalists: how many of the best are measured
    on all prompts. limit_s: prompts, checks and finalists are cut to what fits into so many seconds (0: they are not).
    """

    lengths: tuple[int, ...] = (1024, 512)
    n_prompts: int = 60
    keep: float = 0.1
    selects: tuple[str, ...] = SELECTS
    most_dense: float = 0.6
    most_filters: int = 3
    waits: tuple[int, ...] = (0, 1)
    checks: int = 20
    finalists: int = 8
    limit_s: float = 0.0
    most_kl: float = 0.01
    seed: int = 2025
    texts: tuple[str, ...] = ()
    versions: tuple[tuple[str, str], ...] = ()


@dataclass
class _Sample:
    """A prompt, what the model says with full attention, and its log-probabilities [n_vocab] at every step.

    costs: seconds for the prompt and for the answer.
    """

    start: Start
    answer: list[int]
    costs: tuple[float, float]
    steps: list[Floats] = field(default_factory=list)


class Analysis:
    """One search on one model: `begin`, then `run`. `share` says how much is done."""

    def __init__(self, model: EvalModel, search: Search) -> None:
        self._model, self._search = model, search
        self._numbers: tuple[int, ...] = ()
        self._matrices: list[Floats] = []
        self._matrix: Floats = np.zeros((0, 0), np.float32)
        self._measured: list[Candidate] = []
        self._costs = Costs(0.0, 0.0, 0.0)
        self._n_ctx = self._recorded = self._answered = self._opened = 0

    @property
    def work(self) -> Work:
        """What is to be done."""
        search = self._search
        return Work(search.n_prompts, search.checks, len(search.selects), search.finalists)

    @property
    def share(self) -> float:
        """Part of the work that is done, 0 to 1."""
        costs, whole_s = self._costs, seconds(self.work, self._costs)
        recorded_s = self._recorded * (costs.prompt_s + costs.answer_s)
        measured_s = self._answered * costs.answer_s + self._opened * costs.open_s
        return (recorded_s + measured_s) / whole_s if whole_s else 0.0

    def begin(self) -> float:
        """Compute the first sample and cut the work to limit_s; about how many seconds `run` takes. Raises H2OError."""
        check_length(self._model, max(self._search.lengths) + _ROOM)
        prompts = self._prompts()
        self._search = replace(self._search, n_prompts=len(prompts))
        self._n_ctx = -(-(max(map(len, prompts)) + _ROOM) // 256) * 256
        layer, open_s = self._any_layer(prompts[0][:1])
        self._samples = self._record(prompts, layer)
        self._first = next(self._samples)
        self._costs = Costs(*self._first.costs, open_s)
        if self._search.limit_s:
            work = fitted(self.work, self._costs, self._search.limit_s)
            self._search = replace(self._search, n_prompts=work.n_prompts, checks=work.checks, finalists=work.finalists)
        return max(0.0, seconds(self.work, self._costs) - sum(self._first.costs))

    def run(self) -> LayerChoice:
        """Do everything. What was measured until then is the result where it is cancelled. Raises H2OError."""
        try:
            with contextlib.closing(self._samples):
                rest = itertools.islice(self._samples, self._search.n_prompts - 1)
                samples = [sample for sample in (self._first, *rest) if sample.answer]
            if not samples:
                raise UsageError("the model ends every answer at once: there are no scores", "give other --prompts")
            self._matrix = np.mean(self._matrices, axis=0)
            self._measure_all(samples)
        except Cancelled:
            if not self._measured:
                raise
            return self._result(complete=False)
        return self._result(complete=True)

    def _prompts(self) -> list[list[int]]:
        """Sample prompts; the first of them are of all lengths, tasks and depths, too."""
        search, model = self._search, self._model
        if search.texts:
            encoded = map(model.tokenizer.encode, search.texts)
            cut = [tokens[:length] for tokens, length in zip(encoded, itertools.cycle(search.lengths), strict=False)]
            return [tokens for tokens in cut if len(tokens) > 1][: search.n_prompts]
        kinds = list(itertools.product(search.lengths, (NEEDLE, RECALL)))
        each = -(-search.n_prompts // (len(kinds) * len(DEPTHS)))
        trials = [
            make_trials(task, length=length, depths=DEPTHS, repeats=each, count=model.count, seed=search.seed)
            for length, task in kinds
        ]
        places = [depth * each + i for i in range(each) for depth in range(len(DEPTHS))]
        mixed = [of_kind[place] for place in places for of_kind in trials]
        return [model.tokenizer.encode(trial.prompt) for trial in mixed[: search.n_prompts]]

    def _record(self, prompts: Sequence[list[int]], filter_layer: int) -> Generator[_Sample]:
        """Answers with full attention, and a similarity matrix for every decode step."""
        room = self._model.states_bytes
        seen: dict[int, Floats] = {}
        nothing = KvFilter(layers=(filter_layer,), wait=0, method="full")
        with self._model.engine(nothing, self._n_ctx) as engine:
            assert engine.kv
            engine.kv.watch(self._numbers, lambda layer, scores: seen.__setitem__(layer, scores.copy()))
            for prompt in prompts:
                began_s = time.perf_counter()
                start = start_of(engine, prompt) if room > 0 and len(prompt) > OWN_TOKENS else Start(prompt)
                room -= len(start.state or ())
                computed_s = time.perf_counter()
                begin(engine, start)
                answer = self._model.answer(engine, ANSWER_TOKENS)[:-1]
                sample = _Sample(start, answer, (computed_s - began_s, time.perf_counter() - computed_s))
                engine.truncate(len(prompt))
                for token in answer:
                    engine.forward([token])
                    sample.steps.append(log_softmax(engine.logits()))
                    scores = np.stack([seen[layer] for layer in self._numbers])
                    self._matrices.append(similarity(scores, max(1, int(self._search.keep * scores.shape[1]))))
                self._recorded += 1
                yield sample

    def _any_layer(self, tokens: Sequence[int]) -> tuple[int, float]:
        """A layer that may filter, for an engine that filters nothing; and the seconds that opening one takes."""
        began_s = time.perf_counter()
        with self._model.engine(KvFilter(wait=0), self._n_ctx) as engine:
            assert engine.kv
            self._numbers = engine.kv.cache.filterable
            engine.forward(tokens)  # reads the weights
        if len(self._numbers) < 2:
            raise ModelError("this model has fewer than two layers that see all positions", "run without a filter")
        return self._numbers[0], time.perf_counter() - began_s

    # --- proposals ----------------------------------------------------------------------------------------------

    def _measure_all(self, samples: Sequence[_Sample]) -> None:
        """All checks on the first samples, then the best of them on all samples. The best come first."""
        first = samples[: self.work.n_first]
        for candidate in self._measure_first(first):
            self._measured.append(candidate)
        self._measured.sort(key=_by_divergence)
        for i, candidate in enumerate(self._measured[: self._search.finalists]):
            self._measured[i] = self._measure(samples, candidate)

    def _measure_first(self, samples: Sequence[_Sample]) -> Iterator[Candidate]:
        """The guess, half of the checks for what similarity proposes, the others around the best of all until then."""
        search, numbers = self._search, self._numbers
        most_dense = round(search.most_dense * len(numbers))
        proposals = propose(
            self._matrix, numbers, most_dense=most_dense, most_filters=search.most_filters, waits=search.waits
        )
        if not proposals:
            raise UsageError(
                f"a dense part of {search.most_dense:.0%} allows no filter layer in {len(numbers)} layers",
                "raise --dense",
            )
        ranked = [(proposal.layers, proposal.wait) for proposal in proposals]
        guess = default_filters(numbers, GUESSED_WAIT)
        if sum(who < 0 for who in served_by(numbers, guess, GUESSED_WAIT)) <= most_dense:
            ranked.insert(0, (guess, GUESSED_WAIT))
        measured: dict[tuple[int, ...], list[Candidate]] = {}
        while len(measured) < search.checks:
            untried = [way for way in ranked if served_by(numbers, *way) not in measured]
            if len(measured) >= search.checks // 2:
                found = sorted(itertools.chain(*measured.values()), key=_by_divergence)
                around = itertools.chain(*(neighbours(numbers, best, search, most_dense) for best in found[:_PARENTS]))
                near = [way for way in around if served_by(numbers, *way) not in measured]
                untried = sorted(near, key=lambda way: -mean_similarity(self._matrix, numbers, *way)) or untried
            if not untried:
                break
            way = untried[0]
            tried = measured[served_by(numbers, *way)] = []
            for select in search.selects:
                tried.append(self._measure(samples, self._candidate(*way, select)))
                yield tried[-1]

    def _candidate(self, layers: tuple[int, ...], wait: int, select: str) -> Candidate:
        by = served_by(self._numbers, layers, wait)
        alike = min(1.0, mean_similarity(self._matrix, self._numbers, layers, wait))
        return Candidate(layers, wait, select, dense_share=sum(who < 0 for who in by) / len(by), similarity=alike)

    def _measure(self, samples: Sequence[_Sample], candidate: Candidate) -> Candidate:
        """The mean divergence of a candidate over all steps of the samples, and how many answers it leaves alone."""
        found, same = [], []
        kv = KvFilter(
            layers=candidate.layers, wait=candidate.wait, keep=self._search.keep, least=1, select=candidate.select
        )
        with self._model.engine(kv, self._n_ctx) as engine:
            self._opened += 1
            for sample in samples:
                pairs = list(zip(sample.steps, forced(engine, sample.start, sample.answer), strict=True))
                found += [divergence(full, other) for full, other in pairs]
                same.append(all(full.argmax() == other.argmax() for full, other in pairs))
                self._answered += 1
        figures = {"kl": float(np.mean(found)), "same": float(np.mean(same)), "n_prompts": len(samples)}
        return msgspec.structs.replace(candidate, **figures)

    def _result(self, *, complete: bool) -> LayerChoice:
        search, file = self._search, self._model.file
        n_best = search.finalists if complete else len(self._measured)
        measured = sorted(self._measured[:n_best], key=_by_divergence) + self._measured[n_best:]
        chosen = choose(measured[:n_best], search.most_kl)
        return LayerChoice(
            schema=SCHEMA,
            model_hash=file.hash,
            model=file.path.name,
            n_layers=file.n_layers,
            layers=chosen.layers,
            wait=chosen.wait,
            select=chosen.select,
            keep=search.keep,
            lengths=search.lengths,
            n_prompts=search.n_prompts,
            n_steps=len(self._matrices),
            most_kl=search.most_kl,
            complete=complete,
            layer_numbers=self._numbers,
            similarity=tuple(_shares(row) for row in self._matrix),
            curves={n: _shares(curve) for n, curve in curves(self._matrix).items()},
            candidates=tuple(measured),
            versions=dict(search.versions),
        )


def _shares(values: Iterable[float]) -> tuple[float, ...]:
    return tuple(round(min(max(float(value), 0.0), 1.0), 4) for value in values)


def choose(candidates: Sequence[Candidate], most_kl: float) -> Candidate:
    """The smallest dense part with a divergence of at most most_kl; the smallest divergence where none has that."""
    good = [candidate for candidate in candidates if candidate.kl <= most_kl]
    return min(good, key=lambda c: (c.dense_share, c.kl)) if good else min(candidates, key=_by_divergence)


def _by_divergence(candidate: Candidate) -> tuple[float, float]:
    return candidate.kl, candidate.dense_share


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
