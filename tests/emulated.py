"""Whether a device can be emulated here, and what is left of one."""

from __future__ import annotations

import os
from pathlib import Path

from h2o_cli.bench.box import ROOT, Device, check_rights
from runtime.errors import H2OError
from runtime.sizes import MB


def can_emulate():
    """Whether this process may make control groups for the disk that holds the tests."""
    try:
        check_rights(Device(64 * MB, 20 * MB, Path(__file__).parent))
    except (H2OError, OSError):
        return False
    return True


def groups_left():
    """Control groups that this process has not removed."""
    return [path for path in ROOT.rglob(f"h2o-device-{os.getpid()}-*") if path.is_dir()]
