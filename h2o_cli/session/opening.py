"""From an open model to a session that is ready to answer: settings, plan, engine, drafter, sampler, plan follower."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace

from h2o_cli.session import team
from h2o_cli.session.drafting import open_draft, speculation_of
from h2o_cli.session.first_plan import DEFAULT, FROM_FILE, Chosen, FirstPlan
from h2o_cli.session.kv_layers import warn_of_guess
from h2o_cli.session.model import OpenModel, positions_of, settings_for
from h2o_cli.session.options import SessionOptions
from h2o_cli.session.smallest import CONVERSATION, NEAR_BYTES, least_settings, measure, written
from runtime.answer.follower import PlanFollower, check_budget
from runtime.answer.generate import Request, Step, generate
from runtime.answer.plan_stats import StatsWriter
from runtime.answer.sampler import Sampler, Sampling
from runtime.answer.speculate import Speculation
from runtime.engine.engine import Engine
from runtime.engine.pass_memory import rows_for
from runtime.engine.sequence import TokenSequence
from runtime.errors import BudgetError
from runtime.plans.ledger import POSITION_BYTES, below_floor
from runtime.plans.plan import Layout
from runtime.plans.residency import smallest_window
from runtime.plans.stats import stats_path
from runtime.plans.watcher import PlanWatcher
from runtime.settings import Machine, Settings
from runtime.sizes import MB, format_size

HARMLESS_BYTES = 64 * MB


@dataclass
class Session:
    """An engine ready to answer, with what goes with it."""

    model: OpenModel
    engine: Engine
    sequence: TokenSequence
    speculation: Speculation | None
    sampler: Sampler
    follower: PlanFollower
    machine: Machine
    plan_origin: str
    load_s: float
    cleanup: ExitStack

    @property
    def budget_bytes(self) -> int:
        """The budget in force."""
        return self.follower.budget_bytes

    def answer(self, request: Request) -> Iterator[Step]:
        """The steps of an answer (runtime/answer/generate.py); new plans are taken over on the way."""
        parts = self.sequence, self.model.tokenizer, self.sampler
        return generate(*parts, request, self.follower, self.speculation)

    def sample_with(self, sampling: Sampling) -> None:
        """Choose the tokens of the answers that follow in another way. Raises UsageError."""
        sampler = Sampler(sampling, self.engine.n_vocab, self.model.tokenizer.suppressed)
        self.sampler.close()
        self.sampler = sampler
        self.cleanup.callback(sampler.close)

    def close(self) -> None:
        """Free everything but the model."""
        self.cleanup.close()


def open_session(model: OpenModel, options: SessionOptions, n_ctx: int, n_prompt: int) -> Session:
    """Choose settings and plan, and open the engine. n_ctx, n_prompt: tokens. Raises H2OError."""
    start = time.perf_counter()
    note = model.caller.note
    _check_context(n_ctx, model.first_plan.budget_bytes)
    settings = settings_for(model.file, options, n_ctx, n_prompt, model.profile)
    settings = replace(settings, lists_tokens=_lists_tokens(model, options))
    if options.kv:
        settings = replace(settings, kv=options.kv.for_model(model.file.hash))
    if options.kv and options.speculate != "off":
        note("speculation is off: a filter of keys and values works on one token per pass")
    with ExitStack() as opened, model.caller.held():
        if model.team:
            settings = model.team.counted(settings)
            model.team.check(model.hollow, settings)
        draft = None
        if model.draft_file:
            n_positions = positions_of(model.draft_file)
            draft_settings = replace(settings, n_ctx=min(n_ctx, n_positions))
            draft = open_draft(model.draft_file, draft_settings, (model.file, model.hollow))
            opened.callback(draft.close)
            settings = replace(settings, draft_bytes=draft.n_bytes)
        chosen, engine = _open_planned(model, options, settings)
        opened.callback(engine.close)
        speculation = speculation_of(engine, model.hollow, draft, model.copy)
        if speculation:
            opened.callback(speculation.close)
        cleanup = opened.pop_all()
    if model.team:
        team.set_up(model.team, engine, model.hollow, cleanup, model.caller)
    if engine.kv:
        warn_of_guess(engine.kv, model.file.path, n_ctx, model.caller.warn)
    sampler = Sampler(options.sampling, engine.n_vocab, model.tokenizer.suppressed)
    watcher = PlanWatcher(model.first_plan.path, model.file.hash, generation=chosen.plan.generation)
    watcher.poll()  # what is in the file now has been looked at
    watcher.take_problem()
    stats = StatsWriter(stats_path(model.first_plan.path), model.file.hash, note)
    for close in (sampler.close, watcher.close, stats.close):
        cleanup.callback(close)
    return Session(
        model=model,
        engine=engine,
        sequence=TokenSequence(engine, note),
        speculation=speculation,
        sampler=sampler,
        follower=PlanFollower(engine, watcher, chosen.budget_bytes, note, stats, cap_bytes=options.budget.cap_bytes),
        machine=model.profile.machine if model.profile else Machine(),
        plan_origin=chosen.origin,
        load_s=model.load_s + time.perf_counter() - start,
        cleanup=cleanup,
    )


def _lists_tokens(model: OpenModel, options: SessionOptions) -> bool:
    """Settings.lists_tokens; in a conversation tokens may be chosen in another way later."""
    return options.kind == CONVERSATION or options.sampling.lists_tokens or bool(model.tokenizer.suppressed)


def _check_context(n_ctx: int, budget_bytes: int) -> None:
    """Raise BudgetError where a context's list of positions alone is more than the budget: it is really allocated.

    Smaller lists are left to the ledger, which knows the smallest budget that works.
    """
    need = n_ctx * POSITION_BYTES
    if need > max(budget_bytes, HARMLESS_BYTES):
        raise BudgetError(
            f"a context of {n_ctx} tokens takes more than {format_size(need)}, keys and values not counted",
            "lower --ctx",
        )


def _open_planned(model: OpenModel, options: SessionOptions, settings: Settings) -> tuple[Chosen, Engine]:
    """The first plan and the engine that follows it. A plan in the default file that does not fit is left out."""
    first, layout = model.first_plan, options.fixed_layout
    chosen = _choose(model, first, settings, layout)
    try:
        return chosen, _open_inside(model, options, chosen, settings)
    except BudgetError as error:
        if chosen.origin != FROM_FILE:
            raise
        message = f"the plan in {first.path} cannot be followed: {error.message}"
        if first.is_named:
            raise BudgetError(message, error.next_step, error.floor_bytes) from None
        model.caller.note(message)
    chosen = _choose(model, first.without_file(), settings, layout)
    return chosen, _open_inside(model, options, chosen, settings)


def _choose(model: OpenModel, first: FirstPlan, settings: Settings, layout: Layout | None) -> Chosen:
    """The plan; nothing is asked of the profile any more until the answer is there."""
    chosen = first.choose(model.file, model.profile, settings, layout)
    if model.profile:
        model.profile.rest()
    return chosen


def _open_inside(model: OpenModel, options: SessionOptions, chosen: Chosen, settings: Settings) -> Engine:
    """The engine. Raises BudgetError below the smallest budget, whatever this very run would need."""
    budget, least = chosen.plan.budget_bytes, least_settings(settings, options.ubatch)
    try:
        engine = _open_engine(model, chosen, settings)
        near = engine.layout.fixed_bytes + smallest_window(model.file) + NEAR_BYTES
        if not budget or budget >= near or 0 < written(model.file.hash, least, options.kind) <= budget:
            return engine
        engine.close()
    except BudgetError:
        if not budget:
            raise
    floor = measure(model.file, model.hollow, least, options.kind)
    if budget < floor:
        flags = "--ctx or --ubatch" if options.sequences == 1 else "--ctx or --batch-size"
        raise below_floor(budget, floor, f"a smaller {flags}")
    return _open_engine(model, chosen, settings)


def _open_engine(model: OpenModel, chosen: Chosen, settings: Settings) -> Engine:
    """The engine; a budget too small for the logits of long drafts has short ones, and then no look-up."""
    settings, most = replace(settings, fit_window=chosen.origin == DEFAULT), settings.n_logits
    fewer = {rows_for(2, most), most if settings.draft_bytes else 1} if settings.n_sequences == 1 else set()
    least, *more = sorted({most} | fewer)
    for n_logits in reversed(more):
        try:
            return _engine(model, chosen, replace(settings, n_logits=n_logits))
        except BudgetError:
            continue
    return _engine(model, chosen, replace(settings, n_logits=least))


def _engine(model: OpenModel, chosen: Chosen, settings: Settings) -> Engine:
    """The engine, closed where a plan without a budget of its own does not fit the process's."""
    engine = Engine(model.file, model.hollow, chosen.plan, settings, model.take_weights())
    try:
        check_budget(engine, chosen.plan, chosen.budget_bytes)
    except BudgetError:
        engine.close()
        raise
    return engine
