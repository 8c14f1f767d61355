"""A draft model takes memory from the weights only while it pays."""

import json
import random
import tracemalloc
from types import SimpleNamespace

import pytest
from answers import REPEATING, STORIES, Always, Known, Rig, lookup
from engines import engine
from stores import bytes_in_memory

from h2o_cli import main as cli
from h2o_cli.closing import closing_line
from h2o_cli.session.drafting import speculation_of
from runtime.answer.drafters import DraftModel, Lodging, LookupDrafter, ModelDrafter
from runtime.answer.gauge import Gauge
from runtime.answer.meter import Statistics
from runtime.answer.speculate import MOST_DRAFTED, Speculation
from runtime.engine.engine import Counters
from runtime.engine.pass_memory import Use, rows_for
from runtime.errors import BudgetError, Cancelled
from runtime.llama.model_file import ModelFile
from runtime.memory import resident_bytes_outside
from runtime.plans.plan import Plan
from runtime.plans.residency import streamable_bytes
from runtime.settings import Settings
from runtime.sizes import MB, PAGE

# --- logits of drafted tokens ---------------------------------------------------------------------------------------


def test_drafts_push_no_weights_out_where_all_are_in_memory(bundled_model):
    with engine(bundled_model, repack=False, n_logits=9) as opened:
        layout, total = opened.layout, streamable_bytes(opened.file)
        token, few, most = (layout.needs.ledger(Use(long=False, rows=rows)).fixed_bytes for rows in (1, 5, 9))
        later = layout.needs.kv_bytes(opened.settings.n_ctx) - layout.needs.kv_bytes(layout._room)
        found = []
        for fixed in (token - 8 * PAGE, token, few, most):
            opened.apply(Plan(0, 1, budget_bytes=fixed - later + total))
            found.append(layout.most_outputs)
        opened.apply(Plan(3, 1))
        assert [*found, layout.most_outputs] == [9, 1, 5, 9, 9]


def test_an_answer_drafts_no_more_than_that(bundled_model):
    with engine(bundled_model, n_logits=9) as opened:
        opened.forward([5])
        rig, drafted = Rig(opened), []
        for most in (9, 1):
            opened.layout.most_outputs = most
            rig.answer(*REPEATING[0], lookup(gauge=Always()))
            drafted.append(rig.figures.drafted)
    assert drafted[0] > 0 == drafted[1]


# --- when it comes and goes, on a simulated machine -----------------------------------------------------------------


class Disk:
    """A model of which `away` bytes are streamed, or `here` while a copy of it drafts; 40 bytes per second.

    right: how often the copy is right. The odds of the tokens say as much.
    """

    name, grade, reading_s, is_ready, relative_cost, n_bytes = "draft", 0, 0.0, True, 0.3, 82

    def __init__(self, right, away=114, here=231, seed=1):
        self.right, self.away, self.here, self.now = right, away, here, 0.0
        self.lodging, self.is_taken, self.visits = self, False, 0
        self.counters = Counters()
        self._rng = random.Random(seed)

    def begin(self):
        pass

    @property
    def pass_bytes(self):
        return self.here

    def take(self):
        self.is_taken, self.visits = True, self.visits + 1
        self.now += self.n_bytes / 40
        self.reading_s += self.n_bytes / 40
        return True

    def leave(self):
        self.is_taken = False
        self._displaced = True

    def propose(self, _tokens, n):
        self.now += 0.02 * n
        return [1] * n

    def answer(self, speculation, n_tokens):
        """(Tokens per pass, seconds) of an answer."""
        start, n, n_passes, displaced = self.now, 1, 0, 0
        speculation.begin()
        speculation.saw_prompt(Counters(), Counters(1, 30, 7.0, 280, 6.0), self.away)
        self._see_odds(speculation)
        while n < n_tokens:
            was_here = self.is_taken
            draft = speculation.draft([0], n_tokens - n - 1)
            displaced = self.here - self.away if was_here and not self.is_taken else displaced
            n_bytes = self.here if self.is_taken else self.away + displaced
            displaced, before = 0, self.counters
            seconds = n_bytes / 40 * self._rng.uniform(0.98, 1.02)
            self.counters = Counters(n_passes, n, before.seconds + seconds, before.bytes_read + n_bytes, before.wait_s)
            self.counters.wait_s += seconds - 0.1 - 0.01 * len(draft)
            self.now += seconds
            speculation.saw_pass(before, self.counters)
            n_right = 0
            while n_right < len(draft) and self._rng.random() < self.right:
                n_right += 1
            for _ in range(n_right + 1):
                self._see_odds(speculation)
            speculation.verified(len(draft), [1] * n_right + [2])
            n, n_passes = n + n_right + 1, n_passes + 1
        return (n - 1) / n_passes, self.now - start

    def _see_odds(self, speculation):
        if speculation.wants_odds:
            speculation.saw_odds(min(1.0, max(0.0, self._rng.gauss(self.right**2, 0.2))))

    def plain_s(self, n_tokens):
        return (n_tokens - 1) * self.away / 40


