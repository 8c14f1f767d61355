"""A long prompt's rows in little time, for timing the tokens after it: its attention sees the first rows only.

What a decode pass costs does not depend on what the rows of the prompt hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from runtime.engine.engine import Engine
from runtime.errors import H2OError
from runtime.llama import abi

if TYPE_CHECKING:
    from runtime.kv.filter import Filter

SEEN_ROWS = 256
_K, _V, _MASK = 1, 2, 3  # sources of a flash-attention node


class _FewRows:
    """Stands between an engine's nodes and its filter, where it has one, and makes attention nodes short."""

    def __init__(self, kv: Filter | None) -> None:
        self._kv = kv
        self._whole: list[tuple[abi.Tensor, int, int]] = []  # tensor, dimension, rows

    def before(self, address: int) -> bool:
        """A node is going to be computed; True: report when it is done."""
        report = self._kv.before(address) if self._kv else False
        if ctypes.c_int.from_address(address + abi.OP_OFFSET).value == abi.OP_FLASH_ATTN_EXT:
            node = abi.Tensor.from_address(address)
            for source, dimension in ((_K, 1), (_V, 1), (_MASK, 0)):
                tensor = abi.Tensor.from_address(node.src[source])
                if tensor.ne[dimension] > SEEN_ROWS:
                    self._whole.append((tensor, dimension, tensor.ne[dimension]))
                    tensor.ne[dimension] = SEEN_ROWS
        return report

    def after(self, address: int) -> None:
        """Everything up to this node has been computed."""
        if self._kv:
            self._kv.after(address)

    def end_pass(self, *, complete: bool) -> H2OError | None:
        """After the pass: the tensors are as they were."""
        for tensor, dimension, n_rows in self._whole:
            tensor.ne[dimension] = n_rows
        self._whole.clear()
        return self._kv.end_pass(complete=complete) if self._kv else None


@contextmanager
def short_attention(engine: Engine) -> Iterator[None]:
    """Prompts computed inside the block attend to their first SEEN_ROWS rows."""
    engine.nodes.kv = cast("Filter", _FewRows(engine.kv))
    try:
        yield
    finally:
        engine.nodes.kv = engine.kv
