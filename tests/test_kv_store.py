"""Several turns, cuts, failures and a store on disk: the rows of sparse layers are where they should be."""

from __future__ import annotations

import ctypes
import errno
import os
import threading

import numpy as np
import pytest
from engines import assert_same, engine
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import Cancelled, DiskError, EngineError, ModelError
from runtime.kv import store as kv_store
from runtime.kv.cache import Cache, CacheLayer, Rows2D, find_cache
from runtime.kv.compact import Compact
from runtime.kv.options import KvFilter
from runtime.kv.slots import Move, Slots
from runtime.kv.store import DiskStore, RamStore
from runtime.llama import abi
from runtime.llama.model_file import ModelFile
from runtime.memory import HUGE_PAGE, file_bytes, resident_bytes
from runtime.plans.plan import Plan

THREADS = 2
PROMPT = [7 + (i * 37) % 200 for i in range(200)]
MORE = [9 + (i * 31) % 190 for i in range(70)]
RESIDENT = Plan(4, 1, pinned_bytes=10**9)


def talk(opened):
    """Two turns with answers, then a cut into the first one and another answer; logits of every step."""
    logits, tokens = [], []

    def step(given):
        opened.forward(given)
        logits.append(opened.logits().copy())
        tokens.append(int(np.argmax(logits[-1])))

    step(PROMPT)
    for token in (5, 6, 7):
        step([token])
    step(MORE)
    for token in (8, 9):
        step([token])
    opened.truncate(120)
    step([10])
    step(MORE[:5])
    for token in (11, 12):
        step([token])
    return logits, tokens


@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("strategy", ["multi", "without_pack", "brutal", "lazy"])
def test_turns_and_cuts(tiny_model, tmp_path, strategy, kv_type):
    """With all rows kept every strategy and store gives the bits of a run without a filter."""
    path, settings = tiny_model("llama"), {"n_ubatch": 64, "n_threads": THREADS, "kv_type": kv_type}
    with engine(path, RESIDENT, **settings) as opened:
        plain = talk(opened)
    keep = 0.1 if strategy == "brutal" else 1.0
    for store in ("ram", "disk"):
        kv = KvFilter(keep=keep, strategy=strategy, store=store, folder=str(tmp_path))
        with engine(path, RESIDENT, kv=kv, **settings) as opened:
            assert_same(talk(opened), plain)


@pytest.mark.parametrize("select", ["last", "exp"])
def test_turns_with_a_selection_are_the_same_from_disk(tiny_model, tmp_path, select):
    path, settings = tiny_model("llama"), {"n_ubatch": 64, "n_threads": THREADS}
    answers = []
    for store in ("ram", "disk"):
        kv = KvFilter(keep=20, select=select, store=store, folder=str(tmp_path), tail=2)
        with engine(path, RESIDENT, kv=kv, **settings) as opened:
            answers.append(talk(opened))
            assert opened.kv.stored < opened.n_past
    assert_same(answers[1], answers[0])


def test_more_tokens_than_the_tail_takes_become_part_of_the_prompt(tiny_model):
    with engine(tiny_model("llama"), RESIDENT, kv=KvFilter(keep=1.0, tail=3)) as opened:
        opened.forward(PROMPT)
        for i in range(8):
            opened.forward([5 + i])
        assert opened.kv.stored == len(PROMPT) + 6
        filtered = opened.logits().copy()
    with engine(tiny_model("llama"), RESIDENT) as opened:
        opened.forward(PROMPT)
        for i in range(8):
            opened.forward([5 + i])
        assert np.array_equal(opened.logits(), filtered)


# --- memory ---------------------------------------------------------------------------------------------------------


