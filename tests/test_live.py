"""A plan written by another process changes a running answer: memory and speed follow, the tokens do not."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from engines import engine, greedy
from reference import reference_logits_and_tokens

from runtime.answer.follower import PlanFollower
from runtime.errors import BudgetError
from runtime.llama.model_file import ModelFile
from runtime.memory import resident_bytes
from runtime.plans.file import write_plan
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import streamable_bytes
from runtime.plans.watcher import LOOK_EVERY_S, PlanWatcher

MB = 10**6
SHAPE = "llama:layers=8,dim=512,ffn=2048,heads=8,kv_heads=4,vocab=4096,ctx=512,tied=0"
WRITER = """
import sys
from runtime.plans.plan import Layout, Plan
from runtime.plans.file import write_plan
budget, model_hash = int(sys.argv[2]), int(sys.argv[3])
write_plan(sys.argv[1], Plan(2, 1, Layout.BALANCED, budget_bytes=budget, model_hash=model_hash))
"""


@pytest.fixture
def model(tiny_model):
    return tiny_model(SHAPE, "f16")


def budget_of(opened, share):
    """A budget that leaves room for this share of the weights."""
    return opened.ledger.fixed_bytes + int(share * streamable_bytes(opened.file))


def write_elsewhere(path, budget, model_hash):
    subprocess.run([sys.executable, "-c", WRITER, str(path), str(budget), str(model_hash)], check=True)


def test_memory_follows_a_plan_of_another_process(model, tmp_path):
    """0.9 -> 0.4 -> 0.9 of the weights while tokens are made; each step within two tokens, no token differs."""
    prompt = list(range(10, 30))
    reference = reference_logits_and_tokens(model, prompt, 30, n_ctx=512, n_ubatch=64, n_threads=2)[1]
    path = tmp_path / "plan.bin"
    model_hash = ModelFile.open(model).hash
    with engine(model, Plan(2, 1, Layout.BALANCED), n_ubatch=64) as opened:
        high, low = budget_of(opened, 0.9), budget_of(opened, 0.4)
        watcher = PlanWatcher(path, model_hash)
        seen = []

        def before_token(i):
            if i in (5, 20):
                write_elsewhere(path, high, model_hash)
            if i == 5:
                time.sleep(LOOK_EVERY_S)  # so much later at most a file that appears is found
            if i == 12:
                write_elsewhere(path, low, model_hash)
            plan = watcher.poll()
            if plan:
                opened.apply(plan)
            seen.append(resident_bytes())

        tokens = greedy(opened, prompt, 30, before_token)[1]
        watcher.close()
        assert opened.layout.plan_changes == 3
    assert tokens == reference
    expected = high - low
    assert seen[11] - seen[14] == pytest.approx(expected, rel=0.15)
    assert seen[22] - seen[19] == pytest.approx(expected, rel=0.15)


def test_budget_holds_at_every_moment_of_a_change(model):
    """What is given up is freed before anything new is loaded, in both directions and between layouts."""
    with engine(model, Plan(0, 1), n_ubatch=64) as opened:
        base = resident_bytes()
        rng = np.random.default_rng(3)
        for step in range(12):
            budget = budget_of(opened, rng.uniform(0.2, 0.95))
            opened.apply(Plan(1, 1, Layout(step % 3), budget_bytes=budget))
            assert opened.ledger.total_bytes <= budget
            for _ in range(2):
                if opened.n_past > 400:
                    opened.truncate(0)
                opened.forward([7])
                weights = opened.ledger.window_bytes + opened.ledger.resident_bytes
                assert resident_bytes() <= base + weights + opened.ledger.margin_bytes


def test_a_plan_below_the_floor_is_refused_and_the_old_one_kept(model, tmp_path):
    path = tmp_path / "plan.bin"
    with engine(model, Plan(2, 1), n_ubatch=64) as opened:
        with pytest.raises(BudgetError) as caught:
            opened.apply(Plan(1, 1, budget_bytes=10 * MB))
        assert caught.value.floor_bytes > 10 * MB
        opened.forward([7, 8])
        notes = []
        watcher = PlanWatcher(path, opened.file.hash)
        follow = PlanFollower(opened, watcher, 0, notes.append)
        write_plan(path, Plan(1, 1, budget_bytes=10 * MB, model_hash=opened.file.hash))
        follow()
        follow()
        watcher.close()
        assert opened.plan.k == 2
        assert len(notes) == 1
