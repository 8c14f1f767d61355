"""`python tests/faulty.py slow=0.5,after=9,fault=error run ...`: the command on a disk that is slow or fails.

slow: seconds every read of weights takes. after: how many reads are served before the fault. fault: `error` (the disk
fails), `short` (the file has become shorter) or `hang` (the read does not come back).
"""

# ruff: noqa: E402 - a signal can come before the imports are done
from __future__ import annotations

from _signal import SIG_DFL, SIGINT, signal

signal(SIGINT, SIG_DFL)

import errno
import itertools
import os
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent)]

HANG_S = 30


def install(slow=0.0, after=10**9, fault="error"):
    """Make reads of weights misbehave from now on."""
    read, count = os.preadv, itertools.count()

    def faulty(fd, parts, offset):
        time.sleep(float(slow))
        if next(count) < int(after):
            return read(fd, parts, offset)
        if fault == "hang":
            time.sleep(HANG_S)
        if fault == "short":
            return 0
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    os.preadv = faulty


if __name__ == "__main__":
    from h2o_cli.start import main

    install(**dict(part.split("=") for part in sys.argv[1].split(",") if part))
    sys.argv = ["h2o", *sys.argv[2:]]
    main()
