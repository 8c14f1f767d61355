import threading
import time

import pytest
import reference
from engines import engine
from hypothesis import given
from hypothesis import strategies as st

from runtime.answer import meter as meters
from runtime.answer.follower import PlanFollower, check_budget
from runtime.answer.generate import (
    CANCELLED,
    LENGTH,
    STOP,
    Request,
    Step,
    generate,
)
from runtime.answer.meter import Meter
from runtime.answer.sampler import Sampler, Sampling
from runtime.answer.stop import LateText, StopFilter
from runtime.engine.engine import Counters
from runtime.engine.sequence import TokenSequence
from runtime.errors import EngineError, PromptError
from runtime.llama.tokenizer import Tokenizer
from runtime.plans.file import write_plan, write_source_plan
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import streamable_bytes
from runtime.plans.watcher import PlanWatcher
from runtime.settings import Machine

PROMPT = tuple(range(3, 15))
GREEDY = Sampling(temp=0)


class Rig:
    """An engine with a tokenizer and a greedy sampler."""

    def __init__(self, opened):
        self.engine = opened
        self.sequence = TokenSequence(opened, opened.notes.append)
        self.tokenizer = Tokenizer(opened._model, opened.file)
        self.sampler = Sampler(GREEDY, opened.n_vocab)

    def steps(self, prompt=PROMPT, n_predict=8, stop=(), between_tokens=lambda: None):
        request = Request(tuple(prompt), n_predict, stop)
        return generate(self.sequence, self.tokenizer, self.sampler, request, between_tokens)

    def answer(self, *args, **more):
        steps = list(self.steps(*args, **more))
        text = "".join(step.text for step in steps)
        return text, [step.token for step in steps if step.token is not None], steps[-1].finish


@pytest.fixture
def rig(tiny_model):
    with engine(tiny_model("qwen2"), n_threads=2, n_ctx=256, n_ubatch=64) as opened:
        made = Rig(opened)
        yield made
        made.sampler.close()


@pytest.fixture(scope="module")
def greedy_tokens(tiny_model):
    options = {"n_ctx": 256, "n_ubatch": 64, "n_threads": 2}
    return reference.reference_in_subprocess(tiny_model("qwen2"), PROMPT, 24, **options)[1]


# --- answers ------------------------------------------------------------------------------------------------------


def test_greedy_answer_is_llama_cpps(rig, greedy_tokens):
    text, tokens, finish = rig.answer(n_predict=24)
    assert tokens == greedy_tokens
    assert finish == LENGTH
    assert text == rig.tokenizer.decode(tokens)


def test_no_tokens_asked_for(rig):
    assert rig.answer(n_predict=0) == ("", [], LENGTH)
    assert rig.engine.n_past == len(PROMPT)


def test_no_limit_ends_with_the_context(rig):
    _, tokens, finish = rig.answer(prompt=[5] * 240, n_predict=-1)
    assert (len(tokens), finish) == (256 - 240 + 1, LENGTH)


def test_end_of_text_is_not_part_of_the_answer(rig, greedy_tokens, monkeypatch):
    last = greedy_tokens[5]
    monkeypatch.setattr(rig.tokenizer, "ends", lambda token: token == last)
    _, tokens, finish = rig.answer(n_predict=24)
    assert finish == "eos"
    assert tokens == greedy_tokens[: greedy_tokens.index(last)]


def test_prompts_that_do_not_fit(rig):
    with pytest.raises(PromptError, match="empty"):
        rig.answer(prompt=())
    with pytest.raises(PromptError, match="256 tokens"):
        rig.answer(prompt=[5] * 256)


def test_not_a_number(rig, monkeypatch):
    monkeypatch.setattr(rig.engine, "has_numbers", lambda: False)
    with pytest.raises(EngineError, match="NaN"):
        rig.answer()


# --- stop texts -----------------------------------------------------------------------------------------------------


def test_answer_ends_before_a_stop_text(rig):
    whole, tokens, _ = rig.answer(n_predict=16)
    stop = whole[6:9]
    at = whole.index(stop)
    text, cut, finish = rig.answer(n_predict=16, stop=(stop, "never there"))
    assert (text, finish) == (whole[:at], STOP)
    assert cut == tokens[: len(cut)]


class Letters:
    """A tokenizer whose token is a character."""

    class _Decoder:
        def feed(self, token):
            return chr(token)

        def finish(self):
            return ""

    def decoder(self):
        return self._Decoder()


