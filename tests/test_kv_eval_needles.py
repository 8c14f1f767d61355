"""Needle prompts: the same every time, as long as asked, the fact where it was asked for."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from profiler.kv_eval.needles import NEEDLE, RECALL, SUM_KEY, TASKS, TWO_STAGE, haystack, is_right, make_trials
from runtime.errors import UsageError


def count(text):
    return len(text.split())


def trials(task, length=300, depths=(0.0, 0.5, 1.0), repeats=2, **more):
    return make_trials(task, length=length, depths=depths, repeats=repeats, count=count, **more)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_trials(task):
    assert trials(task) == trials(task)
    assert trials(task) != trials(task, seed=1)
    assert len({trial.prompt for trial in trials(task)}) == 6


@pytest.mark.parametrize("task", TASKS)
@given(length=st.integers(150, 900), depth=st.floats(0, 1))
def test_a_prompt_keeps_to_its_length(task, length, depth):
    (trial,) = trials(task, length, (depth,), 1)
    assert length * 0.6 < count(trial.prompt + trial.follow_up) <= length


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("task", [NEEDLE, RECALL])
def test_the_fact_is_at_its_depth_and_only_there(task, depth):
    (trial,) = trials(task, 800, (depth,), 1)
    text, _, question = trial.prompt.rpartition(". ")
    assert question.endswith("?")
    name = next(word.removesuffix("'s") for word in question.split()[2:] if word[0].isupper())
    sentences = [s for s in text.split(".") if name in s and trial.value in s]
    assert len(sentences) == 1
    place = text.index(sentences[0]) / len(text)
    assert abs(place - depth) < 0.1


def test_both_stages_are_in_the_prompt():
    for trial in trials(TWO_STAGE):
        assert f"word is {trial.first_value}." in trial.prompt
        thing = trial.follow_up.split()[-1].removesuffix("?")
        assert f"{trial.first_value}'s {thing} is in the {trial.value}." in trial.prompt


def test_the_sum_is_a_key_of_the_table():
    for trial in trials(SUM_KEY):
        first, second = (int(word) for word in trial.prompt.split(" of ")[1].split("?")[0].split(" + "))
        assert f"{first + second}: {trial.value}" in trial.prompt


def test_what_cannot_be_asked_for():
    with pytest.raises(UsageError, match="no task"):
        trials("poem")
    with pytest.raises(UsageError, match="depth"):
        trials(NEEDLE, depths=(1.5,))
    with pytest.raises(UsageError, match="too few"):
        trials(NEEDLE, length=20)


def test_statements_at_the_ends():
    import random

    text = haystack(random.Random(1), 100, [(0, "First."), (1, "Last.")], count)
    assert text.startswith("First.")
    assert text.endswith("Last.")


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" It is in the red box.", True),
        ("The Red Box!", True),
        (" It is in the red boxes.", False),
        (" It is in the blue box. The red box is empty.", False),
        ("", False),
    ],
)
def test_right_answers(answer, right):
    assert is_right(answer, "red box") == right
