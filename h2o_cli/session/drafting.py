"""Who drafts tokens in a session: a small model, a copy of the model with few bits, or the text so far."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

from h2o_cli.session.caller import Caller
from runtime.answer.drafters import DraftModel, Lodging, LookupDrafter, ModelDrafter, can_take_back, check_vocabulary
from runtime.answer.speculate import Speculation
from runtime.engine.engine import Engine
from runtime.errors import H2OError, ModelError
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.settings import Settings
from runtime.sizes import MB

AUTO = "auto"
GUESSED_DRAFT_BYTES = 32 * MB  # of a draft model beside its weights, until it is open


def expected_draft_bytes(file: ModelFile, draft: str | None) -> int:
    """About what a draft model will take, before it is opened. draft: its path, AUTO or None."""
    if draft is None:
        return 0
    from runtime.llama.quantize import copy_bytes, copy_pays

    if draft == AUTO and not copy_pays(file):
        return 0
    n_bytes = copy_bytes(file) if draft == AUTO else ModelFile.open(draft).n_bytes
    return n_bytes + GUESSED_DRAFT_BYTES


def draft_file(file: ModelFile, hollow: HollowModel, draft: str | None, caller: Caller) -> ModelFile | None:
    """The model that drafts, if there is one; a copy with few bits is made when "auto" finds none."""
    if draft is None:
        return None
    if not can_take_back(hollow):
        caller.note("speculation is off: computed tokens of this model cannot be taken back")
        return None
    if draft != AUTO:
        return ModelFile.open(draft)
    from runtime.llama.quantize import copy_pays, low_bit_copy

    if not copy_pays(file):
        caller.note(f"no draft model: {file.path.name} has few bits per weight already, a 4-bit copy is no faster")
        return None
    import platformdirs

    def progress(share: Callable[[], float]) -> AbstractContextManager[object]:
        return caller.progress("making the copy", share)

    folder = Path(platformdirs.user_cache_dir("h2o-llm"))
    return ModelFile.open(low_bit_copy(file, folder, caller.note, progress))


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


def speculation_of(engine: Engine, hollow: HollowModel, draft: DraftModel | None) -> Speculation | None:
    """A drafter, where the engine can verify several tokens in one pass and take back those that were wrong."""
    most = min(engine.settings.n_logits, engine.settings.n_ubatch) - 1
    if most < 1 or not can_take_back(hollow):
        return None
    if draft:
        cost, n_vocab = draft.file.n_bytes / engine.file.n_bytes, min(engine.n_vocab, draft.engine.n_vocab)
        place = Lodging(engine, draft) if engine.layout.displaced_bytes(draft.n_bytes) else draft
        engine.lodger = draft.engine if place is draft else None
        return Speculation(ModelDrafter(place, cost, n_vocab), most)
    return Speculation(LookupDrafter(engine.settings.n_ctx), most)
