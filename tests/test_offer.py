"""What a worker's machine has to give."""

from __future__ import annotations

import pytest

from runtime.distributed import offer
from runtime.errors import BudgetError
from runtime.llama.model_file import ModelFile
from runtime.sizes import MB


def test_the_smallest_budget_that_is_named_works(tiny_model, monkeypatch):
    """With more memory more layers are measured, whose keys and values take more: but only where there is room."""
    monkeypatch.setattr(offer, "_rates", lambda _engine: (1.0, 1.0))
    shape = "llama:layers=12,dim=512,ffn=512,heads=4,kv_heads=4,vocab=512,ctx=512"
    file = ModelFile.open(tiny_model(shape, "q8_0"))
    with pytest.raises(BudgetError) as refused:
        offer.measure(file, MB, 1)
    floor = refused.value.floor_bytes
    assert floor // 4 > 2 * file.layers[0].pieces[0].span_bytes  # more layers than one are tried
    assert offer.measure(file, floor, 1).weights_bytes > 0
    with pytest.raises(BudgetError):
        offer.measure(file, floor - 4 * MB, 1)
