"""Conversations: the model's own chat template turns messages into a prompt.

Templates come with models that were downloaded, so they are compiled and rendered in a child process that may take some
seconds and some megabytes (see limited.py). What that takes lies in the ledger's margin: a few pages that the child
changes, and what it may take for itself.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType

from runtime import limited
from runtime.errors import PromptError
from runtime.llama.tokenizer import Tokenizer
from runtime.sizes import format_size

SECONDS = 5.0
COMPILE_BYTES = 6 * 2**20  # the largest templates in use take 5
RENDER_BYTES = 2**20
_COPIES = 6  # of the messages, while they are put together
_LONGEST_TOKEN = 32  # characters, on average: a conversation with more of them does not fit
_OTHER = "use another model file, or give a prompt with -p and without --chat"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_STOP = ("<|im_end|>", "<|im_start|>")


@dataclass(frozen=True)
class Message:
    """One turn: role is "system", "user" or "assistant"."""

    role: str
    content: str


class Chat:
    """Renders conversations for one model. `stop` are texts that end an answer besides the model's own tokens."""

    def __init__(self, tokenizer: Tokenizer, note: Callable[[str], None]) -> None:
        self._template = tokenizer.chat_template
        self.stop: tuple[str, ...] = ()
        if not self._template:
            note("this model has no chat template: ChatML is used, and answers may be poor")
            self._template, self.stop = CHATML, CHATML_STOP
        self._tokenizer = tokenizer
        self._code = b""

    def move_to(self, tokenizer: Tokenizer) -> None:
        """The same model was opened anew."""
        self._tokenizer = tokenizer

    def compile(self) -> None:
        """Compile the template now, as long as there is memory for it: before the engine has it. Raises PromptError."""
        if not self._code:
            self._code = self._in_child(lambda: bytes(_template().compiled(self._template)), COMPILE_BYTES)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for a conversation, up to where the answer begins. Raises PromptError."""
        turns = [{"role": message.role, "content": message.content} for message in messages]
        code, bos, eos = self._code, self._tokenizer.bos_text, self._tokenizer.eos_text
        more_bytes = RENDER_BYTES + _COPIES * sum(sys.getsizeof(message.content) for message in messages)

        def work() -> bytes:
            text = _template().rendered(code or _template().compiled(self._template), turns, bos, eos)
            return str(text).encode(errors="replace")

        if code:
            _template().environment()  # here, so that not every child has to import it
        else:
            more_bytes += COMPILE_BYTES
        return self._in_child(work, more_bytes).decode()

    def _in_child(self, work: Callable[[], bytes], more_bytes: int) -> bytes:
        try:
            return limited.in_child(lambda: _template().environment(), work, more_bytes, SECONDS, "the chat template")
        except limited.Failed as error:
            said, next_step = _told(error, more_bytes)
            raise PromptError(f"the model's chat template {said}", next_step) from None

    def text(self, messages: Sequence[Message], most: int) -> str:
        """What render() gives, without the begin-of-text token that the tokenizer puts there.

        Raises PromptError, also where it would take more than `most` tokens by far.
        """
        if _is_long(messages, most):
            raise PromptError(f"the prompt has more tokens than the {most} that the context takes", "shorten it")
        text, bos = self.render(messages), self._tokenizer.bos_text
        return text.removeprefix(bos) if bos and self._tokenizer.adds_bos else text

    def encode(self, messages: Sequence[Message], most: int) -> list[int]:
        """Tokens of a conversation; where they are more than `most`, more than that, but any. Raises PromptError."""
        if _is_long(messages, most):
            return [0] * (most + 1)
        return self._tokenizer.encode(self.text(messages, most), parse_special=True, most=most)


def _is_long(messages: Sequence[Message], most: int) -> bool:
    return sum(len(message.content) for message in messages) > _LONGEST_TOKEN * most


def _template() -> ModuleType:
    return import_module("runtime.llama.chat_template")  # a child's, until a conversation has compiled its template


def _told(error: limited.Failed, more_bytes: int) -> tuple[str, str]:
    """What a template did, and what to do about it."""
    reason = " ".join(str(error).split())
    told = {
        "": "ended the process that read it",
        "MemoryError": f"takes more than {format_size(more_bytes)} of memory",
        "TimeoutError": f"did not end within {SECONDS:.0f} seconds",
        "RecursionError": "is nested too deeply",
        "BrokenTemplateError": f"is broken ({reason})",
    }
    if error.name in told:
        return told[error.name], _OTHER
    return f"refuses this conversation ({reason or error.name})", "start a new one, or leave out --chat"
