"""Whether other devices are to compute the next answer of a conversation."""

from __future__ import annotations

import os
from collections.abc import Callable

from h2o_cli.session.team import Flags
from runtime.errors import H2OError


class DeviceChanges:
    """Watches the file of --devices: devices that were added, removed or put into another order.

    What cannot be used is said once, and the devices stay as they are. Devices that were tried are not tried again
    before the file is written again.
    """

    def __init__(self, flags: Flags, note: Callable[[str], None]) -> None:
        self._flags, self._note = flags, note
        self._tried = (0, "")
        self._told: set[str] = set()

    def look(self, in_force: Flags) -> Flags | None:
        """The devices of the file as flags that name them, where they are not those in force."""
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
        return self._flags.naming(found[1])

    def keep(self, error: Exception) -> None:
        """The devices stay as they are, because of an error; said once."""
        text = f"the devices stay as they are: {error}"
        if text not in self._told:
            self._told.add(text)
            self._note(text)
