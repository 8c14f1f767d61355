"""Who drafts tokens in a session: a small model, a copy of the model with few bits, or the text so far."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.session.caller import Caller
from runtime.answer.drafters import DraftModel, Lodging, LookupDrafter, ModelDrafter, can_take_back, check_vocabulary
from runtime.answer.gauge import ODDS_POWER, Gauge
from runtime.answer.speculate import Speculation
from runtime.engine.engine import Engine
from runtime.errors import H2OError, ModelError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.residency import smallest_window, streamable_bytes
from runtime.settings import Settings
from runtime.sizes import MB
from runtime.weights.head_start import guessed_room

if TYPE_CHECKING:
    from runtime.llama.quantize import CopyType

AUTO = "auto"
GUESSED_DRAFT_BYTES = 32 * MB  # of a draft model beside its weights, until it is open
_GUESSED_DISK = 100 * MB  # bytes per second
_MEMORY = 8e9  # bytes of weights per second that are computed with
_USUAL_ODDS = 0.7  # the probability a model gives to the tokens of its answers, in the middle


def best_copy(
    file: ModelFile, draft: str | None, budget_bytes: int, longest: int, disk_bytes_per_s: float
) -> CopyType | None:
    """The type of copy with which --draft auto takes the least time per token; None: no copy, or none is wanted.

    A copy with more bits is right more often, and takes the place of more weights. budget_bytes 0: no budget.
    longest: drafted tokens. disk_bytes_per_s 0: not known.
    """
    if draft != AUTO:
        return None
    from runtime.llama.quantize import copy_bytes, useful_copies

    total, room = streamable_bytes(file), guessed_room(file, budget_bytes) if budget_bytes else streamable_bytes(file)

    def left(kind: CopyType) -> int:  # bytes for weights
        return room - copy_bytes(file, kind) - GUESSED_DRAFT_BYTES

    def token_s(kind: CopyType) -> float:
        read_s = max(0, total - left(kind)) / (disk_bytes_per_s or _GUESSED_DISK)
        right: float = _USUAL_ODDS**kind.odds_power
        return min(
            (read_s + (total + n * copy_bytes(file, kind)) / _MEMORY) * (1 - right) / (1 - right ** (n + 1))
            for n in range(1, longest + 1)
        )

    kinds = useful_copies(file)
    fitting = [kind for kind in kinds if left(kind) >= smallest_window(file)]
    return min(fitting or kinds[:1], key=token_s, default=None)


def expected_draft_bytes(file: ModelFile, draft: str | None, copy: CopyType | None) -> int:
    """About what a draft model will take, before it is opened. draft: its path, AUTO or None."""
    if draft is None or (draft == AUTO and not copy):
        return 0
    from runtime.llama.quantize import copy_bytes

    return (copy_bytes(file, copy) if copy else ModelFile.open(draft).n_bytes) + GUESSED_DRAFT_BYTES


def needs_copy(file: ModelFile, copy: CopyType | None) -> bool:
    """Whether a copy has to be made first: until then the memory of the weights is the quantiser's."""
    if copy is None:
        return False
    from runtime.llama.quantize import copy_path

    return not copy_path(file, copy, _cache_folder()).is_file()


def draft_file(
    file: ModelFile, hollow: HollowModel, draft: str | None, copy: CopyType | None, caller: Caller
) -> ModelFile | None:
    """The model that drafts, if there is one; the copy for "auto" is made where there is none."""
    if draft is None:
        return None
    if not can_take_back(hollow):
        caller.note("speculation is off: computed tokens of this model cannot be taken back")
        return None
    if draft != AUTO:
        return ModelFile.open(draft)
    if not copy:
        caller.note(f"no draft model: {file.path.name} has few bits per weight already, a smaller copy is no faster")
        return None
    from runtime.llama.quantize import low_bit_copy

    def progress(share: Callable[[], float]) -> AbstractContextManager[object]:
        return caller.progress("making the copy", share)

    return ModelFile.open(low_bit_copy(file, copy, _cache_folder(), caller.note, progress))


def _cache_folder() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("h2o-llm"))


def open_draft(file: ModelFile, settings: Settings, target: tuple[ModelFile, HollowModel]) -> DraftModel:
    """The draft model for a target, its weights not read yet.

    Raises ModelError where it has another vocabulary, and where tokens that turn out wrong could not be taken back.
    """
    draft = DraftModel(file, settings)
    try:
        check_vocabulary(target[1], draft.hollow, (target[0].path.name, file.path.name))
        if not can_take_back(draft.hollow):
            raise ModelError(
                f"{file.path.name} cannot draft: what it has computed cannot be taken back",
                "give a model without a recurrent state, or --draft auto",
            )
    except H2OError:
        draft.close()
        raise
    return draft


def speculation_of(
    engine: Engine, hollow: HollowModel, draft: DraftModel | None, copy: CopyType | None = None
) -> Speculation | None:
    """A drafter, where the engine can verify several tokens in one pass and take back those that were wrong.

    copy: what the draft model is, where it is a copy of the engine's.
    """
    most = min(engine.settings.n_logits, engine.settings.n_ubatch) - 1
    if most < 1 or not can_take_back(hollow):
        return None
    if draft:
        cost, n_vocab = draft.file.n_bytes / engine.file.n_bytes, min(engine.n_vocab, draft.engine.n_vocab)
        place = Lodging(engine, draft) if engine.layout.displaced_bytes(draft.n_bytes) else draft
        engine.lodger = draft.engine if place is draft else None
        return Speculation(
            ModelDrafter(place, cost, n_vocab), most, Gauge(cost, copy.odds_power if copy else ODDS_POWER)
        )
    return Speculation(LookupDrafter(engine.settings.n_ctx), most)
