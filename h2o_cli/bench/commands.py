"""Commands that benchmarks start: their environment, how they are shown, and what they said when they failed."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]


def environment(**more: str) -> dict[str, str]:
    """This process's environment, with this program's packages first in PYTHONPATH, and more variables."""
    paths = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": paths, **more}


def python(module: str, *words: object) -> list[str]:
    """The command that runs a module of this program with this Python."""
    return [sys.executable, "-m", module, *map(str, words)]


def h2o(*words: object) -> list[str]:
    """A command of this program."""
    return python("h2o_cli.main", *words)


def shown_command(started: Sequence[str]) -> str:
    """A command for people, without the paths of this machine."""
    words = [Path(word).name if os.sep in word and Path(word).is_absolute() else word for word in started]
    if list(started[:3]) == h2o():
        words[:3] = ["h2o"]
    return shlex.join(words)


def this_command() -> str:
    """The command of the user, for people."""
    return shown_command(h2o(*sys.argv[1:]))


def last_words(stderr: str, rc: int) -> str:
    """Why a command failed: the last line it wrote on standard error, or its exit code."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip() and not line.startswith("  next:")]
    return (lines or [f"exit code {rc}"])[-1].removeprefix("h2o: ")
