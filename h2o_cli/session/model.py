"""A model of which everything but the engine is open: index, tokenizer, first plan; its weights are being read."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace

from h2o_cli.session import team
from h2o_cli.session.caller import Caller
from h2o_cli.session.defaults import CONVERSATION_CONTEXT, UBATCH, default_threads
from h2o_cli.session.drafting import best_copy, draft_file, expected_draft_bytes, needs_copy
from h2o_cli.session.first_plan import FirstPlan
from h2o_cli.session.options import SessionOptions
from h2o_cli.session.profiled import Profiled, early_child
from h2o_cli.session.smallest import CONVERSATION
from runtime.answer.speculate import most_drafted
from runtime.errors import H2OError, UsageError
from runtime.llama import abi
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.llama.tokenizer import Tokenizer
from runtime.plans.file import default_plan_path
from runtime.settings import KV_TYPES, MARGIN_BYTES, SHORT_PASS, TURNS_MARGIN_BYTES, Settings
from runtime.weights.head_start import Weights, head_start

CONTEXT_STEP = 256
CONTEXT_GUESS = 512  # tokens, while the prompt's length is not known yet
UNLIMITED = 2**31 - 1
_NO_FLASH_ATTENTION = ("grok", "t5")  # llama.cpp computes their attention in other ways
_PLAIN_KV = "use --kv-type f16"


class OpenModel:
    """A model's index, its llama.cpp side without weights, and its tokenizer."""

    def __init__(self, options: SessionOptions, caller: Caller) -> None:
        """Begin to read the weights, and load llama.cpp's side meanwhile. Raises H2OError."""
        start = time.perf_counter()
        note = caller.note
        self.caller = caller
        self.weights: Weights | None = None
        self.is_named = options.is_named
        with ExitStack() as opened:
            with caller.held():
                child = early_child()
                if child:
                    opened.callback(child.close)
                self.file = ModelFile.open(options.model)
            check_kv_type(self.file, options.kv_type)
            self.team = team.join(self.file, options.devices, options.budget, options.threads, note)
            opened.pop_all()
        if self.team:
            self.file = self.team.part
        with caller.held():
            self.profile = Profiled.find(self.file, note, child)
            path, is_named = options.plan_file or default_plan_path(), options.plan_file is not None
            self.first_plan = FirstPlan.find(self.file, path, options.budget, note, is_named=is_named)
            settings = settings_for(self.file, options, options.ctx or CONTEXT_GUESS, UBATCH, self.profile)
            settings = self.team.counted(settings) if self.team else settings
            rate = self.profile.machine.disk_bytes_per_s if self.profile else 0.0
            self.copy = best_copy(self.file, options.draft, self.first_plan.budget_bytes, settings.n_logits - 1, rate)
            settings = replace(settings, draft_bytes=expected_draft_bytes(self.file, options.draft, self.copy))
            plan = self.first_plan.choose(self.file, self.profile, settings, options.fixed_layout).plan
            plan = replace(plan, budget_bytes=max(0, plan.budget_bytes - settings.draft_bytes))
            if not needs_copy(self.file, self.copy):
                self.weights = head_start(self.file, plan, settings)
            try:
                self.hollow = HollowModel(self.file)
            except H2OError:
                if self.weights:
                    self.weights.close()
                raise
        try:
            self.tokenizer = Tokenizer(self.hollow, self.file)
            self.draft_file = draft_file(self.file, self.hollow, options.draft, self.copy, caller)
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
        """Positions that the model knows; practically unlimited where it has no table of them."""
        return positions_of(self.file)

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


def context_for(model: OpenModel, ctx: int | None, n_wanted: int) -> int:
    """The context in tokens: --ctx, else n_wanted rounded up, at most what the model was made for."""
    if ctx is None:
        return min(-(-n_wanted // CONTEXT_STEP) * CONTEXT_STEP, model.context_length, model.n_positions)
    if ctx > model.n_positions:
        raise UsageError(f"this model knows {model.n_positions} positions, --ctx {ctx} is more", "lower --ctx")
    if ctx > model.context_length:
        model.caller.note(f"--ctx {ctx} is more than the {model.context_length} tokens this model was made for")
    return ctx


def settings_for(
    file: ModelFile, options: SessionOptions, n_ctx: int, n_prompt: int, profile: Profiled | None
) -> Settings:
    """How an engine runs for a context of n_ctx tokens and a prompt of n_prompt. A filter and drafts come on top."""
    n_logits = 1 if options.speculate == "off" or options.kv else 1 + most_drafted(_n_vocab(file), file.n_bytes)
    settings = Settings(
        n_ctx=n_ctx,
        n_ubatch=options.ubatch or max(SHORT_PASS, n_logits, min(UBATCH, n_prompt)),
        n_logits=max(n_logits, options.sequences),
        n_sequences=options.sequences,
        swap_bytes=options.swap_bytes,
        resident=options.resident,
        overlap=options.overlap,
        n_threads=options.threads or default_threads(),
        kv_type=options.kv_type,
        prefetch_input=options.prefetch_input,
        repack=options.repack == "auto" and not options.devices.are_given,
        margin_bytes=TURNS_MARGIN_BYTES if options.kind == CONVERSATION else MARGIN_BYTES,
    )
    if profile is None:
        return settings
    return replace(settings, request_bytes=profile.request_bytes, depth=profile.depth)


def check_kv_type(file: ModelFile, kv_type: str) -> None:
    """Raise UsageError where llama.cpp cannot keep a model's keys and values in this type, and would say so late."""
    n_block = abi.ggml_blck_size(KV_TYPES[kv_type])
    if n_block == 1:
        return
    if file.architecture in _NO_FLASH_ATTENTION:
        raise UsageError(
            f"--kv-type {kv_type} needs flash attention, which llama.cpp has not for {file.architecture}", _PLAIN_KV
        )
    heads = file.hyper_parameter("attention.head_count")
    usual = file.hyper_parameter("embedding_length") // heads if heads else 0
    for name, width in (("key_length", usual), ("value_length", usual), ("key_length_swa", 0), ("value_length_swa", 0)):
        n_values = file.hyper_parameter(f"attention.{name}") or width
        if n_values % n_block:
            raise UsageError(
                f"--kv-type {kv_type} has blocks of {n_block} values, and heads of this model have {n_values}",
                _PLAIN_KV,
            )


def _n_vocab(file: ModelFile) -> int:
    return max((table.n_rows for table in file.row_tables), default=0)


def positions_of(file: ModelFile) -> int:
    """Rows of a model's table of positions; practically unlimited where it has none."""
    return next((t.n_rows for t in file.tensors if t.name == "position_embd.weight"), UNLIMITED)
