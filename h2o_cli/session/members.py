"""The workers of a run: which layers each of them computes, and what is left for this machine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runtime.distributed.cluster import Cluster, Stage, greet, shares
from runtime.distributed.messages import PROTOCOL, Hello
from runtime.distributed.wire import keys_for, parse_address
from runtime.distributed.worker import build, cpu_class
from runtime.engine.borders import Borders, check_cut
from runtime.engine.engine import Engine
from runtime.errors import UsageError
from runtime.llama import abi
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.memory import peak_bytes
from runtime.plans.residency import layer_bytes
from runtime.settings import Settings
from runtime.sizes import format_size
from runtime.weights.head_start import guessed_room

LOCAL = "local"
SPLIT_POSITIONS = 512  # from here on llama.cpp cuts the attention of a token by threads


@dataclass(frozen=True)
class Devices:
    """What the flags say: addresses in the order of their layers (`local`: this machine), and spare ones."""

    workers: str
    spare: str | None = None
    tls: Path | None = None

    @property
    def addresses(self) -> list[str]:
        """Those that compute. Raises UsageError."""
        found = parse_addresses(self.workers)
        if found in ([], [LOCAL]):
            raise UsageError("--workers names no worker", "give host:port, separated by commas")
        return found

    @property
    def spares(self) -> list[str]:
        """Those that take over. Raises UsageError."""
        return parse_addresses(self.spare or "")


@dataclass
class Team:
    """Workers that have been greeted; `part` is what this machine computes itself."""

    part: ModelFile
    n_layers: int
    cluster: Cluster

    @classmethod
    def join(cls, file: ModelFile, devices: Devices, budget_bytes: int, note: Callable[[str], None]) -> Team:
        """Greet the workers and share out the layers. Raises UsageError, WorkerError."""
        addresses, spares = devices.addresses, devices.spares
        twice = next((a for i, a in enumerate(addresses + spares) if a in (addresses + spares)[:i]), None)
        if twice or LOCAL in spares:
            raise UsageError(f"{twice or LOCAL} cannot be named here", "name each worker once")
        if len(addresses) > file.n_layers:
            raise UsageError(f"{len(addresses)} devices for {file.n_layers} layers", "name fewer")
        mine = Hello(PROTOCOL, build(), file.hash, cpu_class())
        links = greet([a for a in addresses + spares if a != LOCAL], lambda a: keys_for(a, devices.tls), mine)
        for link in links:
            if link.hello.cpu != mine.cpu:
                note(f"{link.address} has another kind of processor: the answer may differ in its last bits")
        by_address = {link.address: link for link in links}
        here = max(1, guessed_room(file, budget_bytes) - layer_bytes(file.head))
        memory = [by_address[a].hello.weights_bytes if a != LOCAL else here for a in addresses]
        layers = _ranges(addresses, shares(memory, file.n_layers))
        stages = [Stage(layers[a].start, layers[a].stop, by_address[a]) for a in addresses if a != LOCAL]
        part = file.owned(layers.get(LOCAL, range(0)), head=True, embedding=True)
        return cls(part, file.n_layers, Cluster(stages, file.n_layers, [by_address[a] for a in spares]))

    def check(self, hollow: HollowModel, settings: Settings) -> None:
        """Raise EngineError where the model cannot be cut like this."""
        check_cut(self.part, hollow, settings)

    def set_up(self, engine: Engine, hollow: HollowModel, note: Callable[[str], None]) -> None:
        """Give the workers their layers, and the engine its way to them. Raises WorkerError, Cancelled."""

        def check() -> None:
            if engine.guests.stop:
                raise engine.guests.stop

        cluster, settings = self.cluster, engine.settings
        cluster.width = int(abi.llama.llama_model_n_embd(hollow.pointer))
        cluster.check, cluster.note = check, note
        engine.most_tokens = cluster.set_up(settings.n_ctx, engine.pass_tokens, settings.n_logits, settings.kv_type)
        others = [link.address for link in cluster.links if link.hello.n_threads != settings.n_threads]
        if others and settings.n_ctx > SPLIT_POSITIONS:
            note(f"{', '.join(others)}: other -t than here: behind {SPLIT_POSITIONS} positions last bits may differ")
        engine.guests.add(Borders(engine.file, hollow.weights, engine.guests, cluster))
        for text in self.allocation(engine):
            note(text)

    def allocation(self, engine: Engine) -> list[str]:
        """One line for each device."""
        own = [(layer.index, layer.index + 1) for layer in self.part.layers]
        what = f"layers {_text(own)} and the head" if own else "the head"
        memory = _memory(engine.ledger.resident_bytes, engine.streamed_bytes)
        lines = [f"{LOCAL}: {what}, {memory} ({format_size(engine.plan.budget_bytes)})"]
        for link in self.cluster.links:
            if ready := link.ready:
                memory = _memory(ready.resident_bytes, ready.streamed_bytes)
                lines.append(
                    f"{link.address}: layers {_text(link.ranges)}, {memory} ({format_size(ready.budget_bytes)})"
                )
        return lines

    def figures(self) -> list[dict[str, Any]]:
        """The devices of `--json`; layers as [first, last), bytes read since the worker began."""
        own = _merged([(layer.index, layer.index + 1) for layer in self.part.layers])
        found = [{"address": LOCAL, "layers": own, "peak_memory_bytes": peak_bytes(), "replacements": 0}]
        for link in self.cluster.links:
            found.append(
                {
                    "address": link.address,
                    "layers": link.ranges,
                    "peak_memory_bytes": link.peak_bytes,
                    "bytes_read": link.bytes_read,
                    "replacements": link.replacements,
                }
            )
        return found

    def close(self) -> None:
        """Leave the workers."""
        self.cluster.close()


def parse_addresses(text: str) -> list[str]:
    """Addresses, separated by commas. Raises UsageError."""
    addresses = [address.strip() for address in text.split(",") if address.strip()]
    for address in addresses:
        if address != LOCAL:
            parse_address(address)
    return addresses


def _ranges(addresses: Sequence[str], counts: Sequence[int]) -> dict[str, range]:
    ranges, start = {}, 0
    for address, count in zip(addresses, counts, strict=True):
        ranges[address] = range(start, start + count)
        start += count
    return ranges


def _merged(ranges: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbours as one."""
    merged: list[tuple[int, int]] = []
    for first, last in ranges:
        if merged and merged[-1][1] == first:
            merged[-1] = (merged[-1][0], last)
        else:
            merged.append((first, last))
    return merged


def _text(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{first}-{last - 1}" for first, last in _merged(ranges))


def _memory(resident: int, streamed: int) -> str:
    rest = f", {format_size(streamed)} streamed" if streamed else ""
    return f"{format_size(resident)} in memory{rest}"
