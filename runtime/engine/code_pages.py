"""Pages of libraries: opening a model uses many that computing does not.

They are mapped from files, so nothing is lost where they are given back, and those that are used come again from the
page cache. What stays away is room for weights, until the next prompt. In a memory group that weights fill, the kernel
takes files out of that cache meanwhile, those that were read once before others.
"""

from __future__ import annotations

from contextlib import suppress
from threading import Thread

from runtime.llama.abi import LIB_DIR
from runtime.memory import drop_file_pages, file_bytes, use_file
from runtime.sizes import MB

_KERNELS = LIB_DIR / "libggml-cpu.so.0"  # the first token computes with other pages of it than the prompt
_LOOKS = (1, 4)  # short passes: what a token uses has come again with the first one, but for little
_AGAIN = 32  # short passes from one later look to the next
_SLACK_BYTES = MB // 4  # what may come later
_LEAST_BYTES = MB // 2  # less than that is not worth moving weights for
_STAY_AWAY = 0.45  # of what is given back; measured, on models of several kinds: half, in a prompt and in a token


class CodePages:
    """spared_bytes: what the process takes less while passes are short than when this was made.

    Until a short pass has shown it, and for prompts always, it is a careful guess: weights that fit are then read once,
    before the first token.
    """

    def __init__(self) -> None:
        self._counted_bytes = file_bytes()
        self._has_begun = False
        self._guess_bytes = self._told_bytes = 0  # careful, and what a pass of a prompt was told of it
        self._n_short = -1  # short passes since a prompt, or since pages were given back
        self._are_dropped = False  # pages, since the last prompt
        self.spared_bytes = 0

    def begin(self) -> None:
        """Before any pass; before the first one, while weights are on their way, pages of opening are given back.

        Not sooner: other engines may yet be opened, and count what the process takes.
        """
        if not self._has_begun:
            self._has_begun = True
            drop_file_pages()
            with suppress(RuntimeError):  # there are no more threads: then a token waits for those pages
                Thread(target=use_file, args=(_KERNELS,), daemon=True, name="kernels").start()
            self._guess_bytes = self.spared_bytes = int(_STAY_AWAY * max(0, self._counted_bytes - file_bytes()))

    def spared(self, *, long: bool) -> int:
        """What the process takes less in a pass of a prompt (long) or of a few tokens."""
        return min(self._guess_bytes, self.spared_bytes) if long else self.spared_bytes

    def begin_pass(self, *, long: bool, streams: bool) -> bool:
        """Before a pass of a prompt (long) or of a few tokens; whether spared() has changed so that it matters.

        streams: in short passes there is not room for all weights. Else nothing is given back for more.
        """
        if long:
            self._n_short, self._are_dropped = -1, False
            before, self._told_bytes = self._told_bytes, self.spared(long=True)
            return before != self._told_bytes
        if streams and not self._are_dropped:
            self._n_short, self._are_dropped = -1, True
            drop_file_pages()
        self._n_short += 1
        if self._n_short in _LOOKS or (self._n_short and self._n_short % _AGAIN == 0):
            before, spared = self.spared_bytes, max(0, self._counted_bytes - file_bytes() - _SLACK_BYTES)
            if streams and self._n_short >= _AGAIN and spared <= before - _LEAST_BYTES:
                drop_file_pages()  # not what a token uses: other code ran, as where a worker's next root comes
                self._n_short = 0
                return False
            if not before <= spared < before + _LEAST_BYTES:
                self.spared_bytes = spared
                return streams or spared < before
        return False
