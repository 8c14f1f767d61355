"""The forward pass: the one place where llama.cpp, the layer store and the budget meet.

llama.cpp asks before it computes a node; when the node uses a weight that is not settled in memory, we wait until the
store has it and point the weight's tensor there. After the node was computed the store gets the slots back. A tensor
kept in several pieces (the output head) is computed piece by piece instead of by llama.cpp's own node.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime import llama_abi as abi
from runtime.context import Context
from runtime.embedding import RowTable
from runtime.errors import Cancelled, DiskError, EngineError, H2OError, PromptError
from runtime.head_start import open_store
from runtime.hollow import HollowModel
from runtime.layer_store import LayerStore
from runtime.ledger import SAMPLER_BYTES_PER_TOKEN, Ledger
from runtime.memory import resident_bytes_outside
from runtime.model_file import ModelFile, Piece
from runtime.pass_memory import PassMemory, pass_sizes
from runtime.plan import Plan
from runtime.repack import Repacker
from runtime.residency import layers_in, resident_pieces, smallest_window, streamable_bytes, window_bytes
from runtime.settings import FULL_TILES, SHORT_PASS, Settings
from runtime.sizes import page_down
from runtime.small_tensors import SmallTensors
from runtime.tiled_product import TiledProduct
from runtime.trace import LayerTrace

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from runtime.kv.filter import Filter

_ROOM_PIECES = 2  # of the largest size: less room than that for weights, and shorter passes are better


@dataclass
class Counters:
    """What the engine did since it was opened. Times in seconds."""

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    wait_s: float = 0.0


@dataclass(eq=False)
class Weight:
    """A weight tensor that is not settled: struct address, its pieces in order (none: an embedding table)."""

    address: int
    pieces: list[Piece]
    table: RowTable | None = None


class Engine:
    """A model ready to compute, inside a budget. `n_past` positions are in the KV cache."""

    def __init__(
        self,
        file: ModelFile,
        model: HollowModel,
        plan: Plan,
        settings: Settings,
        note: Callable[[str], None] = print,
        store: LayerStore | None = None,
    ) -> None:
        """Take over a store that is reading already (see head_start), or begin to read now."""
        self.file, self.settings, self.plan = file, settings, plan
        self.n_past = 0
        self.plan_changes = 0
        self.counters = Counters()
        self.trace: LayerTrace | None = None
        self.quiet = False  # True: the readers rest while anything is computed (for measuring)
        self._note = note
        self._model = model
        self._stop: BaseException | None = None
        self._skipped: dict[int, int] = {}
        self._tiled: dict[int, Weight] = {}
        self._aliases: list[int] = []
        self._asked_bytes = 0
        self._store = store or open_store(file, settings)
        self._small = SmallTensors(file, model, self._store.files)
        self._tables = [RowTable(t, t.n_bytes) for t in file.row_tables]
        self._weights = self._index_weights()
        self._active: dict[int, Weight] = {}  # weights that are not in memory for good
        self._callback = abi.EvalCallback(self._on_node)
        self._product = TiledProduct(settings.n_threads)
        self._repacker = Repacker()
        self.kv: Filter | None = None
        self._open_context(plan)
        self.n_vocab = self._context.n_vocab
        self._ledgers = {long: self._fixed_ledger(long=long) for long in (True, False)}
        self._long = True  # memory is laid out for a prompt, not for the next token
        try:
            self.apply(plan)
            if settings.prefetch_input:
                for table in self._tables:
                    table.fetch(range(table.tensor.n_rows), self._store)
        except H2OError:
            self.close()
            raise
        self.plan_changes = 0

    # --- opening ------------------------------------------------------------------------------------------------

    def _index_weights(self) -> list[Weight]:
        tables = {table.tensor.name: table for table in self._tables}
        pieces: dict[str, list[Piece]] = {}
        for piece in self.file.pieces:
            pieces.setdefault(piece.tensor.name, []).append(piece)
        weights = []
        for name in dict.fromkeys((*pieces, *tables)):
            for address in self._model.weights.get(name, ()):
                weights.append(Weight(address, pieces.get(name, []), tables.get(name)))
        return weights

    def _open_context(self, plan: Plan) -> None:
        """A context for passes as long as the prompt needs them and the budget allows."""
        n_tokens = min(self.settings.n_ubatch, self.settings.n_ctx)
        while True:
            self._context = Context(self._model, self.settings, n_tokens, self._callback)
            self._pass_memory = PassMemory(self.file, self.settings, self._context)
            try:
                self.kv = self._open_filter()
            except H2OError:
                self._context.close()
                raise
            fixed = self._fixed_ledger(long=True).fixed_bytes
            room = plan.budget_bytes - fixed >= _ROOM_PIECES * smallest_window(self.file)
            if room or n_tokens <= FULL_TILES:
                return
            self._close_context()
            n_tokens = max(FULL_TILES, n_tokens // 2)

    def _close_context(self) -> None:
        if self.kv:
            self.kv.close()
        self._context.close()

    def _open_filter(self) -> Filter | None:
        if self.settings.kv is None:
            return None
        from runtime.kv.filter import CacheSource, open_filter  # numpy, which a run without it does not need

        source = CacheSource(self._context.buffers.caches, self._model.pointer)
        return open_filter(self.settings, self.file, source, lambda: self._stop)

    def _fixed_ledger(self, *, long: bool) -> Ledger:
        """The ledger without weights while a prompt is computed (long), or for the tokens after it."""
        passes, buffers = self._pass_memory, self._context.buffers
        return Ledger(
            process_bytes=resident_bytes_outside(self._store.ranges),
            kv_bytes=buffers.kv_bytes - (self.kv.spared_bytes if self.kv else 0),
            compute_bytes=passes.compute(long=long),
            embedding_bytes=sum(passes.embedding(table.tensor, long=long) for table in self._tables),
            sampler_bytes=self._context.n_vocab * SAMPLER_BYTES_PER_TOKEN,
            draft_bytes=self.settings.draft_bytes,
            filter_bytes=self.kv.memory_bytes if self.kv else 0,
        )

    # --- plans --------------------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> None:
        """Adopt a plan between two passes. Raises BudgetError when its budget is below the floor.

        A plan made for a budget is filled to the last byte of it; a plan without one keeps exactly its k layers.
        """
        if plan.budget_bytes:
            self._ledgers[True].weights_bytes(plan.budget_bytes, smallest_window(self.file))
        self._lay_out(plan)
        self._asked_plan = plan
        self.plan_changes += 1

    def _lay_out(self, plan: Plan) -> None:
        """Share out what the budget leaves for weights in passes of the kind at hand."""
        fixed, total = self._ledgers[self._long], streamable_bytes(self.file)
        window, limit = window_bytes(self.file, plan), total
        everything = False
        if plan.budget_bytes:
            everything = plan.budget_bytes >= self._ledgers[True].fixed_bytes + total
            left = plan.budget_bytes - fixed.fixed_bytes
            if left >= total:
                window, limit = 0, total
            else:
                window = min(window, left)
                limit = left - window
            plan = replace(plan, pinned_bytes=max(limit, 1))
        resident = resident_pieces(self.file, plan, limit, self._store.wanted)
        streamed = sum(p.span_bytes for p in self.file.pieces if p.number not in resident)
        window = min(page_down(window), streamed)
        pinned = total - streamed
        for weight in self._weights:
            if any(piece.number not in resident for piece in weight.pieces):
                self._repacker.forget(weight.address)
        self._store.apply(resident, window)
        self._repack = self.settings.repack and streamed == 0 and (everything or not plan.budget_bytes)
        self._active = {weight.address: weight for weight in self._weights if weight.pieces}
        largest = smallest_window(self.file, resident)
        self._boundary_bytes = max(0, min(window // 4, (window - 2 * largest) // 2))
        self.ledger = replace(fixed, window_bytes=window, resident_bytes=pinned)
        self.plan = replace(plan, k=layers_in(self.file, pinned) if plan.budget_bytes else plan.k)
        self.streamed_bytes = streamed
        for table in self._tables:
            table.resize(self._pass_memory.embedding(table.tensor, long=self._long))

    # --- computing ----------------------------------------------------------------------------------------------

    def forward(self, tokens: Sequence[int], n_logits: int = 1) -> None:
        """Append tokens to the sequence; logits of the last n_logits of them are there afterwards.

        Raises PromptError when the context is full, DiskError when a read failed, Cancelled after cancel(). After an
        error the sequence is as it was before the pass that failed.
        """
        if self.n_past + len(tokens) > self.settings.n_ctx:
            raise PromptError(
                f"{self.n_past + len(tokens)} tokens do not fit a context of {self.settings.n_ctx}", "raise --ctx"
            )
        sizes = self.pass_sizes(len(tokens))
        self._prepare(max(sizes))
        self._store.expect_passes([i == len(sizes) - 1 for i in range(len(sizes))])
        start = 0
        for i, size in enumerate(sizes):
            if self.kv:
                self.kv.begin_pass(self.n_past, size, decode=len(tokens) == 1 and self.n_past > 0)
            self._pass(tokens[start : start + size], min(n_logits, size) if i == len(sizes) - 1 else 0)
            start += size

    def pass_sizes(self, n_tokens: int) -> list[int]:
        """The tokens of each pass that n_tokens take."""
        return pass_sizes(n_tokens, min(self.settings.n_ubatch, self.settings.n_ctx), self._context.n_tokens)

    def _prepare(self, n_tokens: int) -> None:
        """Lay the memory out for passes of at most n_tokens: weights make room for a prompt, and come back after it."""
        long = n_tokens > max(SHORT_PASS, self.settings.n_logits)
        if long != self._long:
            self._long = long
            if not long:
                self._context.drop_scratch()
            if self._asked_plan.budget_bytes:
                self._lay_out(self._asked_plan)

    def _pass(self, tokens: Sequence[int], n_logits: int) -> None:
        """One pass through all layers."""
        start = time.perf_counter()
        status = -1
        try:
            self._fetch_rows(tokens)
            watched = bool(self._active or self.trace or self.kv)
            self._context.call_back(wanted=len(tokens) > 1 or watched)
            if self.quiet:
                self._store.settle()
            if self.trace:
                self.trace.begin_pass(self._store.wait_s)
            status = self._context.decode(tokens, self.n_past, n_logits)
        except Cancelled:
            self.forget_cancel()
            raise
        finally:
            self._close_pass(complete=status == 0 and self._stop is None)
        self._raise_stop()
        if self._store.bytes_read != self.counters.bytes_read:
            self._check_files()
        if status != 0:
            self.truncate(self.n_past)
            reason = (abi.take_log() or ["no reason given"])[-1]
            raise EngineError(f"llama.cpp could not compute this pass (status {status}, {reason})", "raise --ctx")
        self.n_past += len(tokens)
        self._count(len(tokens), time.perf_counter() - start)

    def _fetch_rows(self, tokens: Sequence[int]) -> None:
        for weight in self._weights:
            if not weight.table or (weight.pieces and weight.address not in self._active):
                continue
            if weight.pieces and all(self._store.is_resident(piece) for piece in weight.pieces):
                abi.Tensor.from_address(weight.address).data = self._store.home(weight.table.tensor.name).data
            else:
                weight.table.fetch(tokens, self._store)
                abi.Tensor.from_address(weight.address).data = weight.table.data

    def _close_pass(self, *, complete: bool) -> None:
        if self.trace:
            self.trace.end_pass(self._store.wait_s)
        for address in self._aliases:
            self._active.pop(address, None)
        self._aliases.clear()
        self._tiled.clear()
        self._asked_bytes = 0
        self._store.end_pass(complete=complete)
        if self.kv:
            self._stop = self.kv.end_pass(complete=complete) or self._stop

    def _raise_stop(self) -> None:
        if self._stop is not None:
            stop, self._stop, self._store.interrupt = self._stop, None, None
            self.truncate(self.n_past)
            raise stop

    def _check_files(self) -> None:
        """Raise DiskError, and forget the pass, when the model on disk was changed."""
        try:
            self._store.files.check_unchanged()
        except DiskError:
            self.truncate(self.n_past)
            raise

    def _count(self, n_tokens: int, seconds: float) -> None:
        counters = self.counters
        counters.passes += 1
        counters.tokens += n_tokens
        counters.seconds += seconds
        counters.bytes_read, counters.wait_s = self._store.bytes_read, self._store.wait_s

    # --- llama.cpp calls back -----------------------------------------------------------------------------------

    def _on_node(self, address: int, ask: bool, _data: int) -> bool:
        if ask and not (self._active or self._stop or self.trace or self.kv):
            return False
        try:
            if self._stop is None:
                return self._before(address) if ask else self._after(address)
        except BaseException as error:  # noqa: BLE001 - ctypes would swallow it: kept, and raised after the pass
            self._stop = error
        return self._skip(address) if ask else self._unskip(address)

    def _before(self, address: int) -> bool:
        """A node is going to be computed: place its weights. True makes llama.cpp report when it is done."""
        report = self.kv.before(address) if self.kv else False
        if not self._active and not self.trace:
            return report
        sources = abi.unpack_src(ctypes.string_at(address + abi.SRC_OFFSET, abi.SRC_BYTES))
        if self.trace and self.trace.before(sources):
            report = True
        if self._active.keys().isdisjoint(sources):
            return report
        for source in sources:
            weight = self._active.get(source)
            if weight and self._place(address, source, weight):
                report = True
        return report

    def _place(self, node: int, source: int, weight: Weight) -> bool:
        """Point one weight of a node at its bytes; whether the node's end has to be reported."""
        op = ctypes.c_int.from_address(node + abi.OP_OFFSET).value
        if op == abi.OP_GET_ROWS and weight.table:
            return False  # its rows were fetched before the pass
        if abi.Tensor.from_address(node).ne[1] == 0:
            return False  # no outputs are wanted: nothing is computed
        if len(weight.pieces) > 1:
            return self._place_tiled(node, op, weight)
        piece = weight.pieces[0]
        data = self._store.need(piece)
        tensor = abi.Tensor.from_address(weight.address)
        tensor.data = data
        if source != weight.address:
            alias = abi.Tensor.from_address(source)
            alias.data = data + alias.view_offs
        if op in abi.VIEW_OPS:
            view_node = abi.Tensor.from_address(node)
            view_node.data = data + view_node.view_offs
            self._active[node] = weight
            self._aliases.append(node)
        elif self._store.is_resident(piece) and source == weight.address:
            self._settle(weight)
        self._asked_bytes += piece.span_bytes
        return self._asked_bytes > self._boundary_bytes or not self._store.next_is_there()

    def _place_tiled(self, node: int, op: int, weight: Weight) -> bool:
        """A tensor in pieces: switch its node off and compute it in _after, unless all of it is in one place."""
        if all(self._store.is_resident(piece) for piece in weight.pieces):
            abi.Tensor.from_address(weight.address).data = self._store.home(weight.pieces[0].tensor.name).data
            self._settle(weight)
            return False
        if op != abi.OP_MUL_MAT:
            raise EngineError(
                f"{weight.pieces[0].tensor.name} is not used as a matrix here", "raise -m until the model fits"
            )
        self._tiled[node] = weight
        self._skip(node)
        return True

    def _settle(self, weight: Weight) -> None:
        """The weight is in memory for good: llama.cpp can use it without asking us."""
        self._active.pop(weight.address, None)
        if self._repack and weight.table is None:
            self._repacker.repack(weight.address)

    def _after(self, address: int) -> bool:
        """Everything up to this node has been computed."""
        weight = self._tiled.pop(address, None)
        if weight:
            self._unskip(address)
            self._give_back()
            self._product.begin(address)
            for piece in weight.pieces:
                self._product.compute(self._store.need(piece), piece.first_row, piece.n_rows)
                self._give_back()
        else:
            self._give_back()
        self._asked_bytes = 0
        if self.kv:
            self.kv.after(address)
        if self.trace:
            self.trace.after(self._store.wait_s)
        return True

    def _give_back(self) -> None:
        """Everything asked for has been computed with."""
        self._store.computed()
        if self.quiet:
            self._store.settle()

    def _skip(self, address: int) -> bool:
        """Switch a node off until it is reported."""
        op = ctypes.c_int.from_address(address + abi.OP_OFFSET)
        self._skipped[address] = op.value
        op.value = abi.OP_NONE
        return True

    def _unskip(self, address: int) -> bool:
        op = self._skipped.pop(address, None)
        if op is not None:
            ctypes.c_int.from_address(address + abi.OP_OFFSET).value = op
        return False

    # --- around a pass ------------------------------------------------------------------------------------------

    def cancel(self, signal_number: int = 2) -> None:
        """End the pass that is running (from a signal handler or another thread); forward() raises Cancelled."""
        self._stop = self._store.interrupt = Cancelled(signal_number)

    def forget_cancel(self) -> None:
        """Drop a cancel() that came when no pass was running, so that the next one runs."""
        self._stop = self._store.interrupt = None

    def truncate(self, n_past: int) -> None:
        """Forget all positions from n_past on. Raises EngineError where the model's memory cannot do that."""
        self._context.truncate(n_past)
        self.n_past = n_past
        if self.kv:
            self.kv.truncate(n_past)

    def has_numbers(self) -> bool:
        """Whether the last logits are numbers (a damaged model computes NaN)."""
        return self._context.has_numbers()

    def is_number(self, token: int, i: int = -1) -> bool:
        """Whether the logit of one token in the last forward's i-th output is a number."""
        return self._context.is_number(token, i)

    def logits(self, i: int = -1) -> npt.NDArray[np.float32]:
        """Logits [n_vocab] of the last forward's i-th output (negative: from the end). Valid until the next forward."""
        return self._context.logits(i)

    @property
    def fixed_bytes(self) -> int:
        """What this process needs besides streamable weights, at its most: while a prompt is computed."""
        return self._ledgers[True].fixed_bytes

    @property
    def prompt_bytes(self) -> int:
        """The part of the compute buffers that only a prompt needs; weights take its place afterwards."""
        return self._ledgers[True].compute_bytes - self._ledgers[False].compute_bytes

    @property
    def bytes_read(self) -> int:
        """Bytes read from disk until now, also in the middle of a pass."""
        return self._store.bytes_read

    @property
    def context(self) -> int:
        """llama.cpp's context, for its samplers."""
        return self._context.pointer

    def close(self) -> None:
        """Free the context and all weights. The hollow model stays its owner's."""
        self._store.close()
        self._close_context()
        self._product.close()
        self._repacker.close()
        self._small.free()
        for table in self._tables:
            table.free()
