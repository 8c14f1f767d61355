"""Long texts and hostile chat templates stay inside the budget: the whole process, in a memory cgroup."""

import os
import sys

import pytest
from cgroups import memory_limit

MB = 10**6
COMMAND = [sys.executable, "-m", "h2o_cli.main", "run"]


def in_a_group(budget_mb, *arguments, **options):
    """A run inside its budget; (exit code, standard error)."""
    command = [*COMMAND, *map(str, arguments), "-m", str(budget_mb)]
    with memory_limit(budget_mb * MB) as group:
        done = group.run(command, timeout=60, env=os.environ, **options)
        assert group.kills == 0, done.stderr
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
