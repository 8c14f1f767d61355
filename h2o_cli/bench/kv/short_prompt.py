"""A long prompt's rows in little time, for timing the tokens after it: its attention sees the first rows only.

What a decode pass costs does not depend on what the rows of the prompt hold.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

from runtime.engine.engine import Engine
from runtime.llama import abi
from runtime.passes import Pass

SEEN_ROWS = 256
_K, _V, _MASK = 1, 2, 3  # sources of a flash-attention node


class _FewRows:
    """A guest that makes attention nodes short."""

    def __init__(self) -> None:
        self._whole: list[tuple[abi.Tensor, int, int]] = []  # tensor, dimension, rows

    def begin(self, pass_: Pass) -> None:
        """A pass comes."""

    def before(self, node: int) -> bool:
        """A node is going to be computed."""
        if ctypes.c_int.from_address(node + abi.OP_OFFSET).value == abi.OP_FLASH_ATTN_EXT:
            attention = abi.Tensor.from_address(node)
            for source, dimension in ((_K, 1), (_V, 1), (_MASK, 0)):
                tensor = abi.Tensor.from_address(attention.src[source])
                if tensor.ne[dimension] > SEEN_ROWS:
                    self._whole.append((tensor, dimension, tensor.ne[dimension]))
                    tensor.ne[dimension] = SEEN_ROWS
        return False

    def after(self, node: int) -> None:
        """Everything up to this node has been computed."""

    def end(self, *, complete: bool) -> None:
        """After the pass: the tensors are as they were."""
        for tensor, dimension, n_rows in self._whole:
            tensor.ne[dimension] = n_rows
        self._whole.clear()


@contextmanager
def short_attention(engine: Engine) -> Iterator[None]:
    """Prompts computed inside the block attend to their first SEEN_ROWS rows."""
    with engine.guests.joined_by(_FewRows()):
        yield
