"""Prompts in, answers out: every line is a request or says why not, and no finished answer is lost or repeated."""

from __future__ import annotations

import fcntl
import json
import resource
import signal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from h2o_cli.session.batch_files import (
    MOST_LINE_BYTES,
    Answers,
    BadLine,
    BatchRequest,
    answered,
    read_requests,
    refused,
)
from runtime.answer.sampler import Sampling
from runtime.errors import H2OError
from runtime.llama.chat import Message

OPENAI = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {
        "model": "any",
        "messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}],
        "max_tokens": 7,
        "temperature": 0,
        "stop": "\n",
        "logit_bias": {},
    },
}


def read(path, *lines):
    path.write_bytes(b"".join((line if isinstance(line, bytes) else line.encode()) + b"\n" for line in lines))
    return list(read_requests(path, Sampling(seed=1)))


def test_every_form_of_a_request(tmp_path):
    chat, plain, messages, text = read(
        tmp_path / "p",
        json.dumps(OPENAI),
        '{"prompt": "Once", "max_tokens": 3, "stop": ["a", "b"], "seed": 5}',
        "",
        '{"custom_id": 7, "messages": [{"role": "user", "content": "Hi"}]}',
        "Once upon a time ",
    )
    assert chat == BatchRequest(
        1, "a", "", (Message("system", "Be short."), Message("user", "Hi")), 7, Sampling(temp=0, seed=1), ("\n",)
    )
    assert plain == BatchRequest(2, "line-2", "Once", (), 3, Sampling(seed=5), ("a", "b"))
    assert (messages.custom_id, messages.messages) == ("7", (Message("user", "Hi"),))
    assert (text.custom_id, text.prompt) == ("line-5", "Once upon a time")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "truncated"),
        ("{}", "it needs either prompt or messages"),
        ('{"prompt": 1}', "Expected `str | null`, got `int`"),
        ('{"prompt": "a", "messages": [{"role": "user", "content": "a"}]}', "either prompt or messages"),
        ('{"prompt": "a", "temperature": -1}', "--temp -1.0 is not possible"),
        ('{"prompt": "a", "n": 2}', "n above 1"),
        ('{"prompt": "a", "max_tokens": 0}', "at `$.max_tokens`"),
        ('{"custom_id": "x", "url": "/v1/embeddings", "body": {"prompt": "a"}}', "there is no '/v1/embeddings'"),
        (b'{"prompt": "\xff"}', "it is not UTF-8 (byte 12)"),
        ("{" + '"a":{' * 20000, "line-1"),
        ("x" * (MOST_LINE_BYTES + 5), "it is longer than 16 MiB"),
    ],
    ids=lambda x: str(x)[:30],
)
def test_a_bad_line_says_why_and_the_others_go_on(tmp_path, line, problem):
    bad, good = read(tmp_path / "p", line, "good")
    assert isinstance(bad, BadLine)
    assert problem in f"{bad.problem} line-{bad.number}"
    assert "\n" not in bad.problem
    assert good.prompt == "good"


def test_one_custom_id_twice_is_an_error_line(tmp_path):
    first, second, third = read(tmp_path / "p", *['{"custom_id": "a", "prompt": "x"}'] * 2, "line")
    assert (first.custom_id, second.custom_id, third.custom_id) == ("a", "line-2", "line-3")
    assert isinstance(second, BadLine)
    assert second.problem == "custom_id 'a' came before"


@given(st.lists(st.binary(max_size=60), max_size=20))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_requests_or_bad_lines(tmp_path_factory, lines):
    found = read(tmp_path_factory.getbasetemp() / "any", *lines)
    assert all(isinstance(item, BatchRequest | BadLine) for item in found)
    assert len({item.custom_id for item in found}) == len(found)


def test_answers_are_kept_and_a_torn_one_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    request = BatchRequest(1, "one", "p", (), 0, Sampling(), ())
    with Answers(path) as answers:
        answers.add(answered(request, " text", "stop", 3, 2, "m.gguf"))
        answers.add(refused("two", "too long"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"custom_id": "three", "resp')
    with Answers(path) as answers:
        assert answers.done == {"one", "two"}
    assert path.read_bytes() == whole
    first, second = map(json.loads, whole.splitlines())
    assert first["response"]["body"]["choices"] == [{"index": 0, "finish_reason": "stop", "text": " text"}]
    assert first["response"]["body"]["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert second == {"custom_id": "two", "response": None, "error": {"message": "too long"}}


@pytest.mark.parametrize(
    "text", ["Dear reader\n", "Dear reader", '{"custom_idea": 1', "\n", '{"custom_id": "a"}\nDear']
)
def test_what_is_no_file_of_answers_is_left_alone(tmp_path, text):
    path = tmp_path / "letter"
    path.write_text(text)
    with pytest.raises(H2OError, match="holds something else than answers"):
        Answers(path)
    assert path.read_text() == text


def test_an_answer_torn_anywhere_is_cut_off(tmp_path):
    path = tmp_path / "a"
    with Answers(path) as answers:
        answers.add(refused("one", "x"))
    whole = path.read_bytes()
    for n in range(len(whole)):
        path.write_bytes(whole + whole[:n])
        with Answers(path) as answers:
            assert answers.done == {"one"}
        assert path.read_bytes() == whole


def test_two_runs_do_not_write_at_once(tmp_path):
    with Answers(tmp_path / "a"), pytest.raises(H2OError, match="another run writes to it"):
        Answers(tmp_path / "a")


def test_an_error_leaves_no_empty_file(tmp_path):
    path = tmp_path / "a"

    def fail(line=None):
        with pytest.raises(ValueError, match="x"), Answers(path) as answers:
            if line:
                answers.add(line)
            raise ValueError("x")

    fail()
    assert not path.exists()
    fail(refused("one", "x"))
    fail()
    assert path.read_bytes().count(b"\n") == 1
    path.write_bytes(b"")
    fail()
    assert path.exists(), "it was the user's"


def test_a_file_that_another_run_removes_is_not_written_to(tmp_path, monkeypatch):
    path = tmp_path / "a"
    lock = fcntl.flock

    def removed_meanwhile(fd, how):
        path.unlink()
        lock(fd, how)

    monkeypatch.setattr("h2o_cli.session.batch_files.fcntl.flock", removed_meanwhile)
    with pytest.raises(H2OError, match="another run writes to it"):
        Answers(path)


def test_a_full_disk_leaves_whole_lines_only(tmp_path):
    path = tmp_path / "a"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with Answers(path) as answers:
            answers.add(refused("one", "x"))
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
            with pytest.raises(H2OError, match="cannot be written"):
                answers.add(refused("two", "y" * 100))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    with Answers(path) as answers:
        assert answers.done == {"one"}
        answers.add(refused("two", "y"))
    assert path.read_bytes().count(b"\n") == 2
