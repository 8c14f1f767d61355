"""Who proposes the next tokens: the text so far (prompt look-up), or a small model."""

from __future__ import annotations

import time
from array import array
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

from runtime.answer.sampler import Sampler, Sampling
from runtime.engine.engine import Engine
from runtime.errors import Cancelled, H2OError, ModelError
from runtime.llama import abi
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.memory import trim_heap
from runtime.plans.plan import Plan
from runtime.plans.residency import streamable_bytes
from runtime.settings import FULL_TILES, Settings
from runtime.weights.head_start import open_weights
from runtime.weights.loads import NONE, Numbers
from runtime.weights.store import LayerStore

LONGEST, SHORTEST = 3, 1
_MULTIPLIER = 0x9E3779B97F4A7C15
_SHIFT = 40
_MOST_PLACES = 8  # earlier places that are looked at
_SURROUNDINGS, _RECENT = 8, 16  # tokens before a place that tell what it is about, and before the end of the text
_MUCH = 16  # more new tokens than this are a text to read, not part of drafting
_MOST_UNUSED = 128  # tokens a vocabulary may be longer by, as llama.cpp allows


class LookupDrafter:
    """Proposes what followed an earlier place where the text ended like this.

    For every suffix length a table of fixed size says where such a suffix ended last, and every place points to the
    one before it. Entries that collide are lost, never wrong: the tokens are compared. Of the last few places the one
    counts whose surroundings have most in common with the present ones, rare tokens above all: asked for somebody's
    hat, the sentence about that hat is quoted, not the last one about a hat.
    """

    name = "lookup"
    relative_cost = 0.0
    reading_s = 0.0
    is_ready = True
    lodging = None

    def __init__(self, n_ctx: int, longest: int = LONGEST, shortest: int = SHORTEST) -> None:
        self._lengths = range(shortest, longest + 1)
        self._n_slots = 1 << max(10, (2 * n_ctx - 1).bit_length())
        self.grade = 0
        self.begin()

    def begin(self) -> None:
        """Forget the text."""
        self._tokens = array("i")
        self._counts: dict[int, int] = {}
        self._last: dict[int, array[int]] = {}  # slot -> where it ended last; the old tables go before new ones come
        self._last |= {n: array("i", [0]) * self._n_slots for n in self._lengths}
        self._before = {n: array("i") for n in self._lengths}  # place -> the place before; 0: none

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        """What followed the longest suffix that occurred before, repeated where it reaches the end of the text."""
        self._read(tokens)
        text, end = self._tokens, len(self._tokens)
        for length in reversed(self._lengths):
            places = self._places(length)
            if places:
                self.grade = length
                place = max(places, key=self._likeness) if len(places) > 1 else places[0]
                return [text[place + i % (end - place)] for i in range(n)]
        self.grade = 0
        return []

    def _places(self, length: int) -> list[int]:
        """Where the present suffix of this length ended before, the last place first."""
        text, before, found = self._tokens, self._before[length], list[int]()
        place = len(text)
        suffix = text[-length:]
        while place and len(found) < _MOST_PLACES:
            place = before[place - 1]
            if place and text[place - length : place] == suffix:
                found.append(place)
        return found

    def _likeness(self, place: int) -> float:
        """How much the tokens before a place have in common with the last ones of the text."""
        text = self._tokens
        here = set(text[max(0, place - _SURROUNDINGS) : place])
        return sum(1 / self._counts[token] for token in here.intersection(text[max(place, len(text) - _RECENT) :]))

    def _read(self, tokens: Sequence[int]) -> None:
        """Take in what is new."""
        text, mask = self._tokens, self._n_slots - 1
        for i in range(len(text), len(tokens)):
            text.append(tokens[i])
            self._counts[tokens[i]] = self._counts.get(tokens[i], 0) + 1
            key = 0
            for length in range(1, self._lengths[-1] + 1):
                token = text[i + 1 - length] if length <= i + 1 else -1
                key = (key * 0x10001 + token + 1) * _MULTIPLIER & 0xFFFFFFFFFFFFFFFF
                if length in self._last:
                    slot = key >> _SHIFT & mask
                    self._before[length].append(self._last[length][slot])
                    self._last[length][slot] = i + 1

    def close(self) -> None:
        """Nothing to free."""


