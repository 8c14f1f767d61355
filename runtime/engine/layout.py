"""Where the budget goes: which weights are in memory for good, and what passes may take besides them.

A plan becomes a set of resident pieces and a window inside the budget. Before passes, weights make room for what those
need, and come back afterwards. All of it happens between two passes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from runtime.engine.code_pages import CodePages
from runtime.engine.pass_memory import PROMPT, TOKEN, Needs, Use, rows_for
from runtime.engine.weights_guest import WeightsGuest
from runtime.errors import Cancelled, H2OError
from runtime.kv.cache_memory import STEP
from runtime.memory import resident_bytes_outside
from runtime.passes import Pass
from runtime.plans.ledger import Ledger, floor_for, usable_bytes
from runtime.plans.plan import Plan
from runtime.plans.residency import (
    k_layers_worth,
    layers_in,
    overlapping_window,
    resident_pieces,
    smallest_window,
    streamable_bytes,
    window_bytes,
)
from runtime.sizes import page_down
from runtime.weights.store import LayerStore

_SSD_BYTES_PER_S = 2e9
_SLOW_BYTES_PER_S = 0.5e9  # an SSD reads 0.5 to 1.1 GB/s into the small pages of resident weights while llama.cpp loads


class Layout:
    """The memory of one engine, shared out by the plan in force: `plan`, `ledger` and `streamed_bytes` say how."""

    def __init__(self, needs: Needs, store: LayerStore, guest: WeightsGuest, cancelled: Callable[[], None]) -> None:
        """apply() comes next. cancelled: called when Cancelled ends a wait for reads."""
        self.plan: Plan
        self.ledger: Ledger
        self.streamed_bytes = 0
        self.most_outputs = 1  # of a pass of an answer: for more, weights would leave that are all in memory else
        self.plan_changes = -1  # the first plan is none
        self.needs, self._store, self._guest, self._cancelled = needs, store, guest, cancelled
        self._file, self._settings, self._cache = needs.passes.file, needs.passes.settings, needs.cache
        self._least_window = smallest_window(self._file)
        few, most = (rows_for(n, self._settings.n_logits) for n in (2, self._settings.n_logits))
        self._drafts, self._everything = Use(long=False, rows=most), Use(long=True, rows=most)
        uses = (PROMPT, TOKEN, Use(long=False, rows=few), self._drafts, self._everything)
        self._ledgers = {use: needs.ledger(use) for use in uses}
        self._code = CodePages()
        self._asked_plan: Plan
        self._use = self._touched = PROMPT  # what memory is laid out for, and what was touched in it
        self._room = self._cache.steps(self._settings.n_ubatch)  # positions laid out for; others take no memory
        self._placed: tuple[frozenset[int], int, bool] | None = None  # resident pieces, window, repacked or not
        self._most_cells = 0  # of the cache that were taken at once since it was empty
        self._all = frozenset(piece.number for piece in self._file.pieces)
        self._spare_bytes = 0  # what passes of one token leave beside all weights; negative: some are streamed
        self._counts_on_code = True  # all weights fit only where pages of libraries stay away, or not even then
        self._fits = False  # weights and what any pass needs, both at once

    # --- plans --------------------------------------------------------------------------------------------------

    def with_fitting_window(self, plan: Plan) -> Plan:
        """The plan with a window for the disk as fast as it was until now; where that was fast, or nothing was asked of
        it, for an SSD."""
        begun = self._store.wanted or self._store.busy_s
        rate = self._store.bytes_read / (self._store.busy_s or 1) if begun else _SSD_BYTES_PER_S
        fitting = overlapping_window(self._least_window, rate if rate < _SLOW_BYTES_PER_S else _SSD_BYTES_PER_S)
        return replace(plan, window_bytes=max(plan.window_bytes, min(fitting, plan.budget_bytes // 4)))

    def apply(self, plan: Plan, n_past: int) -> None:
        """Adopt a plan between two passes. Raises BudgetError when its budget is below the floor.

        A plan made for a budget is filled to the last byte of it; a plan without one keeps exactly its k layers.
        n_past: positions in the cache.
        """
        if plan.budget_bytes:
            self._largest_ledger.weights_bytes(plan.budget_bytes, self._least_window)
        self._lay_out(plan, self._use, min(self._room, self._cache.steps(n_past or self._settings.n_ubatch)))
        self._asked_plan = plan
        self.plan_changes += 1

    def _lay_out(self, plan: Plan, use: Use, room: int, *, again: bool = False) -> None:
        """Share out what the budget leaves for weights in passes of this kind, with room for so many positions.

        again: the plan is in force already, so where there is less for weights some leave and none comes. After an
        error nothing has changed.
        """
        if room < self._room:
            self._cache.drop_behind(room)
        fixed, total = self._ledgers[use], streamable_bytes(self._file)
        fixed = replace(fixed, process_bytes=fixed.process_bytes - self._code.spared(long=use.long))
        window, limit = window_bytes(self._file, plan), total
        usable = usable_bytes(plan.budget_bytes)
        fits = not plan.budget_bytes or usable >= self._ledgers[self._everything].fixed_bytes + total
        if plan.budget_bytes:
            margin = fixed.margin_bytes + plan.budget_bytes - usable
            fixed = replace(fixed, kv_bytes=self.needs.kv_bytes(room), margin_bytes=margin)
            left = plan.budget_bytes - fixed.fixed_bytes
            self._counts_on_code = left < total + self._code.spared(long=use.long)
            if left >= total and self._asked_pieces(total) in (None, self._all):
                window, limit = 0, total
            else:
                window = min(window, left)
                limit = left - window
            plan = replace(plan, pinned_bytes=max(limit, 1))
        there = self._store.wanted
        leave = again and limit < self.ledger.resident_bytes
        resident = self._asked_pieces(limit)
        if resident is None:
            resident = resident_pieces(self._file, plan, limit, there, among=there if leave else None)
        streamed = sum(p.span_bytes for p in self._file.pieces if p.number not in resident)
        window = min(page_down(window), streamed)
        pinned = total - streamed
        placed = resident, window, self._settings.repack and streamed == 0 and fits
        if not again or placed != self._placed:
            self._place(*placed)
        self._use, self._room, self._fits = use, room, fits
        self.ledger = replace(fixed, window_bytes=window, resident_bytes=pinned)
        self.plan = replace(plan, k=layers_in(self._file, pinned) if plan.budget_bytes else plan.k)
        self.streamed_bytes = streamed
        self._spare_bytes = self._beside_all(usable, TOKEN, room)
        self.most_outputs = self._outputs_worth() if plan.budget_bytes else self._settings.n_logits
        for table in self.needs.tables:
            table.resize(self.needs.passes.embedding(table.tensor, long=use.long))

    def _beside_all(self, usable: int, use: Use, room: int) -> int:
        """What passes of this kind leave of so many bytes beside all weights; negative: some are streamed."""
        ledger = replace(self._ledgers[use], kv_bytes=self.needs.kv_bytes(room))
        return usable - ledger.fixed_bytes + self._code.spared(long=use.long) - streamable_bytes(self._file)

    def _outputs_worth(self) -> int:
        """most_outputs under a budget; where weights are streamed anyway, as many as there may be."""
        most = self._settings.n_logits
        for rows in (most, rows_for(2, most)):
            more = self._ledgers[Use(long=False, rows=rows)].fixed_bytes - self._ledgers[TOKEN].fixed_bytes
            if self._spare_bytes < 0 or more <= self._spare_bytes:
                return rows
        return 1

    def _asked_pieces(self, limit: int) -> frozenset[int] | None:
        """The pieces that the settings name, where there are such and they take no more than limit bytes."""
        asked = self._settings.resident
        if asked is None or sum(p.span_bytes for p in self._file.pieces if p.number in asked) > limit:
            return None
        return asked

    def _place(self, resident: frozenset[int], window: int, repack: bool) -> None:
        """Have these pieces in memory, rearranged or not, and the others come through the window."""
        try:
            self._store.apply(resident, window, spoilt=self._guest.spoilt_by(resident))
        except Cancelled:
            self._cancelled()
            raise
        self._placed = resident, window, repack
        self._guest.forget(resident)
        largest = smallest_window(self._file, resident)
        self._guest.watch_all(repack=repack, boundary_bytes=max(0, min(window // 4, (window - 2 * largest) // 2)))

    # --- around passes ------------------------------------------------------------------------------------------

    def prepare(self, passes: Sequence[Pass]) -> None:
        """Lay the memory out for these passes: weights make room for a prompt, for the logits of drafted tokens and for
        keys and values, and come back when those are gone.

        Where there is room for everything, what was touched stays for the next time.
        """
        self._code.begin()
        n_tokens = n_outputs = 0
        for pass_ in passes:
            n_tokens, n_outputs = max(n_tokens, pass_.n_tokens), max(n_outputs, pass_.n_outputs)
        rows = rows_for(n_outputs, self._settings.n_logits)
        use = Use(long=n_tokens > self.needs.passes.short(rows), rows=rows)
        use, room = self._known(use), self._cache.steps(self._cells_after(passes))
        if self._fits and self.streamed_bytes == 0:
            self._touched, self._room = use.with_(self._touched), max(room, self._room)
            if self._settings.n_sequences > 1:  # each pass writes to many new pages
                self._cache.make(room)
            return
        if self._room - STEP <= room <= self._room:  # no step back for each draft that was wrong
            room = self._room
        code_changed, budget = False, self._asked_plan.budget_bytes
        if budget and (use.long or self._counts_on_code):
            code_changed = self._code.begin_pass(long=use.long, streams=self._spare_bytes < 0)
        if code_changed or self.streamed_bytes or use.with_(self._touched) != self._use or room != self._room:
            use = self._touched = self._kept(use, room)
        else:
            use = self._use  # laid out for it and for what was touched before, and all weights are there
        if not budget:
            self._room = max(room, self._room)
        elif code_changed or (use, room) != (self._use, self._room):
            self._lay_out(self._asked_plan, use, room, again=True)

    def _known(self, use: Use) -> Use:
        """The use that there is a ledger for: of a prompt with one row of logits, or with the most."""
        return use if not use.long else PROMPT if use.rows == 1 else self._everything

    def _kept(self, use: Use, room: int) -> Use:
        """What memory is laid out for where passes of this kind are next.

        What was touched before stays where all weights are there beside it, and is given back else.
        """
        both = self._known(use.with_(self._touched))
        if both == use:
            return use
        usable = usable_bytes(self._asked_plan.budget_bytes)
        if self.streamed_bytes == 0 and self._beside_all(usable, both, room) >= 0:
            return both
        self.needs.passes.context.drop_scratch()
        return use

    def _cells_after(self, passes: Sequence[Pass]) -> int:
        """How many of the cache's cells, from the front on, these passes may touch.

        One sequence has position p in cell p. Several share the cells: llama.cpp gives each token the first free one,
        so the last one in use is at most as far back as there were ever cells in use together.
        """
        if self._settings.n_sequences == 1:
            return max(pass_.only.end for pass_ in passes)
        taken = (self.needs.attention or self.needs.passes.context).n_cells
        after = taken + sum(pass_.n_tokens for pass_ in passes)
        self._most_cells = max(self._most_cells, after) if taken else after
        return self._most_cells

    def make_cells(self, n: int) -> None:
        """Between two passes: make room for n more positions of several sequences, which come from elsewhere."""
        self._most_cells = max(self._most_cells, self.needs.passes.context.n_cells + n)
        room = self._cache.steps(self._most_cells)
        if room > self._room and self._asked_plan.budget_bytes and not (self._fits and self.streamed_bytes == 0):
            self._lay_out(self._asked_plan, self._use, room, again=True)
        self._room = max(room, self._room)

    # --- a draft model ------------------------------------------------------------------------------------------

    def make_room(self, draft_bytes: int) -> None:
        """Between two passes: a draft model takes so many bytes from now on, weights have the rest.

        Raises BudgetError, and leaves everything as it is, where the budget is too small for that.
        """
        before = self._ledgers
        self._ledgers = {use: replace(ledger, draft_bytes=draft_bytes) for use, ledger in before.items()}
        try:
            if self._asked_plan.budget_bytes:
                self._largest_ledger.weights_bytes(self._asked_plan.budget_bytes, self._least_window)
            self._lay_out(self._asked_plan, self._use, self._room, again=True)
        except H2OError:
            self._ledgers = before
            raise

    def measure_process(self) -> int:
        """Before the first pass: measure again what the process takes besides weights; how much that is less."""
        now, self._code = resident_bytes_outside(self._store.ranges), CodePages()
        self._ledgers = {use: replace(ledger, process_bytes=now) for use, ledger in self._ledgers.items()}
        return self.ledger.process_bytes - now

    def displaced_bytes(self, draft_bytes: int) -> int:
        """Bytes of weights that have to be streamed where a draft model takes so many bytes."""
        budget, ledger = self._asked_plan.budget_bytes, self._ledgers[TOKEN]
        if not budget:
            return 0
        later = ledger.kv_bytes - self.needs.kv_bytes(self._room)
        need = ledger.fixed_bytes - ledger.draft_bytes - later + streamable_bytes(self._file)
        return max(0, draft_bytes - max(0, usable_bytes(budget) - need))

    # --- facts --------------------------------------------------------------------------------------------------

    @property
    def fixed_bytes(self) -> int:
        """What this process needs besides streamable weights, at its most: for a prompt or for drafts."""
        return self._largest_ledger.fixed_bytes

    @property
    def floor_bytes(self) -> int:
        """The smallest budget of a plan that this process follows: its context and its passes stay."""
        return floor_for(self.fixed_bytes + self._least_window)

    def needed_bytes(self, plan: Plan) -> int:
        """What a plan without a budget of its own takes of this process, at its most."""
        total = streamable_bytes(self._file)
        pinned = min(total, plan.pinned_bytes or k_layers_worth(self._file, plan.k, plan.layout))
        return self.fixed_bytes + pinned + min(window_bytes(self._file, plan), total - pinned)

    @property
    def _largest_ledger(self) -> Ledger:
        if self._settings.n_sequences > 1:  # one may read its prompt while others are being answered
            return self._ledgers[self._everything]
        return max(self._ledgers[PROMPT], self._ledgers[self._drafts], key=lambda ledger: ledger.fixed_bytes)

    @property
    def prompt_bytes(self) -> int:
        """The part of the compute buffers that only a prompt needs; weights take its place afterwards."""
        return self._ledgers[PROMPT].compute_bytes - self._ledgers[TOKEN].compute_bytes

    @property
    def spared_bytes(self) -> int:
        """Pages of libraries that passes of a few tokens do not use, as far as is known; weights take their place."""
        return self._code.spared_bytes