@pytest.mark.parametrize(
    ("text", "stop", "pieces"),
    [
        ("abc", (), ["a", "b", "c", ""]),
        ("xENDy", ("END",), ["x", "", "", "", ""]),
        ("xENxE", ("END",), ["x", "", "", "ENx", "", "E"]),
        ("EENDz", ("END",), ["", "E", "", "", ""]),
        ("abab", ("abac",), ["", "", "", "ab", "ab"]),
        ("ab", ("b", ""), ["a", "", ""]),
        ("x\n\n", ("\n\n", "x\n"), ["", "", ""]),
    ],
)
def test_possible_stop_texts_are_held_back(text, stop, pieces):
    stops = StopFilter(Letters(), stop)
    seen = []
    for letter in text:
        seen.append(stops.feed(ord(letter)))
        if stops.stopped:
            break
    seen.append(stops.finish())
    assert seen == pieces[: len(seen)]
    assert "".join(seen) == "".join(pieces)


class Words(Letters):
    """A tokenizer with one token, a whole text."""

    class _Decoder(Letters._Decoder):
        def feed(self, token):
            return token

    def decoder(self):
        return self._Decoder()


@pytest.mark.parametrize("stop", [("d", "b"), ("b", "d"), ("cd", "bc"), ("d", "bcd")])
def test_an_answer_ends_before_the_first_stop_text_whatever_their_order(stop):
    stops = StopFilter(Words(), stop)
    assert stops.feed("abcde") == "a"
    assert stops.stopped
    assert stops.finish() == ""


class Bytes(Tokenizer):
    """A tokenizer whose token is a byte."""

    def __init__(self):
        pass

    def piece(self, token, *, special=False):
        return bytes([token])


@given(st.one_of(st.binary(), st.text().map(str.encode)))
def test_a_text_that_is_looked_at_late_is_the_same(text):
    early, late = StopFilter(Bytes()), LateText(Bytes())
    said = [early.feed(byte) for byte in text] + [early.finish()]
    assert [late.feed(byte) for byte in text] == [""] * len(text)
    assert late.finish() == "".join(said)


# --- sequences ------------------------------------------------------------------------------------------------------


def test_common_beginning_is_not_computed_again(rig):
    _, first, _ = rig.answer(n_predict=6)
    conversation = [*PROMPT, *first, 7, 8, 9]
    before = rig.engine.counters.tokens
    _, second, _ = rig.answer(prompt=conversation, n_predict=1)
    assert rig.engine.counters.tokens - before == 1 + 3  # the last token of the answer was never fed
    rig.sequence.feed(PROMPT)
    assert rig.engine.n_past == len(PROMPT) == len(rig.sequence.tokens)
    rig.sequence.feed(conversation)
    assert rig.sampler.sample(rig.engine) == second[0]


def test_state_that_cannot_be_shortened_is_read_again(rig, monkeypatch):
    _, first, _ = rig.answer()
    truncate = rig.engine.truncate

    def whole_only(n_past):
        if n_past:
            raise EngineError("this model's state cannot be shortened")
        truncate(0)

    monkeypatch.setattr(rig.engine, "truncate", whole_only)
    assert rig.answer()[1] == first
    assert len(rig.engine.notes) == 1


def test_cancelled_answer_keeps_its_text_and_can_go_on(rig, greedy_tokens):
    steps, seen = rig.steps(n_predict=24), []
    for step in steps:
        seen.append(step)
        if len(seen) == 5:
            rig.engine.cancel()
    assert [step.token for step in seen] == [*greedy_tokens[:5], None]
    assert seen[-1].finish == CANCELLED
    rest = rig.answer(prompt=[*PROMPT, *greedy_tokens[:5]], n_predict=4)
    assert rest[1] == greedy_tokens[5:9]


def test_cancel_that_came_too_late_is_forgotten(rig):
    rig.answer()
    rig.engine.cancel()
    rig.engine.forget_cancel()
    assert rig.answer()[2] == LENGTH


# --- plans ----------------------------------------------------------------------------------------------------------


def test_new_plans_are_followed_and_change_no_token(rig, greedy_tokens, tmp_path):
    path = tmp_path / "plan.bin"
    follow = PlanFollower(rig.engine, PlanWatcher(path, rig.engine.file.hash), 0, rig.engine.notes.append)
    plans = {4: Plan(2, 1, Layout.EVEN), 9: Plan(0, 2, Layout.BALANCED, model_hash=rig.engine.file.hash)}
    tokens = []
    for step in rig.steps(n_predict=24, between_tokens=follow):
        tokens.append(step.token)
        if len(tokens) in plans:
            write_plan(path, plans[len(tokens)])
            follow._watcher._next_look_s = 0
    assert tokens == greedy_tokens
    assert rig.engine.layout.plan_changes == 2
    assert (rig.engine.plan.w, rig.engine.plan.generation) == (2, 2)
    assert rig.engine.notes == []


