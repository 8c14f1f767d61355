"""What the code of a run takes in memory: `h2o profile` has loaded more, and asks a process that has loaded just that.

`python -m h2o_cli.run_memory` is this process: it loads what `h2o run` loads, then what a filter of
keys and values needs, and prints the bytes of both, and those of the first that come from files.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import TYPE_CHECKING

from runtime.memory import file_bytes, resident_bytes

if TYPE_CHECKING:
    from profiler.measure import RunMemory

RUN = ("runtime.llama.tokenizer", "platformdirs")
FILTER = ("runtime.kv.filter",)
_TIMEOUT_S = 300.0


def measure_run_memory() -> RunMemory | None:
    """The bytes; None where no process can be started."""
    from profiler.measure import RunMemory

    try:
        process_bytes, filter_bytes, from_files = map(int, output_of("h2o_cli.run_memory").split())
    except ValueError:
        return None
    return RunMemory(process_bytes, filter_bytes, from_files)


def output_of(module: str, *arguments: str) -> bytes:
    """What `python -m module arguments` writes to standard output; nothing where it cannot be started, or fails."""
    import subprocess

    command = [sys.executable, "-m", module, *arguments]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        return subprocess.run(
            command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, timeout=_TIMEOUT_S, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return b""


def main() -> None:
    """Load, measure, print."""
    from h2o_cli.main import LazyGroup

    LazyGroup(name="h2o").get_command(None, "run")
    bytes_after, from_files = [], []
    for names in (RUN, FILTER):
        for name in names:
            importlib.import_module(name)
        bytes_after.append(resident_bytes())
        from_files.append(file_bytes())
    sys.stdout.write(f"{bytes_after[0]} {bytes_after[1] - bytes_after[0]} {from_files[0]}\n")


if __name__ == "__main__":
    main()
