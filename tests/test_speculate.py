"""Drafted tokens change no answer, and figures of runs with drafts."""

import itertools
import json
import re

import numpy as np
import pytest
from answers import AGAIN, GREEDY, RECALL, REPEATING, STORIES, Always, Known, Rig, lookup
from engines import engine

from h2o_cli import main as cli
from h2o_cli.session import model
from runtime.answer.generate import CANCELLED, EOS, LENGTH, STOP, Request, generate
from runtime.answer.sampler import Sampler, Sampling
from runtime.answer.speculate import MOST_DRAFTED, Speculation
from runtime.engine.sequence import TokenSequence
from runtime.errors import BudgetError, H2OError
from runtime.llama import quantize
from runtime.plans.plan import Plan


@pytest.fixture(scope="module")
def rig(bundled_model):
    with engine(bundled_model, Plan(2, 1), n_logits=MOST_DRAFTED + 1) as opened:
        yield Rig(opened)


def test_repeating_prompts_give_the_same_tokens_in_half_the_passes(rig):
    per_pass = []
    for prompt, n in REPEATING:
        plain = rig.answer(prompt, n)
        assert rig.figures.tokens_per_pass == 1
        assert rig.answer(prompt, n, lookup()) == plain
        per_pass.append(rig.figures.tokens_per_pass)
        assert rig.figures.accepted <= rig.figures.drafted
        assert sum(rig.figures.drafted for _ in [0]) > 0
    assert min(per_pass) >= 2.0, per_pass


@pytest.mark.parametrize("wrong", [0.0, 0.3, 0.8, 1.0])
def test_no_drafter_changes_the_answer(rig, wrong):
    for sampling in (GREEDY, Sampling(seed=7), Sampling(temp=1.5, seed=8, repeat_penalty=1.3)):
        plain = rig.answer(STORIES[0], 30, sampling=sampling)
        text = rig.tokenizer.encode(STORIES[0]) + plain[0]
        drafter = Known(text, wrong, rig.engine.n_vocab)
        assert rig.answer(STORIES[0], 30, Speculation(drafter, 8, Always()), sampling=sampling) == plain
        if wrong == 0:
            assert rig.figures.tokens_per_pass > 5


def test_sampled_answers_are_those_of_one_token_per_pass(rig):
    for seed in range(4):
        sampling = Sampling(temp=1.0, seed=seed)
        plain = rig.answer(f"{RECALL}Emma's scarf?", 20, sampling=sampling)
        assert rig.answer(f"{RECALL}Emma's scarf?", 20, lookup(), sampling=sampling) == plain


def test_every_length_and_every_context_end(rig, monkeypatch):
    prompt = rig.tokenizer.encode(AGAIN)
    whole = prompt + rig.answer(prompt, 14)[0]
    for n in range(1, 9):
        tokens, _, finish = rig.answer(prompt, n, Speculation(Known(whole), 8, Always()))
        assert (tokens, finish) == (whole[len(prompt) :][:n], LENGTH)
    monkeypatch.setattr(rig.tokenizer, "ends", lambda token: False)
    long = (prompt * 60)[: rig.engine.settings.n_ctx - 5]
    plain = rig.answer(long, -1)
    assert (len(plain[0]), plain[2]) == (6, LENGTH)
    assert rig.answer(long, -1, Speculation(Known(long + plain[0]), 8, Always())) == plain


def test_stop_texts_and_ends_inside_a_draft(rig, monkeypatch):
    whole, text, _ = rig.answer(STORIES[1], 20)
    known = rig.tokenizer.encode(STORIES[1]) + whole
    for start, end in itertools.combinations(range(0, 30, 7), 2):
        stop = text[start:end]
        plain = rig.answer(STORIES[1], 20, stop=[stop])
        assert rig.answer(STORIES[1], 20, Speculation(Known(known), 8, Always()), stop=[stop]) == plain
        assert plain[2] == STOP
    monkeypatch.setattr(rig.tokenizer, "ends", lambda token: token == whole[6])
    plain = rig.answer(STORIES[1], 20)
    assert plain[2] == EOS
    assert rig.answer(STORIES[1], 20, Speculation(Known(known), 8, Always())) == plain


