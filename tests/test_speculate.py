import itertools
import json
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from engines import engine

from h2o_cli import main as cli
from h2o_cli.session import model
from h2o_cli.session.drafting import best_copy
from runtime.answer.drafters import DraftModel, LookupDrafter, ModelDrafter, can_take_back, check_vocabulary
from runtime.answer.gauge import Gauge, Mean, PassTime
from runtime.answer.generate import CANCELLED, EOS, LENGTH, STOP, Request, generate
from runtime.answer.meter import Meter
from runtime.answer.sampler import Sampler, Sampling
from runtime.answer.speculate import MOST_DRAFTED, Speculation
from runtime.engine.engine import Counters
from runtime.engine.sequence import TokenSequence
from runtime.errors import BudgetError, H2OError, ModelError
from runtime.llama import quantize
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.llama.tokenizer import Tokenizer
from runtime.plans.plan import Plan
from runtime.settings import Settings
from runtime.sizes import MB

RECALL = (
    "It was a rainy day and Henry felt tired. Emma's scarf is in the green pot. Henry found an old map in a tin. "
    "George's book is in the yellow bucket. The map showed a way to the museum. Zoe's frog is in the red drawer. "
    "Henry and Molly packed tea and a drum. Bill's shell is in the small tent. They walked for hours. Where is "
)
LIST = (
    'Kate said: "tent, lonely, mill, station, church, whistle, cupboard, bread." Simon went to the lake. '
    'Some children were playing with a kite on the grass. Again Kate said: "tent,'
)
AGAIN = "locker blue museum green bird market sad turtle hedgehog red. Again: locker"
REPEATING = [(f"{RECALL}{who}", 8) for who in ("Emma's scarf?", "Zoe's frog?", "Bill's shell?")] + [
    (LIST, 18),
    (AGAIN, 16),
]
STORIES = ["One foggy summer Simon went to the castle.", "Tom lost his blue hat.", "Once upon a time there was a girl"]
GREEDY = Sampling(temp=0)
FOUR_BITS = quantize.COPY_TYPES[0]


class Always(Gauge):
    """Drafts as much as possible, whatever it costs."""

    def best(self, grade, most):
        return most


class Rig:
    """An engine that answers with or without speculation."""

    def __init__(self, opened):
        self.engine = opened
        self.tokenizer = Tokenizer(opened._model, opened.file)
        self.figures = None

    def answer(self, prompt, n_predict=24, speculation=None, *, sampling=GREEDY, stop=(), sequence=None):
        """(tokens, text, finish) of an answer to a text or to tokens."""
        sequence = sequence or TokenSequence(self.engine, self.engine.notes.append)
        self.engine.truncate(len(sequence.tokens))
        sampler, meter = Sampler(sampling, self.engine.n_vocab), Meter(self.engine)
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        out, text, step = [], "", None
        request = Request(tuple(tokens), n_predict, tuple(stop))
        for step in generate(sequence, self.tokenizer, sampler, request, speculation=speculation):
            meter.see(step)
            out += [step.token] if step.token is not None else []
            text += step.text
        self.figures = meter.statistics()
        sampler.close()
        assert sequence.tokens == [*tokens, *out][: self.engine.n_past]
        assert self.engine.n_past == len(sequence.tokens)
        return out, text, step.finish


def lookup(n_ctx=512, gauge=None):
    return Speculation(LookupDrafter(n_ctx), MOST_DRAFTED, gauge or Always())


@pytest.fixture(scope="module")
def rig(bundled_model):
    with engine(bundled_model, Plan(2, 1), n_logits=MOST_DRAFTED + 1) as opened:
        yield Rig(opened)


class Known:
    """A drafter that knows the answer, and gives a wrong token with a probability."""

    name, lodging, relative_cost, reading_s, grade, is_ready = "known", None, 0.0, 0.0, 0, True

    def __init__(self, text, wrong=0.0, n_vocab=0, seed=1):
        self._text, self._wrong, self._n_vocab = list(text), wrong, n_vocab
        self._rng = random.Random(seed)

    def begin(self):
        pass

    def propose(self, tokens, n):
        right = self._text[len(tokens) : len(tokens) + n]
        return [self._rng.randrange(self._n_vocab) if self._rng.random() < self._wrong else t for t in right]

    def close(self):
        pass


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


