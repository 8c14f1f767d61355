"""The flags that filter keys and values, as `h2o run` and `h2o plan` have them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from runtime.kv.options import DEFAULT_KEEP, LEAST_KEPT, METHODS, SELECTORS, STORES, STRATEGIES

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
    str | None, _option("--kv-layers", "I,J,..|auto", "Layers that select for those after them. [default: auto]")
]
Wait = Annotated[
    int | None, _option("--kv-wait", "N", "Layers after each of them that see everything. [default: 1; 0 with auto]")
]
Keep = Annotated[
    str | None,
    _option(
        "--kv-keep", "F|N", f"Selected positions: a share (at least {LEAST_KEPT}) or a count. [default: {DEFAULT_KEEP}]"
    ),
]
Select = Annotated[
    str | None,
    _option("--kv-select", "|".join(SELECTORS), "How positions are scored. [default: as --kv-layers auto, last]"),
]
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
