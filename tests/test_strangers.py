"""What a worker refuses: it says so once, stays up, and its memory stays as it was."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

import grpc
from test_cli_worker import anonymous_bytes, run, worker
from test_keys import unchecked
from test_protocol import HELLO, SETUP, mutated, step

from runtime.distributed import wire
from runtime.distributed.keys import Keys, make_keys
from runtime.distributed.messages import PROTOCOL, Bye, Error, Hello, Probe, Setup, Truncate, decode, encode
from runtime.distributed.wire import Wire
from runtime.distributed.worker import build, cpu_class
from runtime.errors import WorkerError
from runtime.llama.model_file import ModelFile
from runtime.sizes import MB

ANY_SIZE = [("grpc.max_send_message_length", -1)]  # a stranger keeps no limits
GROWTH_BYTES = 4 * MB
PROMPT = ("-p", "Once upon a time", "-n", "8", "--temp", "0", "--ctx", "256", "-t", "1")


def log_of(process):
    """The lines about what was refused, when a worker has ended."""
    process.terminate()
    lines = process.communicate(timeout=5)[1].decode().splitlines()
    return sorted(line for line in lines if "refused" in line)


def peak_bytes(pid):
    """The most memory that a process ever held."""
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def hello_of(model):
    """A root's greeting."""
    return Hello(PROTOCOL, build(), ModelFile.open(model).hash, cpu_class())


def said(channel, *messages):
    """What a worker answers to messages of one conversation."""
    try:
        return [decode(data) for data in channel.stream_stream(wire._PATH)(iter(messages))]
    except grpc.RpcError as error:
        return [error.code()]


def said_after_greeting(channel, greeting, message):
    """What a worker answers to a message that comes when it has answered the greeting."""
    greeted = threading.Event()

    def messages():
        yield greeting
        greeted.wait(5)
        yield message

    with pytest.raises(grpc.RpcError) as refused:
        for _ in channel.stream_stream(wire._PATH)(messages()):
            greeted.set()
    return refused.value.code()


def test_everyone_without_a_valid_certificate_is_refused_and_said_once(bundled_model, tmp_path):
    make_keys(tmp_path / "a", ["me", "worker,127.0.0.1"])
    make_keys(tmp_path / "a", ["late"], days=-1)
    make_keys(tmp_path / "b", ["foreign"])
    me, foreign = unchecked(tmp_path / "a" / "me"), unchecked(tmp_path / "b" / "foreign")
    strangers = [
        None,
        Keys(me.authority, None, None),
        Keys(me.authority, foreign.certificate, foreign.key),
        unchecked(tmp_path / "a" / "late"),
    ]
    arguments = (bundled_model, "--listen", "127.0.0.1:0", "--tls", tmp_path / "a" / "worker")
    with worker(*arguments) as (process, found):
        for keys in strangers * 3:
            stranger = Wire(found["listening"], keys)
            stranger.send(encode(HELLO))
            with pytest.raises(WorkerError, match="closed the connection"):
                stranger.receive(timeout_s=5)
            stranger.close()
        devices = ("--workers", found["listening"], "--tls", tmp_path / "a" / "me")
        assert run("run", bundled_model, *PROMPT, *devices)[0] == 0
        assert log_of(process) == [
            "h2o: refused a connection: it does not speak TLS",
            "h2o: refused a connection: it showed no certificate",
            "h2o: refused a connection: its certificate has expired",
            "h2o: refused a connection: its certificate is not of this authority",
        ]


def test_messages_that_are_too_long_take_no_memory(bundled_model):
    greeting = encode(hello_of(bundled_model))
    with worker(bundled_model, "--listen", "127.0.0.1:0", "-m", "100") as (process, found):
        before = peak_bytes(process.pid)
        with grpc.insecure_channel(found["listening"], ANY_SIZE) as channel:
            for _ in range(3):
                assert said(channel, bytes(65 * 2**20)) == [grpc.StatusCode.RESOURCE_EXHAUSTED]
                code = said_after_greeting(channel, greeting, bytes(65 * 2**20))
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert peak_bytes(process.pid) - before < GROWTH_BYTES
        assert run("run", bundled_model, *PROMPT, "--workers", found["listening"])[0] == 0
        assert log_of(process) == [
            "h2o: a root is gone without a goodbye: it was killed, its line is lost, or a message of more than 64 MiB "
            "was refused",
            "h2o: refused: a conversation without a message of at most 64 MiB",
        ]


def test_a_root_that_ends_says_goodbye(bundled_model):
    """So nothing is said of it; nor where the worker itself ends."""
    with worker(bundled_model, "--listen", "127.0.0.1:0", "-m", "100") as (process, found):
        for _ in range(3):
            assert run("run", bundled_model, *PROMPT, "--workers", found["listening"])[0] == 0
            assert run("devices", bundled_model, "--workers", found["listening"])[0] == 0
        link = Wire(found["listening"], None)
        link.send(encode(hello_of(bundled_model)))
        link.receive(timeout_s=5)
        assert log_of(process) == []
        link.close()


def test_a_step_that_comes_again(bundled_model):
    """The last one has the same answer, an earlier one is refused and said once."""
    first, second = step(), step(2, n_past=3)
    messages = map(encode, (hello_of(bundled_model), Setup([(0, 8)], 64, 16, 4, "f16"), first, first, second, first))
    with worker(bundled_model, "--listen", "127.0.0.1:0", "-m", "100") as (process, found):
        data = list(messages)
        for _ in range(2):
            link, answers = Wire(found["listening"], None), []
            for message in data:
                link.send(message)
                answers.append(link.receive(timeout_s=5))
            link.close()
            assert answers[2] == answers[3] != answers[4]
            assert decode(answers[5]).reason.startswith("step 1: part 0 came instead of step 3, part 0")
        assert log_of(process) == ["h2o: refused: step 1: part 0 came instead of step 3, part 0"]


def test_ten_thousand_messages_leave_a_worker_as_it_was(bundled_model):
    chance, n = random.Random(1), 0
    hello = encode(hello_of(bundled_model))
    valid = [hello, *map(encode, (HELLO, SETUP, step(), step(part=1), Truncate(0), Bye(), Probe(b"1"), Error("no")))]
    with worker(bundled_model, "--listen", "127.0.0.1:0", "-m", "100") as (process, found):
        with grpc.insecure_channel(found["listening"]) as channel:
            while n < 10_000:
                n += 1
                if n == 2000:
                    before = anonymous_bytes(process.pid)
                data = chance.randbytes(chance.randrange(64)) if n % 4 == 0 else mutated(chance.choice(valid), chance)
                said(channel, *[hello] * (n % 2), data)
        time.sleep(0.2)
        assert anonymous_bytes(process.pid) - before < GROWTH_BYTES
        assert run("run", bundled_model, *PROMPT, "--workers", found["listening"])[0] == 0
        log = log_of(process)
        assert 1 < len(log) == len(set(log)) <= 100
        assert all(line.isprintable() for line in log)