def test_memory_falls_by_the_rows_that_are_not_kept(tiny_model, tmp_path):
    """4 of 6 layers are in a file: their 41 MB are not in memory, the rows kept are in both cases."""
    shape = "llama:layers=6,dim=1024,ffn=256,heads=8,kv_heads=8,vocab=512,ctx=4096"
    path, n, row_bytes, n_sparse = tiny_model(shape), 2500, 2 * 1024 * 2, 4
    tokens, used = [7 + (i * 37) % 200 for i in range(n)], {}
    for store in ("ram", "disk"):
        kv = KvFilter(layers=(0,), keep=0.1, store=store, folder=str(tmp_path))
        with engine(path, Plan(6, 1, pinned_bytes=10**9), n_ctx=4096, n_ubatch=512, n_threads=THREADS, kv=kv) as opened:
            opened.forward(tokens)
            for _ in range(3):
                opened.forward([5])
            assert len(opened.kv.figures()["sparse_layers"]) == n_sparse
            used[store] = resident_bytes() - file_bytes()  # pages of libraries come and go
            ledger = opened.ledger
            if store == "disk":
                assert opened.kv.figures()["bytes_on_disk"] == n * row_bytes * n_sparse
    expected = n * row_bytes * n_sparse
    # the heap of this process of tests may have a huge page more or less
    assert used["ram"] - used["disk"] == pytest.approx(expected, abs=expected // 20 + HUGE_PAGE)
    assert ledger.kv_bytes == pytest.approx(4096 * row_bytes * 2, rel=0.01)


# --- failures -------------------------------------------------------------------------------------------------------


def test_no_room_for_the_file(tiny_model, tmp_path, monkeypatch):
    def full(_fd, _start, _n_bytes):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(kv_store.os, "posix_fallocate", full)
    with (
        pytest.raises(DiskError, match=r"No space left.*TMPDIR"),
        engine(tiny_model("llama"), RESIDENT, kv=KvFilter(store="disk", folder=str(tmp_path))),
    ):
        pass
    assert not list(tmp_path.glob("h2o-kv*"))


def test_a_folder_that_cannot_be_made(tiny_model, tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(DiskError, match="no file for keys and values"),
        engine(tiny_model("llama"), RESIDENT, kv=KvFilter(store="disk", folder=str(tmp_path / "file" / "x"))),
    ):
        pass


@pytest.mark.parametrize("when", ["prompt", "decode"])
def test_a_disk_that_fails_ends_the_pass_and_nothing_else(tiny_model, tmp_path, monkeypatch, when):
    path, kv = tiny_model("llama"), KvFilter(keep=20, store="disk", folder=str(tmp_path))
    with engine(path, RESIDENT, n_ubatch=64, n_threads=THREADS, kv=kv) as opened:
        plain = talk(opened)
    broken = "pwritev" if when == "prompt" else "preadv"
    with engine(path, RESIDENT, n_ubatch=64, n_threads=THREADS, kv=kv) as opened:
        if when == "decode":
            opened.forward(PROMPT)
        with monkeypatch.context() as patch:
            patch.setattr("runtime.kv.whole.os", Broken(broken))
            with pytest.raises(DiskError, match="Input/output error"):
                opened.forward(PROMPT if when == "prompt" else [5])
        opened.truncate(0)
        assert_same(talk(opened), plain)


class Broken:
    """The module os with one function that fails."""

    def __init__(self, name):
        self._name = name

    def __getattr__(self, name):
        if name == self._name:
            raise_error = OSError(errno.EIO, os.strerror(errno.EIO))
            return lambda *_: (_ for _ in ()).throw(raise_error)
        return getattr(os, name)


def test_ctrl_c_while_rows_are_fetched(tiny_model, tmp_path, monkeypatch):
    """The wait ends at once, and the sequence goes on with the same bits."""
    path, kv = tiny_model("llama"), KvFilter(keep=20, store="disk", folder=str(tmp_path))
    with engine(path, RESIDENT, n_ubatch=64, n_threads=THREADS, kv=kv) as opened:
        opened.forward(PROMPT)
        opened.forward([5])
        expected = opened.logits().copy()
    go = threading.Event()
    with engine(path, RESIDENT, n_ubatch=64, n_threads=THREADS, kv=kv) as opened:
        opened.forward(PROMPT)
        read = DiskStore._read_rows
        with monkeypatch.context() as patch:
            patch.setattr(DiskStore, "_read_rows", lambda *arguments: (go.wait(), read(*arguments))[1])
            threading.Timer(0.3, opened.cancel).start()
            with pytest.raises(Cancelled):
                opened.forward([5])
            go.set()
        opened.forward([5])
        assert np.array_equal(opened.logits(), expected)


# --- refusals -------------------------------------------------------------------------------------------------------


def test_keys_of_32_bits_are_refused(tiny_model):
    with (
        pytest.raises(ModelError, match="32 bits"),
        engine(tiny_model("llama"), RESIDENT, kv_type="f32", kv=KvFilter()),
    ):
        pass


def test_without_flash_attention_nothing_is_filtered_silently(tiny_model, monkeypatch):
    defaults = abi.llama.llama_context_default_params

    def off():
        parameters = defaults()
        parameters.flash_attn_type = 0
        return parameters

    monkeypatch.setattr(abi.llama, "llama_context_default_params", off)
    with engine(tiny_model("llama"), RESIDENT, kv=KvFilter()) as opened:
        with pytest.raises(EngineError, match="without flash attention"):
            opened.forward(PROMPT)
        assert opened.n_past == 0


@pytest.mark.parametrize("what", ["recurrent", "hybrid"])
def test_recurrent_state_is_refused(tiny_model, monkeypatch, what):
    monkeypatch.setattr(abi.llama, f"llama_model_is_{what}", lambda _: True)
    with pytest.raises(ModelError, match="recurrent state"), engine(tiny_model("llama"), RESIDENT, kv=KvFilter()):
        pass


@pytest.mark.parametrize(
    "names, words",
    [(["cache_k_l0"], "MLA"), (["cache_dsak_l0"], "special cache"), ([], "no layer")],
)
def test_caches_of_other_kinds_are_refused(tiny_model, monkeypatch, names, words):
    monkeypatch.setattr(abi.llama, "llama_model_is_recurrent", lambda _: False)
    monkeypatch.setattr(abi.llama, "llama_model_is_hybrid", lambda _: False)
    monkeypatch.setattr(abi.llama, "llama_model_n_swa", lambda _: 0)
    tensor = abi.Tensor(type=1)
    address = abi.ctypes.addressof(tensor)
    with pytest.raises(ModelError, match=words):
        find_cache([dict.fromkeys(names, address)], ModelFile.open(tiny_model("llama")), 0)


def test_a_layer_with_a_window_cannot_filter(tiny_model):
    shape = "cohere2:layers=12,dim=256,ffn=512,heads=4,kv_heads=2,vocab=512,ctx=512"
    with (
        pytest.raises(Exception, match=r"layer 2 has a sliding window.*3, 7, 11"),
        engine(tiny_model(shape), RESIDENT, kv=KvFilter(layers=(2,))),
    ):
        pass


# --- the file -------------------------------------------------------------------------------------------------------


@given(st.data())
def test_rows_of_any_size_come_back_from_the_file(data):
    """Written in parts, read in any selection: rows of f16 and of q8_0 caches, which do not fill pages."""
    row_bytes = data.draw(st.sampled_from([64, 272, 1024, 1088, 5120]))
    n_cells = 256
    tensors = [abi.Tensor(type=1) for _ in range(2)]
    parts = tuple(Rows2D(abi.ctypes.addressof(tensor), row_bytes, n_cells, is_half=True) for tensor in tensors)
    cache = Cache({3: CacheLayer(parts)}, (3,))
    rows = np.random.default_rng(data.draw(st.integers(0, 99))).integers(0, 255, (2, n_cells, row_bytes), np.uint8)
    store = DiskStore(cache, [3], KvFilter(folder=os.environ.get("TMPDIR", "/tmp"), store="disk"))
    compact = Compact(cache.layers[3], n_cells)
    try:
        start = 0
        while start < n_cells:
            end = data.draw(st.integers(start + 1, n_cells))
            for part in (0, 1):
                store.put(3, part, start, rows[part, start:end].view(compact.rows[part].dtype).ravel())
            start = end
        chosen = np.array(sorted(data.draw(st.sets(st.integers(0, n_cells - 1), min_size=1))), np.int64)
        slots = np.array(data.draw(st.permutations(range(n_cells)))[: len(chosen)], np.int64)
        store.fetch({3: compact}, (3,), Move(chosen, slots, slots))
        for part in (0, 1):
            assert np.array_equal(compact.rows[part][slots].view(np.uint8), rows[part, chosen].ravel())
    finally:
        compact.free()
        store.close()


@given(
    row_bytes=st.tuples(st.integers(1, 40).map(lambda n: 34 * n), st.integers(1, 300).map(lambda n: 4 * n)),
    n_new=st.integers(0, 40),
    n_threads=st.sampled_from([1, 2]),
    data=st.data(),
)
def test_rows_of_any_size_come_from_the_cache(row_bytes, n_new, n_threads, data):
    """Few new rows or all of them, whatever their size: every slot has its row, the other slots what they had."""
    n_cells, n_slots = 90, 40
    filled = [np.frombuffer(os.urandom(n_cells * size), np.uint8).reshape(n_cells, size) for size in row_bytes]
    tensors = [abi.Tensor() for _ in row_bytes]
    for tensor, rows in zip(tensors, filled, strict=True):
        tensor.data = rows.ctypes.data
    addresses = map(ctypes.addressof, tensors)
    both = tuple(Rows2D(a, size, n_cells, is_half=False) for a, size in zip(addresses, row_bytes, strict=True))
    layers = {n: CacheLayer(both) for n in (3, 5)}
    store = RamStore(Cache(layers, (3, 5)), (3, 5), KvFilter(keep=n_slots), n_threads)
    compact = {n: Compact(layer, n_cells) for n, layer in layers.items()}
    slots = Slots(n_slots, n_cells)
    order = np.array(data.draw(st.permutations(range(n_cells))), np.int64)
    try:
        for rows in (np.sort(order[:n_slots]), np.sort(order[n_new : n_new + n_slots])):
            move = slots.choose(rows)
            if move:
                store.fetch(compact, (3, 5), move)
                for layer in compact.values():
                    for found, source in zip(layer.rows, filled, strict=True):
                        assert found[:n_slots].tobytes() == source[move.every].tobytes()
    finally:
        store.close()
        for layer in compact.values():
            layer.free()