def test_plan_outside_the_budget_is_refused_once(rig, tmp_path):
    budget = rig.engine.ledger.total_bytes
    path = tmp_path / "plan.bin"
    follow = PlanFollower(rig.engine, PlanWatcher(path, rig.engine.file.hash), budget, rig.engine.notes.append)
    for k in (4, 3):
        write_source_plan(path, k, 4)
        follow._watcher._next_look_s = 0
        follow()
    write_plan(path, Plan(1, 1, budget_bytes=10**6))
    follow._watcher._next_look_s = 0
    follow()
    assert rig.engine.layout.plan_changes == 0
    assert len(rig.engine.notes) == 3
    assert all("was not taken" in text for text in rig.engine.notes)


def test_a_plan_never_lifts_the_cap(rig, tmp_path):
    path, floor = tmp_path / "plan.bin", rig.engine.layout.fixed_bytes + streamable_bytes(rig.engine.file) // 2
    watcher = PlanWatcher(path, rig.engine.file.hash)
    follow = PlanFollower(rig.engine, watcher, floor, rig.engine.notes.append, cap_bytes=floor)
    budgets = []
    for budget in (2 * floor, floor - 2 * 10**6, 3 * floor, floor):
        write_plan(path, Plan(0, 1, budget_bytes=budget))
        watcher._next_look_s = 0
        follow()
        budgets.append(follow.budget_bytes)
        assert rig.engine.ledger.total_bytes <= budgets[-1]
    assert budgets == [floor, floor - 2 * 10**6, floor, floor]
    assert [f"inside the {floor / 1e6:.1f} MB of -m" in text for text in rig.engine.notes] == [True, True]


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (Plan(2**31 - 1, 2**31 - 1), "k=2147483647, w=2147483647 is no plan for 4 layers"),
        (Plan(0, 5), "w=5 is no plan for 4 layers"),
        (Plan(0, 1, budget_bytes=2**62), "is more than the"),
    ],
)
def test_absurd_plans_are_refused(rig, tmp_path, plan, said):
    path = tmp_path / "plan.bin"
    follow = PlanFollower(rig.engine, PlanWatcher(path, 0), 0, rig.engine.notes.append)
    before = rig.engine.plan
    write_plan(path, plan)
    follow()
    assert (rig.engine.plan, follow.budget_bytes) == (before, 0)
    assert len(rig.engine.notes) == 1
    assert said in rig.engine.notes[0]


def test_a_plan_without_address_space_is_refused_and_the_answer_goes_on(rig, tmp_path, monkeypatch):
    path = tmp_path / "plan.bin"
    follow = PlanFollower(rig.engine, PlanWatcher(path, 0), 0, rig.engine.notes.append)
    before = rig.engine.plan

    def refuse(*_, **__):
        raise EngineError("the system gave no address space")

    monkeypatch.setattr(rig.engine._store, "apply", refuse)
    write_plan(path, Plan(1, 2))
    follow()
    assert rig.engine.plan == before
    assert ["was not taken" in text for text in rig.engine.notes] == [True]


def test_damaged_plan_file_is_told_once(rig, tmp_path):
    path = tmp_path / "plan.bin"
    path.write_bytes(b"x" * 200)
    path.chmod(0o600)
    follow = PlanFollower(rig.engine, PlanWatcher(path, 0), 0, rig.engine.notes.append)
    for _ in range(3):
        follow()
        time.sleep(0.15)  # contents that stay as they are for 0.2 s are no write in progress
    assert len(rig.engine.notes) == 1


def test_plan_with_its_own_budget_is_the_engines_to_judge(rig):
    check_budget(rig.engine, Plan(4, 4, budget_bytes=1), 10)
    check_budget(rig.engine, Plan(4, 4), 0)


# --- figures --------------------------------------------------------------------------------------------------------


def test_figures_of_an_answer(rig):
    meter = Meter(rig.engine)
    for step in rig.steps(n_predict=12):
        meter.see(step)
    figures = meter.statistics()
    assert figures.n_tokens == 12
    assert figures.ttft_s > 0
    assert figures.decode_ms_per_token == pytest.approx(1000 / figures.tokens_per_s, rel=0.9)
    assert figures.bytes_asked_per_token == pytest.approx(rig.engine.streamed_bytes, rel=0.5)