class _LateStore(LayerStore):
    """A store that follows no plan, and reads nothing, until it is started."""

    is_started = False

    def apply(self, wanted: Numbers, window_bytes: int, *, everything: bool = False, spoilt: Numbers = NONE) -> None:
        """Adopt a plan, once it is started."""
        if self.is_started:
            super().apply(wanted, window_bytes, everything=everything, spoilt=spoilt)

    @property
    def is_complete(self) -> bool:
        """Whether every piece is resident."""
        return len(self._resident) == len(self._pieces)


class DraftModel:
    """A small model that is in memory as a whole, beside the model it drafts for. Its weights are read at start()."""

    def __init__(self, file: ModelFile, settings: Settings) -> None:
        """Load everything but the weights. Raises H2OError."""
        self.file, self._settings = file, settings
        self._closed = False
        settings = replace(settings, n_logits=1, n_ubatch=min(FULL_TILES, settings.n_ubatch))
        self._whole = Plan(file.n_layers, 1, pinned_bytes=max(1, streamable_bytes(file)))
        with ExitStack() as opened:
            self.hollow = HollowModel(file)
            opened.callback(self.hollow.free)
            weights = open_weights(file, settings, _LateStore)
            self._store = cast(_LateStore, weights.store)
            self.engine = Engine(file, self.hollow, self._whole, settings, weights)
            opened.pop_all()

    @property
    def n_bytes(self) -> int:
        """The most it will take of what is not in memory yet: weights, keys and values, buffers."""
        ledger = self.engine.ledger
        return ledger.total_bytes - ledger.process_bytes - ledger.margin_bytes

    @property
    def is_ready(self) -> bool:
        """Whether all weights are there."""
        return self._store.is_complete

    def start(self) -> None:
        """Begin to read the weights."""
        if not self._store.is_started:
            self._store.is_started = True
            self.engine.apply(self._whole)

    def again(self) -> DraftModel:
        """The same model, opened again. Raises H2OError."""
        return DraftModel(self.file, self._settings)

    def close(self) -> None:
        """Free it; once more does nothing."""
        if not self._closed:
            self._closed = True
            self.engine.close()
            self.hollow.free()


class Lodging:
    """A draft model's place in memory, taken from the weights of the model that verifies, its host."""

    def __init__(self, host: Engine, model: DraftModel) -> None:
        """Close the model; it is opened again when it comes."""
        self.model: DraftModel | None = None
        self._host, self._reopen = host, model.again
        self._away_bytes = 4 * host.n_vocab  # Engine.odds
        self.n_bytes = model.engine.ledger.resident_bytes
        self._taken_bytes = model.n_bytes
        model.close()
        trim_heap()
        self._taken_bytes += max(0, host.layout.measure_process())
        host.layout.make_room(self._away_bytes)

    @property
    def is_taken(self) -> bool:
        """Whether the draft model has it."""
        return self.model is not None

    @property
    def pass_bytes(self) -> int:
        """What a pass of the host reads while the draft model is there."""
        displaced = 0 if self.model else self._host.layout.displaced_bytes(self._taken_bytes)
        return self._host.streamed_bytes + displaced

    def take(self) -> bool:
        """The draft model comes; False where the budget has become too small for it, or its file is not there.

        Raises Cancelled.
        """
        try:
            self._host.layout.make_room(self._taken_bytes)
            self.model = self._reopen()
        except H2OError as error:
            self._host.layout.make_room(self._away_bytes)
            if isinstance(error, Cancelled):
                raise
            return False
        self._host.lodger = self.model.engine
        self.model.start()
        if self._host.guests.stop:  # it came while the model was opened
            raise self._host.guests.stop
        return True

    def leave(self) -> None:
        """The draft model goes, weights take its place."""
        if self.model:
            self._host.lodger = None
            self.model.close()
            self.model = None
            trim_heap()
            self._host.layout.make_room(self._away_bytes)


