"""devices.json: which machines there are, with the fields of the source system, and in which order they are used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import msgspec

from h2o_cli.session.models import read_text
from runtime.errors import UsageError

LOCAL = "local"
_MOST_BYTES = 2**20
_Amount = Annotated[float, msgspec.Meta(ge=0)]


class Entry(msgspec.Struct, frozen=True):
    """A machine. Memory in MB, speed in tokens per second, load from 0 to 1: what is measured counts more."""

    address: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)] = 0
    total_memory: _Amount = 0.0
    memfree: _Amount = 0.0
    speed: _Amount = 0.0
    load: Annotated[float, msgspec.Meta(ge=0, le=1)] = 0.0

    @property
    def place(self) -> str:
        """host:port, or `local`."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return LOCAL if self.address == LOCAL else f"{host}:{self.port}"


class _File(msgspec.Struct, frozen=True):
    devices: Annotated[list[Entry], msgspec.Meta(min_length=1, max_length=1000)]


def read_devices(path: Path) -> list[Entry]:
    """The machines in a file, as they stand there. Raises UsageError, and H2OError where it cannot be read."""
    try:
        return msgspec.json.decode(read_text(path, "the devices in", _MOST_BYTES), type=_File).devices
    except msgspec.MsgspecError as error:
        raise UsageError(
            f"{path} cannot be used: {error}", 'it has to look like {"devices": [{"address": "alpha", "port": 9999}]}'
        ) from None


def in_order(entries: Sequence[Entry], priority: Sequence[str], *, by_memory: bool) -> list[Entry]:
    """Those of highest priority first: by total memory, or as `priority` lists them (others behind), then by memory."""
    unknown = [name for name in priority if name not in {e.address for e in entries} | {e.place for e in entries}]
    if unknown:
        raise UsageError(f"--priority {unknown[0]} is no device", "name addresses of the file")

    def rank(entry: Entry) -> tuple[int, float]:
        listed = [i for i, name in enumerate(priority) if name in (entry.address, entry.place)]
        return (0 if by_memory else min(listed, default=len(priority))), -entry.total_memory

    return sorted(entries, key=rank)
