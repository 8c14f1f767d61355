"""The flags that name other machines: shared by the commands that have them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Workers = Annotated[
    str | None,
    typer.Option(
        "--workers",
        metavar="A:P,...",
        show_default=False,
        help="Workers that share the layers (`h2o worker`); `local` among them: this machine, too.",
    ),
]
File = Annotated[
    Path | None,
    typer.Option("--devices", metavar="FILE", show_default=False, help="The same from a file: devices.json."),
]
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="auto|ADDRESS",
        show_default=False,
        help="Start a worker on every node of a Ray cluster, for this run.",
    ),
]
Priority = Annotated[
    str | None,
    typer.Option("--priority", metavar="A,B,...", show_default=False, help="Devices of the file to use first."),
]
ByMemory = Annotated[bool, typer.Option("--prioritize-by-memory", help="Use those with most memory first.")]
Spare = Annotated[
    str | None,
    typer.Option(
        "--spare", metavar="A:P,...", show_default=False, help="Workers that take over when one of the others is lost."
    ),
]
Split = Annotated[
    str | None,
    typer.Option(
        "--split", metavar="N,...", show_default=False, help="Layers of each worker. [default: the fastest way]"
    ),
]
Tls = Annotated[
    Path | None, typer.Option("--tls", metavar="DIR", show_default=False, help="This machine's keys (`h2o keys`).")
]
Hidden = Annotated[
    str,
    typer.Option(
        "--hidden",
        metavar="f32|f16",
        help="How hidden states travel; f16: half the bytes, for slow links. The answer is not exact then.",
    ),
]
Refresh = Annotated[
    bool, typer.Option("--refresh", help="Measure devices and links anew; else what was measured in the last hour.")
]
