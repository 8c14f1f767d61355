"""Whether other devices are to compute the next answer of a conversation."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from h2o_cli.session.team import Flags
from runtime.errors import H2OError

if TYPE_CHECKING:
    from h2o_cli.session.members import Team


class DeviceChanges:
    """Watches the file of --devices (devices that were added, removed or put into another order) and how long workers
    take: layers move off one that has become slow.

    What cannot be used is said once, and the devices stay as they are. Devices that were tried are not tried again
    before the file is written again.
    """

    def __init__(self, flags: Flags, note: Callable[[str], None]) -> None:
        self._flags, self._note = flags, note
        self._tried = (0, "")
        self._told: set[str] = set()

    def look(self, in_force: Flags, team: Team | None) -> Flags | None:
        """Flags that name other devices than those in force, or say of some how slow they are; None: all stays."""
        return self._in_file(in_force) or (self._slower(in_force, team) if team else None)

    def _in_file(self, in_force: Flags) -> Flags | None:
        path = self._flags.devices
        if path is None:
            return None
        try:
            found = os.stat(path).st_mtime_ns, self._flags.addresses(once_more=True)
        except (H2OError, OSError) as error:
            self.keep(error)
            return None
        if found[1] == in_force.workers or found == self._tried:
            return None
        self._tried = found
        self._note(f"the devices change: {found[1]}")
        return replace(self._flags.naming(found[1]), slower=in_force.slower)

    def _slower(self, in_force: Flags, team: Team) -> Flags | None:
        found = None if in_force.cluster else team.slower(in_force.slower)
        if found is None:
            return None
        changed = [(address, f) for address, f in found.items() if f != in_force.slower.get(address, 1.0)]
        said = ", ".join(f"{address} takes {factor:.1f} times as long as measured" for address, factor in changed)
        self._note(f"{said}: the layers are shared out anew")
        return replace(in_force, slower=found)

    def keep(self, error: Exception) -> None:
        """The devices stay as they are, because of an error; said once."""
        text = f"the devices stay as they are: {error}"
        if text not in self._told:
            self._told.add(text)
            self._note(text)
