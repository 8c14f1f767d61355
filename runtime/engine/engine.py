"""The forward pass: the one place where llama.cpp, the layer store and the budget meet.

A plan becomes a set of resident pieces and a window inside the budget; tokens become passes. While llama.cpp computes a
pass, guests act at its nodes: the weights are put under them there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.engine.guests import Guests
from runtime.engine.pass_memory import PassMemory, Use, rows_for
from runtime.engine.weights_guest import WeightsGuest
from runtime.errors import Cancelled, DiskError, EngineError, H2OError, PromptError
from runtime.kv.cache_memory import STEP, CacheMemory
from runtime.llama import abi
from runtime.llama.context import Context
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.memory import resident_bytes_outside
from runtime.passes import Part, Pass, cut
from runtime.plans.ledger import SAMPLER_BYTES_PER_TOKEN, Ledger, more_margin, usable_bytes
from runtime.plans.plan import Plan
from runtime.plans.residency import (
    layers_in,
    overlapping_window,
    resident_pieces,
    smallest_window,
    streamable_bytes,
    window_bytes,
)
from runtime.settings import FULL_TILES, SHORT_PASS, Settings
from runtime.sizes import page_down
from runtime.weights.head_start import Weights, open_weights
from runtime.weights.rows import RowTable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from runtime.kv.filter import Filter

_SSD_BYTES_PER_S = 2e9
_ROOM_PIECES = 2  # of the largest size: less room than that for weights, and shorter passes are better
_PROMPT, _TOKEN = Use(long=True), Use(long=False)


@dataclass
class Counters:
    """What the engine did since it was opened. Times in seconds; busy_s: in which anything was being read."""

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    wait_s: float = 0.0
    busy_s: float = 0.0


class Engine:
    """A model ready to compute, inside a budget. `n_past` positions are in the KV cache."""

    def __init__(
        self,
        file: ModelFile,
        model: HollowModel,
        plan: Plan,
        settings: Settings,
        weights: Weights | None = None,
    ) -> None:
        """Take over weights that are being read already (see head_start), or begin to read now."""
        self.file, self.settings, self.plan = file, settings, plan
        self.ledger: Ledger
        self.n_past = 0
        self.plan_changes = 0
        self.lodger: Engine | None = None  # a draft model's, which is cancelled with this one
        self.counters = Counters()
        self.guests = Guests()
        self.most_tokens = 0  # of a pass, where others that take part in it can take no more (0: as many as fit)
        self._model = model
        self.kv: Filter | None = None
        self._use = self._touched = _PROMPT  # what memory is laid out for, and what was touched in it
        self._room = 0  # positions that memory is laid out for; what is behind them takes none
        self._placed: tuple[frozenset[int], int, bool] | None = None  # resident pieces, window, repacked or not
        self._fits = False  # weights and what any pass needs, both at once
        self._n_computing = 0  # tokens of the pass that runs
        self._source = weights or open_weights(file, settings)
        self._store = self._source.store
        self._opened = ExitStack()
        try:
            self._open(plan)
        except BaseException:
            self.close()
            raise
        self.plan_changes = 0

    # --- opening ------------------------------------------------------------------------------------------------

    def _open(self, plan: Plan) -> None:
        self._source.small.place(self._model)
        self._tables = []
        for info in self.file.row_tables:
            self._tables.append(RowTable(info, info.n_bytes))
            self._opened.callback(self._tables[-1].free)
        model, n_threads = self._model, self.settings.n_threads
        self.weights = WeightsGuest(self.file, model.weights, self._tables, self._store, self.guests, n_threads)
        self._opened.callback(self.weights.close)
        self._open_context(plan)
        self.guests.add(self.weights, every_node=False)
        if self.kv:
            self.guests.add(self.kv)
        self.n_vocab = self._context.n_vocab
        few, most = (rows_for(n, self.settings.n_logits) for n in (2, self.settings.n_logits))
        self._drafts, self._everything = Use(long=False, rows=most), Use(long=True, rows=most)
        uses = (_PROMPT, _TOKEN, Use(long=False, rows=few), self._drafts, self._everything)
        self._ledgers = {use: self._fixed_ledger(use) for use in uses}
        self._room = self._cache.steps(self.settings.n_ubatch)
        self.apply(self._with_fitting_window(plan) if self.settings.fit_window else plan)
        if self.settings.prefetch_input:
            for table in self._tables:
                table.fetch(range(table.tensor.n_rows), self._store)

    def _with_fitting_window(self, plan: Plan) -> Plan:
        """The plan with a window for the disk as fast as it was until now, or an SSD where it was asked for nothing."""
        begun = self._store.wanted or self._store.busy_s
        rate = self._store.bytes_read / (self._store.busy_s or 1) if begun else _SSD_BYTES_PER_S
        streamed = streamable_bytes(self.file) + self._ledgers[_TOKEN].fixed_bytes - usable_bytes(plan.budget_bytes)
        fitting = overlapping_window(smallest_window(self.file), streamed, rate)
        return replace(plan, window_bytes=max(plan.window_bytes, min(fitting, plan.budget_bytes // 4)))

    def _open_context(self, plan: Plan) -> None:
        """A context for passes as long as the prompt needs them and the budget allows."""
        n_tokens = min(self.settings.n_ubatch, self.settings.n_ctx)
        while True:
            with ExitStack() as opened:
                self._context = Context(self._model, self.settings, n_tokens, self.guests.filter)
                opened.callback(self._context.close)
                self._pass_memory = PassMemory(self.file, self.settings, self._context, self._one_row_bytes(n_tokens))
                self._context.align_scratch(self._pass_memory.scratch_bytes)
                self._cache = CacheMemory.of(self._context.buffers, self.file)
                self.kv = self._open_filter()
                if self.kv:
                    opened.callback(self.kv.close)
                self._process_bytes = resident_bytes_outside(self._store.ranges)
                drafts = Use(long=False, rows=self.settings.n_logits)
                fixed = max(self._fixed_ledger(use).fixed_bytes for use in (_PROMPT, drafts))
                room = usable_bytes(plan.budget_bytes) - fixed >= _ROOM_PIECES * smallest_window(self.file)
                if room or n_tokens <= FULL_TILES:
                    self._opened.enter_context(opened.pop_all())
                    return
            n_tokens = max(FULL_TILES, n_tokens // 2)

    def _one_row_bytes(self, n_tokens: int) -> int:
        """The buffers of a context that makes one row of logits."""
        if self.settings.n_logits == 1:
            return self._context.scratch_bytes
        with closing(Context(self._model, replace(self.settings, n_logits=1), n_tokens, self.guests.filter)) as context:
            return context.scratch_bytes

    def _open_filter(self) -> Filter | None:
        if self.settings.kv is None:
            return None
        from runtime.kv.filter import CacheSource, open_filter  # numpy, which a run without it does not need

        source = CacheSource(self._context.buffers.caches, self._model.pointer)
        return open_filter(self.settings, self.file, source, lambda: self.guests.stop, self.guests.skip)

    def _fixed_ledger(self, use: Use) -> Ledger:
        """The ledger of a full context, without weights."""
        passes = self._pass_memory
        return Ledger(
            process_bytes=self._process_bytes,
            kv_bytes=self.kv_bytes(self._cache.n_cells),
            compute_bytes=passes.compute(use),
            embedding_bytes=sum(passes.embedding(table.tensor, long=use.long) for table in self._tables),
            sampler_bytes=self._context.n_vocab * SAMPLER_BYTES_PER_TOKEN,
            draft_bytes=self.settings.draft_bytes,
            filter_bytes=self.kv.memory_bytes if self.kv else 0,
            cache_bytes=self.settings.depth * self._store.files.cached_bytes,
            margin_bytes=self.settings.margin_bytes + more_margin(self.settings.n_ctx, self.settings.n_threads),
        )

    def kv_bytes(self, n_positions: int) -> int:
        """What n_positions take of the cache."""
        spared = self.kv.spared_bytes if self.kv else 0
        return min(self._cache.n_bytes - spared, self._cache.bytes_for(n_positions))

    # --- plans --------------------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> None:
        """Adopt a plan between two passes. Raises BudgetError when its budget is below the floor.

        A plan made for a budget is filled to the last byte of it; a plan without one keeps exactly its k layers.
        """
        if plan.budget_bytes:
            self._largest_ledger.weights_bytes(plan.budget_bytes, smallest_window(self.file))
        self._lay_out(plan, self._use, min(self._room, self._cache.steps(self.n_past or self.settings.n_ubatch)))
        self._asked_plan = plan
        self.plan_changes += 1

    def _lay_out(self, plan: Plan, use: Use, room: int, *, again: bool = False) -> None:
        """Share out what the budget leaves for weights in passes of this kind, with room for so many positions.

        again: the plan is in force already, so where there is less for weights some leave and none comes. After an
        error nothing has changed.
        """
        if room < self._room:
            self._cache.drop_behind(room)
        fixed, total = self._ledgers[use], streamable_bytes(self.file)
        window, limit = window_bytes(self.file, plan), total
        usable = usable_bytes(plan.budget_bytes)
        fits = not plan.budget_bytes or usable >= self._ledgers[self._everything].fixed_bytes + total
        if plan.budget_bytes:
            margin = fixed.margin_bytes + plan.budget_bytes - usable
            fixed = replace(fixed, kv_bytes=self.kv_bytes(room), margin_bytes=margin)
            left = plan.budget_bytes - fixed.fixed_bytes
            if left >= total:
                window, limit = 0, total
            else:
                window = min(window, left)
                limit = left - window
            plan = replace(plan, pinned_bytes=max(limit, 1))
        there = self._store.wanted
        leave = again and limit < self.ledger.resident_bytes
        resident = resident_pieces(self.file, plan, limit, there, among=there if leave else None)
        streamed = sum(p.span_bytes for p in self.file.pieces if p.number not in resident)
        window = min(page_down(window), streamed)
        pinned = total - streamed
        placed = resident, window, self.settings.repack and streamed == 0 and fits
        if not again or placed != self._placed:
            self._place(*placed)
        self._use, self._room, self._fits = use, room, fits
        self.ledger = replace(fixed, window_bytes=window, resident_bytes=pinned)
        self.plan = replace(plan, k=layers_in(self.file, pinned) if plan.budget_bytes else plan.k)
        self.streamed_bytes = streamed
        for table in self._tables:
            table.resize(self._pass_memory.embedding(table.tensor, long=use.long))

    def _place(self, resident: frozenset[int], window: int, repack: bool) -> None:
        """Have these pieces in memory, rearranged or not, and the others come through the window."""
        try:
            self._store.apply(resident, window, spoilt=self.weights.spoilt_by(resident))
        except Cancelled:
            self.forget_cancel()
            raise
        self._placed = resident, window, repack
        self.weights.forget(resident)
        largest = smallest_window(self.file, resident)
        self.weights.watch_all(repack=repack, boundary_bytes=max(0, min(window // 4, (window - 2 * largest) // 2)))

    def make_room(self, draft_bytes: int) -> None:
        """Between two passes: a draft model takes so many bytes from now on, weights have the rest.

        Raises BudgetError, and leaves everything as it is, where the budget is too small for that.
        """
        before = self._ledgers
        self._ledgers = {use: replace(ledger, draft_bytes=draft_bytes) for use, ledger in before.items()}
        try:
            if self._asked_plan.budget_bytes:
                self._largest_ledger.weights_bytes(self._asked_plan.budget_bytes, smallest_window(self.file))
            self._lay_out(self._asked_plan, self._use, self._room, again=True)
        except H2OError:
            self._ledgers = before
            raise

    def measure_process(self) -> int:
        """Before the first pass: measure again what the process takes besides weights; how much that is less."""
        now = resident_bytes_outside(self._store.ranges)
        self._ledgers = {use: replace(ledger, process_bytes=now) for use, ledger in self._ledgers.items()}
        return self.ledger.process_bytes - now

    def displaced_bytes(self, draft_bytes: int) -> int:
        """Bytes of weights that have to be streamed where a draft model takes so many bytes."""
        budget, ledger = self._asked_plan.budget_bytes, self._ledgers[_TOKEN]
        if not budget:
            return 0
        later = ledger.kv_bytes - self.kv_bytes(self._room)
        need = ledger.fixed_bytes - ledger.draft_bytes - later + streamable_bytes(self.file)
        return max(0, draft_bytes - max(0, usable_bytes(budget) - need))

    # --- computing ----------------------------------------------------------------------------------------------

    def forward(self, tokens: Sequence[int], n_logits: int = 1) -> None:
        """Append tokens to the sequence; logits of the last n_logits of them are there afterwards.

        Raises PromptError when the context is full, DiskError when a read failed, Cancelled after cancel(). After an
        error the sequence is as it was before the pass that failed, or empty (n_past 0) where the model's state cannot
        be shortened.
        """
        if self.n_past + len(tokens) > self.settings.n_ctx:
            raise PromptError(
                f"{self.n_past + len(tokens)} tokens do not fit a context of {self.settings.n_ctx}", "raise --ctx"
            )
        part = Part(0, self.n_past, tuple(tokens), n_logits)
        self.compute(self.cut(part, decode=len(tokens) == 1 and self.n_past > 0))

    def cut(self, part: Part, *, decode: bool) -> list[Pass]:
        """The passes that a part takes alone. decode: it continues an answer."""
        most = min(self.pass_tokens, self.most_tokens or self.pass_tokens)
        return cut(part, min(self.settings.n_ubatch, self.settings.n_ctx), most, decode=decode)

    def compute(self, passes: Sequence[Pass]) -> None:
        """Compute passes one after the other; the logits that the last one wants are there afterwards.

        Raises what forward() raises.
        """
        self._prepare(passes)
        self._store.expect_passes(passes)
        for pass_ in passes:
            self._compute(pass_)

    def _prepare(self, passes: Sequence[Pass]) -> None:
        """Lay the memory out for these passes: weights make room for a prompt, for the logits of drafted tokens and for
        keys and values, and come back when those are gone.

        Where there is room for everything, what was touched stays for the next time.
        """
        rows = rows_for(max(pass_.n_outputs for pass_ in passes), self.settings.n_logits)
        use = Use(long=max(pass_.n_tokens for pass_ in passes) > max(SHORT_PASS, rows), rows=rows)
        if use.long:
            use = _PROMPT if rows == 1 else self._everything
        room = self._cache.steps(max(pass_.only.end for pass_ in passes))
        if self._fits and self.streamed_bytes == 0:
            self._touched, self._room = use.with_(self._touched), max(room, self._room)
            return
        if use.with_(self._touched) != use:
            self._context.drop_scratch()
        self._touched = use
        if self._room - STEP <= room <= self._room:  # no step back for each draft that was wrong
            room = self._room
        if not self._asked_plan.budget_bytes:
            self._room = max(room, self._room)
        elif (use, room) != (self._use, self._room):
            self._lay_out(self._asked_plan, use, room, again=True)

    def _compute(self, pass_: Pass) -> None:
        """One pass through all layers."""
        start = time.perf_counter()
        status = -1
        try:
            self.guests.begin(pass_)
            self._n_computing = pass_.n_tokens
            long = pass_.n_tokens > 1  # it can be ended at any node
            self._context.call_back(wanted=long or self.guests.are_needed)
            status = self._context.decode(pass_)
        except Cancelled:
            self.forget_cancel()
            raise
        finally:
            self._n_computing = 0
            self.guests.end(complete=status == 0)
        self._raise_stop()
        if self._store.bytes_read != self.counters.bytes_read:
            self._check_files()
        if status != 0:
            self._take_back()
            reason = (abi.take_log() or ["no reason given"])[-1]
            raise EngineError(f"llama.cpp could not compute this pass (status {status}, {reason})", "raise --ctx")
        self.n_past = pass_.only.end
        self._count(pass_.n_tokens, time.perf_counter() - start)

    def _raise_stop(self) -> None:
        stop = self.guests.stop
        if stop is not None:
            self.forget_cancel()
            self._take_back()
            raise stop

    def _take_back(self) -> None:
        """Forget the pass that failed; where the model cannot, as recurrent ones, everything."""
        try:
            self.truncate(self.n_past)
        except EngineError:
            self.truncate(0)

    def _check_files(self) -> None:
        """Raise DiskError, and forget the pass, when the model on disk was changed."""
        try:
            self._store.files.check_unchanged()
        except DiskError:
            self._take_back()
            raise

    def _count(self, n_tokens: int, seconds: float) -> None:
        counters = self.counters
        counters.passes += 1
        counters.tokens += n_tokens
        counters.seconds += seconds
        counters.bytes_read, counters.wait_s = self._store.bytes_read, self._store.wait_s
        counters.busy_s = self._store.busy_s

    # --- around a pass ------------------------------------------------------------------------------------------

    def cancel(self, signal_number: int = 2) -> None:
        """End the pass that is running (from a signal handler or another thread); forward() raises Cancelled."""
        self.guests.stop = self._store.interrupt = Cancelled(signal_number)
        if self.lodger:
            self.lodger.cancel(signal_number)

    def forget_cancel(self) -> None:
        """Drop a cancel() that came when no pass was running, so that the next one runs."""
        self.guests.stop = self._store.interrupt = None
        if self.lodger:
            self.lodger.forget_cancel()

    def truncate(self, n_past: int) -> None:
        """Forget all positions from n_past on. Raises EngineError where the model's memory cannot do that."""
        self._context.truncate(n_past)
        self.n_past = n_past
        if self.kv:
            self.kv.truncate(n_past)

    def odds(self, token: int, i: int = -1) -> float:
        """The probability (at temperature 1) of a token in the last forward's i-th output (negative: from the end)."""
        return self._context.odds(token, i)

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
        """What this process needs besides streamable weights, at its most: for a prompt or for drafts."""
        return self._largest_ledger.fixed_bytes

    @property
    def _largest_ledger(self) -> Ledger:
        return max(self._ledgers[_PROMPT], self._ledgers[self._drafts], key=lambda ledger: ledger.fixed_bytes)

    @property
    def prompt_bytes(self) -> int:
        """The part of the compute buffers that only a prompt needs; weights take its place afterwards."""
        return self._ledgers[_PROMPT].compute_bytes - self._ledgers[_TOKEN].compute_bytes

    @property
    def waited_s(self) -> float:
        """Seconds of waits for reads until now, in the pass that runs."""
        return self._store.wait_s

    @property
    def pass_tokens(self) -> int:
        """The longest pass that there is memory for."""
        return self._context.n_tokens

    @property
    def computed_tokens(self) -> float:
        """Tokens computed until now; those of the pass that runs count by the layers it has come to."""
        return self.counters.tokens + self._n_computing * self._store.share_used

    @property
    def context(self) -> int:
        """llama.cpp's context, for its samplers."""
        return self._context.pointer

    def give_up_weights(self) -> Weights:
        """Free the context; the weights stay as they are, for another engine on the same model."""
        self._opened.close()
        return self._source

    def close(self) -> None:
        """Free the context and all weights. The hollow model stays its owner's."""
        if self._source.close():
            self._opened.close()
