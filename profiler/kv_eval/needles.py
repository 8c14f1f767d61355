"""Questions about facts in a long text: needle, recall and two-stage retrieval, each of a given length and depth.

The needle test: one fact at a chosen depth of unrelated text, a question about it at the end (Kamradt, "Needle in a
haystack", 2023). Facts about other people are strewn about, so that finding any fact is not enough.
Two-stage retrieval follows the source system's 2StageRetr (OmniKV, ICLR 2025): the answer of the first lookup names
what has to be looked up next, so the second place cannot be guessed from the question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from profiler.kv_eval.texts import COLOURS, CONTAINERS, NAMES, THINGS, story
from runtime.errors import UsageError

NEEDLE, RECALL, TWO_STAGE, SUM_KEY = "needle", "recall", "two-stage", "sum-key"
TASKS = (NEEDLE, RECALL, TWO_STAGE, SUM_KEY)
ANSWER_TOKENS = 16
OTHERS = 6

Count = Callable[[str], int]
"""Tokens of a text, without a begin-of-text token."""


@dataclass(frozen=True)
class Trial:
    """A prompt and what has to be in the first sentence of the answer.

    length: tokens the prompt was made for (it is that long or a sentence shorter), depth: where the fact is, 0 the
    beginning, 1 the end. follow_up: the second question of a two-stage trial, with {} for the first answer;
    first_value: the right first answer.
    """

    task: str
    length: int
    depth: float
    prompt: str
    value: str
    n_predict: int = ANSWER_TOKENS
    follow_up: str = ""
    first_value: str = ""


@dataclass(frozen=True)
class Fact:
    """A statement, the question that asks for it, and the value that answers it."""

    statement: str
    question: str
    value: str


def place_fact(name: str, rng: random.Random) -> Fact:
    """Where a person's thing is."""
    thing, value = rng.choice(THINGS), f"{rng.choice(COLOURS)} {rng.choice(CONTAINERS)}"
    return Fact(f"{name}'s {thing} is in the {value}.", f"Where is {name}'s {thing}?", value)


def has_fact(name: str, rng: random.Random) -> Fact:
    """What a person has."""
    value = f"{rng.choice(COLOURS)} {rng.choice(CONTAINERS)}"
    return Fact(f"{name} has the {value}.", f"What does {name} have?", value)


def word_fact(name: str, rng: random.Random) -> Fact:
    """What a person's word is."""
    value = rng.choice(THINGS)
    return Fact(f"{name}'s word is {value}.", f"What is {name}'s word?", value)


def like_fact(name: str, rng: random.Random) -> Fact:
    """What a person likes."""
    value = rng.choice(THINGS)
    return Fact(f"{name} likes the {value}.", f"What does {name} like?", value)


_RECALL_FORMS = (has_fact, word_fact, like_fact)


def make_trials(
    task: str, *, length: int, depths: Sequence[float], repeats: int, count: Count, seed: int = 0
) -> list[Trial]:
    """`repeats` trials for each depth; the same arguments give the same trials. Raises UsageError."""
    if task not in _MAKERS:
        raise UsageError(f"there is no task {task!r}", f"choose one of {', '.join(TASKS)}")
    trials = []
    for depth in depths:
        if not 0 <= depth <= 1:
            raise UsageError(f"a depth of {depth} is not possible", "give 0 (the beginning) to 1 (the end)")
        rng = random.Random(f"{seed} {task} {length} {depth}")
        trials += [_MAKERS[task](rng, length, depth, i, count) for i in range(repeats)]
    return trials


def _lookup(rng: random.Random, length: int, depth: float, i: int, count: Count) -> Trial:
    return _about(NEEDLE, [place_fact(name, rng) for name in rng.sample(NAMES, OTHERS + 1)], rng, length, depth, count)


def _recall(rng: random.Random, length: int, depth: float, i: int, count: Count) -> Trial:
    form = _RECALL_FORMS[i % len(_RECALL_FORMS)]
    return _about(RECALL, [form(name, rng) for name in rng.sample(NAMES, OTHERS + 1)], rng, length, depth, count)


