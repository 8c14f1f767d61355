"""Processes on a terminal of their own."""

import os
import pty
import select
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
H2O = [sys.executable, "-m", "h2o_cli.main"]


class Terminal:
    """A process on a terminal of its own."""

    def __init__(self, command):
        self.seen = ""
        self._after = 0  # what was waited for ends here
        self.pid, self._fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.environ.update(TERM="xterm", NO_COLOR="1")
            os.execv(command[0], command)

    def wait_for(self, text, seconds=60):
        """Read until a text appears behind the one waited for before."""
        end = time.monotonic() + seconds
        while text not in self.seen[self._after :]:
            self._read(text, end)
        self._after = self.seen.index(text, self._after) + len(text)

    def wait_for_more(self, seconds=60):
        """Read until anything appears behind the text waited for before."""
        end = time.monotonic() + seconds
        while len(self.seen) == self._after:
            self._read("more", end)
        self._after = len(self.seen)

    def _read(self, wanted, end):
        assert time.monotonic() < end, f"{wanted!r} did not come: {self.seen[-500:]!r}"
        if not select.select([self._fd], [], [], 0.5)[0]:
            return
        try:
            self.seen += os.read(self._fd, 65536).decode(errors="replace")
        except OSError:
            raise AssertionError(f"{wanted!r} did not come before the end: {self.seen[-500:]!r}") from None

    def send(self, text):
        os.write(self._fd, text.encode())

    def exit_code(self, again=lambda: None):
        """Read to the end; the exit code. `again` repeats what shall end the process: one may come before it waits."""
        end = time.monotonic() + 60
        again()
        while True:
            assert time.monotonic() < end, f"no end came: {self.seen[-500:]!r}"
            if not select.select([self._fd], [], [], 1.0)[0]:
                again()
                continue
            try:
                data = os.read(self._fd, 65536)
            except OSError:
                break
            if not data:
                break
            self.seen += data.decode(errors="replace")
        os.close(self._fd)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
