"""What a root and a worker say: every message comes back as it was, and nothing else does any harm."""

from __future__ import annotations

import random
import tracemalloc
from dataclasses import replace

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.distributed.messages import (
    BLOCK,
    MOST_CONTEXT,
    MOST_LAYERS,
    PROTOCOL,
    Adopt,
    Bye,
    Error,
    Hello,
    Load,
    MalformedError,
    Probe,
    Progress,
    Ready,
    Result,
    Save,
    Saved,
    Setup,
    Step,
    Taken,
    Truncate,
    Truncated,
    decode,
    encode,
)
from runtime.distributed.protocol import CLOSED, READY, Again, Refusal, RootSide, Shape, Stale, WorkerSide

WIDTH, VOCAB, LAYERS = 8, 100, 6
HELLO = Hello(PROTOCOL, "build", 7, "cpu", 10**9, 2, 10**8, 2e8, 1e-10)
SETUP = Setup([(0, 2), (4, 6)], 64, 16, 4, "f16")
CELLS = (4, 4, 8, 0)  # bytes of a position, of four layers
SHAPE = Shape(((0, 2), (4, 6)), LAYERS, 64, 16, 4, VOCAB, WIDTH, cell_bytes=CELLS)
IS_READY = Ready(16, WIDTH, 10**9, 1000, 0, list(CELLS))


def tokens(*numbers):
    return b"".join(n.to_bytes(4, "little", signed=True) for n in numbers)


def step(number=1, part=0, n_past=0, n_logits=1, ids=(1, 2, 3), hidden=None):
    if hidden is None:
        hidden = b"" if part == 0 else bytes(4 * WIDTH * len(ids))
    return Step(number, part, n_past, n_logits, tokens(*ids), hidden)


def ready_worker():
    side = WorkerSide()
    assert side.receive(encode(HELLO)) == HELLO
    side.hello(HELLO)
    assert side.receive(encode(SETUP)) == SETUP
    side.ready(IS_READY, SHAPE)
    return side


def ready_root():
    side = RootSide()
    side.hello(HELLO)
    assert side.receive(encode(HELLO)) == HELLO
    side.setup(SETUP)
    assert side.receive(encode(IS_READY)) == IS_READY
    return side


# --- messages -------------------------------------------------------------------------------------------------------

counts, words = st.integers(0, 2**62), st.text(max_size=64)
layers = st.integers(0, MOST_LAYERS)
messages = st.one_of(
    st.builds(Hello, counts, words, st.integers(0, 2**63 - 1), st.text(max_size=500), counts, counts, counts),
    st.builds(Probe, st.binary(max_size=100)),
    st.builds(
        Setup,
        st.lists(st.tuples(layers, layers), min_size=1, max_size=9),
        st.integers(1, MOST_CONTEXT),
        st.integers(1, 65536),
        st.integers(1, 65536),
        words,
    ),
    st.builds(Ready, st.integers(1, 65536), st.integers(1, 65536), counts, counts, counts),
    st.builds(
        Step,
        st.integers(1, 2**62),
        st.integers(0, MOST_LAYERS - 1),
        st.integers(0, MOST_CONTEXT),
        st.integers(0, 65536),
        st.binary(max_size=64),
        st.binary(max_size=256),
    ),
    st.builds(Result, st.integers(1, 2**62), st.integers(0, MOST_LAYERS - 1), st.binary(max_size=256), counts, counts),
    st.builds(Progress, st.integers(1, 2**62), st.floats(0, 1)),
    st.builds(Truncate, st.integers(0, MOST_CONTEXT)),
    st.builds(Truncated, st.integers(0, MOST_CONTEXT)),
    st.builds(Error, st.text(max_size=200), st.text(max_size=200)),
    st.builds(Save, st.integers(0, MOST_CONTEXT), layers, layers),
    st.builds(Saved, st.integers(0, MOST_CONTEXT), layers, st.binary(max_size=256)),
    st.builds(Adopt, st.integers(0, MOST_CONTEXT)),
    st.builds(Load, st.integers(0, MOST_CONTEXT), layers, layers, st.binary(max_size=256)),
    st.builds(Taken),
    st.builds(Bye),
)


