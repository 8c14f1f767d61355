"""What the code of a run takes in memory: `h2o profile` has loaded more, and asks a process that has loaded just that.

`python -m h2o_cli.session.run_memory` is this process: it loads what `h2o run` loads, then what a filter of
keys and values needs, and prints the bytes of both.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING

from runtime.memory import resident_bytes

if TYPE_CHECKING:
    from profiler.measure import RunMemory

RUN = ("runtime.llama.tokenizer", "platformdirs")
FILTER = ("runtime.kv.filter",)


def measure_run_memory() -> RunMemory | None:
    """The bytes; None where no process can be started."""
    from h2o_cli.session.smallest import output_of  # here: the process that is measured loads it later
    from profiler.measure import RunMemory

    try:
        process_bytes, filter_bytes = map(int, output_of("h2o_cli.session.run_memory").split())
    except ValueError:
        return None
    return RunMemory(process_bytes, filter_bytes)


def main() -> None:
    """Load, measure, print."""
    from h2o_cli.main import LazyGroup

    LazyGroup(name="h2o").get_command(None, "run")
    bytes_after = []
    for names in (RUN, FILTER):
        for name in names:
            importlib.import_module(name)
        bytes_after.append(resident_bytes())
    sys.stdout.write(f"{bytes_after[0]} {bytes_after[1] - bytes_after[0]}\n")


if __name__ == "__main__":
    main()
