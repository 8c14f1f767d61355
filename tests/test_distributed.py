"""Layers on several machines give the logits of one machine, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from cluster import CUTS, LONG, PROMPT, one_machine, shared_engine, workers
from engines import assert_same, engine, greedy
from skip_models import skip_model

from runtime.distributed.link import Link
from runtime.distributed.messages import PROTOCOL, Hello, Setup
from runtime.distributed.worker import build, cpu_class
from runtime.engine import borders
from runtime.errors import Cancelled, EngineError, WorkerError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.passes import Part
from runtime.settings import Settings

ARCHS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3")
SHORT = [1, 7, 8, 9, 250, 3, 99]


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
    return one_machine(paths)


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


def test_hidden_states_in_16_bits_halve_the_bytes_and_are_near(paths, addresses, alone, monkeypatch):
    owners, sizes = CUTS["ring"], {}
    for kind in ("f32", "f16"):
        with shared_engine(paths["qwen2"], owners, used(owners, addresses), hidden=kind, n_ubatch=64) as opened:
            put, sizes[kind] = opened.cluster._journal.put, []

            def counted(layer, data, put=put, sizes=sizes[kind]):
                sizes.append(len(data))
                put(layer, data)

            monkeypatch.setattr(opened.cluster._journal, "put", counted)
            found = greedy(opened, PROMPT, 1)
        expected = alone("qwen2", PROMPT, 1)
        assert np.array_equal(found[0][0], expected[0][0]) == (kind == "f32")
        assert np.allclose(found[0][0], expected[0][0], atol=0.01)
    assert sizes["f16"] == [size // 2 for size in sizes["f32"]] != []


def test_what_16_bits_do_not_hold_is_refused(paths, addresses, monkeypatch):
    """And no worker is taken for lost because of it."""
    owners = CUTS["halves"]
    with shared_engine(paths["llama"], owners, used(owners, addresses), hidden="f16", n_ubatch=64) as opened:
        result = Link.result

        def larger(link, check):
            return b"\x00\x7c" + result(link, check)[2:]  # what ggml makes of a larger one: infinite

        opened.forward(PROMPT)
        monkeypatch.setattr(Link, "result", larger)
        with pytest.raises(EngineError, match="what goes into layer 2 is beyond 65504"):
            opened.forward([1])
        monkeypatch.undo()
        with pytest.raises(EngineError, match="what goes into layer 2 is beyond 65504"):  # from layers of the root
            opened.cluster.leave(2, memoryview(np.full(opened.cluster.width, 1e6, np.float32)))
        opened.forward([1])
        assert not any(link.is_lost for link in opened.cluster.links)


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


# --- what is refused ------------------------------------------------------------------------------------------------


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
        ([(0, 2)], 64, "f16 f8", "do not travel as 'f8'"),
    ],
)
def test_a_setup_that_cannot_be_is_refused(paths, addresses, ranges, n_ctx, kv_type, reason):
    kv_type, _, hidden = kv_type.partition(" ")
    link = Link(addresses[0], None, hello(ModelFile.open(paths["llama"]).hash))
    link.set_up(Setup(ranges, n_ctx, 16, 1, kv_type, 0, hidden or "f32"))
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
