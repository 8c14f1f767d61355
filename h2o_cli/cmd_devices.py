"""`h2o devices`: what workers offer, how fast their links are, and what a token would take with them."""

from __future__ import annotations

from contextlib import closing
from typing import Annotated, Any

import typer

from h2o_cli import device_flags as flags
from h2o_cli.output import emit, note, print_json, table
from h2o_cli.session.defaults import default_threads
from h2o_cli.session.models import DEFAULT_MODEL, resolve_model
from h2o_cli.session.team import Flags
from runtime.errors import UsageError
from runtime.plans.budget import Budget
from runtime.sizes import format_size

EPILOG = """Examples:

\b
  h2o devices model.gguf --workers local,192.168.1.7:9999 --tls cluster/me
  h2o devices model.gguf --workers 127.0.0.1:9999,127.0.0.1:9998 --json | jq .predicted_ms_per_token
"""

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help=f"Path of a GGUF file. {DEFAULT_MODEL}")
]
Memory = Annotated[
    str | None, typer.Option("-m", "--memory", metavar="SIZE", help="Memory of a run on this machine: 400 (MB), 1.5GB.")
]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", metavar="N", help="Computing threads here. [default: physical cores]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def devices(  # noqa: PLR0913, PLR0917 - one parameter per flag
    model: Model = None,
    workers: flags.Workers = None,
    device_file: flags.File = None,
    cluster: flags.Cluster = None,
    priority: flags.Priority = None,
    prioritize_by_memory: flags.ByMemory = False,
    memory: Memory = None,
    threads: Threads = None,
    tls: flags.Tls = None,
    refresh: flags.Refresh = False,
    hidden: flags.Hidden = "f32",
    as_json: Json = False,
) -> None:
    """Show what workers offer for a model, and which of them would take part in a run."""
    named = Flags.of(locals())
    show(model, named, memory, threads, as_json)


def show(model: str | None, named: Flags, memory: str | None, threads: int | None, as_json: bool) -> None:
    """Print what the named devices offer and the placement on them. Raises H2OError."""
    named.check()
    if not named.are_given:
        raise UsageError("no devices were named", "name some with --workers, --devices or --cluster")
    from h2o_cli.session.members import Devices, survey
    from runtime.llama.model_file import ModelFile

    file = ModelFile.open(resolve_model(model))
    limits = Budget.parse(memory).n_bytes, threads or default_threads()
    if named.cluster is None:
        found = survey(
            file, Devices(named.addresses(), None, named.tls, None, named.refresh, hidden=named.hidden), *limits, note
        )
    else:
        from h2o_cli.session.ray_workers import RayWorkers

        with closing(RayWorkers(named.cluster, file.path, file.n_bytes, limits[1])) as nodes:
            found = survey(
                file, Devices(",".join(nodes.addresses), None, nodes.keys, hidden=named.hidden), *limits, note
            )
    print_json(found) if as_json else emit(_text(found) + "\n")


def _text(found: dict[str, Any]) -> str:
    rows = [["device", "for weights", "disk", "all layers", "link", "layers"]]
    for device in found["devices"]:
        link = "" if device["link_ms"] is None else f"{device['link_ms']:.2f} ms, {_rate(device['link_bytes_per_s'])}"
        layers = ", ".join(f"{first}-{last - 1}" for first, last in device["layers"])
        if device["left_out"]:
            layers = (
                f"none: {_ms(device['left_out']['with_ms'])} with it, {_ms(device['left_out']['without_ms'])} without"
            )
        rows.append(
            [
                device["address"],
                format_size(device["weights_bytes"]),
                _rate(device["disk_bytes_per_s"]),
                _ms(device["compute_ms"]),
                link,
                layers,
            ]
        )
    return f"{table(rows, right=(1, 2, 3))}\n\na token: {_ms(found['predicted_ms_per_token'])}"


def _ms(value: float | None) -> str:
    return "not possible" if value is None else f"{value:.3g} ms"


def _rate(bytes_per_s: float) -> str:
    return f"{format_size(int(bytes_per_s))}/s"
