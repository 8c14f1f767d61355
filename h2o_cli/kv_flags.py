"""The flags of `h2o run` that filter keys and values: from words, or the source system's file, to a KvFilter."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from runtime.errors import UsageError
from runtime.kv.options import (
    DEFAULT_KEEP,
    METHODS,
    SELECTORS,
    STORES,
    STRATEGIES,
    KvFilter,
    parse_keep,
    parse_layers,
    parse_strategy,
)

_PANEL = "Filtering keys and values"


def _option(flag: str, metavar: str, text: str) -> Any:
    return typer.Option(flag, metavar=metavar, help=text, rich_help_panel=_PANEL)


Switch = Annotated[
    bool,
    typer.Option(
        "--kv-filter", help="Answer from a selection of the prompt's positions in most layers.", rich_help_panel=_PANEL
    ),
]
Layers = Annotated[
    str | None, _option("--kv-layers", "I,J,..|auto", "Layers that select for those behind them. [default: auto]")
]
Wait = Annotated[int | None, _option("--kv-wait", "N", "Layers behind each of them that see everything. [default: 1]")]
Keep = Annotated[
    str | None,
    _option("--kv-keep", "F|N", f"Selected positions: a share of the prompt or a count. [default: {DEFAULT_KEEP}]"),
]
Select = Annotated[str | None, _option("--kv-select", "|".join(SELECTORS), "How positions are scored. [default: last]")]
Store = Annotated[
    str | None, _option("--kv-store", "|".join(STORES), "Where positions that are not selected are. [default: ram]")
]
Sinks = Annotated[int | None, _option("--kv-sinks", "N", "First positions that are always selected. [default: 0]")]
Recent = Annotated[
    int | None, _option("--kv-recent", "N", "Last positions of the prompt that are always selected. [default: 0]")
]
Block = Annotated[int | None, _option("--kv-block", "N", "Select blocks of this many positions. [default: 1]")]
Strategy = Annotated[
    str | None, _option("--kv-strategy", "|".join(STRATEGIES), "How selected positions are fetched. [default: multi]")
]
Method = Annotated[
    str | None,
    _option("--kv-method", "|".join(METHODS), "Who selects; all but omnikv are baselines. [default: omnikv]"),
]
Config = Annotated[
    str | None, _option("--kv-config", "FILE", "Settings from an OmniKV JSON file; flags come before it.")
]


@dataclass(frozen=True)
class KvFlags:
    """What the flags say; None: not given."""

    on: bool = False
    layers: str | None = None
    wait: int | None = None
    keep: str | None = None
    select: str | None = None
    store: str | None = None
    sinks: int | None = None
    recent: int | None = None
    block: int | None = None
    strategy: str | None = None
    method: str | None = None


def build_filter(flags: KvFlags, base: KvFilter | None) -> KvFilter | None:
    """The filter the flags ask for, on top of the one in a configuration file. Raises UsageError."""
    values: dict[str, Any] = {
        name: value
        for name in ("wait", "select", "store", "sinks", "recent", "block", "method")
        if (value := getattr(flags, name)) is not None
    }
    if flags.layers is not None:
        values["layers"] = parse_layers(flags.layers)
    if flags.keep is not None:
        values["keep"] = parse_keep(flags.keep)
    if flags.strategy is not None:
        values["strategy"], values["lazy_threshold"] = parse_strategy(flags.strategy)
    if not flags.on and base is None:
        if values:
            raise UsageError(f"--kv-{next(iter(values))} does nothing without --kv-filter", "add --kv-filter")
        return None
    before = {name: getattr(base, name) for name in KvFilter.__dataclass_fields__} if base else {}
    return KvFilter(**(before | values))


def store_folder() -> str:
    """Where files of a disk store are made: TMPDIR where it is set, else the user's cache folder."""
    if os.environ.get("TMPDIR"):
        return os.environ["TMPDIR"]
    import platformdirs

    return str(Path(platformdirs.user_cache_dir("h2o-llm")))
