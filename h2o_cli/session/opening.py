"""From the flags of a run to a model that is ready to answer: context, threads, budget, plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from h2o_cli.interrupts import interrupts
from h2o_cli.kv_flags import KvChoice
from h2o_cli.output import Progress
from h2o_cli.session import team
from h2o_cli.session.defaults import CONVERSATION_CONTEXT, MOST_THREADS, UBATCH, default_threads
from h2o_cli.session.first_plan import DEFAULT, FROM_FILE, Chosen, FirstPlan
from h2o_cli.session.kv_layers import warn_of_guess
from h2o_cli.session.profiled import Profiled
from h2o_cli.session.smallest import CONVERSATION, NEAR_BYTES, PROMPT, least_settings, measure, written
from runtime.answer.drafters import DraftModel, Lodging, LookupDrafter, ModelDrafter, can_take_back, check_vocabulary
from runtime.answer.follower import PlanFollower, check_budget
from runtime.answer.generate import TokenSequence
from runtime.answer.plan_stats import StatsWriter
from runtime.answer.sampler import Sampler, Sampling
from runtime.answer.speculate import Speculation, most_drafted
from runtime.engine.engine import Engine
from runtime.engine.pass_memory import rows_for
from runtime.errors import BudgetError, H2OError, ModelError, UsageError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.llama.quantize import copy_bytes, copy_pays, low_bit_copy
from runtime.llama.tokenizer import Tokenizer
from runtime.plans.file import default_plan_path
from runtime.plans.ledger import POSITION_BYTES, below_floor
from runtime.plans.plan import Layout
from runtime.plans.residency import smallest_window
from runtime.plans.stats import stats_path
from runtime.plans.watcher import PlanWatcher
from runtime.settings import KV_TYPES, MARGIN_BYTES, SHORT_PASS, TURNS_MARGIN_BYTES, Machine, Settings
from runtime.sizes import MB, format_size, parse_size
from runtime.weights.head_start import Weights, head_start

CONTEXT_STEP = 256
HARMLESS_BYTES = 64 * MB
CONTEXT_GUESS = 512  # tokens, while the prompt's length is not known yet
UNLIMITED = 2**31 - 1
SPECULATE = ("auto", "off")
AUTO = "auto"
GUESSED_DRAFT_BYTES = 32 * MB  # of a draft model beside its weights, until it is open
REPACK = ("auto", "off")


@dataclass(frozen=True)
class RunOptions:
    """What the flags of `h2o run` say; None: not given.

    is_named: the user named the model. kind: of run, as the smallest budget knows them.
    """

    model: Path
    is_named: bool = True
    kind: str = PROMPT
    n_predict: int | None = None
    memory: str | None = None
    plan_file: Path | None = None
    ctx: int | None = None
    threads: int | None = None
    ubatch: int | None = None
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    chat: bool = False
    json: bool = False
    layout: str = "auto"
    kv_type: str = "f16"
    speculate: str = "auto"
    draft: str | None = None
    prefetch_input: bool = False
    repack: str = "auto"
    kv: KvChoice | None = None
    max_context: int = 0
    devices: team.Flags = field(default_factory=team.Flags)

    @classmethod
    def of(cls, given: Mapping[str, Any], **made: Any) -> RunOptions:
        """From the parameters of a command, and what was made of some of them."""
        names = [field.name for field in fields(cls) if field.name not in made]
        return cls(**{name: given[name] for name in names}, **made)

    def __post_init__(self) -> None:
        for flag, value in (("--ctx", self.ctx), ("--threads", self.threads), ("--ubatch", self.ubatch)):
            if value is not None and value < 1:
                raise UsageError(f"{flag} {value} is not possible", "give 1 or more")
        if self.threads is not None and self.threads > MOST_THREADS:
            raise UsageError(f"--threads {self.threads} is not possible", f"give 1 to {MOST_THREADS}")
        if self.kv_type not in KV_TYPES:
            raise UsageError(f"there is no KV type {self.kv_type!r}", f"choose one of {', '.join(KV_TYPES)}")
        if self.repack not in REPACK:
            raise UsageError(f"--repack {self.repack} is not possible", f"choose one of {', '.join(REPACK)}")
        if self.speculate not in SPECULATE:
            raise UsageError(f"--speculate {self.speculate} is not possible", f"choose one of {', '.join(SPECULATE)}")
        if self.speculate == "off" and self.draft is not None:
            raise UsageError("--draft does nothing with --speculate off", "give one of them")
        if self.n_predict is not None and self.n_predict < -1:
            raise UsageError(f"-n {self.n_predict} is not possible", "give 0 or more, or -1 for no limit")
        if self.kv:
            self._check_filter()
        self.devices.check(bool(self.kv or self.draft))

    def _check_filter(self) -> None:
        if self.kv_type == "f32":
            raise UsageError("--kv-filter does not work with --kv-type f32", "use --kv-type f16 or q8_0")
        if self.draft is not None:
            raise UsageError("--draft does not work with --kv-filter", "give one of them")

    def for_answers_of(self, n_tokens: int) -> RunOptions:
        """These options, their filter made for answers of at most n_tokens (negative: no limit)."""
        if self.kv is None or n_tokens < 0:
            return self
        return replace(self, kv=replace(self.kv, filter=replace(self.kv.filter, tail=n_tokens + 1)))

    @property
    def budget_bytes(self) -> int:
        """-m in bytes; 0 when it was not given."""
        return parse_size(self.memory) if self.memory else 0

    @property
    def fixed_layout(self) -> Layout | None:
        """The layout asked for, None for "auto"."""
        return None if self.layout == "auto" else Layout.parse(self.layout)


class OpenModel:
    """A model's index, its llama.cpp side without weights, and its tokenizer."""

    def __init__(self, options: RunOptions, note: Callable[[str], None]) -> None:
        """Begin to read the weights, and load llama.cpp's side meanwhile."""
        start = time.perf_counter()
        self.weights: Weights | None = None
        self.is_named = options.is_named
        with interrupts.held():
            self.file = ModelFile.open(options.model)
        self.team = team.join(self.file, options.devices, options.budget_bytes, options.threads, note)
        if self.team:
            self.file = self.team.part
        with interrupts.held():
            self.profile = Profiled.find(self.file, note)
            path, is_named = options.plan_file or default_plan_path(), options.plan_file is not None
            self.first_plan = FirstPlan.find(self.file, path, options.budget_bytes, note, is_named=is_named)
            settings = _settings(self.file, options, options.ctx or CONTEXT_GUESS, UBATCH, self.profile)
            settings = replace(settings, draft_bytes=_expected_draft_bytes(self.file, options))
            plan = self.first_plan.choose(self.file, self.profile, settings, options.fixed_layout).plan
            plan = replace(plan, budget_bytes=max(0, plan.budget_bytes - settings.draft_bytes))
            self.weights = head_start(self.file, plan, settings)
            try:
                self.hollow = HollowModel(self.file)
            except H2OError:
                self.weights.close()
                raise
        try:
            self.tokenizer = Tokenizer(self.hollow, self.file)
            self.draft_file = _draft_file(self, options, note)
        except H2OError:
            self.close()
            raise
        self.load_s = time.perf_counter() - start

    @property
    def context_length(self) -> int:
        """The longest context the model was made for."""
        return self.file.hyper_parameter("context_length") or CONVERSATION_CONTEXT

    @property
    def n_positions(self) -> int:
        """Rows of the model's table of positions; practically unlimited where it has none."""
        return _n_positions(self.file)

    def take_weights(self) -> Weights | None:
        """The weights that are being read already; they are the engine's from now on."""
        weights, self.weights = self.weights, None
        return weights

    def close(self) -> None:
        """Free the model."""
        if self.weights:
            self.weights.close()
        if self.profile:
            self.profile.rest()
        if self.team:
            self.team.close()
        self.hollow.free()


