"""Settings of a KV filter in the JSON fields of OmniKV's own configuration files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import msgspec

from h2o_cli.session.models import read_text
from runtime.errors import UsageError
from runtime.kv.options import READERS, WINDOW, KvFilter, parse_layers

_MOST_BYTES = 2**20
_STRATEGIES = {"multi": "multi", "eff": "multi", "without_pack": "without_pack", "lazy": "lazy", "default": "multi"}
_SELECTORS = {"last": "last", "softmax_before_last": "softmax", "uniform": "uniform", "exp": "exp"}

Count = Annotated[int, msgspec.Meta(ge=1)]


class _Fields(msgspec.Struct, forbid_unknown_fields=True):
    """The file. Fields that are left out keep this program's defaults."""

    cpu_num_threads: Count | None = None
    use_chat_template: bool = False
    cot: bool = False
    max_context_len: Count | None = None
    model_name: str | None = None
    load_in_8bit: bool = False
    load_in_4bit: bool = False
    model_cls: str = "multi"
    cache_cls: str = "multi"
    use_flash_attn: bool = True
    do_select_layers: str | None = None
    num_wait_load_layers: Annotated[int, msgspec.Meta(ge=0)] | None = None
    real_offload: bool = False
    dense_more: bool = True
    num_of_selected_tokens: int | float | None = None
    selector_cls: str = "last"
    window_size: Count = WINDOW


@dataclass(frozen=True)
class KvConfig:
    """What a file says. model: a name that may be a GGUF's; max_context 0: prompts are not cut."""

    filter: KvFilter
    wait_given: bool
    chat: bool
    model: str | None
    max_context: int


def read_config(path: str) -> KvConfig:
    """The settings in a file. Raises UsageError for unknown fields and for what this program cannot do."""
    try:
        fields = msgspec.json.decode(read_text(path, "the configuration", _MOST_BYTES), type=_Fields)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be used: {error}", "docs/kv-filter.md lists the fields") from None
    _refuse(path, fields)
    values: dict[str, Any] = {
        "select": _SELECTORS[fields.selector_cls],
        "strategy": _STRATEGIES[fields.cache_cls],
        "method": "full" if fields.cache_cls == "default" else "omnikv",
        "store": "disk" if fields.real_offload else "ram",
        "window": fields.window_size,
        "readers": fields.cpu_num_threads or READERS,
    }
    if fields.do_select_layers is not None:
        values["layers"] = parse_layers(fields.do_select_layers)
    if fields.num_wait_load_layers is not None:
        values["wait"] = fields.num_wait_load_layers
    if fields.num_of_selected_tokens is not None:
        values["keep"] = fields.num_of_selected_tokens
    return KvConfig(
        KvFilter(**values),
        wait_given=fields.num_wait_load_layers is not None,
        chat=fields.use_chat_template,
        model=_gguf(fields.model_name),
        max_context=fields.max_context_len or 0,
    )


def _refuse(path: str, fields: _Fields) -> None:
    """Raise UsageError for values that would be ignored or wrong here."""
    for name, value, known in (
        ("cache_cls", fields.cache_cls, _STRATEGIES),
        ("selector_cls", fields.selector_cls, _SELECTORS),
        ("model_cls", fields.model_cls, {"multi": ""}),
    ):
        if value not in known:
            raise UsageError(f"{path}: {name} {value!r} is not known", f"choose one of {', '.join(known)}")
    for name, wrong, why in (
        ("load_in_8bit", fields.load_in_8bit, "the precision of weights is the GGUF file's"),
        ("load_in_4bit", fields.load_in_4bit, "the precision of weights is the GGUF file's"),
        ("use_flash_attn", not fields.use_flash_attn, "filtering needs flash attention"),
        ("dense_more", not fields.dense_more, "the layers before the first filter layer are always dense"),
        ("cot", fields.cot, "put the instruction to think step by step into the prompt"),
    ):
        if wrong:
            raise UsageError(f"{path}: {name} {str(getattr(fields, name)).lower()} is not possible", why)


def _gguf(name: str | None) -> str | None:
    """A model name that is a GGUF file; names of other formats (the source system's) say nothing here."""
    return name if name and name.lower().endswith(".gguf") else None
