"""Conversations: the model's own chat template turns messages into a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

from runtime.errors import PromptError
from runtime.tokenizer import Tokenizer

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
        template = tokenizer.chat_template
        self.stop: tuple[str, ...] = ()
        if not template:
            note("this model has no chat template: ChatML is used, and answers may be poor")
            template, self.stop = CHATML, CHATML_STOP
        self._tokenizer = tokenizer
        try:
            self._format = Jinja2ChatFormatter(template, eos_token=tokenizer.eos_text, bos_token=tokenizer.bos_text)
        except TemplateError as error:
            raise PromptError(f"the model's chat template is broken ({error})", "run without --chat") from None

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt for a conversation, up to where the answer begins. Raises PromptError."""
        turns: list[Any] = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return str(self._format(messages=turns).prompt)
        except (TemplateError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
            raise PromptError(
                f"the model's chat template refuses this conversation ({error})", "start a new one, or leave out --chat"
            ) from None

    def text(self, messages: Sequence[Message]) -> str:
        """What render() gives, without the begin-of-text token that the tokenizer puts there."""
        text, bos = self.render(messages), self._tokenizer.bos_text
        return text.removeprefix(bos) if bos and self._tokenizer.adds_bos else text

    def encode(self, messages: Sequence[Message], most: int | None = None) -> list[int]:
        """Tokens of a conversation; `most` as in Tokenizer.encode. Raises PromptError."""
        return self._tokenizer.encode(self.text(messages), parse_special=True, most=most)
