"""Word lists and the story grammar of the bundled model's corpus.

`story(rng)` returns one short story as a list of sentences.  A plot is a list of
slots, a slot a list of alternative sentences, and a sentence may name the parts of
its story in braces: {A} and {B} are two people, {he}, {his} and {him} stand for A.
"""

from __future__ import annotations

import random
import re

GIRLS = [
    "Anna", "Mia", "Lily", "Emma", "Rosa", "Nora", "Clara", "Ella", "Sara", "Julia", "Ruby", "Ivy",
    "Maya", "Zoe", "Lucy", "Grace", "Alice", "Eva", "Lena", "Tina", "Molly", "Hanna", "Olga",
    "Paula", "Kate", "Jane", "Mary", "Amy", "Linda", "Susan", "Vera", "Wendy",
]  # fmt: skip
BOYS = [
    "Tom", "Ben", "Sam", "Max", "Leo", "Jack", "Tim", "Oscar", "Paul", "Felix", "Hugo", "Noah",
    "Adam", "Finn", "Karl", "Peter", "David", "Luke", "Ralph", "Simon", "Victor", "Oliver", "Henry",
    "George", "Frank", "Bill", "Nick", "Otto", "Eric", "Ivan", "Martin", "Robert",
]  # fmt: skip
NAMES = GIRLS + BOYS
COLOURS = [
    "red", "blue", "green", "yellow", "white", "black", "brown", "purple", "orange", "pink", "grey",
    "golden", "silver", "wooden", "small", "big", "old", "new", "round", "heavy",
]  # fmt: skip
CONTAINERS = [
    "box", "bag", "basket", "drawer", "chest", "jar", "bucket", "cupboard", "case", "bottle",
    "tent", "boat", "cart", "tower", "barn", "hut", "suitcase", "pot", "tin", "locker",
]  # fmt: skip
OBJECTS = [
    "key", "book", "ring", "coin", "hat", "map", "ball", "letter", "lamp", "cup", "scarf", "drum",
    "kite", "clock", "spoon", "glove", "doll", "flute", "rope", "stone", "feather", "shell", "bell",
    "brush", "ticket", "button", "whistle", "candle", "pencil", "mirror", "blanket", "hammer",
]  # fmt: skip
ANIMALS = [
    "dog", "cat", "rabbit", "horse", "duck", "goat", "fox", "owl", "mouse", "bird", "pony", "hen",
    "frog", "hedgehog", "squirrel", "bear", "turtle", "sheep", "lamb", "goose",
]  # fmt: skip
PLACES = [
    "garden", "forest", "river", "market", "school", "library", "harbour", "castle", "village",
    "lake", "bridge", "mill", "farm", "beach", "station", "park", "meadow", "kitchen", "bakery",
    "hill", "museum", "island", "cave", "church",
]  # fmt: skip
FOODS = [
    "soup", "bread", "cake", "apples", "honey", "cheese", "pancakes", "cookies", "pears",
    "cherries", "tea", "milk", "nuts", "rice",
]  # fmt: skip
FEELINGS = [
    "happy", "sad", "proud", "tired", "brave", "angry", "glad", "afraid", "curious", "hungry",
    "lonely", "calm", "excited", "worried",
]  # fmt: skip
WEATHER = [
    "sunny", "rainy", "windy", "cold", "warm", "cloudy", "snowy", "foggy", "quiet", "bright",
]  # fmt: skip
TIMES = [
    "morning", "evening", "afternoon", "day", "night", "summer", "autumn", "winter", "spring",
    "weekend",
]  # fmt: skip
JOBS = [
    "baker", "farmer", "teacher", "sailor", "doctor", "painter", "miller", "gardener", "driver",
    "shepherd", "tailor", "cook",
]  # fmt: skip
WORDS = sorted(set(OBJECTS + ANIMALS + PLACES + FOODS + CONTAINERS + COLOURS + JOBS + FEELINGS))