@dataclass
class Session:
    """An engine ready to answer, with what goes with it."""

    model: OpenModel
    engine: Engine
    sequence: TokenSequence
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

    def close(self) -> None:
        """Free everything but the model."""
        self.cleanup.close()


def context_for(model: OpenModel, ctx: int | None, n_wanted: int, note: Callable[[str], None]) -> int:
    """The context in tokens: --ctx, else n_wanted rounded up, at most what the model was made for."""
    if ctx is None:
        return min(-(-n_wanted // CONTEXT_STEP) * CONTEXT_STEP, model.context_length, model.n_positions)
    if ctx > model.n_positions:
        raise UsageError(f"this model knows {model.n_positions} positions, --ctx {ctx} is more", "lower --ctx")
    if ctx > model.context_length:
        note(f"--ctx {ctx} is more than the {model.context_length} tokens this model was made for")
    return ctx


def open_session(
    model: OpenModel, options: RunOptions, n_ctx: int, n_prompt: int, note: Callable[[str], None]
) -> Session:
    """Choose settings and plan, and open the engine. Raises H2OError."""
    start = time.perf_counter()
    _check_context(n_ctx, model.first_plan.budget_bytes)
    settings = _settings(model.file, options, n_ctx, n_prompt, model.profile)
    if options.kv:
        settings = replace(settings, kv=options.kv.for_model(model.file.hash))
    if options.kv and options.speculate != "off":
        note("speculation is off: a filter of keys and values works on one token per pass")
    with ExitStack() as opened, interrupts.held():
        if model.team:
            model.team.check(model.hollow, settings)
        draft = _open_draft(model, settings)
        if draft:
            opened.callback(draft.close)
            settings = replace(settings, draft_bytes=draft.n_bytes)
        chosen, engine = _open_planned(model, options, settings, note)
        opened.callback(engine.close)
        speculation = _speculation(model, engine, draft)
        if speculation:
            opened.callback(speculation.close)
        cleanup = opened.pop_all()
    if model.team:
        team.set_up(model.team, engine, model.hollow, cleanup, note)
    if engine.kv:
        warn_of_guess(engine.kv, model.file.path, n_ctx)
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
        sequence=TokenSequence(engine, note, speculation),
        sampler=sampler,
        follower=PlanFollower(engine, watcher, chosen.budget_bytes, note, stats, cap_bytes=options.budget_bytes),
        machine=model.profile.machine if model.profile else Machine(),
        plan_origin=chosen.origin,
        load_s=model.load_s + time.perf_counter() - start,
        cleanup=cleanup,
    )


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


def _open_planned(
    model: OpenModel, options: RunOptions, settings: Settings, note: Callable[[str], None]
) -> tuple[Chosen, Engine]:
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
        note(message)
    chosen = _choose(model, first.without_file(), settings, layout)
    return chosen, _open_inside(model, options, chosen, settings)


def _choose(model: OpenModel, first: FirstPlan, settings: Settings, layout: Layout | None) -> Chosen:
    """The plan; nothing is asked of the profile any more until the answer is there."""
    chosen = first.choose(model.file, model.profile, settings, layout)
    if model.profile:
        model.profile.rest()
    return chosen


def _open_inside(model: OpenModel, options: RunOptions, chosen: Chosen, settings: Settings) -> Engine:
    """The engine. Raises BudgetError below the smallest budget, whatever this very run would need."""
    budget, least = chosen.plan.budget_bytes, least_settings(settings, options.ubatch)
    try:
        engine = _open_engine(model, chosen, settings)
        near = engine.fixed_bytes + smallest_window(model.file) + NEAR_BYTES
        if not budget or budget >= (written(model.file.hash, least, options.kind) or near):
            return engine
        engine.close()
    except BudgetError:
        if not budget:
            raise
    floor = measure(model.file, model.hollow, least, options.kind)
    if budget < floor:
        raise below_floor(budget, floor)
    return _open_engine(model, chosen, settings)


def _open_engine(model: OpenModel, chosen: Chosen, settings: Settings) -> Engine:
    """The engine; a budget too small for the logits of long drafts has short ones, and then no look-up."""
    settings, most = replace(settings, fit_window=chosen.origin == DEFAULT), settings.n_logits
    least, *more = sorted({most, rows_for(2, most), most if settings.draft_bytes else 1})
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


# --- speculation ----------------------------------------------------------------------------------------------------


def _speculation(model: OpenModel, engine: Engine, draft: DraftModel | None) -> Speculation | None:
    """A drafter, where the engine can verify several tokens in one pass and take back those that were wrong."""
    most = min(engine.settings.n_logits, engine.settings.n_ubatch) - 1
    if most < 1 or not can_take_back(model.hollow):
        return None
    if draft:
        cost, n_vocab = draft.file.n_bytes / model.file.n_bytes, min(engine.n_vocab, draft.engine.n_vocab)
        place = Lodging(engine, draft) if engine.displaced_bytes(draft.n_bytes) else draft
        engine.lodger = draft.engine if place is draft else None
        return Speculation(ModelDrafter(place, cost, n_vocab), most)
    return Speculation(LookupDrafter(engine.settings.n_ctx), most)


def _expected_draft_bytes(file: ModelFile, options: RunOptions) -> int:
    """About what a draft model will take, before it is opened."""
    if options.draft is None or (options.draft == AUTO and not copy_pays(file)):
        return 0
    n_bytes = copy_bytes(file) if options.draft == AUTO else ModelFile.open(options.draft).n_bytes
    return n_bytes + GUESSED_DRAFT_BYTES


def _draft_file(model: OpenModel, options: RunOptions, note: Callable[[str], None]) -> ModelFile | None:
    """The model that drafts, if there is one; a copy with few bits is made when "auto" finds none."""
    if options.draft is None:
        return None
    if not can_take_back(model.hollow):
        note("speculation is off: computed tokens of this model cannot be taken back")
        return None
    if options.draft != AUTO:
        return ModelFile.open(options.draft)
    if not copy_pays(model.file):
        note(f"no draft model: {model.file.path.name} has few bits per weight already, a 4-bit copy is no faster")
        return None
    import platformdirs

    def progress(share: Callable[[], float]) -> Progress:
        return Progress("making the copy", share)

    folder = Path(platformdirs.user_cache_dir("h2o-llm"))
    return ModelFile.open(low_bit_copy(model.file, folder, note, progress))


def _open_draft(model: OpenModel, settings: Settings) -> DraftModel | None:
    """The draft model, its weights not read yet. Raises ModelError when it has another vocabulary, or tokens that turn
    out wrong could not be taken back in it."""
    file = model.draft_file
    if file is None:
        return None
    n_ctx = min(settings.n_ctx, _n_positions(file))
    draft = DraftModel(file, replace(settings, n_ctx=n_ctx))
    try:
        check_vocabulary(model.hollow, draft.hollow, (model.file.path.name, file.path.name))
        if not can_take_back(draft.hollow):
            raise ModelError(
                f"{file.path.name} cannot draft: what it has computed cannot be taken back",
                "give a model without a recurrent state, or --draft auto",
            )
    except H2OError:
        draft.close()
        raise
    return draft


def _n_vocab(file: ModelFile) -> int:
    return max((table.n_rows for table in file.row_tables), default=0)


def _n_positions(file: ModelFile) -> int:
    return next((t.n_rows for t in file.tensors if t.name == "position_embd.weight"), UNLIMITED)


# --- settings -------------------------------------------------------------------------------------------------------


def _settings(file: ModelFile, options: RunOptions, n_ctx: int, n_prompt: int, profile: Profiled | None) -> Settings:
    n_logits = 1 if options.speculate == "off" or options.kv else 1 + most_drafted(_n_vocab(file), file.n_bytes)
    settings = Settings(
        n_ctx=n_ctx,
        n_ubatch=options.ubatch or max(SHORT_PASS, n_logits, min(UBATCH, n_prompt)),
        n_logits=n_logits,
        n_threads=options.threads or default_threads(),
        kv_type=options.kv_type,
        prefetch_input=options.prefetch_input,
        repack=options.repack == "auto" and not options.devices.are_given,
        margin_bytes=TURNS_MARGIN_BYTES if options.kind == CONVERSATION else MARGIN_BYTES,
    )
    if profile is None:
        return settings
    return replace(settings, request_bytes=profile.request_bytes, depth=profile.depth)
