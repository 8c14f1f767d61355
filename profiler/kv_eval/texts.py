"""Words and story text for the evaluation: filler between facts, and held-out text.

Everything is written from a seed, in the simple words that also the bundled model knows.
"""

from __future__ import annotations

import random

NAMES = (
    "Anna", "Mia", "Lily", "Emma", "Rosa", "Nora", "Clara", "Ella", "Sara", "Julia", "Ruby", "Ivy", "Tom", "Ben", "Sam",
    "Max", "Leo", "Jack", "Tim", "Oscar", "Paul", "Felix", "Hugo", "Noah", "Adam", "Finn", "Karl", "Peter", "David",
)  # fmt: skip
COLOURS = (
    "red", "blue", "green", "yellow", "white", "black", "brown", "purple", "orange", "pink", "grey", "golden", "silver",
)  # fmt: skip
CONTAINERS = (
    "box", "bag", "basket", "drawer", "chest", "jar", "bucket", "cupboard", "case", "bottle", "tent", "boat", "barn",
)  # fmt: skip
THINGS = (
    "key", "book", "ring", "coin", "hat", "map", "ball", "letter", "lamp", "cup", "scarf", "drum", "kite", "clock",
    "spoon", "glove", "doll", "flute", "rope", "stone", "feather", "shell", "bell", "brush", "ticket", "button",
)  # fmt: skip
_PLACES = (
    "garden", "forest", "river", "market", "school", "library", "harbour", "castle", "village", "lake", "bridge",
    "mill", "farm", "beach", "station", "park", "meadow", "kitchen", "bakery", "hill", "museum", "island", "cave",
)  # fmt: skip
_ANIMALS = ("dog", "cat", "rabbit", "horse", "duck", "goat", "fox", "owl", "mouse", "bird", "pony", "hen", "frog")
_JOBS = ("baker", "farmer", "teacher", "sailor", "doctor", "painter", "miller", "gardener", "shepherd", "cook")
_FOODS = ("soup", "bread", "cake", "apples", "honey", "cheese", "pancakes", "cookies", "pears", "tea", "milk")
_FEELINGS = ("happy", "sad", "proud", "tired", "brave", "glad", "afraid", "curious", "hungry")
_WEATHER = ("sunny", "rainy", "windy", "cold", "warm", "cloudy", "foggy", "quiet", "bright")
_TIMES = ("morning", "evening", "afternoon", "day", "night", "summer", "autumn", "winter", "spring")
_OPENINGS = (
    "One {weather} {time} {A} went to the {place}.",
    "{A} lived in a {colour} house near the {place}.",
    "It was a {weather} {time} and {A} felt {feeling}.",
    "{A} and {B} were good friends.",
)
_SENTENCES = (
    "The wind was soft and the sky was blue.",
    "The sun was high above the {place}.",
    "A {animal} sat under a tree and watched them.",
    "They could smell {food} from the {place}.",
    "A {job} walked by and smiled at {A}.",
    "{A} looked at the clouds and thought of {food}.",
    "It was very quiet near the {place}.",
    "{B} told {A} a funny story about a {job}.",
    "The {animal} was {feeling} and so was {A}.",
    "The old {job} gave them some {food}.",
    "Together they walked to the {place}.",
    "There a {animal} was playing with the {thing}.",
    "{A} met a little {animal} near the {place}.",
    "{A} gave it some {food} and water.",
    "After three days the {animal} could run again.",
    "{A} wanted to bake a cake for {B}.",
    "They cleaned the kitchen and started again.",
    "{A} and {B} packed {food} and a {thing}.",
    "They climbed over the hill and through the forest.",
    "A {animal} showed them the way.",
    "The bridge near the {place} was broken.",
    '"Let us build it again," said {B}.',
    "They carried wood and stones all {time}.",
    "One day it worked.",
)
_ENDINGS = (
    "In the end they were all very {feeling}.",
    "{A} went home and slept well that night.",
    "From that day on {A} and {B} were the best of friends.",
    "That evening they ate {food} and laughed together.",
    "It was the best {time} of the year.",
)
_STORY_SENTENCES = 8


def story(rng: random.Random) -> list[str]:
    """The sentences of one short story about two people."""
    first, second = rng.sample(NAMES, 2)
    lines = [rng.choice(_OPENINGS), *rng.sample(_SENTENCES, _STORY_SENTENCES), rng.choice(_ENDINGS)]
    return [_filled(line, rng, first, second) for line in lines]


def _filled(line: str, rng: random.Random, first: str, second: str) -> str:
    return (
        line.format(
            A=first,
            B=second,
            place=rng.choice(_PLACES),
            animal=rng.choice(_ANIMALS),
            job=rng.choice(_JOBS),
            food=rng.choice(_FOODS),
            thing=rng.choice(THINGS),
            colour=rng.choice(COLOURS),
            feeling=rng.choice(_FEELINGS),
            weather=rng.choice(_WEATHER),
            time=rng.choice(_TIMES),
        )
        .replace("a orange", "an orange")
        .replace("a owl", "an owl")
        .replace("A owl", "An owl")
    )