@given(messages)
def test_every_message_comes_back_as_it_was(message):
    assert decode(encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc0",
        b"\x81\xa4kind\xa7unknown",
        b"\x82\xa4kind\xa3bye\xa4more\x01",
        b"\x86\xa4kind\xa5setup\xa6ranges\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\x91" * 100_000,
        b"\x82\xa4kind\xa5error\xa6reason\xdb\xff\xff\xff\xff",
        encode(Bye()) + b"\x00",
        encode(Setup([(0, MOST_LAYERS + 1)], 1, 1, 1, "f16")),
        encode(Setup([(0, 1)] * (MOST_LAYERS + 1), 1, 1, 1, "f16")),
        encode(Error("x" * 2001)),
        encode(Truncate(-1)),
        bytes(64 * 2**20 + 1),
    ],
    ids=range(14),
)
def test_what_is_no_message_is_said_in_one_line(data):
    with pytest.raises(MalformedError) as caught:
        decode(data)
    assert 0 < len(str(caught.value)) <= 200
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("theirs", ["\x1b[2J", "\n", "a` - at `b", "a' - at 'b", "\x85"])
def test_what_is_said_of_it_has_no_words_of_its_own(theirs):
    """They would reach a terminal, and each of them would be a line of its own in the log."""
    for message, reason in (
        ({"kind": theirs}, "Invalid value"),
        ({"kind": "bye", theirs: 1}, "Object contains unknown field"),
    ):
        with pytest.raises(MalformedError) as caught:
            decode(msgspec.msgpack.encode(message))
        assert str(caught.value) == reason


# --- a conversation in order ----------------------------------------------------------------------------------------


def test_a_pass_goes_through_all_parts_and_positions_grow():
    worker, root = ready_worker(), ready_root()
    for number, n_past in ((1, 0), (2, 3)):
        for part, size in ((0, 3 * WIDTH * 4), (1, WIDTH * 4)):
            sent = step(number, part, n_past)
            assert worker.receive(root.step(sent, size)) == sent
            assert root.receive(worker.progress(0.5)) == Progress(number, 0.5)
            assert root.receive(worker.result(bytes(size))).hidden == bytes(size)
    assert worker.n_past == root.n_past == 6


def test_the_same_step_again_has_the_same_answer():
    worker = ready_worker()
    data = encode(step())
    worker.receive(data)
    assert worker.receive(data) == Again(b"")  # while it is computed
    answer = worker.result(bytes(3 * WIDTH * 4))
    assert worker.receive(data) == Again(answer)
    second = encode(step(part=1))
    worker.receive(second)
    other = worker.result(bytes(WIDTH * 4))
    assert [worker.receive(d) for d in (data, second)] == [Again(answer), Again(other)]
    worker.receive(encode(step(2, n_past=3)))
    refusal = worker.receive(second)
    assert isinstance(refusal, Refusal)
    assert worker.state == CLOSED


def test_the_same_step_with_other_contents_is_refused():
    worker = ready_worker()
    worker.receive(encode(step()))
    worker.result(bytes(3 * WIDTH * 4))
    assert "other contents" in worker.receive(encode(step(ids=(1, 2, 4)))).reason


def test_hidden_states_of_another_size_are_checked():
    worker = ready_worker()
    worker.shape = replace(SHAPE, number_bytes=2)
    sent = step()
    assert worker.receive(encode(sent)) == sent
    worker.result(bytes(3 * WIDTH * 2))
    assert "hidden state of 96 bytes instead of 48" in worker.receive(encode(step(part=1))).reason


