"""What people and programs read: notes and progress on standard error, results on standard output.

Plain writes only: a run keeps to its memory budget, so no drawing library is loaded beside the model.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

from runtime.errors import H2OError

PROGRESS_AFTER_S = 2.0
_REDRAW_S = 0.5
_LOG_S = 10.0  # between two lines where progress cannot be redrawn
_COLUMNS = 80  # where nobody knows how wide the terminal is
_START_OF_LINE = "\r\x1b[K"
_CODES = {"bold": "1", "dim": "2", "red": "31", "green": "32"}


def is_terminal(stream: TextIO) -> bool:
    """Whether somebody watches the stream."""
    try:
        return stream.isatty()
    except ValueError:
        return False


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """The text in a style, where the stream is a terminal that shows it and NO_COLOR is not set."""
    stream = stream or sys.stderr
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not is_terminal(stream):
        return text
    return f"\x1b[{_CODES[style]}m{text}\x1b[0m"


def note(text: str) -> None:
    """One line for the user on standard error."""
    tell(styled(f"h2o: {text}", "dim"))


def print_error(message: str, next_step: str = "") -> None:
    """A failure, and what to do about it."""
    lines = [f"{styled('h2o:', 'red')} {_one_line(message)}"]
    if next_step:
        lines.append(f"  next: {_one_line(next_step)}")
    tell("\n".join(lines))


def warn(message: str, next_step: str) -> None:
    """Something that may be wrong with the answer that follows, and what to do about it."""
    print_error(f"warning: {message}", next_step)


def tell(text: str, end: str = "\n") -> None:
    """Text on standard error as it is, in no line of the answer. The work goes on where nobody can read it."""
    try:
        sys.stderr.write(_end_of_line() + text + end)
        sys.stderr.flush()
    except OSError:
        _silence(sys.stderr)


class _Answer:
    """What was written to standard output last: whether its line goes on."""

    is_inside_a_line = False


def _end_of_line() -> str:
    """What ends the answer's line, where it goes on and standard error is the same terminal."""
    if not _Answer.is_inside_a_line or not _is_one_terminal():
        return ""
    _Answer.is_inside_a_line = False
    return "\n"


def _is_one_terminal() -> bool:
    """Whether standard output and standard error are the same terminal."""
    try:
        return is_terminal(sys.stdout) and os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):
        return False


def _one_line(text: str) -> str:
    return " ".join(text.split())


class ReaderGone(Exception):
    """Nobody reads standard output any more: there is nothing left to do."""


def emit(text: str) -> None:
    """A part of the result, at once. Raises ReaderGone when nobody reads it, H2OError when it cannot be written."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        silence_stdout()
        raise H2OError(f"cannot write the answer: {error.strerror}", "send standard output elsewhere") from None
    if text:
        _Answer.is_inside_a_line = not text.endswith("\n")


def silence_stdout() -> None:
    """Nothing more can be written to standard output, not even by the interpreter when it ends."""
    _silence(sys.stdout)


def _silence(stream: TextIO) -> None:
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)


def print_json(value: Any) -> None:
    """One JSON object on one line of standard output."""
    import json  # here: no answer waits for it

    emit(json.dumps(value, ensure_ascii=False) + "\n")


def table(rows: Sequence[Sequence[str]], *, right: Sequence[int] = ()) -> str:
    """Rows in columns, two spaces apart; the columns in `right` are right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


class Progress:
    """A line with share done and time left on standard error, for work that takes more than two seconds.

    `share` is asked from a thread of its own and answers 0 to 1. Quiet with enabled=False. ahead: as soon as a share
    is done, a line that stays says how long all of it takes.
    """

    def __init__(self, what: str, share: Callable[[], float], *, enabled: bool = True, ahead: bool = False) -> None:
        self._what = what
        self._share = share
        self._ahead = ahead
        self._done = threading.Event()
        self._drawn = False
        self._thread = threading.Thread(target=self._watch, daemon=True, name="progress") if enabled else None

    def __enter__(self) -> Progress:
        self._start_s = time.monotonic()
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread:
            self._thread.join()
        if self._drawn and is_terminal(sys.stderr):
            tell(_START_OF_LINE, end="")

    def _watch(self) -> None:
        if self._done.wait(PROGRESS_AFTER_S):
            return
        redraw = is_terminal(sys.stderr)
        while True:
            self._draw(redraw)
            if self._done.wait(_REDRAW_S if redraw else _LOG_S):
                return

    def _draw(self, redraw: bool) -> None:
        passed_s = time.monotonic() - self._start_s
        share = min(max(self._share(), 0.0), 1.0)
        if self._ahead and share > 0:
            self._ahead = False
            tell(f"{_START_OF_LINE if redraw else ''}h2o: {self._what} takes about {duration(passed_s / share)}")
        left = f", about {duration(passed_s * (1 - share) / share)} left" if share > 0.02 else ""
        line = f"h2o: {self._what}: {share:.0%} after {duration(passed_s)}{left}"
        tell(f"{_START_OF_LINE}{line[: _columns() - 1]}" if redraw else f"{line}\n", end="")
        self._drawn = True


def _columns() -> int:
    """The width of the terminal that standard error is."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or _COLUMNS
    except (OSError, ValueError):
        return _COLUMNS


def duration(seconds: float) -> str:
    """Seconds as people say them: "9 s", "3 min", "2.1 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def versions() -> dict[str, str]:
    """Versions of this program and of what its answers depend on."""
    import platform
    from importlib import metadata

    found = {"python": platform.python_version()}
    for key, package in (("h2o", "h2o-llm"), ("llama_cpp_python", "llama-cpp-python")):
        try:
            found[key] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[key] = "not installed"
    return found
