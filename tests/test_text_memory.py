"""Long texts and hostile chat templates stay inside the budget: the whole process, in a memory cgroup."""

import json
import os
import re
import sys

import broken_models
import pytest
from cgroups import memory_limit
from test_smallest import converse, h2o, named

MB = 10**6
COMMAND = [sys.executable, "-m", "h2o_cli.main", "run"]


def in_a_group(budget_mb, *arguments, kills=(0,), **options):
    """A run inside its budget; (exit code, standard error). kills: how many processes the kernel may end."""
    command = [*COMMAND, *map(str, arguments), "-m", str(budget_mb)]
    with memory_limit(budget_mb * MB) as group:
        done = group.run(command, timeout=60, env=os.environ, **options)
        assert group.kills in kills, done.stderr
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.cgroup
@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("the cat sat on the mat\n" * 90_000, "more than 2048 tokens"),
        ("😀" * 500_000, "more than 2048 tokens"),
        ("x😀" + "a b" * 690_000, "more than 2048 tokens"),
        ("the cat sat on the mat\n" * 200_000, "is longer than 3.1 MB"),
    ],
    ids=["2 MB", "emoji", "wide", "4.6 MB"],
)
def test_a_prompt_that_is_too_long_is_refused_inside_the_budget(text, said, bundled_model, tmp_path):
    (tmp_path / "prompt.txt").write_text(text)
    code, err = in_a_group(100, bundled_model, "-f", tmp_path / "prompt.txt", "-n", 4)
    assert code == 1
    assert said in err


def with_template(folder, template):
    """A small valid model with this chat template."""
    path = folder / "model.gguf"
    broken_models.valid_model().set("tokenizer.chat_template", broken_models.STRING, template).write(path)
    return path


DOUBLING = "{% set n = namespace(t='aaaa') %}{% for i in range(60) %}{% set n.t = n.t ~ n.t %}{% endfor %}"
HOSTILE = ["{{ 'a'.center(2000000000) }}", "{{ 10 ** (10 ** 9) }}", DOUBLING, "{{ [1] * 900000 }}" * 2000]


@pytest.mark.cgroup
@pytest.mark.parametrize("template", HOSTILE, ids=["center", "power", "doubling", "long"])
def test_a_hostile_template_in_the_smallest_budget(template, tmp_path):
    """The smallest model there is leaves less than a template may take: then the kernel ends the template's process."""
    path = with_template(tmp_path, template)
    floor = named(h2o("run", path, "-p", "a", "--ctx", 128, "-m", 5).stderr)
    code, err = in_a_group(floor, path, "-p", "hi", "-n", 4, "--chat", "--ctx", 128, kills=(0, 1))
    assert code == 1
    assert re.search(r"^h2o: the model's chat template (takes more than|did not end)", err), err


@pytest.mark.cgroup
def test_a_prompt_and_a_chat_have_the_same_smallest_budget(bundled_model):
    floors = [named(h2o("run", bundled_model, "-p", "a", "-m", 5, *more).stderr) for more in ((), ("--chat",))]
    assert abs(floors[0] - floors[1]) <= 1  # each is measured, to a quarter of a MB, and said in whole ones


@pytest.mark.cgroup
@pytest.mark.parametrize("template", ["", HOSTILE[0], DOUBLING], ids=["chatml", "center", "doubling"])
def test_a_conversation_with_a_template_in_the_smallest_budget(template, bundled_model, tmp_path, monkeypatch):
    """Compiled and rendered in children, the second of them beside everything that an answer needs."""
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    path = with_template(tmp_path, template) if template else bundled_model
    floor = json.loads(h2o("inspect", path, "--json").stdout)["conversation_floor_bytes"] // MB
    text, code, kills = converse([*COMMAND, str(path), "--chat", "-n", "20", "-m", str(floor)], floor)
    assert (code, kills if not template else 0) == (0, 0), text
    if template:
        assert text.count("the model's chat template takes more than") == 3
    else:
        assert text.count("tokens/s)") == 3