def test_positions_are_forgotten_in_the_middle_of_a_pass():
    worker, root = ready_worker(), ready_root()
    worker.receive(root.step(step(), 3 * WIDTH * 4))
    late = worker.result(bytes(3 * WIDTH * 4))
    assert worker.receive(root.truncate(0)) == Truncate(0)
    assert root.receive(late) == Stale()
    assert root.receive(worker.truncated(0)) == Truncated(0)
    assert (worker.state, root.state, worker.n_past, root.n_past) == (READY, READY, 0, 0)
    again = step(2)
    assert worker.receive(root.step(again, 3 * WIDTH * 4)) == again


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (step(part=1), "part 1 came"),
        (step(n_past=1), "1 positions are expected"),
        (step(ids=()), "0 bytes of tokens"),
        (step(ids=range(17)), "1 to 16 tokens"),
        (step(ids=(VOCAB,)), "vocabulary"),
        (step(ids=(-1,)), "vocabulary"),
        (step(n_logits=4), "rows of logits"),
        (step(hidden=b"1234"), "hidden state of 4 bytes"),
        (Step(1, 0, 0, 1, b"123", b""), "3 bytes of tokens"),
        (Truncated(0), "Truncated while ready"),
        (HELLO, "Hello while ready"),
        (Result(1, 0, b""), "Result while ready"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_worker_refuses_what_does_not_fit(wrong, reason):
    worker = ready_worker()
    refusal = worker.receive(encode(wrong))
    assert reason in refusal.reason
    assert decode(refusal.answer) == Error(refusal.reason)
    assert worker.receive(encode(step())) == Refusal("a message behind the end", b"")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Result(1, 0, bytes(8)), "8 bytes instead"),
        (Result(1, 1, bytes(96)), "96 bytes"),
        (Result(2, 0, bytes(96)), "step 2"),
        (Truncated(0), "nobody asked"),
        (IS_READY, "Ready while waiting"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_root_refuses_what_does_not_fit(wrong, reason):
    root = ready_root()
    root.step(step(), 96)
    refusal = root.receive(encode(wrong))
    assert reason in refusal.reason
    assert root.state == CLOSED


def test_another_protocol_is_refused():
    assert "protocol 99" in WorkerSide().receive(encode(Hello(99, "b", 7, "c"))).reason


def test_what_is_sent_out_of_turn_is_a_mistake_here():
    with pytest.raises(ValueError, match="while greeting"):
        WorkerSide().hello(HELLO)
    with pytest.raises(ValueError, match="while greeting"):
        RootSide().setup(SETUP)


# --- keys and values ------------------------------------------------------------------------------------------------


def after_a_pass(n=16):
    """Both ends, with n positions."""
    worker, root = ready_worker(), ready_root()
    for part in (0, 1):
        size = worker.shape.hidden_out(sent := step(1, part, ids=range(n)))
        worker.receive(root.step(sent, size))
        root.receive(worker.result(bytes(size)))
    assert worker.n_past == root.n_past == n
    return worker, root


def test_keys_and_values_come_behind_the_next_step():
    worker, root = after_a_pass()
    save, data = Save(0, 1, 3), bytes(12 * BLOCK)
    assert worker.receive(root.save(save, len(data))) == save
    assert root.is_saving
    after = step(2, n_past=16)
    assert worker.receive(root.step(after, 96)) == after
    assert root.receive(worker.saved(data)) == Saved(0, 1, data)
    assert not root.is_saving
    assert root.receive(worker.result(bytes(96))).hidden == bytes(96)


@pytest.mark.parametrize(("kept", "holds"), [(15, False), (16, True)])
def test_those_of_positions_that_were_forgotten_meanwhile_are_stale(kept, holds):
    worker, root = after_a_pass()
    worker.receive(root.save(Save(0, 0, 1), 4 * BLOCK))
    worker.receive(root.truncate(kept))
    event = root.receive(worker.saved(bytes(4 * BLOCK)))
    assert event == (Saved(0, 0, bytes(4 * BLOCK)) if holds else Stale())
    assert root.receive(worker.truncated(kept)) == Truncated(kept)


def test_a_worker_takes_them_and_goes_on_behind_them():
    worker, root = ready_worker(), ready_root()
    adopt, load = Adopt(20), Load(16, 0, 3, bytes(16 * BLOCK))
    assert worker.receive(root.adopt(20)) == adopt
    assert root.receive(worker.taken()) == Taken()
    assert worker.n_past == root.n_past == 20
    assert worker.receive(root.load(load)) == load
    assert root.receive(worker.taken()) == Taken()
    after = step(1, n_past=20)
    assert worker.receive(root.step(after, 96)) == after


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Save(8, 0, 1), "no block"),
        (Save(16, 0, 1), "position 32 of 16"),
        (Save(0, 0, 5), "0 to 5 of 4"),
        (Save(0, 2, 2), "2 to 2 of 4"),
        (Adopt(20), "20 positions after 16"),
        (Load(0, 0, 1, bytes(63)), "63 bytes of keys and values instead of 64"),
        (Load(16, 0, 1, bytes(64)), "position 17 of 16"),
        (Saved(0, 0, bytes(64)), "Saved while ready"),
        (Taken(), "Taken while ready"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_keys_and_values_that_do_not_fit_are_refused(wrong, reason):
    worker, _ = after_a_pass()
    assert reason in worker.receive(encode(wrong)).reason
    assert worker.state == CLOSED


def test_they_do_not_come_in_the_middle_of_a_pass_or_unasked():
    worker, root = after_a_pass()
    assert "Saved while ready" in root.receive(encode(Saved(0, 0, bytes(64)))).reason
    worker.receive(encode(step(2, n_past=16)))
    worker.result(bytes(96))
    assert "in the middle" in worker.receive(encode(Save(0, 0, 1))).reason
    worker, root = after_a_pass()
    root.save(Save(0, 0, 1), 64)
    assert "63 bytes" in root.receive(encode(Saved(0, 0, bytes(63)))).reason
    for adopt in (Adopt(0), Adopt(65)):
        assert "Adopt" in ready_worker().receive(encode(adopt)).reason


# --- anything at all ------------------------------------------------------------------------------------------------

EVENTS = (Hello, Setup, Step, Truncate, Bye, Error, Again, Refusal, Ready, Result, Progress, Truncated, Stale, Probe)
EVENTS += (Save, Saved, Adopt, Load, Taken)


def sides():
    """Both ends in every state."""
    greeting, choosing = WorkerSide(), WorkerSide()
    choosing.receive(encode(HELLO))
    computing = ready_worker()
    computing.receive(encode(step()))
    waiting, shortening = ready_root(), ready_root()
    waiting.step(step(), 96)
    shortening.truncate(0)
    saving, loading = after_a_pass(), (ready_worker(), ready_root())
    saving[0].receive(saving[1].save(Save(0, 0, 1), 64))
    loading[0].receive(loading[1].adopt(16))
    first = [greeting, choosing, ready_worker(), computing, RootSide(), ready_root(), waiting, shortening]
    return [*first, *after_a_pass(), *saving, *loading]


def mutated(data, chance):
    """Some bytes changed, cut off, doubled or put in."""
    data = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        place = chance.randrange(len(data) + 1)
        kind = chance.randrange(4)
        if kind == 0 and place < len(data):
            data[place] = chance.randrange(256)
        elif kind == 1:
            del data[place:]
        elif kind == 2:
            data[place:place] = chance.randbytes(chance.randint(1, 8))
        else:
            data[place:place] = data[place : place + chance.randint(1, 16)]
    return bytes(data)


def test_ten_thousand_messages_of_any_kind_do_no_harm():
    chance = random.Random(1)
    valid = [encode(m) for m in (HELLO, SETUP, IS_READY, step(), step(part=1), Truncate(0), Truncated(0), Bye())]
    valid += [encode(m) for m in (Save(0, 0, 1), Saved(0, 0, bytes(64)), Adopt(16), Load(0, 0, 1, bytes(64)), Taken())]
    valid += [
        encode(m) for m in (Result(1, 0, bytes(96)), Progress(1, 0.5), Error("no"), step(2, n_past=3), Probe(b"1"))
    ]

    def one_round(n):
        for i in range(n):
            if i % 16 == 0:
                ends = sides()
            data = chance.randbytes(chance.randrange(64)) if i % 4 == 0 else mutated(chance.choice(valid), chance)
            side = chance.choice(ends)
            before = side.state
            event = side.receive(data)
            assert isinstance(event, EVENTS)
            if isinstance(event, Refusal):
                assert side.state == CLOSED
                assert "\n" not in event.reason
                assert before == CLOSED or isinstance(decode(event.answer), Error)

    tracemalloc.start()
    try:
        one_round(2_000)
        before = tracemalloc.get_traced_memory()[0]
        one_round(10_000)
        assert tracemalloc.get_traced_memory()[0] - before < 64 * 1024
    finally:
        tracemalloc.stop()
