"""How good answers are under each method: accuracy of lookups, divergence on held-out text, scores on files."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from h2o_cli.bench.kv.methods import FULL, HEAVY, Method
from h2o_cli.bench.kv.readers import ANSWER_TOKENS, Example, measure_of, read_examples, score, truncate_middle
from h2o_cli.bench.kv.rows import KvRow
from h2o_cli.bench.rows import circumstances
from profiler.kv_eval.model import EvalModel, Start, begin, check_length, divergence, forced, kept_share
from profiler.kv_eval.needles import Trial, haystack, is_right, make_trials, place_fact
from profiler.kv_eval.texts import NAMES
from runtime.engine.engine import Engine

_ROOM = 64  # tokens of an answer, or of a second question and its answer
_STEP = 256
_FACTS = 4
_HEAVY_PART = 5


@dataclass(frozen=True)
class Quality:
    """What is asked. Lengths in tokens; trials per depth; texts and steps of the divergence; files with questions."""

    tasks: tuple[str, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9)
    trials: int = 10
    texts: int = 6
    text_tokens: int = 48
    examples: tuple[Example, ...] = ()
    example_tokens: int = 0
    seed: int = 0


class QualityRun:
    """All methods on all tasks. `share` says how much is done."""

    def __init__(self, model: EvalModel, methods: Sequence[Method], quality: Quality) -> None:
        self._model, self._methods, self._quality = model, methods, quality
        self._done = 0
        each = len(quality.tasks) * len(quality.lengths) * len(quality.depths) * quality.trials
        each += quality.texts * len(quality.lengths) + len(quality.examples)
        self._all = max(1, each * len(methods))

    @property
    def share(self) -> float:
        """Part of the work that is done, 0 to 1."""
        return self._done / self._all

    def check(self) -> None:
        """Raise UsageError for what cannot be asked of this model."""
        check_length(self._model, max((*self._quality.lengths, self._quality.example_tokens)) + _ROOM)
        for example in self._quality.examples:
            measure_of(example.task)

    def rows(self) -> Iterator[KvRow]:
        """Rows as they are measured. Raises H2OError."""
        for length in self._quality.lengths:
            yield from self._divergence(length)
            for task in self._quality.tasks:
                yield from self._accuracy(task, length)
        if self._quality.examples:
            yield from self._files()

    # --- accuracy -----------------------------------------------------------------------------------------------

    def _accuracy(self, task: str, length: int) -> Iterator[KvRow]:
        """Right answers; beside full attention also how many are right only with it, and only here."""
        quality, encode = self._quality, self._model.tokenizer.encode
        trials = make_trials(
            task,
            length=length,
            depths=quality.depths,
            repeats=quality.trials,
            count=self._model.count,
            seed=quality.seed,
        )
        starts = self._model.starts([encode(trial.prompt) for trial in trials], _context(length))
        with_full: list[bool] = []
        for method in self._methods:
            n = _trials_of(method, quality.trials)
            right = []
            with self._model.engine(method.kv, _context(length)) as engine:
                for i, (trial, start) in enumerate(zip(trials, starts, strict=True)):
                    right.append(i % quality.trials < n and self._is_right(engine, trial, start))
                    self._done += 1
                share = kept_share(engine, length)
            if method.name == FULL:
                with_full = right
            for i, depth in enumerate(quality.depths):
                part = slice(i * quality.trials, i * quality.trials + n)
                found = {"task": task, "depth": depth, "n": n, "right": sum(right[part])}
                pairs = list(zip(with_full[part], right[part], strict=True)) if with_full else []
                compared = {"lost": pairs.count((True, False)), "gained": pairs.count((False, True))}
                yield self._row("accuracy", method, length, share, **found, **(compared if with_full else {}))

    def _is_right(self, engine: Engine, trial: Trial, start: Start) -> bool:
        model, tokenizer = self._model, self._model.tokenizer
        begin(engine, start)
        tokens = model.answer(engine, trial.n_predict)
        said = tokenizer.decode(tokens)
        if trial.follow_up:
            words = said.split(".")[0].split()
            second = trial.follow_up.format(words[-1] if words else "")
            engine.forward([*tokens[-1:], *tokenizer.encode(second, add_special=False)])
            said = tokenizer.decode(model.answer(engine, trial.n_predict))
        return is_right(said, trial.value)

    # --- divergence ---------------------------------------------------------------------------------------------

    def _divergence(self, length: int) -> Iterator[KvRow]:
        """Held-out text given token by token: divergence from full attention, and the loss itself."""
        quality = self._quality
        texts = [self._text(length, i) for i in range(quality.texts)]
        starts = self._model.starts([prompt for prompt, _ in texts], _context(length))
        followings = [following for _, following in texts]
        full = []
        with self._model.engine(None, _context(length)) as engine:
            for start, following in zip(starts, followings, strict=True):
                full.append(list(forced(engine, start, following[:-1])))
        for method in self._methods:
            kl, nll = [], []
            with self._model.engine(method.kv, _context(length)) as engine:
                for start, following, steps in zip(starts, followings, full, strict=True):
                    for i, step in enumerate(forced(engine, start, following[:-1])):
                        kl.append(divergence(steps[i], step))
                        nll.append(-float(step[following[i + 1]]))
                    self._done += 1
                share = kept_share(engine, length)
            if kl:
                means = {"kl": float(np.mean(kl)), "nll": float(np.mean(nll)), "n": len(kl)}
                yield self._row("divergence", method, length, share, task="text", **means)

    def _text(self, length: int, number: int) -> tuple[list[int], list[int]]:
        """A prompt of story and facts, and what follows it: questions about the facts with their answers."""
        rng = random.Random(f"{self._quality.seed} text {length} {number}")
        facts = [place_fact(name, rng) for name in rng.sample(NAMES, _FACTS)]
        known = [(rng.random(), fact.statement) for fact in facts]
        prompt = self._model.tokenizer.encode(haystack(rng, length - 1, known, self._model.count))
        asked = "".join(f" {fact.question} {fact.statement}" for fact in facts)
        following = self._model.tokenizer.encode(asked, add_special=False)
        return prompt, following[: self._quality.text_tokens]

    # --- files --------------------------------------------------------------------------------------------------

    def _files(self) -> Iterator[KvRow]:
        """Mean scores by task, prompts cut in the middle to example_tokens."""
        examples, most = self._quality.examples, self._quality.example_tokens
        starts = self._model.starts([self._prompt(example, most) for example in examples], _context(most))
        for method in self._methods:
            scores: dict[str, list[float]] = {}
            shares = []
            with self._model.engine(method.kv, _context(most)) as engine:
                for example, start in zip(examples, starts, strict=True):
                    begin(engine, start)
                    said = self._model.tokenizer.decode(self._model.answer(engine, ANSWER_TOKENS))
                    scores.setdefault(example.task, []).append(score(example, said))
                    shares.append(kept_share(engine, len(start.prompt)))
                    self._done += 1
            for task, found in scores.items():
                figures = {"task": task, "n": len(found), "score": float(np.mean(found))}
                yield self._row("data", method, most, float(np.mean(shares)), **figures)

    def _prompt(self, example: Example, most: int) -> list[int]:
        encode: Callable[..., list[int]] = self._model.tokenizer.encode
        ending = encode(example.ending, add_special=False)[-(most // 2) :]
        return truncate_middle(encode(example.context), most - len(ending)) + ending

    def _row(self, suite: str, method: Method, length: int, share: float, **figures: object) -> KvRow:
        fields: dict[str, object] = {
            "suite": suite,
            "model": self._model.file.path.name,
            "method": method.name,
            "label": method.label,
            "keep": method.keep,
            "kv_share": share,
            "length": length,
            "seed": self._quality.seed,
        }
        if method.kv:
            fields |= {"layers": method.kv.layers, "wait": method.kv.wait, "select": method.kv.select}
        return KvRow(**{**fields, **figures, **circumstances(self._model.file.path)})


def _trials_of(method: Method, n: int) -> int:
    """Trials per depth: a fifth for heavy hitters, which look at every query of every prompt."""
    return max(1, n // _HEAVY_PART) if method.name == HEAVY else n


def _context(length: int) -> int:
    return -(-(length + _ROOM) // _STEP) * _STEP


def examples_of(files: Sequence[Path], most: int) -> tuple[Example, ...]:
    """The questions of all files, at most `most` of each. Raises UsageError."""
    return tuple(example for path in files for example in read_examples(path, most))
