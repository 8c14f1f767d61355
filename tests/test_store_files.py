"""The layer store on files of models."""

from __future__ import annotations

import numpy as np
import pytest
from stores import (
    EVERYTHING,
    Computation,
    computing,
    end_when_hanging,  # noqa: F401 - a fixture of the tests here, too
    n_bytes,
    numbers_of,
    readers,
    resident_bytes,
)
from test_residency import make_index

from runtime.llama.model_file import ModelFile
from runtime.settings import Settings
from runtime.sizes import PAGE, page_down, page_up
from runtime.weights import head_start
from runtime.weights.files import BUFFERED, DIRECT, WeightFiles
from runtime.weights.store import LayerStore


@pytest.mark.parametrize("mode", [DIRECT, BUFFERED])
@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_bytes_are_those_of_the_file(tiny_model, arch, mode):
    model = ModelFile.open(tiny_model(arch, "q8_0"))
    data = np.memmap(model.path, mode="r")

    def content(piece):
        return data[piece.offset : piece.offset + piece.n_bytes].view(np.uint64)

    store = LayerStore(model, WeightFiles(model.paths, mode), request_bytes=64 * 1024, depth=3)
    c = Computation(model, store, content)
    try:
        largest = max(piece.span_bytes for piece in c.pieces)
        c.plan(set(), largest)
        c.one_pass()
        c.one_pass(c.pieces[::-1])
        c.plan({piece.number for piece in c.pieces[::2]}, 3 * largest)
        c.one_pass(c.pieces[1::2] + c.pieces[::2])
        c.plan({piece.number for piece in c.pieces}, 0)
        for _ in range(2):
            c.one_pass()
        assert resident_bytes(store) == n_bytes(c.pieces)
        before = store.bytes_read
        c.one_pass()
        assert store.bytes_read == before
    finally:
        store.close()
    assert not readers()


def pages_of(tensors):
    """(file, page) of all their bytes."""
    return {(t.file, page) for t in tensors for page in range(page_down(t.offset), page_up(t.offset + t.n_bytes), PAGE)}


@pytest.mark.parametrize(("layers", "head"), [((0, 1), False), ((2, 3), True), ((1, 3), False)])
def test_of_a_part_nothing_else_is_read(tiny_model, monkeypatch, layers, head):
    """Weights through the stream or into memory, and small tensors."""
    model = ModelFile.open(tiny_model("qwen2", "q8_0"))
    part = model.owned(layers, head=head, embedding=False)
    streamed, read = [], set()
    monkeypatch.setattr(LayerStore, "read_observer", lambda chunk, *_: streamed.append((chunk.offset, chunk.n_bytes)))

    class Files(WeightFiles):
        def read(self, file, offset, address, n_bytes):
            read.update((file, page) for page in range(offset, offset + n_bytes, PAGE))
            super().read(file, offset, address, n_bytes)

    monkeypatch.setattr(head_start, "WeightFiles", Files)
    weights = head_start.open_weights(part, Settings(depth=2))
    try:
        c = Computation(
            part,
            weights.store,
            lambda piece: np.fromfile(model.path, np.uint64, piece.n_bytes // 8, offset=piece.offset),
        )
        for wanted in (set(), numbers_of(c.pieces[::2]), numbers_of(c.pieces)):
            c.plan(wanted, n_bytes(c.pieces) // 3)
            for n in (1, 2):
                assert weights.store.share_used == 0
                c.one_pass(c.pieces[:-1], complete=False) if n == 1 else c.one_pass()
        assert [p.layer for p in c.pieces] == sorted(p.layer for p in c.pieces)
        assert {p.layer for p in c.pieces} == {*layers, *([model.n_layers] if head else [])}
        assert {offset for offset, _ in streamed} == {piece.span[0] for piece in c.pieces}
        small = list(part.small_tensors)
        assert {t.name.split(".")[1] for t in small if t.name.startswith("blk.")} == set(map(str, layers))
        assert ("output_norm.weight" in {t.name for t in small}) == head
        assert read == pages_of([*small, *(piece.tensor for piece in c.pieces)])
    finally:
        weights.close()
    assert pages_of(model.tensors) - read


def test_how_far_the_computation_is_counts_by_the_layers_of_the_part():
    model = make_index([[64, 64]] * 4, [64])
    for part, shares in (
        (model, [0, 0, 0.25, 0.25, 0.5, 0.5, 0.75, 0.75, 1]),
        (model.owned([1, 3], head=True, embedding=False), [0, 0, 0.5, 0.5, 1]),
        (model.owned([], head=True, embedding=False), [0]),
    ):
        with computing(part) as (c, s, _):
            c.plan(set(), EVERYTHING)
            assert s.share_used == 0
            assert [c.use(piece) or s.share_used for piece in c.pieces] == shares
            c.report()
