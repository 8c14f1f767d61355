"""Texts as a service gets them: of mixed lengths with a heavy tail, in bursts; the same ones for the same seed."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from runtime.errors import LIMITS, H2OError

_WORDS = 8  # of the shortest prompts
_TAIL = 1.2  # of lengths: the share of prompts longer than x falls as x to this power
_MOST_WORDS = 400
_ANSWER, _ANSWER_SPREAD, _MOST_ANSWER = 40, 0.8, 256  # tokens: median, sigma of its logarithm, most
_BURST = 6  # texts, on average
_GAP_PASSES = 6.0  # between bursts, on average
_SENTENCES = (
    "Once upon a time there was a little dog who wanted to see the sea.",
    "Tom and Lily went to the park with their mother.",
    "It was a sunny day, and the birds were singing.",
    "The cat did not want to play, so it climbed a tree.",
    "Anna found an old box under her bed.",
    "In the box there was a red ball and a letter.",
    "They walked through the wood until they came to a house.",
    "Nobody was at home, but the door was open.",
    "The old man laughed and gave them some bread.",
    "Then it began to rain, and they ran back as fast as they could.",
)


@dataclass(frozen=True)
class Arrival:
    """A text that arrives before a pass (0: the first).

    n_predict: the most tokens of its answer. share: of them, that really come, where nothing computes the answer.
    """

    at_pass: int
    prompt: str
    n_predict: int
    share: float


def workload(n: int, seed: int, behaviors: Sequence[str] = ()) -> list[Arrival]:
    """n texts in the order of their arrival. behaviors: prompts to take, in random order, instead of made ones."""
    rng = random.Random(seed)
    found: list[Arrival] = []
    at_pass, left = 0.0, 0
    prompts: list[str] = []
    for _ in range(n):
        if not left:
            at_pass += rng.expovariate(1 / _GAP_PASSES) if found else 0
            left = 1 + int(rng.expovariate(1 / (_BURST - 1)))
        left -= 1
        if behaviors and not prompts:
            prompts = rng.sample(behaviors, len(behaviors))
        prompt = prompts.pop() if behaviors else _prompt(rng)
        n_predict = min(_MOST_ANSWER, 1 + int(rng.lognormvariate(0, _ANSWER_SPREAD) * _ANSWER))
        found.append(Arrival(int(at_pass), prompt, n_predict, rng.uniform(0.2, 1)))
    return found


def _prompt(rng: random.Random) -> str:
    n_words = min(_MOST_WORDS, int(_WORDS * rng.paretovariate(_TAIL)))
    words: list[str] = []
    while len(words) < n_words:
        words += rng.choice(_SENTENCES).split()
    return " ".join(words[:n_words])


def read_behaviors(path: Path) -> list[str]:
    """The column Behavior of a CSV file, such as HarmBench's. Raises H2OError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            found = [row["Behavior"].strip() for row in csv.DictReader(file) if (row.get("Behavior") or "").strip()]
    except OSError as error:
        raise H2OError(f"the prompts {path} cannot be read: {error.strerror}", "give another file") from None
    except (UnicodeDecodeError, csv.Error):
        found = []
    if not found:
        raise H2OError(f"{path} has no column Behavior with prompts", "give a CSV file such as HarmBench's")
    return found


def as_requests(arrivals: Iterable[Arrival]) -> list[str]:
    """The lines of a file of prompts for `h2o batch`."""
    return [
        json.dumps({"custom_id": f"text-{i}", "prompt": arrival.prompt, "max_tokens": arrival.n_predict})
        for i, arrival in enumerate(arrivals, 1)
    ]


def write_requests(arrivals: Iterable[Arrival], path: Path) -> None:
    """Write a file of prompts. Raises H2OError."""
    try:
        with path.open("w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in as_requests(arrivals))
    except OSError as error:
        step = LIMITS.get(error.errno or 0, "give another file")
        raise H2OError(f"{path} cannot be written: {error.strerror}", step) from None
