"""Answers of an engine with and without speculation, and texts to draft."""

import random

from runtime.answer.drafters import LookupDrafter
from runtime.answer.gauge import Gauge
from runtime.answer.generate import Request, generate
from runtime.answer.meter import Meter
from runtime.answer.sampler import Sampler, Sampling
from runtime.answer.speculate import MOST_DRAFTED, Speculation
from runtime.engine.sequence import TokenSequence
from runtime.llama import quantize
from runtime.llama.tokenizer import Tokenizer

RECALL = (
    "It was a rainy day and Henry felt tired. Emma's scarf is in the green pot. Henry found an old map in a tin. "
    "George's book is in the yellow bucket. The map showed a way to the museum. Zoe's frog is in the red drawer. "
    "Henry and Molly packed tea and a drum. Bill's shell is in the small tent. They walked for hours. Where is "
)
LIST = (
    'Kate said: "tent, lonely, mill, station, church, whistle, cupboard, bread." Simon went to the lake. '
    'Some children were playing with a kite on the grass. Again Kate said: "tent,'
)
AGAIN = "locker blue museum green bird market sad turtle hedgehog red. Again: locker"
REPEATING = [(f"{RECALL}{who}", 8) for who in ("Emma's scarf?", "Zoe's frog?", "Bill's shell?")] + [
    (LIST, 18),
    (AGAIN, 16),
]
STORIES = ["One foggy summer Simon went to the castle.", "Tom lost his blue hat.", "Once upon a time there was a girl"]
GREEDY = Sampling(temp=0)
FOUR_BITS = quantize.COPY_TYPES[0]


class Always(Gauge):
    """Drafts as much as possible, whatever it costs."""

    def best(self, grade, most):
        return most


class Rig:
    """An engine that answers with or without speculation."""

    def __init__(self, opened):
        self.engine = opened
        self.tokenizer = Tokenizer(opened._model, opened.file)
        self.figures = None

    def answer(self, prompt, n_predict=24, speculation=None, *, sampling=GREEDY, stop=(), sequence=None):
        """(tokens, text, finish) of an answer to a text or to tokens."""
        sequence = sequence or TokenSequence(self.engine, self.engine.notes.append)
        self.engine.truncate(len(sequence.tokens))
        sampler, meter = Sampler(sampling, self.engine.n_vocab), Meter(self.engine)
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        out, text, step = [], "", None
        request = Request(tuple(tokens), n_predict, tuple(stop))
        for step in generate(sequence, self.tokenizer, sampler, request, speculation=speculation):
            meter.see(step)
            out += [step.token] if step.token is not None else []
            text += step.text
        self.figures = meter.statistics()
        sampler.close()
        assert sequence.tokens == [*tokens, *out][: self.engine.n_past]
        assert self.engine.n_past == len(sequence.tokens)
        return out, text, step.finish


def lookup(n_ctx=512, gauge=None):
    return Speculation(LookupDrafter(n_ctx), MOST_DRAFTED, gauge or Always())


class Known:
    """A drafter that knows the answer, and gives a wrong token with a probability."""

    name, lodging, relative_cost, reading_s, grade, is_ready = "known", None, 0.0, 0.0, 0, True

    def __init__(self, text, wrong=0.0, n_vocab=0, seed=1):
        self._text, self._wrong, self._n_vocab = list(text), wrong, n_vocab
        self._rng = random.Random(seed)

    def begin(self):
        pass

    def propose(self, tokens, n):
        right = self._text[len(tokens) : len(tokens) + n]
        return [self._rng.randrange(self._n_vocab) if self._rng.random() < self._wrong else t for t in right]

    def close(self):
        pass
