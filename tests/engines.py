"""An engine for tests, opened and closed in one place."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np

from runtime.engine.engine import Engine
from runtime.errors import Cancelled
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.plan import Plan
from runtime.settings import Settings


@contextmanager
def engine(path, plan=None, part=lambda file: file, **settings):
    """An Engine on the model at path, or a part of it, with a list `engine.notes` for those of a test."""
    file = part(ModelFile.open(path))
    model = HollowModel(file)
    opened = None
    try:
        opened = Engine(file, model, plan or Plan(0, 1), Settings(**{"n_ctx": 512, **settings}))
        opened.notes = []
        yield opened
    finally:
        if opened:
            opened.close()
        model.free()


def greedy(opened, prompt, n_predict, before_token=None):
    """(logits of every step, tokens), as tests/reference.py gives them for llama.cpp alone."""
    opened.forward(prompt)
    logits, tokens = [], []
    for i in range(n_predict):
        logits.append(opened.logits().copy())
        tokens.append(int(np.argmax(logits[-1])))
        if i + 1 < n_predict:
            if before_token:
                before_token(i)
            opened.forward(tokens[-1:])
    return logits, tokens


def assert_same(mine, reference):
    """Bit-equal logits at every step, and the same tokens."""
    assert mine[1] == list(reference[1])
    for step, (own, other) in enumerate(zip(mine[0], reference[0], strict=True)):
        assert np.array_equal(own, other), f"step {step}: max difference {np.abs(own - other).max()}"


def cancel_at_piece(monkeypatch, opened, number):
    """The pass in which the number-th piece from now on is needed is cancelled there; the list of pieces needed."""
    need, needed = opened._store.need, []

    def cancelling(piece):
        needed.append(piece)
        if len(needed) == number:
            opened.guests.stop = Cancelled(2)
        return need(piece)

    monkeypatch.setattr(opened._store, "need", cancelling)
    return needed
