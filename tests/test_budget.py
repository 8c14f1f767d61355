"""The budget is kept: the whole process lives inside a memory cgroup limited to exactly -m."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
from cgroups import memory_limit
from reference import reference_in_subprocess

MB = 10**6
COMMAND = [sys.executable, "-m", "h2o_cli.main"]
LIBRARIES = 45 * MB  # pages of libraries may be charged to whoever read them first
SHAPE = "llama:layers=12,dim=768,ffn=3072,heads=12,kv_heads=4,vocab=4096,ctx=512,tied=0"


@pytest.fixture(scope="module")
def model(tiny_model):
    """About 220 MB of weights, three times what the smaller budgets leave for them."""
    return tiny_model(SHAPE, "f16")


def run_command(model, budget_mb, *more):
    prompt = ["-p", "Once upon a time", "-n", "16", "--temp", "0", "--ctx", "256", "--json"]
    return [*COMMAND, "run", str(model), "-m", str(budget_mb), *prompt, *more]


@pytest.mark.cgroup
@pytest.mark.parametrize("layout", ["prefix", "even", "balanced"])
@pytest.mark.parametrize("budget_mb", [100, 140, 200])
def test_a_run_lives_inside_its_budget(model, budget_mb, layout, tmp_path):
    with memory_limit(budget_mb * MB) as group:
        done = group.run(run_command(model, budget_mb, "--layout", layout), timeout=120, env=os.environ)
        assert done.returncode == 0, done.stderr
        answer = json.loads(done.stdout)
        assert group.kills == 0
        assert len(answer["tokens"]) == 16
        assert answer["peak_memory_bytes"] == pytest.approx(group.peak_bytes, rel=0.05)
        assert group.peak_bytes <= budget_mb * MB
        assert group.peak_bytes >= 0.9 * budget_mb * MB - LIBRARIES, "the budget is not made use of"


@pytest.mark.cgroup
def test_tokens_do_not_depend_on_the_budget(model):
    tokens = []
    for budget_mb in (100, 400):
        with memory_limit(budget_mb * MB) as group:
            done = group.run(run_command(model, budget_mb), timeout=120)
            assert done.returncode == 0, done.stderr
            tokens.append(json.loads(done.stdout))
    reference = reference_in_subprocess(
        model, tokens[0]["prompt_tokens"], 16, n_ctx=256, n_ubatch=128, n_threads=tokens[0]["threads"]
    )
    assert tokens[0]["tokens"] == tokens[1]["tokens"] == reference[1]


@pytest.mark.cgroup
def test_the_floor_that_is_named_works(model):
    with memory_limit(400 * MB) as group:
        refused = group.run(run_command(model, 40), timeout=60)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    floor_mb = int(re.search(r"-m (\d+)", refused.stderr).group(1))
    with memory_limit(floor_mb * MB) as group:
        done = group.run(run_command(model, floor_mb), timeout=120)
        assert done.returncode == 0, done.stderr
        assert group.kills == 0
    below = run_command(model, floor_mb - 1)
    with memory_limit(400 * MB) as group:
        assert group.run(below, timeout=60).returncode == 1
