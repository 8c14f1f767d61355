"""Weights live in the room of positions that are not there yet, and leave in steps."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from cgroups import memory_limit
from engines import engine
from hypothesis import given
from hypothesis import strategies as st

from runtime.kv.cache_memory import STEP, CacheMemory, Rows
from runtime.passes import Part, Pass
from runtime.plans.ledger import budget_for, touched_bytes
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import smallest_window, streamable_bytes
from runtime.sizes import MB, page_down, page_up

CTX = 1024
TOKENS = [3 + i * 7 % 250 for i in range(CTX)]
SHAPE = "llama:layers=8,dim=512,ffn=1024,heads=8,kv_heads=8,vocab=2048,ctx=2048,tied=0"

rows = st.builds(Rows, st.integers(1, 2**40), st.integers(1, 5000), st.just(1000))


@given(st.lists(rows, min_size=1, max_size=6), st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 10**6))
def test_steps_reach_far_enough_and_bytes_grow_with_them(parts, a, b, states):
    cache = CacheMemory(states + sum(part.row_bytes * part.n_cells for part in parts), parts)
    few, many = sorted((a, b))
    assert min(few, 1000) <= cache.steps(few) <= min(1000, few + STEP)
    assert cache.steps(few) <= cache.steps(many)
    assert states <= cache.bytes_for(few) <= cache.bytes_for(many) <= cache.n_bytes
    assert cache.bytes_for(1000) == cache.n_bytes
    assert cache.bytes_for(few) >= states + sum(part.row_bytes * min(few, 1000) for part in parts)


@given(st.integers(0, 10**6), st.integers(1, 5000), st.integers(1, 300), st.integers(0, 300))
def test_rows_take_whole_pages_from_wherever_they_begin(address, row_bytes, n_cells, n_positions):
    n_positions = min(n_positions, n_cells)
    pages = page_up(address + row_bytes * n_positions) - page_down(address)
    whole = row_bytes * n_cells
    assert touched_bytes(row_bytes, n_cells, n_positions) >= min(whole, pages)


def rss():
    """Bytes in memory, counted page by page; what was only read of fresh memory takes none."""
    rollup = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(row for row in rollup if row.startswith("Rss:")).split()[1])


def cache_in_memory(opened):
    """Bytes of the cache in memory. Its contents are gone afterwards."""
    before = rss()
    for region in opened._context.buffers._cleared:
        region.drop(0, region.n_bytes)
    return before - rss()


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "gemma3", "gpt2", "qwen3moe"])
def test_positions_take_no_more_than_is_counted(tiny_model, arch, kv_type):
    for n in (10, 70, 300):
        with engine(tiny_model(arch), n_ubatch=64, n_ctx=512, kv_type=kv_type) as opened:
            cache = opened.layout._cache
            assert cache.n_bytes == opened._context.buffers.kv_bytes
            opened.forward(TOKENS[: n - 2])
            opened.forward(TOKENS[:1])
            opened.forward(TOKENS[:1])
            counted, found = cache.bytes_for(cache.steps(n)), cache_in_memory(opened)
            assert found <= counted < cache.n_bytes, (found, counted)
            assert found > counted // 5


def half_budget(opened):
    """A budget in which half of the weights can stay when the context is full."""
    return opened.layout.fixed_bytes + streamable_bytes(opened.file) // 2 + 2 * smallest_window(opened.file)


def budget_plan(n_bytes):
    return Plan(0, 1, Layout.BALANCED, window_bytes=2 * MB, budget_bytes=n_bytes)


@pytest.mark.parametrize("layout", list(Layout))
def test_weights_leave_as_the_context_fills_and_the_numbers_stay(tiny_model, layout):
    path = tiny_model(SHAPE)
    with engine(path, n_ubatch=64, n_ctx=CTX, repack=False) as opened:
        opened.forward(TOKENS[:60])
        expected = [opened.logits().copy()]
        for start in range(60, CTX - 60, 60):
            opened.forward(TOKENS[start : start + 60])
            expected.append(opened.logits().copy())
    with engine(path, n_ubatch=64, n_ctx=CTX, repack=False) as opened:
        budget = half_budget(opened)
        opened.apply(Plan(0, 1, layout, window_bytes=2 * MB, budget_bytes=budget))
        resident, stays = [], []
        for i, start in enumerate([0, *range(60, CTX - 60, 60)]):
            before = opened._store.wanted
            opened.forward(TOKENS[start : start + 60])
            assert np.array_equal(opened.logits(), expected[i])
            assert opened.ledger.total_bytes <= budget
            assert opened.ledger.kv_bytes >= opened.layout._cache.bytes_for(opened.n_past)
            resident.append(opened.ledger.resident_bytes)
            stays.append(opened._store.wanted <= before)
        assert resident == sorted(resident, reverse=True)
        assert all(stays), "a piece came while others left"
        gone = opened.layout._cache.n_bytes - opened.layout._cache.bytes_for(64)
        assert abs(resident[0] - resident[-1] - gone) <= 3 * smallest_window(opened.file)
        assert opened.layout.plan_changes == 1


def test_room_for_a_long_context_costs_nothing_before_it_is_used(tiny_model):
    path, budget, resident = tiny_model(SHAPE), 0, []
    for n_ctx in (2048, 256):
        with engine(path, n_ubatch=64, n_ctx=n_ctx) as opened:
            budget = budget or budget_for(opened.layout.fixed_bytes + smallest_window(opened.file))
            opened.apply(budget_plan(budget))
            opened.forward(TOKENS[:30])
            opened.forward(TOKENS[:1])
            resident.append(min(opened.ledger.resident_bytes, streamable_bytes(opened.file)))
    assert resident[0] > resident[1] - 3 * MB  # the compute buffers are a little larger


def test_a_new_conversation_gives_the_room_back(tiny_model):
    with engine(tiny_model(SHAPE), n_ubatch=64, n_ctx=CTX) as opened:
        budget = half_budget(opened)
        opened.apply(budget_plan(budget))
        opened.forward(TOKENS[:40])
        early = opened.ledger
        opened.forward(TOKENS[40:900])
        late = opened.ledger
        assert late.resident_bytes < early.resident_bytes
        opened.truncate(0)
        opened.forward(TOKENS[:40])
        assert opened.ledger.kv_bytes == early.kv_bytes
        assert opened.ledger.resident_bytes >= early.resident_bytes - smallest_window(opened.file)
        assert opened.ledger.total_bytes <= budget
        assert cache_in_memory(opened) <= early.kv_bytes


def test_a_wrong_draft_moves_nothing(tiny_model):
    with engine(tiny_model(SHAPE), n_ubatch=64, n_ctx=CTX, n_logits=8) as opened:
        opened.apply(budget_plan(half_budget(opened)))
        opened.forward(TOKENS[: STEP - 4])
        opened.forward(TOKENS[:8], 8)
        room = opened.layout._room
        opened.truncate(STEP - 3)
        opened.forward(TOKENS[:8], 8)
        assert opened.layout._room == room


def test_what_was_touched_while_everything_fitted_is_given_back_under_a_smaller_budget(tiny_model):
    with engine(tiny_model(SHAPE), Plan(0, 1, budget_bytes=1000 * MB), n_ubatch=64, n_ctx=CTX) as opened:
        opened.forward(TOKENS[:900])
        opened.truncate(20)
        budget = half_budget(opened)
        opened.apply(budget_plan(budget))
        opened.forward(TOKENS[:1])
        assert opened.ledger.total_bytes <= budget
        assert cache_in_memory(opened) <= opened.ledger.kv_bytes < opened.layout._cache.n_bytes // 4


def test_what_was_touched_under_a_plan_without_a_budget_is_given_back(tiny_model):
    with engine(tiny_model(SHAPE), Plan(0, 1), n_ubatch=64, n_ctx=CTX) as opened:
        opened.forward(TOKENS[:900])
        opened.truncate(40)  # as much room as there was at the beginning
        opened.apply(budget_plan(half_budget(opened)))
        opened.forward(TOKENS[:1])
        assert cache_in_memory(opened) <= opened.ledger.kv_bytes < opened.layout._cache.n_bytes // 4


def test_a_plan_that_comes_in_the_middle_counts_what_is_there(tiny_model):
    with engine(tiny_model(SHAPE), n_ubatch=64, n_ctx=CTX) as opened:
        opened.apply(budget_plan(half_budget(opened)))
        opened.forward(TOKENS[:500])
        for more in (4, 0, 8):
            budget = half_budget(opened) + more * MB
            opened.apply(budget_plan(budget))
            assert opened.ledger.kv_bytes >= opened.layout._cache.bytes_for(500)
            opened.forward(TOKENS[:1])
            assert opened.ledger.total_bytes <= budget


@pytest.mark.cgroup
def test_an_answer_that_fills_its_context_stays_inside_the_cgroup(tiny_model, tmp_path):
    """Keys and values of 2048 positions take 34 MB, twice what the weights do."""
    path = tiny_model(SHAPE)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("word " * 200)
    command = [sys.executable, "-m", "h2o_cli.main", "run", str(path), "-f", str(prompt), "-n", "-1", "--ctx", "2048"]
    budget_mb = 100
    with memory_limit(budget_mb * MB) as group:
        done = group.run([*command, "-m", str(budget_mb), "--temp", "0", "--json"], timeout=120, env=os.environ)
        assert done.returncode == 0, done.stderr
        assert group.kills == 0
        assert group.peak_bytes <= budget_mb * MB
    answer = json.loads(done.stdout)
    assert len(answer["prompt_tokens"]) + len(answer["tokens"]) >= 2048 or answer["finish"] == "eos"
    assert answer["ledger"]["kv_bytes"] > 30 * MB or answer["finish"] == "eos"


def test_pages_for_the_next_positions_of_several_texts_are_made_at_once_where_all_fits(tiny_model):
    """Where nothing streams. One text writes to few pages, so its own come one by one."""
    for budget, n_texts in ((1000 * MB, 2), (0, 2), (1000 * MB, 1)):
        fits, several = budget > 0 and n_texts > 1, {"n_sequences": n_texts, "n_logits": n_texts}
        with engine(tiny_model(SHAPE), n_ubatch=64, n_ctx=CTX, **several) as opened:
            opened.apply(budget_plan(budget or half_budget(opened)))
            opened.compute([Pass((Part(0, 0, (5, 6), 1), Part(1, 0, (7,), 1))[:n_texts])])
            cache = opened.layout._cache
            found = cache_in_memory(opened)
            if fits:
                assert cache.bytes_for(256) <= found <= cache.bytes_for(STEP + 256)
                cache.drop_behind(0)
                cache.make(STEP)
                assert cache_in_memory(opened) >= cache.bytes_for(256)
            else:
                assert found <= cache.bytes_for(STEP)
            opened.compute([Pass((Part(0, 2, (5,), 1),))])