def test_mean_forgets():
    mean = Mean(1.0)
    for _ in range(100):
        mean.see(2.0)
    assert mean.value == pytest.approx(2.0, abs=0.01)


# --- the same answers -----------------------------------------------------------------------------------------------


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


# --- a draft model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def draft_model(bundled_variant):
    file = ModelFile.open(bundled_variant("q4_0"))
    model = DraftModel(file, Settings(n_ctx=512))
    yield model
    model.close()


def test_low_bit_draft_of_the_same_model(rig, draft_model):
    drafter = ModelDrafter(draft_model, 0.5, rig.engine.n_vocab)
    assert not draft_model.is_ready
    per_pass = []
    for prompt in STORIES:
        plain = rig.answer(prompt, 40)
        speculation = Speculation(drafter, MOST_DRAFTED, Always())
        drafter.begin()
        while not draft_model.is_ready:
            time.sleep(0.01)
        assert rig.answer(prompt, 40, speculation) == plain
        per_pass.append(rig.figures.tokens_per_pass)
    drafter.close()
    assert min(per_pass) >= 2.5, per_pass
    assert drafter.reading_s > 0 or len(rig.tokenizer.encode(STORIES[0])) < 17


def test_draft_model_follows_texts_that_change(draft_model):
    drafter = ModelDrafter(draft_model, 0.5, draft_model.engine.n_vocab)
    drafter.begin()
    drafter.propose([1, 2, 3], 2)  # the first pass loads the weights
    drafter.begin()
    one = drafter.propose([1, *range(20, 50)], 4)
    assert drafter.propose([1, *range(20, 50), *one[:2], 99], 3) != []
    drafter.begin()
    assert drafter.propose([1, *range(20, 50)], 4) == one
    assert drafter.propose([1, *range(20, 50), 10**5], 4) == []  # no token of the draft model
    drafter.begin()
    assert drafter.propose([1] * 510, 8) != []
    assert drafter.propose([1] * 512, 8) == []
    assert drafter.propose([1] * 508, 8) != []
    drafter.close()
    narrow = ModelDrafter(draft_model, 0.5, min(one[1:]) if min(one[1:]) > 50 else 51)
    narrow.begin()
    assert all(token < narrow._n_vocab for token in narrow.propose([1, *range(20, 50)], 4))
    narrow.close()


def test_draft_bytes_are_what_it_takes(draft_model):
    ledger = draft_model.engine.ledger
    parts = (ledger.kv_bytes, ledger.compute_bytes, ledger.embedding_bytes, ledger.sampler_bytes, ledger.resident_bytes)
    assert draft_model.n_bytes == sum(parts)
    assert ledger.resident_bytes > 0.8 * draft_model.file.n_bytes - 500_000


def test_vocabularies_must_agree(tiny_model, bundled_model):
    models = [HollowModel(ModelFile.open(p)) for p in (bundled_model, tiny_model("llama"), bundled_model)]
    try:
        check_vocabulary(models[0], models[2], ("a", "b"))
        assert can_take_back(models[0])
        with pytest.raises(ModelError, match=r"b\.gguf cannot draft for a\.gguf"):
            check_vocabulary(models[0], models[1], ("a.gguf", "b.gguf"))
    finally:
        for model in models:
            model.free()


# --- a low-bit copy -------------------------------------------------------------------------------------------------


