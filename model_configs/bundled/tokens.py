"""The tokenizer of the bundled model and the arrays of tokens it is trained on."""

from __future__ import annotations

import io
import random

import numpy as np
import sentencepiece as spm
from corpus import FULL, Mix, document, unmarked
from numpy.typing import NDArray
from stories import NAMES, WORDS

BOS, EOS = 1, 2
MASKED = 255  # a target that is left out of the loss


def build_tokenizer(seed: int, vocabulary: int) -> bytes:
    """Trains a byte-pair vocabulary on the corpus; every name and thing is one piece."""
    rng = random.Random(seed)
    lines = [line for _ in range(6000) for line in unmarked(document(rng, FULL, 150)).split("\n")]
    lines += [" ".join(rng.sample(NAMES + WORDS, 60)) for _ in range(1500)]
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocabulary,
        byte_fallback=True,
        character_coverage=1.0,
        required_chars="".join(chr(code) for code in range(33, 127)),
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        max_sentence_length=100000,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


class Encoder:
    """Turns marked documents into tokens, a word at a time with a memory of words."""

    def __init__(self, model: bytes) -> None:
        self.processor = spm.SentencePieceProcessor(model_proto=model)
        self.known: dict[str, list[int]] = {}

    def word(self, word: str) -> list[int]:
        """The pieces of one word; pieces never reach over a space."""
        pieces = self.known.get(word)
        if pieces is None:
            pieces = self.known[word] = self.processor.encode(word)
        return pieces

    def document(self, text: str) -> tuple[list[int], list[int]]:
        """Tokens of a marked document and, for each, 0, MASKED or its form plus one."""
        tokens, marks = [BOS], [MASKED]
        for word in text.split(" "):
            marked = word.startswith("~")
            mark = int(word[1]) + 1 if marked else 0
            pieces = self.word(word[2:] if marked else word)
            tokens += pieces
            marks.append(mark)
            marks += [0] * (len(pieces) - 1)
            if "\n" in word:
                marks[tokens.index(self.word("\n")[-1], len(tokens) - len(pieces))] = MASKED
        return [*tokens, EOS], [*marks, 0]


Batch = tuple[NDArray[np.int64], NDArray[np.uint8]]


def batch(rng: random.Random, encoder: Encoder, mix: Mix, rows: int, length: int) -> Batch:
    """`rows` windows of length + 1 tokens with their marks, filled with documents."""
    tokens = np.full((rows, length + 1), EOS, dtype=np.int64)
    marks = np.full((rows, length + 1), MASKED, dtype=np.uint8)
    for row in range(rows):
        filled = 0
        while filled < length - 16:
            room = length + 1 - filled
            ids, flags = encoder.document(document(rng, mix, max(20, int(room * 0.8))))
            tokens[row, filled : filled + len(ids)] = ids[:room]
            marks[row, filled : filled + len(ids)] = flags[:room]
            filled += len(ids)
    return tokens, marks