def speculation_on(disk):
    return Speculation(disk, MOST_DRAFTED, clock=lambda: disk.now)


def speeds(right, n_tokens):
    """Of answers of n_tokens against those without drafts, the slowest first."""
    disks = [Disk(right, seed=seed) for seed in range(20)]
    return sorted(disk.plain_s(n_tokens) / disk.answer(speculation_on(disk), n_tokens)[1] for disk in disks)


def test_text_that_is_hard_to_guess_is_hardly_slower():
    for right in (0.1, 0.37, 0.5, 0.55):
        assert speeds(right, 64)[0] >= 0.97
    found = speeds(0.7, 64)
    assert sum(found) / len(found) > 1.1
    assert found[0] >= 0.85


@pytest.mark.parametrize("seed", range(4))
def test_text_that_is_easy_to_guess_takes_a_third_of_the_time(seed):
    disk = Disk(0.9, seed=seed)
    speculation = speculation_on(disk)
    per_pass, seconds = disk.answer(speculation, 128)
    assert per_pass >= 4.5
    assert seconds < 0.5 * disk.plain_s(128)
    assert speculation.saved_s == pytest.approx(disk.plain_s(128) - seconds, rel=0.1)
    assert disk.answer(speculation, 128)[0] >= 4.5


def test_a_copy_with_more_bits_comes_for_text_that_is_harder_to_guess():
    def visits(odds_power):
        disk = Disk(0.9)
        disk._see_odds = lambda speculation: speculation.wants_odds and speculation.saw_odds(0.35)
        gauge = Gauge(disk.relative_cost, odds_power)
        disk.answer(Speculation(disk, MOST_DRAFTED, gauge, clock=lambda: disk.now), 64)
        return disk.visits

    assert (visits(0.5), visits(0.08)) == (0, 1)


def test_it_goes_when_the_text_changes_and_comes_back():
    disk = Disk(0.9)
    speculation = speculation_on(disk)
    disk.answer(speculation, 100)
    assert disk.is_taken
    disk.right = 0.2
    disk.answer(speculation, 100)
    assert not disk.is_taken
    disk.right = 0.9
    disk.answer(speculation, 400)
    assert disk.is_taken
    assert disk.visits == 2


def test_a_copy_that_belies_the_odds_costs_little_time():
    disk = Disk(0.9)
    disk._see_odds = lambda speculation: speculation.wants_odds and speculation.saw_odds(0.8)
    disk.right = 0.1
    assert disk.answer(speculation_on(disk), 800)[1] < 1.05 * disk.plain_s(800)


def test_what_is_not_used_costs_nothing():
    disk = Disk(0.1)
    speculation = speculation_on(disk)
    disk.answer(speculation, 64)
    assert speculation.saved_s == 0


def test_it_does_not_come_for_a_few_tokens():
    disk = Disk(0.9)
    disk.answer(speculation_on(disk), 6)
    assert disk.visits == 0


def test_where_it_takes_no_place_it_is_there_from_the_first_token():
    disk = Disk(0.9)
    disk.lodging = None
    assert not speculation_on(disk).wants_odds


