"""What a pass needs besides weights, keys and values: buffers that grow with its tokens.

llama.cpp reserves its compute buffer for the longest pass, and an output for the logits of as many tokens as are ever
drafted. It is memory that is touched lazily: a short pass (a token and its drafts) takes a small part of the first, a
pass without drafts one row of the second. What was touched and is not needed is given back, and weights take its place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from runtime.llama import abi
from runtime.llama.context import Context
from runtime.llama.model_file import ModelFile, TensorInfo
from runtime.plans.ledger import embedding_rows_bytes
from runtime.settings import SHORT_PASS, Settings
from runtime.sizes import MB, PAGE, page_up

_KEPT_ROWS = 64  # embedding rows of past tokens that stay in memory
_SPREAD = 1.25  # a short pass touches pages here and there: at most this times its share of the buffer (measured)


class Use(NamedTuple):
    """What memory is laid out for.

    long: passes of a prompt; else of at most SHORT_PASS tokens, or of a token and its drafts. rows: of logits.
    """

    long: bool
    rows: int = 1

    def with_(self, other: Use) -> Use:
        """For both."""
        return Use(self.long or other.long, max(self.rows, other.rows))


def rows_for(n_logits: int, most: int) -> int:
    """Rows of logits that memory is laid out for: one, half of the most, or the most. A change is paid with reads."""
    half = -(-most // 2)
    return 1 if n_logits <= 1 else half if n_logits <= half else most


@dataclass(frozen=True)
class PassMemory:
    """Bytes that the passes of a context need.

    one_row_bytes: of the buffers where the context makes one row of logits at most. Nothing else in them grows with the
    rows, and rows that a pass does not make are not touched.
    """

    file: ModelFile
    settings: Settings
    context: Context
    one_row_bytes: int

    def compute(self, use: Use) -> int:
        """Compute and output buffers."""
        n_tokens, row_bytes = self.context.n_tokens, 4 * self.context.n_vocab
        logits, n_short = row_bytes * use.rows, max(SHORT_PASS, use.rows)
        others = max(0, self.one_row_bytes - row_bytes)
        share = 1.0 if use.long else _SPREAD * min(1.0, n_short / n_tokens)
        buffer = min(self.context.scratch_bytes, logits + int(share * others) + MB // 4)
        return buffer + logits + self._work_bytes(n_tokens if use.long else min(n_tokens, n_short))

    @property
    def scratch_bytes(self) -> int:
        """More than ggml's scratch takes in the longest pass."""
        return page_up(2 * self._work_bytes(self.context.n_tokens) + MB)

    def _work_bytes(self, n_tokens: int) -> int:
        """ggml's scratch for a product: the input in the type the weights are multiplied with."""
        tensors = (piece.tensor for layer in self.file.layers for piece in layer.pieces)
        inputs = {(tensor.type_name, tensor.shape[0]) for tensor in tensors}
        return n_tokens * max((abi.input_row_bytes(name, n) for name, n in inputs), default=0)

    def embedding(self, table: TensorInfo, *, long: bool) -> int:
        """An input embedding's rows: of one pass and some of the passes before; or all of it."""
        if self.settings.prefetch_input:
            return page_up(table.n_bytes) + PAGE
        n_rows = (self.context.n_tokens if long else SHORT_PASS) + _KEPT_ROWS
        return min(embedding_rows_bytes(table.row_bytes, n_rows), page_up(table.n_bytes) + PAGE)
