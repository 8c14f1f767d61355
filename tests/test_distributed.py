"""Layers on several machines give the logits of one machine, bit by bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from cluster import MB, WorkerProcess, shared_engine, workers
from engines import assert_same, engine, greedy
from skip_models import skip_model

from runtime.distributed import wire
from runtime.distributed.cluster import Link
from runtime.distributed.messages import PROTOCOL, Hello, Setup
from runtime.distributed.worker import build, cpu_class
from runtime.engine import borders
from runtime.errors import Cancelled, EngineError, WorkerError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.passes import Part
from runtime.settings import Settings

ARCHS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
CUTS = {
    "halves": [0, 0, 1, 1],
    "uneven": [0, 1, 1, 1],
    "three": [0, 1, 2, 2],
    "ring": [0, 1, 0, 1],
    "root in front": [None, 0, 0, 1],
    "root between": [None, 0, None, 1],
    "root behind": [0, 1, 1, None],
}
PROMPT = [int(token) for token in np.random.default_rng(1).integers(1, 500, 18)]
SHORT = [1, 7, 8, 9, 250, 3, 99]
LONG = [int(token) for token in np.random.default_rng(2).integers(1, 500, 220)]


@pytest.fixture(scope="module")
def paths(tiny_model, bundled_model):
    """The models that the workers have."""
    return {arch: tiny_model(arch) for arch in ARCHS} | {"bundled": bundled_model}


@pytest.fixture(scope="module")
def addresses(paths):
    """Of three workers."""
    with workers(3, paths.values()) as found:
        yield [worker.address for worker in found]


@pytest.fixture(scope="module")
def alone(paths):
    """alone(arch, prompt, n): the answer of one machine."""
    known = {}

    def answer(arch, prompt, n, **settings):
        key = (arch, tuple(prompt), n, *settings.items())
        if key not in known:
            with engine(paths[arch], repack=False, n_ubatch=64, n_threads=1, **settings) as opened:
                known[key] = greedy(opened, prompt, n)
        return known[key]

    return answer


def used(owners, addresses):
    return addresses[: 1 + max(owner for owner in owners if owner is not None)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("arch", ARCHS)
def test_logits_are_those_of_one_machine(arch, cut, paths, addresses, alone):
    owners = CUTS[cut]
    with shared_engine(paths[arch], owners, used(owners, addresses), n_ubatch=64) as opened:
        assert_same(greedy(opened, PROMPT, 6), alone(arch, PROMPT, 6))


@pytest.mark.parametrize(
    ("arch", "cut"), [("qwen2", "three"), ("qwen3", "uneven"), ("gemma2", "ring"), ("gemma3", "ring")]
)
def test_a_long_prompt_and_many_tokens(arch, cut, paths, addresses, alone):
    """Of more than one pass, and longer than the window of those that have one."""
    owners = CUTS[cut]
    with shared_engine(paths[arch], owners, used(owners, addresses), n_ubatch=64) as opened:
        assert len(opened.cut(Part(0, 0, tuple(LONG)), decode=False)) == 4
        assert_same(greedy(opened, LONG, 64), alone(arch, LONG, 64))


def test_the_bundled_model(paths, addresses, alone):
    owners = [0, 0, 0, 1, 1, 2, 2, 2]
    with shared_engine(paths["bundled"], owners, addresses, n_ubatch=64) as opened:
        assert_same(greedy(opened, PROMPT, 64), alone("bundled", PROMPT, 64))


def test_something_else_comes_out_when_something_else_goes_in(paths, addresses, alone, monkeypatch):
    """The comparison above sees a hidden state that is wrong in one bit of one number."""
    owners = CUTS["halves"]
    with shared_engine(paths["llama"], owners, used(owners, addresses), n_ubatch=64) as opened:
        enter = opened.cluster.enter

        def wrong(layer, n_bytes):
            hidden = bytearray(enter(layer, n_bytes))
            hidden[2] ^= 1
            return bytes(hidden)

        monkeypatch.setattr(opened.cluster, "enter", wrong)
        with pytest.raises(AssertionError):
            assert_same(greedy(opened, PROMPT, 2), alone("llama", PROMPT, 2))


def test_positions_are_taken_back_and_computed_again(paths, addresses, alone):
    owners = CUTS["ring"]
    with shared_engine(paths["gemma3"], owners, used(owners, addresses), n_ubatch=64) as opened:
        opened.forward(PROMPT + PROMPT[:5])
        opened.truncate(10)
        opened.forward(PROMPT[10:17])
        opened.truncate(0)
        assert_same(greedy(opened, PROMPT, 6), alone("gemma3", PROMPT, 6))


def test_logits_of_several_tokens(paths, addresses):
    """As drafts need them."""
    owners = CUTS["halves"]
    with engine(paths["qwen2"], repack=False, n_ubatch=64, n_threads=1, n_logits=4) as opened:
        opened.forward(PROMPT, 4)
        expected = [opened.logits(i).copy() for i in range(4)]
    with shared_engine(paths["qwen2"], owners, used(owners, addresses), n_ubatch=64, n_logits=4) as opened:
        opened.forward(PROMPT, 4)
        assert all(np.array_equal(opened.logits(i), expected[i]) for i in range(4))


def test_a_cancelled_pass_is_forgotten_everywhere(paths, addresses, alone, monkeypatch):
    owners = CUTS["ring"]
    with shared_engine(paths["llama"], owners, used(owners, addresses), n_ubatch=64) as opened:
        begin = opened.cluster.begin

        def cancelling(pass_):
            begin(pass_)
            opened.cancel()

        monkeypatch.setattr(opened.cluster, "begin", cancelling)
        with pytest.raises(Cancelled):
            opened.forward(PROMPT)
        monkeypatch.undo()
        assert_same(greedy(opened, PROMPT, 4), alone("llama", PROMPT, 4))


# --- what a model does not allow ------------------------------------------------------------------------------------


def test_a_cut_that_the_graph_does_not_allow_is_refused(paths, monkeypatch):
    """As if a layer read what an earlier one had computed beside its border."""
    monkeypatch.setattr(borders, "_BORDER", b"ffn_out-%d")
    file = ModelFile.open(paths["llama"])
    part = file.owned([2, 3], head=True, embedding=True)
    hollow = HollowModel(part)
    try:
        with pytest.raises(EngineError, match="tied to each other beyond their borders"):
            borders.check_cut(part, hollow, Settings())
    finally:
        hollow.free()


def test_a_model_without_borders_is_refused(paths, monkeypatch):
    monkeypatch.setattr(borders, "_BORDER", b"none-%d")
    file = ModelFile.open(paths["llama"])
    part = file.owned([2, 3], head=True, embedding=True)
    hollow = HollowModel(part)
    try:
        with pytest.raises(EngineError, match="no border in front of layer 2"):
            borders.check_cut(part, hollow, Settings())
    finally:
        hollow.free()


def test_layers_that_read_the_embedding_are_not_cut_from_it(tmp_path):
    """Of a real architecture; on one worker it computes as on one machine."""
    path = skip_model(tmp_path)
    with workers(1, [path]) as (worker,):
        link = Link(worker.address, None, hello(ModelFile.open(path).hash))
        link.set_up(Setup([(2, 4)], 64, 16, 1, "f16"))
        with pytest.raises(WorkerError, match=r"tied to each other beyond their borders \(embd_skip-2\)"):
            link.wait_ready(lambda: None)
        link.close()
        with engine(path, repack=False, n_ubatch=64, n_threads=1, n_ctx=64) as opened:
            expected = greedy(opened, SHORT, 4)
        with shared_engine(path, [0] * 4, [worker.address], n_ubatch=64, n_ctx=64) as opened:
            assert_same(greedy(opened, SHORT, 4), expected)


def test_where_something_comes_in_and_goes_out():
    assert borders.borders_of([2, 3], 6, head=False) == ({b"l_out-1": 2}, {b"l_out-3": 4})
    assert borders.borders_of([4, 5], 6, head=False) == ({b"l_out-3": 4}, {b"l_out-5": 6})
    assert borders.borders_of([], 6, head=True) == ({b"l_out-5": 6}, {})
    assert borders.borders_of([0, 3], 6, head=True) == ({b"l_out-2": 3, b"l_out-5": 6}, {b"l_out-0": 1, b"l_out-3": 4})


# --- workers that go -------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_is_one_clear_line_at_once(paths):
    with workers(1, [paths["llama"]]) as (worker,):
        with shared_engine(paths["llama"], [0] * 4, [worker.address], n_ubatch=64) as opened:
            opened.forward(PROMPT)
            threading.Timer(0.1, worker.process.kill).start()
            start = time.monotonic()
            with pytest.raises(WorkerError, match="is gone"):
                while time.monotonic() - start < 5:
                    opened.forward([1])
                    if opened.n_past > 400:
                        opened.truncate(20)
        assert time.monotonic() - start < 1.1


@pytest.mark.parametrize("cut", ["halves", "three", "ring", "root between"])
@pytest.mark.parametrize("who", ["spare", "survivor"])
@pytest.mark.parametrize("dies", [0, 1])
def test_another_worker_takes_over_and_the_answer_is_the_same(cut, who, dies, paths, alone):
    owners = CUTS[cut]
    n, expected = 1 + max(o for o in owners if o is not None), alone("qwen2", LONG, 24)
    with workers(n + (who == "spare"), [paths["qwen2"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["qwen2"], owners, addresses[:n], spares=addresses[n:], n_ubatch=64) as opened:

            def die(i):
                if i == 12:
                    found[dies].process.kill()

            assert_same(greedy(opened, LONG, 24, before_token=die), expected)
            assert sum(link.replacements for link in opened.cluster.links) == 1


def test_a_worker_that_comes_back_can_take_over(paths, alone):
    with workers(2, [paths["llama"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["llama"], CUTS["halves"], addresses, n_ubatch=64) as opened:
            opened.forward(PROMPT)
            found[1].process.kill()
            opened.forward([1])
            assert [link.address for link in opened.cluster.links] == addresses[:1]
            found[1].process.communicate()
            found[1] = WorkerProcess([paths["llama"]], listen=addresses[1])
            assert found[1].address == addresses[1]
            opened.truncate(0)
            opened.forward(PROMPT[:5])
            deadline = time.monotonic() + 5
            while not opened.cluster._spares and time.monotonic() < deadline:
                time.sleep(0.01)
            found[0].process.kill()
            opened.truncate(0)
            assert_same(greedy(opened, PROMPT, 6), alone("llama", PROMPT, 6))
            assert [link.address for link in opened.cluster.links] == addresses[1:]


@pytest.mark.parametrize("comes", [True, False])
def test_a_worker_that_somebody_starts_again_elsewhere(comes, paths, alone):
    """Where it does not come, the others take over."""
    notes = []
    with workers(3, [paths["llama"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["llama"], CUTS["halves"], addresses[:2], n_ubatch=64) as opened:

            def restarted(link):
                assert link.address == addresses[1]
                if not comes:
                    raise WorkerError("nobody starts it again")
                return link.again(addresses[2])

            opened.cluster.restarted, opened.cluster.note = restarted, notes.append

            def die(i):
                if i == 2:
                    found[1].process.kill()

            assert_same(greedy(opened, PROMPT, 6, before_token=die), alone("llama", PROMPT, 6))
            expected = [addresses[0], addresses[2]] if comes else addresses[:1]
            assert [link.address for link in opened.cluster.links] == expected
            assert len(opened.cluster._lost) == (not comes)
    assert ("nobody starts it again" in notes) == (not comes)


def test_workers_die_one_after_the_other_at_any_moment(paths, alone):
    expected = alone("gemma3", PROMPT, 40)
    with workers(4, [paths["gemma3"]]) as found:
        addresses = [worker.address for worker in found]
        with shared_engine(paths["gemma3"], CUTS["ring"], addresses[:2], spares=addresses[2:], n_ubatch=64) as opened:
            timers = [threading.Timer(0.05 * (i + 1), found[i].process.kill) for i in range(3)]

            def begin(i):
                time.sleep(0.01)
                if i == 0:
                    for timer in timers:
                        timer.start()

            assert_same(greedy(opened, PROMPT, 40, before_token=begin), expected)


def test_a_worker_ends_at_once_and_says_nothing_wrong(paths):
    worker = WorkerProcess([paths["llama"]])
    with shared_engine(paths["llama"], [0, 0, 0, 0], [worker.address], n_ubatch=64) as opened:
        opened.forward(PROMPT)
        start = time.monotonic()
        assert worker.close() == 0
        assert time.monotonic() - start < 2
    assert worker.log == "layers 0-3: 4.8 MB in memory\n"


def bytes_read(process):
    """By a process until now, from files of any kind."""
    fields = dict(line.split(": ") for line in Path(f"/proc/{process.pid}/io").read_text().splitlines())
    return int(fields["rchar"])


def test_weights_stay_for_the_next_root_also_with_another_context(paths):
    worker = WorkerProcess([paths["llama"]])
    address, read = worker.address, []
    for n_ctx, prompt in ((512, PROMPT), (512, PROMPT * 4), (256, PROMPT)):
        before = bytes_read(worker.process)
        with shared_engine(paths["llama"], [0] * 4, [address], n_ubatch=len(prompt), n_ctx=n_ctx) as opened:
            opened.forward(prompt)
            opened.forward([1])
        read.append(bytes_read(worker.process) - before)
    assert worker.close() == 0
    assert worker.log.count("layers 0-3") == 2
    assert read[0] > 4 * MB
    assert max(read[1:]) < MB


@pytest.fixture
def short_pings(monkeypatch):
    """A second each."""
    pings = [(name, 1000 if name.endswith("_ms") else value) for name, value in wire._PINGS]
    monkeypatch.setattr(wire, "_PINGS", pings)


def test_a_worker_that_hangs_is_noticed(paths, short_pings):
    with (
        workers(1, [paths["llama"]]) as (worker,),
        shared_engine(paths["llama"], [0] * 4, [worker.address], n_ubatch=64) as opened,
    ):
        opened.forward(PROMPT)
        worker.process.send_signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(WorkerError, match="does not answer any more"):
            opened.forward([1])
        assert time.monotonic() - start < 4


def test_another_worker_takes_over_from_one_that_hangs(paths, alone, short_pings):
    notes = []
    with workers(3, [paths["llama"]]) as found:
        addresses = [worker.address for worker in found]
        owners = CUTS["ring"]
        with shared_engine(paths["llama"], owners, addresses[:2], spares=addresses[2:], n_ubatch=64) as opened:
            opened.cluster.note = notes.append

            def stop(i):
                if i == 3:
                    found[1].process.send_signal(signal.SIGSTOP)

            assert_same(greedy(opened, PROMPT, 8, before_token=stop), alone("llama", PROMPT, 8))
    assert [note.split("; ")[0] for note in notes] == [
        f"the worker {addresses[1]} is gone: it does not answer any more"
    ]


def hello(model, protocol=PROTOCOL, what=None):
    return Hello(protocol, what or build(), model, cpu_class())


def test_what_would_not_be_the_same_answer_is_refused(paths, addresses):
    model = ModelFile.open(paths["llama"]).hash
    for mine, reason in (
        (hello(model, what="another build"), "another build asks"),
        (hello(12345), "does not have that model"),
        (hello(model, protocol=PROTOCOL + 1), f"protocol {PROTOCOL + 1}"),
    ):
        with pytest.raises(WorkerError, match=reason):
            Link(addresses[0], None, mine)


@pytest.mark.parametrize(
    ("ranges", "n_ctx", "kv_type", "reason"),
    [
        ([(0, 5)], 64, "f16", "layers 0 to 4 are not possible"),
        ([(2, 1)], 64, "f16", "layers 2 to 0"),
        ([(0, 2), (2, 4)], 64, "f16", "layers 2 to 3"),
        ([(0, 2)], 2**24, "f16", "is too long"),
        ([(0, 2)], 64, "q9", "no KV type"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(paths, addresses, ranges, n_ctx, kv_type, reason):
    link = Link(addresses[0], None, hello(ModelFile.open(paths["llama"]).hash))
    link.set_up(Setup(ranges, n_ctx, 16, 1, kv_type))
    with pytest.raises(WorkerError, match=reason):
        link.wait_ready(lambda: None)
    link.close()


@pytest.mark.parametrize("theirs", [None, "tcp_frame_size_tuning"])
def test_switches_of_our_grpc_are_not_those_of_another_one(theirs):
    """Ray has one of its own in the same process."""
    code = "import os, runtime.distributed.wire; print(os.environ.get('GRPC_EXPERIMENTS'))"
    environment = {name: value for name, value in os.environ.items() if name != "GRPC_EXPERIMENTS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parent.parent)} | ({"GRPC_EXPERIMENTS": theirs} if theirs else {})
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.strip() == str(theirs)


def test_one_root_at_a_time(paths, addresses):
    with shared_engine(paths["llama"], [0] * 4, addresses[:1], n_ubatch=64) as opened:
        opened.forward(PROMPT)
        with (
            pytest.raises(WorkerError, match="computes for another root"),
            shared_engine(paths["llama"], [0] * 4, addresses[:1], n_ubatch=64),
        ):
            pass
        opened.forward([1])
    with shared_engine(paths["llama"], [0] * 4, addresses[:1], n_ubatch=64) as opened:
        opened.forward(PROMPT)
