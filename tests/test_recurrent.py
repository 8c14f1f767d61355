"""Models whose state has no positions: what a pass that ends early leaves, and how an answer ends."""

from __future__ import annotations

import itertools
import signal

import pytest
from broken_models import valid_model
from engines import engine, greedy
from recurrent_models import ARCHS, recurrent_model
from test_faults import end, ends_soon, is_disk_error, start, text_of  # noqa: F401 - start is a fixture

from h2o_cli import main as cli
from runtime.answer.generate import CANCELLED, Request, generate
from runtime.answer.sampler import Sampler, Sampling
from runtime.engine.sequence import TokenSequence
from runtime.errors import Cancelled, DiskError, EngineError
from runtime.llama.model_file import ModelFile
from runtime.llama.tokenizer import Tokenizer
from runtime.plans.file import write_plan
from runtime.plans.plan import Plan

PROMPT = [5, 6, 7, 8]
LONG = ["-p", "he is in the stone house", "-n", "900", "--temp", "0", "-t", "1", "--ctx", "1024"]


@pytest.fixture(params=ARCHS)
def model(request, model_folder):
    return recurrent_model(model_folder, request.param)


def fail_in_pass(opened, error, n_reads=3):
    """Reads fail (DiskError) or somebody cancels, after some more of them."""
    files, count = opened._store.files, itertools.count()
    read = type(files).read

    def broken(*arguments):
        if next(count) >= n_reads:
            if isinstance(error, Cancelled):
                opened.cancel()
            else:
                raise error
        read(files, *arguments)

    files.read = broken


@pytest.mark.parametrize("error", [Cancelled(2), DiskError("the disk is gone")])
def test_a_pass_that_ends_early_leaves_an_empty_sequence_that_can_go_on(error, model):
    with engine(model, Plan(0, 1)) as opened:
        expected = greedy(opened, PROMPT, 6)[1]
        opened.truncate(0)
        assert greedy(opened, PROMPT, 6)[1] == expected
        with pytest.raises(EngineError, match="cannot be shortened"):
            opened.truncate(2)
        fail_in_pass(opened, error)
        with pytest.raises(type(error)):
            for _ in range(20):
                opened.forward([9])
        del opened._store.files.read
        opened.forget_cancel()
        opened.truncate(0)
        assert greedy(opened, PROMPT, 6)[1] == expected


@pytest.mark.parametrize("error", [Cancelled(2), DiskError("the disk is gone")])
def test_the_tokens_of_a_sequence_are_those_its_state_holds(error, model):
    with engine(model, Plan(0, 1)) as opened:
        sequence = TokenSequence(opened, opened.notes.append)
        sequence.feed(PROMPT)
        expected = opened.logits().copy()
        sequence.feed([*PROMPT, 9, 10, 11])
        fail_in_pass(opened, error, 0)
        opened._store._resident.clear()
        with pytest.raises(type(error)):
            for _ in range(20):
                sequence.extend([9])
        assert len(sequence.tokens) == opened.n_past
        del opened._store.files.read
        opened.forget_cancel()
        sequence.feed(PROMPT)
        assert (opened.logits() == expected).all()


def test_a_cancelled_answer_is_cancelled_and_the_next_one_is_whole(model):
    with engine(model, Plan(0, 1)) as opened:
        tokenizer, sequence = Tokenizer(opened._model, opened.file), TokenSequence(opened, opened.notes.append)
        sampler = Sampler(Sampling(temp=0), opened.n_vocab)
        request = Request(tuple(PROMPT), 8)
        whole = [step.token for step in generate(sequence, tokenizer, sampler, request)]
        steps = []
        for step in generate(sequence, tokenizer, sampler, request):
            steps.append(step)
            if len(steps) == 3:
                opened.cancel()
        assert steps[-1].finish == CANCELLED
        assert [step.token for step in generate(sequence, tokenizer, sampler, request)] == whole
        sampler.close()


@pytest.fixture
def streaming(model, tmp_path):
    """Arguments of a long run that streams all layers."""
    plan = tmp_path / "plan.bin"
    write_plan(plan, Plan(0, 1, model_hash=ModelFile.open(model).hash))
    return ["run", model, *LONG, "-s", plan]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_an_answer_with_a_closing_line(number, streaming, start):  # noqa: F811
    process = start("slow=0.003", *streaming)
    assert text_of(process)
    _, _, err = ends_soon(process, number)
    assert " tokens, first " in err
    assert "shortened" not in err


def test_a_disk_that_fails_in_an_answer_is_what_is_told(streaming, start):  # noqa: F811
    assert is_disk_error(end(start("after=500", *streaming)), "Input/output error")


def test_a_model_with_a_state_does_not_draft(model, model_folder, capsys):
    """With the vocabulary of the model it is to draft for."""
    host = valid_model().write(model_folder / "host.gguf")
    assert cli.run_command(["run", str(host), "--draft", str(model), "-p", "he", "-n", "8", "-t", "1"]) == 1
    err = capsys.readouterr().err
    assert f"{model.name} cannot draft: what it has computed cannot be taken back" in err
