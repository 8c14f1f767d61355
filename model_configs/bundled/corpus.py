"""The corpus of the bundled model: stories, facts with questions, and repetitions.

A document is a list of words.  A word that starts with `~` and a digit is part of an
answer of that form (see FORMS): it is weighted up in the loss and counted in the
recall figures.  `^` before a word takes it out of the loss.  The marks never reach
the tokenizer.  Run as a script to read some documents:

    python model_configs/bundled/corpus.py
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from stories import ANIMALS, COLOURS, CONTAINERS, NAMES, OBJECTS, WORDS, story

FORMS = ("copy", "plain", "likes", "has", "word", "place", "it", "chat")
COPY, PLAIN, LIKES, HAS, WORD, PLACE, IT, CHAT = range(len(FORMS))
SIMPLE = [PLAIN, LIKES, HAS, WORD, PLACE]


@dataclass(frozen=True)
class Fact:
    """Something a person has, stated once and asked for later."""

    form: int
    name: str
    thing: str
    colour: str
    container: str

    def statement(self, mark: str = "") -> str:
        """The sentence of the fact; `mark` goes before the words of the answer."""
        colour, container, thing = mark + self.colour, mark + self.container, mark + self.thing
        if self.form == PLAIN:
            return f"{self.name} {colour}."
        if self.form == LIKES:
            return f"{self.name} likes the {thing}."
        if self.form == HAS:
            return f"{self.name} has the {colour} {container}."
        if self.form == WORD:
            return f"{self.name}'s word is {thing}."
        return f"{self.name}'s {self.thing} is in the {colour} {container}."

    def question(self) -> str:
        """The question without its answer."""
        if self.form == PLAIN:
            return ""
        if self.form == LIKES:
            return f"What does {self.name} like?"
        if self.form == HAS:
            return f"What does {self.name} have?"
        if self.form == WORD:
            return f"What is {self.name}'s word?"
        return f"Where is {self.name}'s {self.thing}?"

    def short_answer(self, mark: str = "") -> str:
        """The answer with `it` for the subject (a PLACE fact only)."""
        return f"It is in the {mark}{self.colour} {mark}{self.container}."

    def asked(self, rng: random.Random, short: float) -> str:
        """Question and answer with marks, the short answer at the rate `short`."""
        if self.form == PLACE and rng.random() < short:
            return f"{self.question()} {self.short_answer(f'~{IT}')}"
        return f"{self.question()} {self.statement(f'~{self.form}')}".strip()


def facts(rng: random.Random, count: int, forms: list[int]) -> list[Fact]:
    """Facts about `count` different people."""
    return [
        Fact(
            rng.choice(forms),
            name,
            rng.choice(OBJECTS if rng.random() < 0.7 else ANIMALS),
            rng.choice(COLOURS),
            rng.choice(CONTAINERS),
        )
        for name in rng.sample(NAMES, count)
    ]


def sentences(rng: random.Random, words: int) -> list[str]:
    """Story sentences of about `words` words together."""
    lines: list[str] = []
    while words > 0:
        for line in story(rng):
            if words <= 0:
                break
            lines.append(line)
            words -= len(line.split())
    return lines


def repeated_words(rng: random.Random, words: int) -> str:
    """Random words said twice: every word of the second half can be copied."""
    half = rng.randint(words // 6, max(6, words // 2))
    pool = [rng.choice(WORDS if rng.random() < 0.7 else NAMES) for _ in range(half)]
    again = " ".join(f"~{COPY}{word}" for word in pool[1:])
    return f"{' '.join(pool)}. Again: {pool[0]} {again}."


def dense(rng: random.Random, words: int, forms: list[int], short: float) -> str:
    """Nothing but facts and then their questions."""
    form = rng.choice(forms)
    cost = {PLAIN: 4, LIKES: 12, HAS: 14, WORD: 13, PLACE: 24}[form]
    count = max(2, min(words // cost, rng.randint(6, 14)))
    known = facts(rng, count, [form])
    lines = [fact.statement() for fact in known]
    rng.shuffle(known)
    return " ".join(lines + [fact.asked(rng, short) for fact in known])


def strewn(rng: random.Random, words: int, forms: list[int], short: float) -> str:
    """A story with facts at random places and questions after them."""
    count = rng.randint(4, max(5, min(10, words // 45)))
    asked = rng.sample(known := facts(rng, count, forms), rng.randint(3, min(6, count)))
    used = count * 8 + len(asked) * 15
    lines = sentences(rng, max(words - used, words // 6))
    for fact in known:
        lines.insert(rng.randint(0, len(lines)), fact.statement())
    places = {line: index for index, line in enumerate(lines)}
    extra: list[tuple[int, str]] = []
    late = rng.random() < 0.8
    for fact in asked:
        first = len(lines) if late else places[fact.statement()] + 1
        extra.append((rng.randint(first, len(lines)), fact.asked(rng, short)))
    for place, text in sorted(extra, key=lambda pair: -pair[0]):
        lines.insert(place, text)
    return " ".join(lines)


def quoted(rng: random.Random, words: int) -> str:
    """A story in which somebody says the same sentence or list again."""
    name = rng.choice(NAMES)
    if rng.random() < 0.5:
        said = rng.choice(sentences(rng, 30)[1:3])
    else:
        said = ", ".join(rng.sample(WORDS, rng.randint(3, 8)))
    said = said.replace('"', "").rstrip(".")
    between = sentences(rng, min(60, words // 2)) if rng.random() < 0.7 else []
    first, *rest = said.split()
    again = " ".join([f'"{first}'] + [f"~{COPY}{word}" for word in rest]) + '."'
    times = 1 if rng.random() < 0.6 else 2
    ends = [f"Again {name} said: {again}"] * times
    return " ".join([f'{name} said: "{said}."', *between, *ends])


def chat(rng: random.Random, words: int, forms: list[int]) -> str:
    """Turns of a user and an assistant about facts, or a story on request."""
    if rng.random() < 0.25:
        tale = sentences(rng, min(words, 70))
        wish = rng.choice(["Tell me a story.", "Please tell me a story.", "Tell a short story."])
        return f"User: {wish}\nAssistant: {' '.join(tale)}"
    places = [PLACE] if PLACE in forms else [HAS]
    count = max(2, min(rng.randint(2, 8), words // 26))
    known = facts(rng, count, places)
    lines = [fact.statement() for fact in known]
    for line in sentences(rng, words - count * 10 - 30)[: max(0, (words - count * 10 - 30) // 9)]:
        lines.insert(rng.randint(0, len(lines)), line)
    text = f"User: {' '.join(lines)}"
    for fact in rng.sample(known, min(len(known), rng.randint(1, 3))):
        answer = fact.short_answer(f"~{CHAT}") if fact.form == PLACE else fact.statement(f"~{CHAT}")
        if rng.random() < 0.4:
            answer = fact.statement(f"~{CHAT}")
        joint = " " if text.count("\n") == 0 else "\nUser: "
        text += f"{joint}{fact.question()}\nAssistant: {answer}"
    return text


@dataclass(frozen=True)
class Mix:
    """One stage of the corpus: shares of the document kinds, and the fact forms."""

    shares: dict[str, float]
    forms: list[int]
    short: float = 0.0


def document(rng: random.Random, mix: Mix, words: int) -> str:
    """One marked document of about `words` words."""
    makers: dict[str, Callable[[], str]] = {
        "repeat": lambda: repeated_words(rng, words),
        "dense": lambda: dense(rng, words, mix.forms, mix.short),
        "strewn": lambda: strewn(rng, words, mix.forms, mix.short),
        "quoted": lambda: quoted(rng, words),
        "chat": lambda: chat(rng, words, mix.forms),
        "story": lambda: " ".join(story(rng)),
    }
    kinds = list(mix.shares)
    kind = rng.choices(kinds, [mix.shares[name] for name in kinds])[0]
    return makers[kind]()


def unmarked(text: str) -> str:
    """The text of a document without its marks."""
    words = text.split(" ")
    return " ".join(word[2:] if word.startswith("~") else word for word in words)


FULL = Mix(
    {"repeat": 0.04, "dense": 0.06, "strewn": 0.6, "quoted": 0.08, "chat": 0.1, "story": 0.12},
    [PLACE, PLACE, PLACE, HAS, WORD, LIKES],
    0.35,
)


def main() -> None:
    """Prints some documents."""
    rng = random.Random(1)
    for _ in range(12):
        print(unmarked(document(rng, FULL, 120)), end="\n\n")


if __name__ == "__main__":
    main()