class NoProgress:
    def __init__(self, share):
        assert share() == 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def test_copy_is_made_once_by_one_of_several(bundled_model, tmp_path, monkeypatch):
    made, notes, make = [], [], quantize._make
    monkeypatch.setattr(quantize, "_make", lambda *args: (made.append(1), make(*args)))
    file = ModelFile.open(bundled_model)
    paths = []
    threads = [
        threading.Thread(
            target=lambda: paths.append(quantize.low_bit_copy(file, FOUR_BITS, tmp_path, notes.append, NoProgress))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(paths)) == len(made) == 1
    assert f"{file.hash:016x}" in paths[0].name
    assert paths[0] == quantize.copy_path(file, FOUR_BITS, tmp_path)
    assert {p.name for p in tmp_path.iterdir() if p.name.endswith((".gguf", ".part"))} == {paths[0].name}
    paths[0].write_bytes(b"damaged")
    assert quantize.low_bit_copy(file, FOUR_BITS, tmp_path, notes.append, NoProgress) == paths[0]
    assert ModelFile.open(paths[0]).n_layers == file.n_layers


def test_copies_that_cannot_be_made(bundled_model, bundled_variant, tmp_path, monkeypatch):
    file = ModelFile.open(bundled_model)
    assert not quantize.useful_copies(ModelFile.open(bundled_variant("q4_0")))
    with pytest.raises(H2OError, match="no copy of"):
        quantize.low_bit_copy(replace(file, paths=(tmp_path / "gone.gguf",)), FOUR_BITS, tmp_path, print, NoProgress)
    (tmp_path / "a file").write_text("")
    with pytest.raises(H2OError, match="cannot be written"):
        quantize.low_bit_copy(file, FOUR_BITS, tmp_path / "a file", print, NoProgress)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(H2OError, match="0 B free"):
        quantize.low_bit_copy(file, FOUR_BITS, tmp_path, print, NoProgress)
    assert [p for p in tmp_path.rglob("*") if p.suffix in (".gguf", ".part")] == []


_QUANTIZE = """
import sys
from runtime.llama.quantize import child
assert child(*sys.argv[1:]) == 0
print([row.split()[1] for row in open("/proc/self/status") if row.startswith("VmHWM")][0])
"""


@pytest.mark.parametrize("dim", [256, 288])
def test_sizes_of_copies_are_known_beforehand(tiny_model, tmp_path, dim):
    for tied in (0, 1):
        path = tiny_model(f"llama:layers=4,dim={dim},ffn=512,heads=4,kv_heads=4,vocab=4096,ctx=64,tied={tied}")
        file = ModelFile.open(path)
        for kind in quantize.COPY_TYPES:
            quantize.quantize(path, tmp_path / "copy.gguf", kind.name)
            found = (tmp_path / "copy.gguf").stat().st_size
            assert found == pytest.approx(quantize.copy_bytes(file, kind), rel=0.04)


def test_a_copy_is_made_in_little_memory(tiny_model, tmp_path):
    path = tiny_model("llama:layers=1,dim=256,ffn=256,heads=4,kv_heads=4,vocab=98304,ctx=64")
    command = [sys.executable, "-c", _QUANTIZE, path, tmp_path / "copy.gguf", "q8_0"]
    peak_bytes = 1024 * int(subprocess.run(command, capture_output=True, check=True).stdout)
    assert peak_bytes < path.stat().st_size + 60 * MB  # its largest matrix has 101 MB as f32


def test_more_bits_where_they_take_less_time(tiny_model, bundled_variant, monkeypatch):
    monkeypatch.setattr("h2o_cli.session.drafting.GUESSED_DRAFT_BYTES", 0)
    monkeypatch.setattr("h2o_cli.session.drafting.guessed_room", lambda _, budget_bytes: budget_bytes)
    file = ModelFile.open(tiny_model("llama"))

    def best(room, disk_bytes_per_s=10**7):
        return best_copy(file, "auto", int(room * file.n_bytes), 32, disk_bytes_per_s).name

    assert best(0.1) == "q4_k_m"  # none fits
    assert best(0.5) == "q6_k"  # q8_0 does not fit
    assert best(0.6) == "q8_0"
    assert best(2.0) == "q4_k_m"  # nothing is read, so what counts is how fast it computes
    assert best(0.6, 10**12) == "q4_k_m"
    assert best_copy(file, None, 10**9, 32, 0) is best_copy(file, "small.gguf", 10**9, 32, 0) is None
    assert best_copy(ModelFile.open(bundled_variant("q4_0")), "auto", 10**9, 32, 0) is None


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
