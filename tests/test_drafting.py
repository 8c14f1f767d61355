"""Look-up, and when drafts pay: on simulated machines."""

import itertools
import random

import pytest
from answers import Always

from runtime.answer.drafters import LookupDrafter
from runtime.answer.gauge import Gauge, Mean, PassTime
from runtime.answer.speculate import MOST_DRAFTED, Speculation
from runtime.engine.engine import Counters

# --- look-up --------------------------------------------------------------------------------------------------------


def slow_lookup(tokens, n, lengths=(3, 2, 1)):
    """Every answer LookupDrafter.propose may give, by searching the whole text."""
    for length in lengths:
        suffix = tokens[len(tokens) - length :]
        ends = [end for end in range(length, len(tokens)) if tokens[end - length : end] == suffix]
        if ends:
            return [[(tokens[end:] * n)[i] for i in range(n)] for end in ends[-8:]]
    return [[]]


@pytest.mark.parametrize("n_kinds", [2, 7, 40])
def test_lookup_finds_what_a_search_finds(n_kinds):
    rng = random.Random(n_kinds)
    tokens, drafter = [], LookupDrafter(4096)
    for _ in range(40):
        tokens += [rng.randrange(n_kinds) for _ in range(rng.randint(1, 9))]
        assert drafter.propose(tokens, 6) in slow_lookup(tokens, 6)


def test_lookup_prefers_the_place_with_the_likest_surroundings():
    facts = [(1, 40, 9, 2, 3, 50), (1, 41, 9, 2, 3, 51), (1, 42, 9, 2, 3, 52)]
    drafter = LookupDrafter(64)
    for subject, answer in ((40, 50), (41, 51), (42, 52)):
        drafter.begin()
        assert drafter.propose([*itertools.chain(*facts), 7, 8, subject, 30, 31, 9, 2, 3], 1) == [answer]


def test_lookup_goes_on_with_a_repetition():
    drafter = LookupDrafter(64)
    assert drafter.propose([1, 2, 3, 1, 2, 3, 1], 7) == [2, 3, 1, 2, 3, 1, 2]
    assert drafter.grade == 3
    assert drafter.propose([1, 2, 3, 1, 2, 3, 1, 9], 4) == []
    drafter.begin()
    assert drafter.propose([5, 6, 5], 2) == [6, 5]
    assert drafter.grade == 1


def test_lookup_of_long_texts_takes_no_longer_per_token():
    rng, drafter = random.Random(3), LookupDrafter(60_000)
    tokens = []
    for _ in range(60_000):  # with a search of the text this would take minutes
        tokens.append(rng.randrange(50))
        drafter.propose(tokens, 2)


def test_lookup_length_can_be_chosen():
    assert LookupDrafter(64, longest=4, shortest=2).propose([1, 2, 3, 9, 3], 2) == []


# --- the gauge, on simulated machines -------------------------------------------------------------------------------


class Machine:
    """Passes whose time is known: wait for the disk and compute n positions at once; some proposals are right."""

    def __init__(self, disk_s, compute_s, growth, *, right, then=None, drafting_s=0.0, seed=1):
        self.now = 0.0
        self._disk_s, self._compute_s, self._growth = disk_s, compute_s, growth
        self._right, self._then, self._drafting_s = right, right if then is None else then, drafting_s
        self._rng = random.Random(seed)
        self.name, self.grade, self.reading_s, self.is_ready = "simulated", 2, 0.0, True
        self.relative_cost, self.lodging = 0.1 if drafting_s else 0.0, None

    def begin(self):
        pass

    def propose(self, _tokens, n):
        self.now += self._drafting_s * n
        return [1] * n

    def pass_s(self, n_drafted):
        return max(self._disk_s, self._compute_s * (1 + self._growth * n_drafted))

    def n_right(self, n_drafted):
        n = 0
        while n < n_drafted and self._rng.random() < (self._then if n else self._right):
            n += 1
        return n

    def run(self, n_passes, speculation):
        """Seconds per token over n_passes."""
        n_tokens, start, left = 0, self.now, 0
        for _ in range(n_passes):
            draft = speculation.draft([0], MOST_DRAFTED)
            noise = self._rng.uniform(0.95, 1.05)
            seconds, compute_s = self.pass_s(len(draft)) * noise, self._compute_s * (1 + self._growth * len(draft))
            self.now += seconds
            speculation.saw_pass(Counters(), Counters(1, 1, seconds, 0, max(0.0, seconds - compute_s)))
            if draft:
                tokens, left = [1] * self.n_right(len(draft)) + [2], 0
            else:  # the proposals of a machine are all the same: what is right of one that was not used comes singly
                left = left or self.n_right(MOST_DRAFTED) + 1
                left -= 1
                tokens = [1 if left else 2]
            speculation.verified(len(draft), tokens)
            n_tokens += len(tokens)
        return (self.now - start) / n_tokens

    def measure(self, n_passes=1500, gauge=None):
        speculation = Speculation(self, MOST_DRAFTED, gauge, clock=lambda: self.now)
        return self.run(n_passes, speculation)

    def plain_s(self):
        return self.pass_s(0)


