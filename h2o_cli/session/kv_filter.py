"""How keys and values are filtered: from flags as words, or the source system's file, to a KvFilter."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h2o_cli.session.kv_layers import find_choice
from runtime.errors import UsageError
from runtime.kv.options import GUESSED_WAIT, KvFilter, parse_keep, parse_layers, parse_strategy

if TYPE_CHECKING:
    from h2o_cli.session.kv_config import KvConfig


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
    config: str | None = None

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> KvFlags:
        """From the parameters of a command: kv_filter, kv_layers, kv_wait, ..."""
        names = [field.name for field in fields(cls) if field.name != "on"]
        return cls(on=given["kv_filter"], **{name: given[f"kv_{name}"] for name in names})

    def as_arguments(self) -> list[str]:
        """The same flags for another command line."""
        names = [field.name for field in fields(self) if field.name != "on" and getattr(self, field.name) is not None]
        given = [text for name in names for text in (f"--kv-{name}", str(getattr(self, name)))]
        return ["--kv-filter", *given] if self.on else given


@dataclass(frozen=True)
class KvChoice:
    """A filter as the flags and the configuration file want it; layers "auto" are found when the model is known.

    given: fields that were asked for, which an analysis does not change.
    """

    filter: KvFilter
    given: frozenset[str] = frozenset()

    def for_model(self, model_hash: int) -> KvFilter:
        """The filter, with the layers, wait and selector that an analysis of this model found, where there was one.

        Where there was none, the layers are guessed once the model is open.
        """
        if self.filter.layers:
            return replace(self.filter, folder=store_folder())
        found = find_choice(model_hash)
        chosen: dict[str, Any] = {"wait": GUESSED_WAIT}
        if found:
            chosen = {"layers": found.layers, "wait": found.wait, "select": found.select, "analyzed": True}
        kept = {name: value for name, value in chosen.items() if name not in self.given}
        return replace(self.filter, folder=store_folder(), **kept)


def choose_filter(flags: KvFlags, config: KvConfig | None) -> KvChoice | None:
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
    if not flags.on and config is None:
        if values:
            raise UsageError(f"--kv-{next(iter(values))} does nothing without --kv-filter", "add --kv-filter")
        return None
    base = config.filter if config else KvFilter()
    given = {name for name in ("wait", "select") if name in values}
    if config:
        given |= {"select", "wait"} if config.wait_given else {"select"}
    return KvChoice(replace(base, **values), frozenset(given))


def store_folder() -> str:
    """Where files of a disk store are made: TMPDIR where it is set, else the user's cache folder."""
    if os.environ.get("TMPDIR"):
        return os.environ["TMPDIR"]
    import platformdirs

    return str(Path(platformdirs.user_cache_dir("h2o-llm")))


def cut_middle(tokens: Sequence[int], most: int) -> list[int]:
    """The first and the last half of `most` tokens of a longer prompt (most 0: all of it)."""
    if not most or len(tokens) <= most:
        return list(tokens)
    head = most // 2
    return [*tokens[:head], *tokens[len(tokens) - (most - head) :]]


def read_kv_config(path: str | None) -> KvConfig | None:
    """The file that --kv-config names. Raises UsageError."""
    if path is None:
        return None
    from h2o_cli.session.kv_config import read_config

    return read_config(path)
