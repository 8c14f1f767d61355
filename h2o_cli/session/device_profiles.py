"""What was measured of devices, kept for an hour in the user's cache folder: the links to workers, this machine itself.

A worker measures its own machine whenever it starts; what it offers comes with its greeting and is not kept here.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec

from h2o_cli.session.models import replace_file

KEPT_S = 3600.0
_MOST_KEPT = 200


class Profile(msgspec.Struct, frozen=True):
    """Numbers, and the second since the epoch in which they were measured."""

    measured_s: float
    numbers: tuple[float, ...]


def kept(
    key: str,
    measure: Callable[[], tuple[float, ...]],
    *,
    refresh: bool = False,
    holds: Callable[[tuple[float, ...]], bool] = lambda _: True,
) -> tuple[float, ...]:
    """What was measured for a key in the last hour; measured now where nothing was, with refresh, or where it does not
    hold any more."""
    known, now_s = _read(), time.time()
    found = known.get(key)
    if found and not refresh and 0 <= now_s - found.measured_s < KEPT_S and holds(found.numbers):
        return found.numbers
    numbers = measure()
    fresh = sorted(known.items(), key=lambda item: item[1].measured_s)
    others = {old: p for old, p in fresh[-_MOST_KEPT:] if old != key and now_s - p.measured_s < KEPT_S}
    _write({**others, key: Profile(now_s, numbers)})
    return numbers


def _path() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("h2o-llm")) / "device-profiles.json"


def _read() -> dict[str, Profile]:
    """All that was kept. Anything but that is as good as nothing."""
    try:
        return msgspec.json.decode(_path().read_bytes(), type=dict[str, Profile])
    except (OSError, msgspec.MsgspecError, UnicodeError, RecursionError):
        return {}


def _write(profiles: dict[str, Profile]) -> None:
    """Keep them; silent where the folder cannot be written."""
    with suppress(OSError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, msgspec.json.encode(profiles))