def test_cancelled_answer_can_go_on(rig):
    plain, _, _ = rig.answer(STORIES[2], 24)
    prompt = rig.tokenizer.encode(STORIES[2])
    sequence = TokenSequence(rig.engine)
    speculation = Speculation(Known(prompt + plain, 0.3, rig.engine.n_vocab), 8, Always())
    rig.engine.truncate(0)
    sampler = Sampler(GREEDY, rig.engine.n_vocab)
    seen = []
    for step in generate(sequence, rig.tokenizer, sampler, Request(tuple(prompt), 24), speculation=speculation):
        seen.append(step)
        if len(seen) == 5:
            rig.engine.cancel()
    sampler.close()
    assert seen[-1].finish == CANCELLED
    tokens = [step.token for step in seen[:-1]]
    assert 5 <= len(tokens) <= 5 + MOST_DRAFTED
    rest = rig.answer([*prompt, *tokens], 24 - len(tokens), lookup(), sequence=sequence)[0]
    assert tokens + rest == plain


def test_state_that_cannot_be_shortened_is_computed_again(rig, monkeypatch):
    plain = rig.answer(STORIES[1], 10)
    known = rig.tokenizer.encode(STORIES[1]) + plain[0]
    truncate = rig.engine.truncate

    def whole_only(n_past):
        if 0 < n_past < rig.engine.n_past:
            raise H2OError("no")
        truncate(n_past)

    monkeypatch.setattr("runtime.engine.sequence.EngineError", H2OError)
    monkeypatch.setattr(rig.engine, "truncate", whole_only)
    assert rig.answer(STORIES[1], 10, Speculation(Known(known, 0.5, rig.engine.n_vocab), 4, Always())) == plain


# --- types whose last bits depend on the batch ----------------------------------------------------------------------


def batch_noise(opened, tokens, n_known):
    """The most a logit changes when tokens behind the first n_known are computed nine at a time instead of singly."""
    rows = []
    for size in (1, MOST_DRAFTED + 1):
        opened.truncate(0)
        opened.forward(tokens[:n_known])
        seen = []
        for start in range(n_known, len(tokens) - size + 1, size):
            opened.forward(tokens[start : start + size], n_logits=size)
            seen += [opened.logits(i).copy() for i in range(size)]
        rows.append(np.array(seen))
    n = min(len(part) for part in rows)
    return float(np.abs(rows[0][:n] - rows[1][:n]).max())


@pytest.mark.parametrize("file_type", ["f16", "f32"])
def test_other_answers_are_near_ties_within_the_noise(bundled_variant, tiny_model, file_type):
    for path in (bundled_variant(file_type), tiny_model("qwen2", file_type)):
        with engine(path, Plan(1, 1), n_logits=MOST_DRAFTED + 1) as opened:
            rig = Rig(opened)
            for prompt in (AGAIN, STORIES[0]):
                plain = rig.answer(prompt, 28)[0]
                text = rig.tokenizer.encode(prompt) + plain
                found = rig.answer(prompt, 28, Speculation(Known(text, 0.1, opened.n_vocab), 8, Always()))[0]
                if found != plain:
                    assert_near_tie(rig, text, len(text) - len(plain), plain, found)


def assert_near_tie(rig, text, n_prompt, plain, found):
    first = next(i for i, (a, b) in enumerate(zip(plain, found, strict=True)) if a != b)
    noise = batch_noise(rig.engine, text, n_prompt)
    rig.engine.truncate(0)
    rig.engine.forward(text[:n_prompt])
    for token in plain[:first]:
        rig.engine.forward([token])
    logits = rig.engine.logits()
    assert 0 <= logits[plain[first]] - logits[found[first]] <= 2 * noise


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run(capsys, bundled_model, tmp_path, monkeypatch):
    """run(*arguments): exit code, standard output, standard error of `h2o run` on the bundled model."""
    monkeypatch.setattr("h2o_cli.session.model.default_plan_path", lambda: tmp_path / "plan")

    def call(*arguments):
        flags = ["run", str(bundled_model), "-t", "1", "--temp", "0", "--ctx", "256", *map(str, arguments)]
        code = cli.run_command(flags)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def test_figures_of_a_run(run):
    code, out, err = run("-p", AGAIN, "-n", 16)
    assert code == 0
    assert err.count("h2o: ") == 1
    found = json.loads(run("-p", AGAIN, "-n", 16, "--json")[1])
    off = json.loads(run("-p", AGAIN, "-n", 16, "--json", "--speculate", "off")[1])
    assert found["tokens"] == off["tokens"]
    assert (off["speculation"], off["drafted"], off["accepted"], off["tokens_per_pass"]) == ("off", 0, 0, 1)
    assert found["speculation"] in ("lookup", "off")
    assert found["tokens_per_pass"] >= 1
    assert out == found["text"] + "\n"
    assert "draft_bytes" not in found["ledger"]


