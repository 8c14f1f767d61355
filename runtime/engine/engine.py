"""The forward pass: the one place where llama.cpp, the layer store and the budget meet.

Tokens become passes. Memory is laid out for a pass inside the budget; while llama.cpp computes it, guests act at its
nodes: the weights are put under them there.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.engine.guests import Guests
from runtime.engine.layout import Layout
from runtime.engine.pass_memory import Needs, PassMemory
from runtime.engine.weights_guest import WeightsGuest
from runtime.errors import Cancelled, EngineError, PromptError
from runtime.kv.cache_memory import CacheMemory
from runtime.llama import abi, q4_1
from runtime.llama.context import Context
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.memory import resident_bytes_outside, trim_heap
from runtime.passes import Part, Pass, cut
from runtime.plans.ledger import Ledger, usable_bytes
from runtime.plans.plan import Plan
from runtime.plans.residency import smallest_window
from runtime.settings import FULL_TILES, SHORT_PASS, Settings
from runtime.weights.head_start import Weights, open_weights
from runtime.weights.rows import RowTable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from runtime.kv.apart import SequenceAttention
    from runtime.kv.filter import Filter

_ROOM_PIECES = 2  # of the largest size: less room than that for weights, and shorter passes are better


@dataclass
class Counters:
    """What the engine did since it was opened. Times in seconds; busy_s: in which anything was being read.

    decodes: passes that continued an answer.
    """

    passes: int = 0
    tokens: int = 0
    seconds: float = 0.0
    bytes_read: int = 0
    wait_s: float = 0.0
    busy_s: float = 0.0
    decodes: int = 0


class Engine:
    """A model ready to compute passes, inside a budget."""

    def __init__(
        self,
        file: ModelFile,
        model: HollowModel,
        plan: Plan,
        settings: Settings,
        weights: Weights | None = None,
    ) -> None:
        """Take over weights that are being read already (see head_start), or begin to read now."""
        self.file, self.settings = file, settings
        self.lodger: Engine | None = None  # a draft model's, which is cancelled with this one
        self.counters = Counters()
        self.guests = Guests()
        self.most_tokens = 0  # of a pass, where others that take part in it can take no more (0: as many as fit)
        self._model = model
        self.kv: Filter | None = None
        self.attention: SequenceAttention | None = None
        self._n_computing = 0  # tokens of the pass that runs
        self._source = weights or open_weights(file, settings)
        self._store = self._source.store
        self._opened = ExitStack()
        try:
            self._open(plan)
        except BaseException:
            self.close()
            raise

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
        needs = self._open_context(plan)
        self.n_vocab = self._context.n_vocab
        self.guests.add(self.weights, every_node=False)
        if self.kv:
            self.guests.add(self.kv)
        if self.attention:
            self.guests.add(self.attention, every_node=False, ops=self.attention.ops)
        self.layout = Layout(needs, self._store, self.weights, self.forget_cancel)
        self.apply(self.layout.with_fitting_window(plan) if self.settings.fit_window else plan)
        if self.settings.prefetch_input:
            for table in self._tables:
                table.fetch(range(table.tensor.n_rows), self._store)

    def _open_context(self, plan: Plan) -> Needs:
        """A context for passes as long as the prompt needs them and the budget allows; what it needs."""
        n_tokens = min(self.settings.n_ubatch, self.settings.n_ctx)
        has_products = q4_1.TYPE_NAME in {tensor.type_name for tensor in self.file.tensors} and q4_1.is_right()
        while True:
            trim_heap()
            with ExitStack() as opened:
                self._context = Context(self._model, self.settings, n_tokens, self.guests.filter)
                opened.callback(self._context.close)
                one_row_bytes, scratch = self._one_row_bytes(n_tokens), self._context.plan_scratch()
                passes = PassMemory(self.file, self.settings, self._context, scratch, one_row_bytes)
                cache = CacheMemory.of(self._context.buffers, self.file)
                self.kv = self._open_filter()
                if self.kv:
                    opened.callback(self.kv.close)
                self.attention = self._open_attention()
                if self.attention:
                    opened.callback(self.attention.close)
                trim_heap()
                process_bytes = resident_bytes_outside(self._store.ranges)
                cached_bytes = self.settings.depth * self._store.files.cached_bytes
                needs = Needs(passes, cache, self.kv, self.attention, self._tables, process_bytes, cached_bytes)
                room = usable_bytes(plan.budget_bytes) - needs.most_bytes >= _ROOM_PIECES * smallest_window(self.file)
                if room or n_tokens <= FULL_TILES:
                    self._opened.enter_context(opened.pop_all())
                    for guest in (self.weights, self.attention):
                        if guest:
                            guest.compute_on(self._context.backend)
                    if has_products:
                        self.guests.filter.turn(q4_1.Products(self._context.backend))
                    return needs
            n_tokens = max(FULL_TILES, n_tokens // 2)

    def _one_row_bytes(self, n_tokens: int) -> int:
        """The buffers of a context that makes one row of logits."""
        if self.settings.n_logits == 1:
            return self._context.scratch_bytes
        one_row = replace(self.settings, n_logits=1, n_sequences=1)
        with closing(Context(self._model, one_row, n_tokens, self.guests.filter)) as context:
            return context.scratch_bytes

    def _open_filter(self) -> Filter | None:
        if self.settings.kv is None:
            return None
        from runtime.kv.filter import CacheSource, open_filter  # numpy, which a run without it does not need

        source = CacheSource(self._context.buffers.caches, self._model.pointer)
        return open_filter(self.settings, self.file, source, lambda: self.guests.stop, self.guests.skip)

    def _open_attention(self) -> SequenceAttention | None:
        if self.settings.n_sequences == 1:
            return None
        from runtime.kv.apart import Calls, open_attention

        calls = Calls(self.guests.skip, self.guests.filter.watch_ops, self.guests.filter.attend)
        caches = self._context.buffers.caches
        return open_attention(self.settings, self.file, caches, self._model.pointer, calls)

    # --- plans --------------------------------------------------------------------------------------------------

    def apply(self, plan: Plan) -> None:
        """Adopt a plan between two passes. Raises BudgetError when its budget is below the floor."""
        self.layout.apply(plan, self.n_past)

    @property
    def plan(self) -> Plan:
        """The plan in force, with the k that the budget comes to."""
        return self.layout.plan

    @property
    def ledger(self) -> Ledger:
        """Where the budget goes just now."""
        return self.layout.ledger

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a pass reads."""
        return self.layout.streamed_bytes

    # --- computing ----------------------------------------------------------------------------------------------

    def cut(self, part: Part, *, decode: bool) -> list[Pass]:
        """The passes that a part takes alone. decode: it continues an answer. Raises PromptError in a full context."""
        if part.end > self.settings.n_ctx:
            raise PromptError(f"{part.end} tokens do not fit a context of {self.settings.n_ctx}", "raise --ctx")
        most = min(self.pass_tokens, self.most_tokens or self.pass_tokens)
        return cut(part, min(self.settings.n_ubatch, self.settings.n_ctx), most, decode=decode)

    def forward(self, tokens: Sequence[int], n_logits: int = 1) -> None:
        """Compute tokens after those that are in the cache: for who keeps no TokenSequence. One alone goes on with an
        answer. Raises what compute() raises.
        """
        part = Part(0, self.n_past, tuple(tokens), n_logits)
        self.compute(self.cut(part, decode=len(tokens) == 1 and part.first > 0))

    def compute(self, passes: Sequence[Pass]) -> None:
        """Compute passes one after the other; the logits that the last one wants are there afterwards.

        Raises DiskError when a read failed, Cancelled after cancel(). After an error the pass that failed is forgotten;
        where the model's state cannot be shortened, all of its sequence is.
        """
        if self.settings.n_sequences == 1:
            _ = [pass_.only for pass_ in passes]
        self.layout.prepare(passes)
        self._store.expect_passes(passes)
        for pass_ in passes:
            self._compute(pass_)

    def adopt(self, n_past: int) -> None:
        """Have the positions up to n_past without computing them; their keys and values are put in by the caller.

        llama.cpp gives a pass its cells before it computes, and keeps them where the first node ends it.
        Raises EngineError.
        """
        while (first := self.n_past) < n_past:
            pass_ = Pass((Part(0, first, (0,) * min(SHORT_PASS, n_past - first, self.pass_tokens)),), decode=True)
            self.layout.prepare([pass_])
            self.guests.stop = Cancelled(0)
            try:
                self._context.call_back(wanted=True)
                status = self._context.decode(pass_)
            finally:
                self.guests.end(complete=False)
                self.forget_cancel()
            if status != 0 or self.n_past <= first:
                raise EngineError("llama.cpp did not take positions that come from elsewhere", "report this")

    def _compute(self, pass_: Pass) -> None:
        """One pass through all layers."""
        start = time.perf_counter()
        status = -1
        try:
            self.guests.begin(pass_)
            self._n_computing = pass_.n_tokens
            long = self._n_computing > 1  # it can be ended at any node
            self._context.call_back(wanted=long or self.guests.are_needed)
            status = self._context.decode(pass_)
        except Cancelled:
            self.forget_cancel()
            raise
        finally:
            self._n_computing = 0
            self.guests.end(complete=status == 0)
        try:
            self._check(status)
        except BaseException:
            self._take_back(pass_)
            raise
        self._count(pass_, time.perf_counter() - start)

    def _check(self, status: int) -> None:
        """Raise what made the last pass fail: a stop, a model that was changed on disk, llama.cpp's status."""
        stop = self.guests.stop
        if stop is not None:
            self.forget_cancel()
            raise stop
        if self._store.bytes_read != self.counters.bytes_read:
            self._store.files.check_unchanged()
        if status != 0:
            reason = (abi.take_log() or ["no reason given"])[-1]
            raise EngineError(f"llama.cpp could not compute this pass (status {status}, {reason})", "raise --ctx")

    def _take_back(self, pass_: Pass) -> None:
        """Forget a pass that failed; where the model cannot, as recurrent ones, everything."""
        for part in pass_.parts:
            try:
                self.truncate(part.first, part.sequence)
            except EngineError:
                self.truncate(0, part.sequence)

    def _count(self, pass_: Pass, seconds: float) -> None:
        counters = self.counters
        counters.passes += 1
        counters.decodes += pass_.decode
        counters.tokens += pass_.n_tokens
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

    @property
    def n_past(self) -> int:
        """Positions in the cache; of the first sequence, where there are several."""
        return self._context.n_past()

    def share(self, source: int, target: int, n: int) -> None:
        """Have another sequence, which has no positions, begin with the first n of one, at no cost.

        Sequence n_sequences is for what others begin with: no pass computes it. Only where `attention` is there.
        """
        assert self.attention
        self._context.share(source, target, n)
        self.attention.share(source, target, n)

    def truncate(self, n_past: int, sequence: int = 0) -> None:
        """Forget a sequence's positions from n_past on. Raises EngineError where the model's memory cannot do that."""
        self._context.truncate(n_past, sequence)
        if self.kv:
            self.kv.truncate(n_past)
        if self.attention:
            self.attention.truncate(n_past, sequence)

    def likeliest(self, i: int = -1) -> int | None:
        """The token with the largest logit in the last forward's i-th output; None: only a sampler can tell."""
        return self._context.likeliest(i)

    def likeliest_of_all(self) -> Sequence[int] | None:
        """The same of every output of the last forward, in their order; -1 where that logit is no number."""
        return self._context.likeliest_of_all()

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
    def caches(self) -> list[dict[str, int]]:
        """The tensors (name -> address) of each buffer of the cache."""
        return self._context.buffers.caches

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