def test_limit_follows_the_profiled_disk(rig):
    meter = Meter(rig.engine, Machine(disk_bytes_per_s=1e3))
    for step in rig.steps(n_predict=4):
        meter.see(step)
    assert meter.statistics().limit_ms_per_token == pytest.approx(rig.engine.streamed_bytes)


class Stepped:
    """An engine whose passes are given: seconds, seconds waited, bytes read, seconds the disk was busy."""

    def __init__(self, streamed_bytes):
        self.streamed_bytes, self.counters = streamed_bytes, Counters()

    def figures(self, machine, passes):
        meter, counters = Meter(self, machine), self.counters
        for seconds, wait_s, n_bytes, busy_s in [(1, 0, 0, 0), *passes]:
            counters.passes, counters.seconds = counters.passes + 1, counters.seconds + seconds
            counters.wait_s, counters.busy_s = counters.wait_s + wait_s, counters.busy_s + busy_s
            counters.bytes_read += n_bytes
            meter.see(Step(1))
        return meter.statistics()


def test_the_limit_is_that_of_what_was_streamed_meanwhile():
    """Keys and values take the place of weights: the last pass streams most."""
    stepped = Stepped(0)
    counters, meter = stepped.counters, Meter(stepped, Machine(1e5, 0.001))
    for streamed in (7000, 1000, 2000, 3000):
        stepped.streamed_bytes = streamed
        counters.passes, counters.seconds = counters.passes + 1, counters.seconds + 0.1
        counters.bytes_read, counters.busy_s = counters.bytes_read + streamed, counters.busy_s + streamed / 1e5
        meter.see(Step(1))
    figures = meter.statistics()
    assert figures.streamed_bytes_per_pass == 2000  # the first step counts for the first token only
    assert figures.limit_ms_per_token == pytest.approx(20)


def test_a_disk_slower_than_its_profile_is_no_low_yield():
    figures = Stepped(1000).figures(Machine(1e5, 0.001), [(0.1, 0.09, 1000, 0.1)] * 8)
    assert figures.yield_ == pytest.approx(1)


def test_an_idle_disk_is_no_slow_one():
    """Computing takes all the time, the disk reads a tenth of it."""
    figures = Stepped(1000).figures(Machine(1e5, 0.04), [(0.1, 0, 1000, 0.01)] * 8)
    assert figures.limit_ms_per_token == pytest.approx(40)


def test_the_runs_own_overhead_is_not_in_the_limit():
    streaming = [(0.1, 0.01, 1000, 0.02)] * 8
    assert Stepped(1000).figures(Machine(1e5, 0.03), streaming).limit_ms_per_token == pytest.approx(30)
    assert Stepped(1000).figures(Machine(), streaming).limit_ms_per_token is None  # who knows
    assert Stepped(0).figures(Machine(1e5, 0.03), [(0.025, 0, 0, 0)] * 8).limit_ms_per_token == pytest.approx(25)


def test_without_a_profile_the_disk_is_the_limit_where_it_takes_longest():
    figures = Stepped(1000).figures(Machine(), [(0.1, 0.08, 1000, 0.09)] * 8)
    assert figures.limit_ms_per_token == pytest.approx(90)


def test_bytes_read_are_those_the_device_delivered(monkeypatch):
    delivered = iter((5000, 13000))
    monkeypatch.setattr(meters, "device_bytes_read", lambda: next(delivered))
    figures = Stepped(500).figures(Machine(), [(0.1, 0.09, 500, 0.09)] * 8)
    assert (figures.bytes_read_per_token, figures.bytes_asked_per_token) == (1000, 500)


def test_one_token_has_no_speed(rig):
    meter = Meter(rig.engine)
    for step in rig.steps(n_predict=1):
        meter.see(step)
    figures = meter.statistics()
    assert figures.ttft_s > 0
    assert figures.tokens_per_s is None
    assert figures.yield_ is None


def test_cancel_from_another_thread(rig):
    timer = threading.Thread(target=lambda: (time.sleep(0.05), rig.engine.cancel()))
    timer.start()
    finish = ""
    for _ in range(200):
        finish = rig.answer(prompt=[5] * 200, n_predict=50)[2]
        if finish == CANCELLED:
            break
    timer.join()
    assert finish == CANCELLED
