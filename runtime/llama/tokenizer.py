"""Text to tokens and back, by llama.cpp's own tokenizer of the model."""

from __future__ import annotations

import codecs
import ctypes
from collections.abc import Iterator
from functools import cached_property

from runtime.errors import ModelError, PromptError
from runtime.llama import abi, cuts
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile

_BYTES = 256
_PIECE_BYTES = 128
_NAME_BYTES = 64
_BYTE_PAIRS = ("gpt2", "gemma4")
_LONGER = {"rwkv": 16, "plamo2": 4}  # tokenizers that take less memory, for vocabularies whose texts are never cut
_ATTR_UNKNOWN, _ATTR_CONTROL, _ATTR_USER_DEFINED = 1, 8, 16


class Tokenizer:
    """The vocabulary of a model. Never lets llama.cpp abort: what it cannot write is a PromptError."""

    def __init__(self, model: HollowModel, file: ModelFile) -> None:
        if file.tokenizer in ("", "no_vocab", "none"):
            raise ModelError(f"{file.path} has no tokenizer", "give a model file that holds its vocabulary")
        self._model = model.pointer
        self._vocab = abi.llama.llama_model_get_vocab(model.pointer)
        self.n_vocab = int(abi.llama.llama_vocab_n_tokens(self._vocab))
        self._kind = file.tokenizer
        self._writes_all = file.tokenizer != "llama" or file.n_byte_tokens >= _BYTES
        self._buffer = ctypes.create_string_buffer(_PIECE_BYTES)

    # --- text to tokens -----------------------------------------------------------------------------------------

    def encode(
        self, text: str, *, add_special: bool = True, parse_special: bool = False, most: int | None = None
    ) -> list[int]:
        """Token ids of a text. Raises PromptError when the vocabulary cannot write it.

        add_special: with the begin-of-text token, if the model wants one. parse_special: control tokens written in
        the text, such as "<|im_end|>", count as such. most: of a text with more tokens than that only the first are
        returned, but more than that.
        """
        ids: list[int] = []
        for part in self.encode_parts(text, add_special=add_special, parse_special=parse_special):
            ids += part
            if most is not None and len(ids) > most:
                break
        return ids

    def encode_parts(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> Iterator[list[int]]:
        """What encode() returns, part by part: memory and time of a part are bounded, and signals get their turn."""
        if not self._writes_all:
            self._check_characters(text, parse_special=parse_special)
        if len(text) <= cuts.PART or (self._may_cut is None and len(text) <= self._longest):
            yield self._encode(text, add_special, parse_special)
            return
        if add_special and self.adds_bos:
            yield [int(abi.llama.llama_vocab_bos(self._vocab))]
        before = ""  # the first piece of a text gets a space in front: the other parts are read behind a character
        for part in cuts.parts(text, self._may_cut, self._longest):
            ids = self._encode(before + part, False, parse_special)
            yield ids[len(self._encode(before, False, parse_special)) if before else 0 :]
            before = part[-1] if self._kind == "llama" else ""
        if add_special and abi.llama.llama_vocab_get_add_eos(self._vocab):
            yield [int(abi.llama.llama_vocab_eos(self._vocab))]

    def _encode(self, text: str, add_special: bool, parse_special: bool) -> list[int]:
        data = text.encode(errors="replace")
        room = len(data) + 8
        while True:
            tokens = (ctypes.c_int32 * room)()
            n = abi.llama.llama_tokenize(self._vocab, data, len(data), tokens, room, add_special, parse_special)
            if n >= 0:
                break
            room = -n
        ids = tokens[:n]
        if any(not 0 <= token < self.n_vocab for token in ids):
            raise PromptError("this model's vocabulary cannot write the prompt", "write it with other characters")
        return ids

    @cached_property
    def _may_cut(self) -> cuts.MayCut | None:
        """Where long texts are cut; None: nowhere."""
        specials = cuts.Specials(self._special_texts)
        if self._kind == "llama":
            return cuts.between_pieces(map(self._text, range(self.n_vocab)), specials)
        return cuts.between_words(self._pre_tokenizer, specials) if self._kind in _BYTE_PAIRS else None

    @property
    def _longest(self) -> int:
        """Characters of the longest text that is tokenised in one call."""
        return cuts.LONGEST_PART * _LONGER.get(self._kind, 1)

    @property
    def _pre_tokenizer(self) -> str:
        name = ctypes.create_string_buffer(_NAME_BYTES)
        n = abi.llama.llama_model_meta_val_str(self._model, b"tokenizer.ggml.pre", name, _NAME_BYTES)
        return name.value.decode(errors="replace") if n > 0 else ""

    def _check_characters(self, text: str, *, parse_special: bool) -> None:
        """A SentencePiece vocabulary without all byte tokens ends the process on a character it does not have."""
        for token in self._special_texts if parse_special else self._user_defined_texts:
            text = text.replace(token, " ")
        texts = self._texts
        for character in dict.fromkeys(text):
            mark = cuts.SPACE_MARK if character == " " else character
            if mark not in texts and not all(_has_byte(texts, byte) for byte in mark.encode(errors="replace")):
                import unicodedata  # a library of 1 MB, for an error

                name = unicodedata.name(character, "a control character")
                raise PromptError(
                    f"this model's vocabulary has no {character!r} ({name.lower()})", "leave it out of the prompt"
                )

    @cached_property
    def _texts(self) -> frozenset[str]:
        return frozenset(self._text(token) for token in range(self.n_vocab))

    @cached_property
    def _user_defined_texts(self) -> list[str]:
        return self._texts_of(_ATTR_USER_DEFINED)

    @cached_property
    def _special_texts(self) -> list[str]:
        return self._texts_of(_ATTR_USER_DEFINED | _ATTR_CONTROL | _ATTR_UNKNOWN)

    def _texts_of(self, attributes: int) -> list[str]:
        """Texts of all tokens with one of the attributes, longest first."""
        attribute = abi.llama.llama_vocab_get_attr
        found = {self._text(token) for token in range(self.n_vocab) if attribute(self._vocab, token) & attributes}
        return sorted(found - {""}, key=len, reverse=True)

    def _text(self, token: int) -> str:
        return str(abi.llama.llama_vocab_get_text(self._vocab, token).decode(errors="replace"))

    # --- tokens to text -----------------------------------------------------------------------------------------

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for; control tokens are empty unless `special`. May end inside a character."""
        n = abi.llama.llama_token_to_piece(self._vocab, token, self._buffer, len(self._buffer), 0, special)
        if n < 0:
            self._buffer = ctypes.create_string_buffer(-n)
            n = abi.llama.llama_token_to_piece(self._vocab, token, self._buffer, -n, 0, special)
        return ctypes.string_at(self._buffer, n)

    def decoder(self) -> StreamDecoder:
        """A decoder for the tokens of one answer."""
        return StreamDecoder(self)

    def decode(self, tokens: list[int]) -> str:
        """The text of tokens; incomplete characters are replaced."""
        return b"".join(self.piece(token) for token in tokens).decode(errors="replace")

    # --- facts --------------------------------------------------------------------------------------------------

    def ends(self, token: int) -> bool:
        """Whether the token ends an answer (end of text, end of turn)."""
        return bool(abi.llama.llama_vocab_is_eog(self._vocab, token))

    @property
    def adds_bos(self) -> bool:
        """Whether a text starts with a begin-of-text token."""
        return bool(abi.llama.llama_vocab_get_add_bos(self._vocab))

    @property
    def bos_text(self) -> str:
        """How the begin-of-text token is written; empty when there is none."""
        return self._token_text(abi.llama.llama_vocab_bos(self._vocab))

    @property
    def eos_text(self) -> str:
        """How the end-of-text token is written; empty when there is none."""
        return self._token_text(abi.llama.llama_vocab_eos(self._vocab))

    def _token_text(self, token: int) -> str:
        return self._text(token) if 0 <= token < self.n_vocab else ""

    @property
    def chat_template(self) -> str:
        """The model's chat template (Jinja); empty when it has none."""
        template = abi.llama.llama_model_chat_template(self._model, None)
        text = template.decode(errors="replace") if template else ""
        return text if "{" in text else ""  # for one family without a template llama.cpp gives the name of its own

    @property
    def suppressed(self) -> list[int]:
        """Tokens the model file says must never be chosen."""
        count = ctypes.c_int32()
        tokens = abi.llama.llama_vocab_get_suppress_tokens(self._vocab, ctypes.byref(count))
        return [int(tokens[i]) for i in range(count.value)] if tokens else []


class StreamDecoder:
    """Turns tokens into text one by one; a character that is not complete is held back until it is."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that became complete with this token."""
        return self._decoder.decode(self._tokenizer.piece(token))

    def finish(self) -> str:
        """What was held back: replacement characters for a cut character, or nothing."""
        return self._decoder.decode(b"", final=True)


def _has_byte(texts: frozenset[str], byte: int) -> bool:
    return f"<0x{byte:02X}>" in texts or (byte < 128 and chr(byte) in texts)
