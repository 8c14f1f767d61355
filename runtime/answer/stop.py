"""Where the text of an answer ends: at the first stop text."""

from __future__ import annotations

from collections.abc import Sequence

from runtime.llama.tokenizer import Tokenizer


class LateText:
    """Text of an answer that nobody looks at before its end: the same as of a StopFilter without stop texts."""

    stopped = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []

    def feed(self, token: int) -> str:
        """Nothing yet."""
        self._tokens.append(token)
        return ""

    def finish(self) -> str:
        """All of it."""
        return self._tokenizer.decode(self._tokens)


class StopFilter:
    """Text of an answer up to the first stop text; a possible beginning of one is held back."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.decoder()
        self._stop = tuple(text for text in stop if text)
        self._held = ""
        self.stopped = False

    def feed(self, token: int) -> str:
        """The text that is certain to belong to the answer once this token is known."""
        return self._release(self._decoder.feed(token))

    def finish(self) -> str:
        """The rest, when no token follows."""
        if self.stopped:
            return ""
        text = self._release(self._decoder.finish()) + self._held
        self._held = ""
        return text

    def _release(self, new: str) -> str:
        if not self._stop:
            return new
        text = self._held + new
        found = [place for place in (text.find(stop) for stop in self._stop) if place >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def _overlap(text: str, stop: str) -> int:
    """The longest end of text that is a beginning of stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