# --- its memory -----------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(bundled_model, bundled_variant):
    """A rig whose budget holds half of the weights beside a draft model, the draft model, and its lodging."""
    model = DraftModel(ModelFile.open(bundled_variant("q4_0")), Settings(n_ctx=256, n_ubatch=64))
    try:
        with engine(bundled_model, n_ctx=256, n_ubatch=64, n_logits=9) as opened:
            budget = opened.layout.fixed_bytes + model.n_bytes + 4 * MB
            opened.apply(Plan(0, 1, window_bytes=MB, budget_bytes=budget))
            assert opened.layout.displaced_bytes(model.n_bytes) > 0
            lodging = Lodging(opened, model)
            yield Rig(opened), model, lodging
            lodging.leave()
    finally:
        model.close()


def weights_in_memory(lodging):
    return bytes_in_memory([(start, end) for start, end in lodging.model._store.ranges if end > start])


def test_its_memory_is_the_weights_until_it_comes_and_after_it_went(pair):
    rig, model, lodging = pair
    opened = rig.engine
    streamed, budget = opened.streamed_bytes, opened.plan.budget_bytes
    assert opened.ledger.draft_bytes == 4 * opened.n_vocab
    assert lodging.pass_bytes > streamed + MB
    plain = rig.answer(STORIES[0], 30)
    drafter = ModelDrafter(lodging, 0.5, opened.n_vocab)
    process_bytes = resident_bytes_outside(opened._store.ranges)
    for _ in range(2):
        assert lodging.take()
        assert opened.ledger.draft_bytes >= model.n_bytes
        assert opened.ledger.total_bytes <= budget
        assert opened.streamed_bytes == pytest.approx(lodging.pass_bytes)
        assert rig.answer(STORIES[0], 30, Speculation(NoPrice(drafter), 8, Always())) == plain
        assert rig.figures.tokens_per_pass > 2
        assert weights_in_memory(lodging) > 0.9 * lodging.n_bytes
        lodging.leave()
        assert resident_bytes_outside(opened._store.ranges) < process_bytes + MB
        assert opened.ledger.total_bytes <= budget
        assert opened.streamed_bytes == streamed
        assert rig.answer(STORIES[0], 30) == plain
    drafter.close()


class NoPrice:
    """A drafter that stays where it is."""

    lodging, name, grade = None, "draft", 0

    def __init__(self, drafter):
        self._drafter = drafter

    def __getattr__(self, name):
        return getattr(self._drafter, name)


def test_it_does_not_come_where_the_budget_became_too_small(pair):
    rig, model, lodging = pair
    rig.engine.apply(Plan(0, 1, window_bytes=MB, budget_bytes=rig.engine.layout.fixed_bytes + 2 * MB))
    assert not lodging.take()
    assert not lodging.is_taken
    with pytest.raises(BudgetError):
        rig.engine.layout.make_room(model.n_bytes)
    rig.answer(STORIES[0], 4)


def test_without_pressure_it_has_no_lodging(bundled_model, bundled_variant):
    with engine(bundled_model, Plan(0, 1, budget_bytes=1000 * MB), n_logits=9) as opened:
        model = DraftModel(ModelFile.open(bundled_variant("q4_0")), Settings(n_ctx=256))
        assert opened.layout.displaced_bytes(model.n_bytes) == 0
        model.close()


def test_ctrl_c_while_the_draft_model_comes_is_not_lost(pair, monkeypatch):
    rig, _, lodging = pair
    opened, apply, reopen = rig.engine, rig.engine._store.apply, lodging._reopen

    def cancelled(*args, **more):
        monkeypatch.setattr(opened._store, "apply", apply)
        raise Cancelled(2)

    monkeypatch.setattr(opened._store, "apply", cancelled)  # as while reads are waited for that have no place any more
    with pytest.raises(Cancelled):
        lodging.take()
    assert not lodging.is_taken
    assert opened.ledger.draft_bytes == 4 * opened.n_vocab
    monkeypatch.setattr(lodging, "_reopen", lambda: opened.cancel() or reopen())
    with pytest.raises(Cancelled):
        lodging.take()
    opened.forget_cancel()
    drafter = NoPrice(ModelDrafter(lodging, 0.5, opened.n_vocab))
    assert rig.answer(STORIES[0], 10, Speculation(drafter, 8, Always())) == rig.answer(STORIES[0], 10)


