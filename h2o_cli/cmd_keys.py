"""`h2o keys`: certificates for the machines of a small cluster."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h2o_cli.output import emit
from runtime.distributed.keys import MACHINE_DAYS, make_keys
from runtime.errors import UsageError

EPILOG = """Examples:

\b
  h2o keys cluster --host me --host alpha,192.168.1.7
  scp -r cluster/alpha alpha:                        the worker's folder goes to the worker, nothing else
  h2o worker model.gguf --listen 192.168.1.7:9999 --tls alpha      there
  h2o run model.gguf --workers 192.168.1.7:9999 --tls cluster/me   here
"""

Folder = Annotated[Path, typer.Argument(metavar="DIR", show_default=False, help="Where the keys are kept.")]
Hosts = Annotated[
    list[str],
    typer.Option(
        "--host",
        metavar="NAME",
        show_default=False,
        help="A machine: its names and addresses, separated by commas; repeatable.",
    ),
]
Days = Annotated[int, typer.Option("--days", metavar="N", help="Days until the machines' certificates expire.")]


def keys(folder: Folder, host: Hosts, days: Days = MACHINE_DAYS) -> None:
    """Make an authority in DIR, where there is none yet, and a folder with keys for each machine.

    DIR/authority.key signs certificates: keep it to yourself. Each machine needs its own folder only.
    """
    if days < 1:
        raise UsageError(f"--days {days} is not possible", "give 1 or more")
    for path in make_keys(folder, host, days):
        emit(f"{path}\n")