class ModelDrafter:
    """Proposes the likeliest tokens of a draft model, one after the other. Its keys and values follow the text."""

    name = "draft"
    grade = 0

    def __init__(self, place: DraftModel | Lodging, relative_cost: float, n_vocab: int) -> None:
        """n_vocab: tokens that both models have.

        place: the model, or where it is while it pays; without a lodging it is there from the first answer on.
        """
        self.lodging = place if isinstance(place, Lodging) else None
        self._place = place
        self.relative_cost = relative_cost
        self._n_vocab = n_vocab
        self._sampler = Sampler(Sampling(temp=0), n_vocab)
        if self._model:
            self._model.engine.truncate(0)
        self._tokens: list[int] = []  # in the draft model's cache
        self._agreed = 0  # so many of them are known to be the text's
        self.reading_s = 0.0

    def begin(self) -> None:
        """Compare with the next text from its beginning; read the weights, unless their place has a price."""
        self._agreed = 0
        if not self.lodging and self._model:
            self._model.start()

    @property
    def _model(self) -> DraftModel | None:
        return self._place.model if isinstance(self._place, Lodging) else self._place

    @property
    def is_ready(self) -> bool:
        """Whether to ask it: its weights are there, or whoever asks decides on them."""
        return self.lodging is not None or (self._model is not None and self._model.is_ready)

    def propose(self, tokens: Sequence[int], n: int) -> list[int]:
        """The n likeliest tokens, each after the ones before; fewer where the vocabularies differ."""
        if not self._model:
            return []
        engine = self._model.engine
        n = min(n, engine.settings.n_ctx - len(tokens))
        new = self._new(engine, tokens) if n > 0 else []
        if not new or any(token >= self._n_vocab for token in new):
            return []
        if len(new) > _MUCH:
            start = time.perf_counter()
            self._feed(engine, new[:-1])
            self.reading_s += time.perf_counter() - start
            new = new[-1:]
        self._feed(engine, new)
        self._agreed = len(tokens)
        draft = [self._sampler.sample(engine)]
        while len(draft) < n and draft[-1] < self._n_vocab:
            self._feed(engine, draft[-1:])
            draft.append(self._sampler.sample(engine))
        return draft if draft[-1] < self._n_vocab else draft[:-1]

    def _new(self, engine: Engine, tokens: Sequence[int]) -> Sequence[int]:
        """What the draft model has to compute of the text, its last token always. Forgets what is not the text."""
        del self._tokens[engine.n_past :]
        agreed = min(self._agreed, len(self._tokens))
        limit = min(len(self._tokens), len(tokens) - 1)
        while agreed < limit and self._tokens[agreed] == tokens[agreed]:
            agreed += 1
        agreed = self._agreed = min(agreed, limit)
        if agreed < len(self._tokens):
            engine.truncate(agreed)
            del self._tokens[agreed:]
        return tokens[agreed:]

    def _feed(self, engine: Engine, tokens: Sequence[int]) -> None:
        self._tokens += tokens
        try:
            engine.forward(tokens)
        finally:
            del self._tokens[engine.n_past :]

    def close(self) -> None:
        """Free the sampler, and a draft model in a lodging; another one stays its owner's."""
        self._sampler.close()
        if self.lodging and self.lodging.model:
            self.lodging.model.close()


def check_vocabulary(model: HollowModel, draft: HollowModel, names: tuple[str, str]) -> None:
    """Raise ModelError unless the tokens of both models mean the same; a few unused ones at the end may differ."""
    llama = abi.llama
    vocabularies = [llama.llama_model_get_vocab(m.pointer) for m in (model, draft)]
    sizes = [int(llama.llama_vocab_n_tokens(v)) for v in vocabularies]
    get, (first, second) = llama.llama_vocab_get_text, vocabularies
    same = (
        abs(sizes[0] - sizes[1]) <= _MOST_UNUSED
        and llama.llama_vocab_type(first) == llama.llama_vocab_type(second)
        and llama.llama_vocab_bos(first) == llama.llama_vocab_bos(second)
        and llama.llama_vocab_eos(first) == llama.llama_vocab_eos(second)
        and all(get(first, i) == get(second, i) for i in range(min(sizes)))
    )
    if not same:
        raise ModelError(
            f"{names[1]} cannot draft for {names[0]}: its vocabulary is another one",
            "give a smaller model of the same family, or --draft auto",
        )


def can_take_back(model: HollowModel) -> bool:
    """Whether computed positions can be forgotten: not in recurrent models, whose state has no positions."""
    return not (abi.llama.llama_model_is_recurrent(model.pointer) or abi.llama.llama_model_is_hybrid(model.pointer))