def test_draft_model_inside_the_budget(run, bundled_variant):
    draft = ["--draft", bundled_variant("q4_0"), "-p", STORIES[0], "-n", 30]
    code, _, err = run(*draft, "-m", 40)
    assert code == 1
    floor = int(re.search(r"works here is -m (\d+)", err).group(1))
    code, out, err = run(*draft, "-m", floor, "--json")
    for _ in range(3):  # with a draft model the number is measured in each run, and runs leave memory in this process
        if code:
            floor += 1
            code, out, err = run(*draft, "-m", floor, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["ledger"]["draft_bytes"] > 0
    assert found["peak_memory_bytes"] < 10**9
    assert sum(found["ledger"].values()) <= floor * 10**6
    plain = json.loads(run("-p", STORIES[0], "-n", 30, "--speculate", "off", "--json")[1])
    assert found["tokens"] == plain["tokens"]


def test_draft_auto_makes_its_copy_in_the_cache_folder(run, tmp_path):
    arguments = ["--draft", "auto", "-p", STORIES[0], "-n", 8, "-m", 1000]  # the whole test process counts
    code, _, err = run(*arguments)
    assert (code, err.count("making a q4_k_m copy")) == (0, 1)
    copies = list((tmp_path / ".user" / "cache" / "h2o-llm").glob("*.gguf"))
    assert len(copies) == 1
    code, _, err = run(*arguments)
    assert (code, err.count("making a q4_k_m copy")) == (0, 0)


def test_drafts_that_are_refused(run, tiny_model, monkeypatch):
    code, _, err = run("-p", "a", "-n", 1, "--draft", tiny_model("llama"))
    assert code == 1
    assert "vocabulary" in err
    assert run("-p", "a", "--draft", "auto", "--speculate", "off")[0] == 2
    assert run("-p", "a", "--speculate", "often")[0] == 2
    assert run("-p", "a", "--draft", "nowhere.gguf")[0] == 1
    monkeypatch.setattr("h2o_cli.session.drafting.can_take_back", lambda _: False)
    code, _, err = run("-p", "a", "-n", 2, "--draft", "auto")
    assert (code, err.count("speculation is off")) == (0, 1)
    code, _, err = run("-p", "a", "-n", 2)
    assert (code, err.count("speculation is off")) == (0, 0)


def test_a_budget_without_room_for_drafts_still_runs(run):
    code, _, err = run("-p", "a", "-n", 1, "-m", 10, "--speculate", "off")
    assert code == 1
    floor = int(re.search(r"works here is -m (\d+)", err).group(1))
    assert run("-p", AGAIN, "-n", 4, "-m", floor + 1)[0] == 0


def test_budget_error_names_the_floor_with_the_draft(bundled_model):
    with pytest.raises(BudgetError) as caught, engine(bundled_model, Plan(0, 1, budget_bytes=10**6), draft_bytes=10**9):
        pass
    assert caught.value.floor_bytes > 10**9


def test_weights_are_not_read_while_a_copy_is_made(run, monkeypatch):
    read, made, make = [], [], quantize._make
    head_start = model.head_start
    monkeypatch.setattr(model, "head_start", lambda *args: (read.append(1), head_start(*args))[1])
    monkeypatch.setattr(quantize, "_make", lambda *args: (made.append(len(read)), make(*args)))
    arguments = ["--draft", "auto", "-p", "a", "-n", 2, "-m", 1000]
    assert run(*arguments)[0] == 0
    assert (read, made) == ([], [0])
    assert run(*arguments)[0] == 0
    assert (read, made) == ([1], [0])
