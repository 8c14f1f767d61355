"""A model's chat template: Jinja, as llama-cpp-python and Transformers set it up. Runs in a child (see limited.py)."""

from __future__ import annotations

import json
import marshal
import sys
from datetime import datetime
from functools import cache
from importlib.util import find_spec
from typing import Any

_HASHES = ("_md5", "_sha1", "_sha3", "_blake2")


class BrokenTemplateError(Exception):
    """The template cannot be compiled."""


@cache
def environment() -> Any:
    """The sandbox that templates run in; imports Jinja."""
    is_spared = "_hashlib" not in sys.modules and all(map(find_spec, _HASHES))
    if is_spared:
        sys.modules["_hashlib"] = None  # type: ignore[assignment] # OpenSSL: 4 MB, which Python's own hashes do without
    from jinja2 import BaseLoader, ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    if is_spared:
        del sys.modules["_hashlib"]

    class GenerationTags(ext.Extension):
        """{% generation %} marks what a model learns from; it shows nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Any) -> Any:
            """What is between the tags."""
            parser.stream.skip(1)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    made = ImmutableSandboxedEnvironment(
        loader=BaseLoader(), trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTags, ext.loopcontrols]
    )
    made.filters["tojson"] = _to_json
    return made


def compiled(template: str) -> bytes:
    """The template's code. Raises BrokenTemplateError."""
    from jinja2 import TemplateError

    try:
        return marshal.dumps(environment().compile(template))
    except (TemplateError, SyntaxError, ValueError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise BrokenTemplateError(str(error)) from None


def rendered(code: bytes, messages: list[dict[str, str]], bos_token: str, eos_token: str) -> str:
    """The prompt for a conversation. Raises whatever the template does."""
    made = environment()
    template = made.template_class.from_code(made, marshal.loads(code), made.make_globals(None))  # our child's own
    return str(
        template.render(
            messages=messages,
            eos_token=eos_token,
            bos_token=bos_token,
            raise_exception=_raise,
            add_generation_prompt=True,
            functions=None,
            function_call=None,
            tools=None,
            tool_choice=None,
            strftime_now=lambda text: datetime.now().strftime(text),
        )
    )


def _raise(message: str) -> None:
    raise ValueError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