def test_reading_bound_passes_draft_as_much_as_they_can():
    machine = Machine(1.0, 0.05, 0.3, right=0.8)
    assert machine.measure() < 1.03 * Machine(1.0, 0.05, 0.3, right=0.8).measure(gauge=Always()) < 0.3


@pytest.mark.parametrize("right", [0.0, 0.1, 0.3])
@pytest.mark.parametrize(("disk_s", "growth"), [(0.0, 1.0), (0.0, 0.5), (1.2, 0.8)])
def test_drafts_that_do_not_help_cost_little(right, disk_s, growth):
    machine = Machine(disk_s, 1.0, growth, right=right)
    assert machine.measure() < 1.03 * machine.plain_s()


def test_compute_bound_passes_draft_where_more_positions_are_cheap():
    machine = Machine(0.0, 1.0, 0.15, right=0.9)
    assert machine.measure() < 0.55 * machine.plain_s()


def test_speculation_ends_when_the_text_changes_and_comes_back():
    machine = Machine(0.0, 1.0, 0.2, right=0.9)
    speculation = Speculation(machine, clock=lambda: machine.now)
    helpful = machine.run(400, speculation)
    machine._right = machine._then = 0.05
    assert machine.run(400, speculation) < 1.03 * machine.plain_s()
    machine._right = machine._then = 0.9
    assert machine.run(400, speculation) < 1.15 * helpful


def test_draft_model_is_used_where_it_pays_and_tried_seldom_where_not():
    assert Machine(1.0, 0.1, 0.3, right=0.85, drafting_s=0.05).measure() < 0.45
    costly = Machine(0.0, 1.0, 1.0, right=0.5, drafting_s=0.5)
    assert costly.measure() < 1.03 * costly.plain_s()


def test_a_process_that_was_stopped_changes_little():
    gauge = Gauge()
    for _ in range(30):
        gauge.see_plain(PassTime(1.0, 0.1))
    gauge.see_plain(PassTime(900.0, 0.1))
    assert gauge._pass_s.value < 1.3


def test_a_prompt_that_waited_for_the_disk_is_proof_enough():
    waited, computed = Gauge(), Gauge()
    waited.see_prompt(100, seconds=2.0, compute_s=0.2, disk_s=1.8)
    computed.see_prompt(100, seconds=2.0, compute_s=1.9, disk_s=1.8)
    assert waited.best(3, MOST_DRAFTED) >= 15
    assert computed.best(3, MOST_DRAFTED) == 0


@pytest.mark.parametrize(("growth", "drafts"), [(0.5, False), (0.2, True)])
def test_a_prompt_tells_what_one_more_position_takes(growth, drafts):
    """With everything in memory: else the first draft of a short answer could cost it a twentieth of its time."""
    gauge = Gauge()
    gauge.see_prompt(9, seconds=5.0, compute_s=1 + 8 * growth, disk_s=0.0)
    gauge.see_plain(PassTime(1.0, 1.0))
    assert (gauge.best(3, 2) > 0) is drafts


def test_mean_forgets():
    mean = Mean(1.0)
    for _ in range(100):
        mean.see(2.0)
    assert mean.value == pytest.approx(2.0, abs=0.01)