def _about(task: str, facts: list[Fact], rng: random.Random, length: int, depth: float, count: Count) -> Trial:
    """Ask for the first fact; the others lie at random places."""
    asked, *others = facts
    question = f" {asked.question}"
    known = [(depth, asked.statement), *((rng.random(), fact.statement) for fact in others)]
    return Trial(task, length, depth, haystack(rng, length - count(question), known, count) + question, asked.value)


def _two_stage(rng: random.Random, length: int, depth: float, i: int, count: Count) -> Trial:
    """A's word is the name of B; where is B's thing? Facts about other words and things are there too.

    The first fact lies at `depth`, the second at the mirrored depth.
    """
    names = rng.sample(NAMES, 8)
    askers, owners = names[:4], names[4:]
    thing = rng.choice(THINGS)
    values = [f"{rng.choice(COLOURS)} {rng.choice(CONTAINERS)}" for _ in owners]
    first = [f"{asker}'s word is {owner}." for asker, owner in zip(askers, owners, strict=True)]
    second = [f"{owner}'s {thing} is in the {value}." for owner, value in zip(owners, values, strict=True)]
    known = [(depth, first[0]), (1 - depth, second[0])]
    known += [(rng.random(), line) for line in (*first[1:], *second[1:])]
    question = f" What is {askers[0]}'s word?"
    follow_up = f" Where is {{}}'s {thing}?"
    room = length - count(question) - count(follow_up) - 2 * ANSWER_TOKENS
    prompt = haystack(rng, room, known, count) + question
    return Trial(TWO_STAGE, length, depth, prompt, values[0], follow_up=follow_up, first_value=owners[0])


def _sum_key(rng: random.Random, length: int, depth: float, i: int, count: Count) -> Trial:
    """The source system's form: a table of numbers and colours, asked by a sum; `depth` is the entry's place."""
    question = " What is the colour of {} + {}? The colour of {} + {} is"
    room = length - count(question.format(100, 100, 100, 100)) - 4
    entry = count(" 123: yellow,")
    keys = rng.sample(range(100, 1000), max(2, min(room // max(entry, 1), 900)))
    table = {key: rng.choice(COLOURS) for key in keys}
    asked = keys[min(int(depth * len(keys)), len(keys) - 1)]
    first = rng.randrange(1, asked)
    lines = ", ".join(f"{key}: {colour}" for key, colour in table.items())
    terms = (first, asked - first) * 2
    return Trial(SUM_KEY, length, depth, f"{{{lines}}}{question.format(*terms)}", table[asked])


def haystack(rng: random.Random, n_tokens: int, facts: Sequence[tuple[float, str]], count: Count) -> str:
    """Story text of at most n_tokens with statements put in at their depths. Raises UsageError when too short."""
    room = n_tokens - sum(count(f" {statement}") for _, statement in facts)
    if room < 0:
        raise UsageError(f"{n_tokens} tokens are too few for the facts alone", "give a greater length")
    lines: list[str] = []
    left = room
    while left > 0:
        for line in story(rng):
            left -= count(f" {line}")
            if left < 0:
                break
            lines.append(line)
    places = sorted(((round(depth * len(lines)), i) for i, (depth, _) in enumerate(facts)), reverse=True)
    for place, i in places:
        lines.insert(place, facts[i][1])
    return " ".join(lines)


_MAKERS: dict[str, Callable[[random.Random, int, float, int, Count], Trial]] = {
    NEEDLE: _lookup,
    RECALL: _recall,
    TWO_STAGE: _two_stage,
    SUM_KEY: _sum_key,
}


def is_right(answer: str, value: str) -> bool:
    """Whether the first sentence of an answer holds the value as whole words."""
    sentence = answer.strip().split("\n")[0].split(".")[0]
    words = "".join(c if c.isalnum() else " " for c in sentence.lower()).split()
    wanted = value.lower().split()
    return any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))