def test_a_draft_model_that_takes_no_place_is_cancelled_with_its_host(bundled_model, bundled_variant):
    with engine(bundled_model, Plan(0, 1, budget_bytes=1000 * MB), n_logits=9) as opened:
        draft = DraftModel(ModelFile.open(bundled_variant("q4_0")), Settings(n_ctx=256))
        speculation = speculation_of(opened, opened._model, draft)
        draft.start()
        opened.cancel()
        with pytest.raises(Cancelled):
            speculation.drafter.propose([1, 2, 3], 4)
        speculation.close()
        draft.close()


def test_an_answer_is_cancelled_while_the_draft_model_is_read(pair):
    rig, _, lodging = pair
    lodging.take()
    rig.engine.cancel()
    drafter = NoPrice(ModelDrafter(lodging, 0.5, rig.engine.n_vocab))
    _, _, finish = rig.answer(STORIES[0], 10, Speculation(drafter, 8, Always()))
    assert finish == "cancelled"
    assert rig.answer(STORIES[0], 10, Speculation(drafter, 8, Always())) == rig.answer(STORIES[0], 10)


def test_odds_are_the_probabilities_of_the_softmax(bundled_model):
    with engine(bundled_model, n_ctx=64) as opened:
        opened.forward([1, 5, 9])
        assert sum(opened.odds(token) for token in range(opened.n_vocab)) == pytest.approx(1, abs=1e-3)
        best = max(range(opened.n_vocab), key=lambda token: opened.logits()[token])
        assert opened.odds(best) == max(opened.odds(token) for token in range(opened.n_vocab))


def test_the_tables_of_a_new_answer_take_the_place_of_the_old_ones():
    tracemalloc.start()
    try:
        drafter = LookupDrafter(2**15)
        drafter.propose([i % 100 for i in range(2000)], 1)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        drafter.begin()
        assert tracemalloc.get_traced_memory()[1] < 1.1 * before
    finally:
        tracemalloc.stop()


# --- long drafts ----------------------------------------------------------------------------------------------------


def test_drafts_of_32_tokens_give_the_same_answer(bundled_model):
    with engine(bundled_model, Plan(2, 1), n_logits=MOST_DRAFTED + 1) as opened:
        rig = Rig(opened)
        plain = rig.answer(STORIES[1], 70)
        known = rig.tokenizer.encode(STORIES[1]) + plain[0]
        assert rig.answer(STORIES[1], 70, Speculation(Known(known), MOST_DRAFTED, Always())) == plain
        assert rig.figures.tokens_per_pass > 20


def test_memory_for_logits_is_laid_out_in_two_steps():
    assert [rows_for(n, 33) for n in (1, 2, 17, 18, 33)] == [1, 17, 17, 33, 33]
    assert [rows_for(n, 2) for n in (1, 2)] == [1, 2]


# --- what a run says ------------------------------------------------------------------------------------------------


def test_auto_on_a_model_of_four_bits_goes_on_without_drafts(capsys, bundled_variant):
    flags = ["-p", "a", "-n", "3", "-t", "1", "--ctx", "64", "--json"]
    assert cli.run_command(["run", str(bundled_variant("q4_0")), "--draft", "auto", *flags]) == 0
    out, err = capsys.readouterr()
    assert len(json.loads(out)["tokens"]) == 3
    assert (len(err.splitlines()), err.count("few bits per weight")) == (1, 1)


def said(opened, saved_s, statistics):
    speculation = SimpleNamespace(saved_s=saved_s, drafter=SimpleNamespace(name="draft"))
    model = SimpleNamespace(profile=None, is_named=True, team=None)
    session = SimpleNamespace(engine=opened, budget_bytes=10**8, speculation=speculation, model=model)
    return closing_line(session, statistics)


def test_a_run_with_a_draft_model_says_what_it_gave(bundled_model):
    with engine(bundled_model, n_ctx=64) as opened:
        statistics = Statistics(
            n_tokens=101, decode_ms_per_token=100.0, tokens_per_s=10.0, tokens_per_pass=1.5, drafted=40, accepted=20
        )
        assert "1.50 tokens per pass (draft)" in said(opened, 3.0, statistics)
        assert "1.0 s lost by --draft" in said(opened, -1.0, statistics)
        assert "lost" not in said(opened, -0.1, statistics)
        unused = statistics._replace(tokens_per_pass=1.0, drafted=0, accepted=0)
        assert "1.00 tokens per pass (off)" in said(opened, 0.0, unused)
