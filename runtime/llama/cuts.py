"""Where a text may be cut so that its parts, tokenised one by one, give the tokens of the whole.

llama.cpp tokenises a text in one call that takes many times the text's bytes and cannot be interrupted. So a long text
goes to it in parts. Every kind of vocabulary has its own places where that changes nothing:

- SentencePiece ("llama") merges neighbours wherever they form a token. Between two characters that stand side by side
  in no token nothing is ever merged, so nothing on the left of them can change what becomes of the right.
- Byte pairs ("gpt2", "gemma4") are merged inside words. Words are found from left to right and none of llama.cpp's
  patterns looks back, so after a place where a word ends whatever comes before it, the rest is a text of its own. A
  letter ends a word before a line break; in most patterns also before a space, and in nearly all before punctuation.
- All others are not cut.

Special tokens are looked for first. No cut is made inside one, or behind a space or one's last character: some of them
take the white space around them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator

from runtime.errors import PromptError

SPACE_MARK = "\u2581"  # how SentencePiece vocabularies write a space
PART = 8 * 1024  # characters of a part
LONGEST_PART = 16 * 1024  # and where no cut is found sooner

_SLOTS = 2**20  # of the table of pairs; pairs that share one are taken for seen
_NO_CUTS = ("superbpe",)
_LINES_ONLY = ("gemma4", "granite-embed-multi-311m", "sarvam-moe", "exaone-moe")
_SPACES_ONLY = ("bloom", "gpt3-finnish", "poro-chat", "viking", "chameleon")
_PUNCTUATION = frozenset('!"#$%&()*+,-./:;<=>?@[\\]^_`{|}~\u3001\u3002\uff0c\uff01\uff1f')  # "'" may begin a word's end
_LETTERS = (
    ("\u0410", "\u044f"),
    ("\u3041", "\u3096"),
    ("\u30a1", "\u30fa"),
    ("\u4e00", "\u9fa5"),
    ("\uac00", "\ud7a3"),
)

MayCut = Callable[[str, str], bool]
"""Whether a text may be cut between two neighbouring characters."""


class Specials:
    """The texts that are looked for before anything else."""

    def __init__(self, texts: Collection[str]) -> None:
        self._pairs = {text[i : i + 2] for text in texts for i in range(len(text) - 1)}
        self._last = {text[-1] for text in texts if text}

    def may_cut(self, before: str, after: str) -> bool:
        """Whether no special token lies across the cut or takes white space from its other side."""
        return not before.isspace() and before not in self._last and before + after not in self._pairs


def between_pieces(texts: Iterable[str], specials: Specials) -> MayCut:
    """The rule for a SentencePiece vocabulary with these tokens."""
    seen = bytearray(_SLOTS)
    for text in texts:
        for i in range(len(text) - 1):
            seen[hash(text[i : i + 2]) % _SLOTS] = 1

    def may_cut(before: str, after: str) -> bool:
        mark = SPACE_MARK if after == " " else after
        return specials.may_cut(before, after) and not seen[hash(before + mark) % _SLOTS]

    return may_cut


def between_words(pre_tokenizer: str, specials: Specials) -> MayCut | None:
    """The rule for a byte-pair vocabulary, by the name of its pattern (tokenizer.ggml.pre); None: it has none."""
    if pre_tokenizer in _NO_CUTS:
        return None
    ends = {"\n"} if pre_tokenizer in _LINES_ONLY else {"\n", " "}
    if pre_tokenizer not in (*_LINES_ONLY, *_SPACES_ONLY):
        ends |= _PUNCTUATION

    def may_cut(before: str, after: str) -> bool:
        return after in ends and _is_letter(before) and specials.may_cut(before, after)

    return may_cut


def _is_letter(character: str) -> bool:
    """Whether every version of Unicode calls this character a letter."""
    if character.isascii():
        return character.isalpha()
    return any(first <= character <= last for first, last in _LETTERS)


def parts(text: str, may_cut: MayCut | None, longest: int) -> Iterator[str]:
    """The parts of a text, of at most PART characters where that is possible. Raises PromptError where one would be
    longer than `longest`.
    """
    start = 0
    while start < len(text):
        window = text[start : start + longest + 1].encode(errors="replace").decode()
        end = _cut(window, may_cut) if len(window) > PART else len(window)
        if end > longest:
            raise PromptError(
                f"the prompt has {longest} characters without a place where it can be cut",
                "put spaces or line breaks into it, or shorten it",
            )
        yield window[:end]
        start += end


def _cut(window: str, may_cut: MayCut | None) -> int:
    """The last cut inside PART characters, else the first one behind them, else all of the window."""
    ends = (*range(PART, 0, -1), *range(PART + 1, len(window))) if may_cut else ()
    return next((end for end in ends if may_cut and may_cut(window[end - 1], window[end])), len(window))
