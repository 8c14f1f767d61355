"""A worker's layers: an engine for them, inside the worker's budget, that takes hidden states in and gives them out."""

from __future__ import annotations

from array import array

from runtime.distributed.hidden import NUMBER_BYTES
from runtime.distributed.messages import Ready, Setup, Step
from runtime.distributed.offer import Offer
from runtime.distributed.protocol import Shape
from runtime.engine.borders import Borders, Hops, check_cut
from runtime.engine.engine import Engine
from runtime.errors import WorkerError
from runtime.kv.rows import CacheRows
from runtime.llama import abi
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.ledger import POSITION_BYTES
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import smallest_window
from runtime.settings import FULL_TILES, KV_TYPES, Settings
from runtime.sizes import format_size
from runtime.weights.head_start import Weights

_WINDOW_PIECES = 2
_LIST_SHARE = 4  # of the budget, at most, for llama.cpp's list of positions


class OwnLayers:
    """The ranges of layers of a setup. `setup` is what the engine was opened for."""

    def __init__(self, file: ModelFile, setup: Setup, offer: Offer, hops: Hops) -> None:
        """Raises H2OError where these layers cannot be computed alone, or not inside the budget."""
        check_setup(setup, file.n_layers, offer.budget_bytes)
        self.model, self._n_layers = file.hash, file.n_layers
        layers = [i for first, last in setup.ranges for i in range(first, last)]
        self.file = file.owned(layers, head=False, embedding=0 in layers)
        self._offer, self._hops = offer, hops
        self._before = 0.0
        self._engine: Engine | None = None
        self._hollow = HollowModel(self.file)
        try:
            check_cut(self.file, self._hollow, _settings(setup, offer))
            self.open(setup)
        except BaseException:
            self.close()
            raise

    @property
    def engine(self) -> Engine:
        """The engine."""
        assert self._engine
        return self._engine

    def open(self, setup: Setup) -> None:
        """An engine for a setup of the same layers. Weights that are in memory stay there. Raises H2OError."""
        check_setup(setup, self._n_layers, self._offer.budget_bytes)
        weights = self._engine.give_up_weights() if self._engine else None
        self._engine = None
        self.setup = setup
        self._engine = self._open_engine(weights)
        self.rows = CacheRows(self._engine.caches, self.file, self._engine.settings.n_ctx)
        self._engine.guests.add(Borders(self.file, self._hollow.weights, self._engine.guests, self._hops))

    def _open_engine(self, weights: Weights | None) -> Engine:
        budget_bytes = self._offer.budget_bytes
        window = self.setup.window_bytes or min(_WINDOW_PIECES * smallest_window(self.file), budget_bytes // 4)
        plan = Plan(0, 1, Layout.BALANCED, window_bytes=window, budget_bytes=budget_bytes, model_hash=self.file.hash)
        return Engine(self.file, self._hollow, plan, _settings(self.setup, self._offer), weights)

    def fits(self, setup: Setup) -> bool:
        """Whether the engine is one for this setup as it is."""
        mine = self.setup
        same = (mine.ranges, mine.n_ctx, mine.kv_type, mine.window_bytes, mine.hidden)
        others = (setup.ranges, setup.n_ctx, setup.kv_type, setup.window_bytes, setup.hidden)
        return (
            self._engine is not None
            and same == others
            and setup.n_logits <= mine.n_logits
            and longest_pass(setup) <= longest_pass(mine)
        )

    @property
    def shape(self) -> Shape:
        """What steps are checked against."""
        engine, setup = self.engine, self.setup
        width = int(abi.llama.llama_model_n_embd(self._hollow.pointer))
        n_tokens, n_vocab = engine.pass_tokens, engine.n_vocab
        sizes = setup.n_ctx, n_tokens, setup.n_logits, n_vocab, width, NUMBER_BYTES[setup.hidden], self.rows.cell_bytes
        return Shape(tuple(setup.ranges), self._n_layers, *sizes)

    @property
    def ready(self) -> Ready:
        """What the root is told."""
        engine, shape = self.engine, self.shape
        resident, streamed = engine.ledger.resident_bytes, engine.streamed_bytes
        budget_bytes = engine.plan.budget_bytes or self._offer.budget_bytes
        return Ready(shape.n_tokens, shape.width, budget_bytes, resident, streamed, list(shape.cell_bytes))

    @property
    def summary(self) -> str:
        """One line for the log."""
        ranges = ", ".join(f"{first}-{last - 1}" for first, last in self.setup.ranges)
        resident, streamed = self.engine.ledger.resident_bytes, self.engine.streamed_bytes
        rest = f", {format_size(streamed)} streamed" if streamed else ""
        return f"layers {ranges}: {format_size(resident)} in memory{rest}"

    @property
    def share(self) -> float:
        """How far the pass is."""
        return self.engine.computed_tokens - self._before

    def cancel(self, signal_number: int) -> None:
        """End the pass that runs, if one does (from any thread)."""
        if self._engine:
            self._engine.cancel(signal_number)

    def compute(self, step: Step) -> None:
        """A pass that begins with this step; results are sent from inside it."""
        self._before = self.engine.computed_tokens
        self.engine.forward(array("i", step.tokens), step.n_logits)

    def close(self) -> None:
        """Free everything."""
        if self._engine:
            self._engine.close()
        self._hollow.free()


def check_setup(setup: Setup, n_layers: int, budget_bytes: int) -> None:
    """Raise WorkerError for what cannot be, or would take memory before anybody counts it."""
    if setup.n_ctx * POSITION_BYTES > budget_bytes // _LIST_SHARE:
        raise WorkerError(
            f"a context of {setup.n_ctx} tokens is too long for {format_size(budget_bytes)}", "lower --ctx"
        )
    end = 0
    for first, last in setup.ranges:
        if not end <= first < last <= n_layers:
            raise WorkerError(f"layers {first} to {last - 1} are not possible: the model has {n_layers}")
        end = last + 1
    if setup.kv_type not in KV_TYPES:
        raise WorkerError(f"there is no KV type {setup.kv_type!r}")
    if setup.hidden not in NUMBER_BYTES:
        raise WorkerError(f"hidden states do not travel as {setup.hidden!r}")


def longest_pass(setup: Setup) -> int:
    """Tokens of the longest pass that is prepared for: rounded up, so that another prompt needs no other engine."""
    n_tokens = FULL_TILES
    while n_tokens < setup.n_ubatch:
        n_tokens *= 2
    return n_tokens


def _settings(setup: Setup, offer: Offer) -> Settings:
    return Settings(
        n_ctx=setup.n_ctx,
        n_ubatch=longest_pass(setup),
        n_threads=offer.n_threads,
        kv_type=setup.kv_type,
        n_logits=setup.n_logits,
        repack=False,
        fit_window=not setup.window_bytes,
    )