OPENING = [
    "Once upon a time there was a {kind} named {A}.",
    "One {weather} {time} {A} went to the {place}.",
    "{A} lived in a {colour} house near the {place}.",
    "It was a {weather} {time} and {A} felt {feeling}.",
    "In a village by the {place} lived a {kind} called {A}.",
    "{A} and {B} were good friends.",
    "Long ago, a {kind} called {A} lived with a {job} near the {place}.",
]
MIDDLE = [
    "The wind was soft and the sky was blue.",
    "The sun was high above the {place}.",
    "A {animal} sat under a tree and watched them.",
    "{B} sang a song about a {animal} and a {animal2}.",
    "They could smell {food} from the {place2}.",
    "A {job} walked by and smiled at {A}.",
    "{A} looked at the clouds and thought of {food}.",
    "It was very quiet near the {place}.",
    "{B} told {A} a funny story about a {job}.",
    "The {animal} was {feeling} and so was {A}.",
    "Some children were playing with a {object2} on the grass.",
    "The old {job} gave them some {food}.",
]
ENDING = [
    "In the end they were all very {good}.",
    "{A} went home and slept well that night.",
    "From that day on {A} and {B} were the best of friends.",
    "That evening they ate {food} and laughed together.",
    "{A} never forgot that {time}.",
    "{he} told everybody in the village about it.",
    "And the {animal} was never lonely again.",
    "It was the best {time} of the year.",
]
PLOTS: list[list[list[str]]] = [
    [
        ["One day {A} lost {his} {colour} {object}.", "But {his} {colour} {object} was gone."],
        ["{he} looked for it in the {place}, but it was not there.", "{he} searched the whole {place2}."],
        ["{A} was very {bad} and began to cry.", "{A} sat down on a stone and felt {bad}."],
        ['Then {B} came and asked, "What is wrong?"', "{B} saw {A} and wanted to help."],
        ["Together they walked to the {place2}.", "They asked the {job}, who pointed to the {place2}."],
        ["There a {animal} was playing with the {object}.", "The {object} was lying under a big leaf."],
        ["{A} thanked {B} and hugged {him2}.", "{A} was so {good} that {he_l} danced."],
    ],
    [
        ["{A} met a little {animal} near the {place}.", "A {animal} with a hurt leg lay by the {place}."],
        ["The {animal} was {bad} and hungry.", "It was {bad} and did not move."],
        ["{A} gave it some {food} and water.", "{he} put it in a warm {container}."],
        ["{B} brought a soft blanket from the {place2}.", "{B} ran to the {job} for help."],
        ["After three days the {animal} could run again.", "Soon the {animal} was well."],
        ["It followed {A} everywhere.", "The {animal} stayed with {A} all {time}."],
    ],
    [
        ["{A} wanted to bake a cake for {B}.", "{A} and {B} made {food} in the kitchen."],
        ["First {he_l} took eggs, milk and honey.", "{he} mixed everything in a {colour} pot."],
        ["But the {animal} jumped on the table.", "Then the pot fell on the floor."],
        ['"Oh no!" said {B}.', '"Do not worry," said {A}.'],
        ["They cleaned the kitchen and started again.", "They laughed and tried once more."],
        ["At last it tasted very good.", "The {job} said it was the best in the village."],
    ],
    [
        ["{A} found an old map in a {container}.", "The {job} gave {A} an old map."],
        ["The map showed a way to the {place}.", "It showed a hidden {container} near the {place2}."],
        ["{A} and {B} packed {food} and a {object}.", "{B} took a lamp and a long rope."],
        ["They walked for hours along the river.", "They climbed over the hill and through the forest."],
        ["A {animal} showed them the way.", "They were {bad}, but they did not stop."],
        ["Behind a rock they found a {colour} {object}.", "There was a {colour} {container} full of coins."],
        ["They gave half of it to the {job}.", "They took it home and showed it to everyone."],
    ],
    [
        ["{A} wanted to learn to swim.", "{A} wanted to play the flute like {B}."],
        ["At first it was very hard.", "On the first day nothing went well."],
        ["{he} was {bad} and wanted to stop.", '"I cannot do it," said {A}.'],
        ['"Try again tomorrow," said the {job}.', '{B} said, "You must only be patient."'],
        ["So {A} practised every {time} near the {place}.", "{he} tried again and again."],
        ["One day it worked.", "After many weeks {he_l} could do it."],
        ["Everybody was proud of {A}.", "{B} clapped and gave {A} a {colour} {object}."],
    ],
    [
        ["A great storm came over the {place}.", "It rained for two days and the river rose."],
        ["The {job} lost the roof of the {place2}.", "The bridge near the {place} was broken."],
        ['{A} said, "We must help."', '"Let us build it again," said {B}.'],
        ["They carried wood and stones all {time}.", "{A} brought a hammer and {B} brought a rope."],
        ["Even the {animal} helped a little.", "A {animal2} sat on the wall and watched."],
        ["When it was done they shared {food}.", "The {job} thanked them with a {colour} {object}."],
    ],
]


def _tidy(text: str) -> str:
    """Begins the sentence with a capital and puts `an` where it belongs."""
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[0].upper() + text[1:]


def _parts(rng: random.Random) -> dict[str, str]:
    """Draws the people, animals and things of one story."""
    hero, friend = rng.sample(NAMES, 2)
    girl, other_girl = hero in GIRLS, friend in GIRLS
    place, place2 = rng.sample(PLACES, 2)
    animal, animal2 = rng.sample(ANIMALS, 2)
    object1, object2 = rng.sample(OBJECTS, 2)
    return {
        "A": hero,
        "B": friend,
        "he": "She" if girl else "He",
        "he_l": "she" if girl else "he",
        "his": "her" if girl else "his",
        "him": "her" if girl else "him",
        "him2": "her" if other_girl else "him",
        "kind": "girl" if girl else "boy",
        "place": place,
        "place2": place2,
        "animal": animal,
        "animal2": animal2,
        "object": object1,
        "object2": object2,
        "colour": rng.choice(COLOURS),
        "container": rng.choice(CONTAINERS),
        "food": rng.choice(FOODS),
        "feeling": rng.choice(FEELINGS),
        "good": rng.choice(["happy", "proud", "glad", "calm", "excited"]),
        "bad": rng.choice(["sad", "tired", "afraid", "worried", "lonely", "angry"]),
        "weather": rng.choice(WEATHER),
        "time": rng.choice(TIMES),
        "job": rng.choice(JOBS),
    }


def story(rng: random.Random) -> list[str]:
    """One short story: an opening, a plot with descriptions strewn in, an ending."""
    parts = _parts(rng)
    lines = [rng.choice(OPENING)]
    for slot in rng.choice(PLOTS):
        if rng.random() < 0.3:
            lines.append(rng.choice(MIDDLE))
        lines.append(rng.choice(slot))
    lines.append(rng.choice(ENDING))
    return [_tidy(line.format(**parts)) for line in lines]
