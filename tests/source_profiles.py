"""Profiles of six models as the H2O source system measured them on its machine: numbers, in its units.

A value that comes several times in a row is written once: "28*24" is 28 for 24 layers.
"""

from __future__ import annotations

from planner.source.profile import SourceProfile

# name: MiB per second, then per layer MiB, ms of computing, ms of releasing
_NUMBERS = {
    "unequal-28": (
        840,
        "22 25 28 33 36 39 42 45 48 51 57 60 63 69*2 75 78 81 86 89 92 95 98 101 107 110 113 116",
        "32 36 41 49 53 57 62 63 67 71 79 82 87 94*2 101 105 109 118 122 126 129 133 136 144 150 138 54",
        "8 9 11 14 15 16*2 17*2 19 23 21 24 25 26 30 32 33 35 32 37 34 35 40 42 44 37 41",
    ),
    "llama2-13b-q6_k": (
        843,
        "248*40",
        "792 597*2 598 599 626 627 626*2 642 658*3 652 626*2 627 626 627 626 627*2 675 692 691*2 667 657*5 "
        "658*2 662 692*4 288",
        "68*2 69*3 71 73 71*2 76 73 75 76 73 71 73*2 72 73 71 73 71 80 78 79 80 75 74 75 78 77 76 75 74 78 80 "
        "77 80 79*2",
    ),
    "llama2-7b-q8_0": (
        849,
        "205*32",
        "354*2 355 352 287*2 286 288 286 287*2 307 316*2 315 316*2 315*3 316 315*2 316 315 287 286*2 287*2 285 120",
        "72 73*2 72 59 60 59*3 60 58 65 63 65 64 65 66 64 66*6 65 58 60 59 60*4",
    ),
    "qwen2.5-0.5b-f16": (
        692,
        "28*24",
        "37 36*12 37 36*6 37 36*2 12",
        "9*2 10*6 9*3 10*10 11 10*2",
    ),
    "qwen2.5-1.5b-f16": (
        1084,
        "89*28",
        "15*2 14 25 14 24 16 13 15 31 16 31 14*2 15 14 25 14 15 14 15 14 15 18 14*2 15 7",
        "20 24 21*2 23 21 23 21 24 20 24 20 23 25 22 21 30 23 24 21 23 22 24 25 23 21 24 21",
    ),
    "qwen2.5-1.5b-f32": (
        808,
        "178*28",
        "110 92 91*2 92*16 91 92*3 93 92*2 25",
        "70 60*3 59*5 60 61*2 59 61*2 59*2 61 59*2 61*4 59*2 60 59",
    ),
}


def _values(text: str) -> tuple[int, ...]:
    pairs = [part.split("*") for part in text.split()]
    return tuple(int(pair[0]) for pair in pairs for _ in range(int(pair[1]) if len(pair) > 1 else 1))


SOURCE_PROFILES = {name: SourceProfile(io, *map(_values, texts)) for name, (io, *texts) in _NUMBERS.items()}
