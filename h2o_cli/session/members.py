"""The workers of a run: which layers each of them computes, and what is left for this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from h2o_cli.session.placing import LOCAL, Place, device_of, given, head_s, here, hidden_bytes, place, split_model
from planner.placement import Device, SplitModel
from planner.rebalance import LEAST_SEEN, corrected, moved, slowness, smoothed
from runtime.distributed.cluster import Cluster, Stage
from runtime.distributed.hidden import F32
from runtime.distributed.link import Link, close_all, greet, saving_bytes
from runtime.distributed.messages import PROTOCOL, Hello
from runtime.distributed.wire import keys_for, parse_address
from runtime.distributed.worker import build, cpu_class
from runtime.engine.borders import Borders, check_cut
from runtime.engine.engine import Engine
from runtime.errors import UsageError
from runtime.kv.cache_memory import cell_bytes
from runtime.llama import abi
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.memory import peak_bytes
from runtime.plans.residency import layer_bytes
from runtime.settings import Settings
from runtime.sizes import format_size

SPLIT_POSITIONS = 512  # from here on llama.cpp cuts the attention of a token by threads


@dataclass(frozen=True)
class Devices:
    """What the flags say: addresses in the order of their layers (`local`: this machine), and spare ones.

    refresh: devices are measured, also where they were in the last hour. hidden: how hidden states travel. slower:
    those that were seen to take so many times as long as measured.
    """

    workers: str
    spare: str | None = None
    tls: Path | None = None
    split: str | None = None
    refresh: bool = False
    hidden: str = F32
    slower: Mapping[str, float] = field(default_factory=dict)

    def counts(self, n_layers: int) -> list[int]:
        """Layers of each address, where --split says it; else none. Raises UsageError."""
        if self.split is None:
            return []
        try:
            counts = [int(count) for count in self.split.split(",")]
        except ValueError:
            counts = []
        if len(counts) != len(self.addresses) or min(counts, default=0) < 1 or sum(counts) != n_layers:
            raise UsageError(
                f"--split {self.split} is not possible", f"give {n_layers} layers to {len(self.addresses)} devices"
            )
        return counts

    @property
    def addresses(self) -> list[str]:
        """Those that compute. Raises UsageError."""
        found = parse_addresses(self.workers)
        if not found:
            raise UsageError("--workers names no worker", "give host:port, separated by commas")
        return found

    @property
    def spares(self) -> list[str]:
        """Those that take over. Raises UsageError."""
        return parse_addresses(self.spare or "")


@dataclass
class Team:
    """Workers that have been greeted; `part` is what this machine computes itself. leave: ends what was started."""

    part: ModelFile
    place: Place
    cluster: Cluster
    model: SplitModel
    leave: Callable[[], None] = lambda: None

    @classmethod
    def join(
        cls, file: ModelFile, devices: Devices, budget_bytes: int, n_threads: int, note: Callable[[str], None]
    ) -> Team | None:
        """Greet the workers and share out the layers; None where this machine is faster alone.

        Raises UsageError, WorkerError, BudgetError.
        """
        addresses = devices.addresses
        by_address = _greet(file, devices, note)
        links = list(by_address.values())
        try:
            counts, model = devices.counts(file.n_layers), split_model(file, devices.hidden)
            if counts:
                found = given(addresses, counts)
            else:
                model, measured = _measured(file, devices, by_address, budget_bytes, n_threads)
                found = place(model, measured, devices.slower)
        except BaseException:
            close_all(links)
            raise
        for address, with_s, without_s in found.left_out:
            note(f"{address} is left out: a token would take {_ms(with_s)} with it, {_ms(without_s)} without it")
        stages = [Stage(first, last, by_address[a]) for first, last, a in found.stages if a != LOCAL]
        used = {stage.link.address for stage in stages}
        if not stages:
            note("this machine is faster alone")
            close_all(links)
            return None
        part = file.owned(found.layers_of(LOCAL), head=True, embedding=True)
        spares = [link for link in links if link.address not in used]
        cluster = Cluster(stages, file.n_layers, spares, _journal_folder())
        cluster.window_bytes, cluster.hidden = found.window_bytes, devices.hidden
        if devices.hidden != F32:
            note("hidden states travel rounded to 16 bits: the answer is not exact")
        return cls(part, found, cluster, model)

    def check(self, hollow: HollowModel, settings: Settings) -> None:
        """Raise EngineError where the model cannot be cut like this."""
        check_cut(self.part, hollow, settings)

    def counted(self, settings: Settings) -> Settings:
        """The settings with what keys and values take that come from the workers."""
        each = saving_bytes(cell_bytes(self.part, settings.kv_type))
        return replace(settings, snapshot_bytes=len(self.cluster.links) * each)

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
        if self.place.token_s:
            lines.append(f"a token is predicted to take {_ms(self.place.token_s)}")
        return lines

    @property
    def hidden(self) -> dict[str, Any]:
        """How hidden states travel, and whether the answer is exact with it, for `--json`."""
        return {"type": self.cluster.hidden, "exact": self.cluster.hidden == F32}

    def figures(self, bytes_read_per_token: float | None) -> list[dict[str, Any]]:
        """The devices of `--json`; layers as [first, last). bytes_read_per_token: on this machine."""
        own = _merged([(layer.index, layer.index + 1) for layer in self.part.layers])
        found = [_figures(LOCAL, own, peak_bytes(), bytes_read_per_token, 0)]
        for link in self.cluster.links:
            found.append(_figures(link.address, link.ranges, link.peak_bytes, link.bytes_per_pass, link.replacements))
        return found

    def slower(self, factors: Mapping[str, float]) -> dict[str, float] | None:
        """How many times longer than measured the devices take, where layers should move because of it; else None.

        factors: the same, as the placement was made with.
        """
        placement, cluster = self.place.placement, self.cluster
        stages = tuple((stage.first, stage.last, stage.link.address) for stage in cluster.stages)
        if placement is None or stages != tuple(stage for stage in self.place.stages if stage[2] != LOCAL):
            return None
        latencies = {link.address: link.latencies for link in cluster.links}
        expected = dict(zip([device.address for device in placement.devices], placement.turns_s, strict=True))
        if LOCAL in expected:
            latencies[LOCAL] = cluster.own_latencies
            expected[LOCAL] += self.model.root_s
        seen = {address: smoothed(found) for address, found in latencies.items() if len(found) >= LEAST_SEEN}
        ratios = {address: ratio for address, ratio in slowness(expected, seen).items() if address != LOCAL}
        after = corrected(factors, ratios)
        return after if moved(self.model, self.place.devices, placement, after) else None

    def close(self) -> None:
        """Leave the workers."""
        self.cluster.close()
        self.leave()


def _figures(
    address: str, layers: Sequence[tuple[int, int]], peak: int, read: float | None, replacements: int
) -> dict[str, Any]:
    return {
        "address": address,
        "layers": layers,
        "peak_memory_bytes": peak,
        "bytes_read_per_token": read,
        "replacements": replacements,
    }


def parse_addresses(text: str) -> list[str]:
    """Addresses, separated by commas. Raises UsageError."""
    addresses = [address.strip() for address in text.split(",") if address.strip()]
    for address in addresses:
        if address != LOCAL:
            parse_address(address)
    return addresses


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


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < float("inf") else "for ever"


def _greet(file: ModelFile, devices: Devices, note: Callable[[str], None]) -> dict[str, Link]:
    """Conversations with all devices but this one, by address. Raises UsageError, WorkerError."""
    named = devices.addresses + devices.spares
    twice = next((address for i, address in enumerate(named) if address in named[:i]), None)
    if twice or LOCAL in devices.spares:
        raise UsageError(f"{twice or LOCAL} cannot be named here", "name each worker once")
    mine = Hello(PROTOCOL, build(), file.hash, cpu_class())
    links = greet([a for a in named if a != LOCAL], lambda a: keys_for(a, devices.tls), mine)
    for link in links:
        if link.hello.cpu != mine.cpu:
            note(f"{link.address} has another kind of processor: the answer may differ in its last bits")
    return {link.address: link for link in links}


def _measured(
    file: ModelFile, devices: Devices, links: Mapping[str, Link], budget_bytes: int, n_threads: int
) -> tuple[SplitModel, list[Device]]:
    """The model with what its head takes here, and the devices as they are."""
    n_bytes, refresh = hidden_bytes(file, devices.hidden), devices.refresh
    limits = budget_bytes, n_threads
    measured = [
        here(file, *limits, refresh=refresh)
        if address == LOCAL
        else device_of(links[address], n_bytes, refresh=refresh)
        for address in devices.addresses
    ]
    return split_model(file, devices.hidden, head_s(file, *limits, refresh=refresh)), measured


def survey(
    file: ModelFile, devices: Devices, budget_bytes: int, n_threads: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """What `h2o devices --json` prints. Raises UsageError, WorkerError, BudgetError."""
    links = _greet(file, devices, note)
    try:
        model, measured = _measured(file, devices, links, budget_bytes, n_threads)
    finally:
        close_all(links.values())
    found = place(model, measured)
    left_out = {address: {"with_ms": _finite(a), "without_ms": _finite(b)} for address, a, b in found.left_out}
    n_bytes = sum(layer_bytes(layer) for layer in file.layers)
    return {
        "model": str(file.path),
        "predicted_ms_per_token": 1000 * found.token_s,
        "placement": {
            device.address: [(first, last) for first, last, owner in found.stages if owner == device.address]
            for device in measured
        },
        "devices": [
            {
                "address": device.address,
                "weights_bytes": device.memory_bytes,
                "disk_bytes_per_s": device.disk_bytes_per_s,
                "compute_ms": 1000 * device.compute_s_per_byte * n_bytes,
                "streaming_ms": 1000 * device.streaming_s_per_byte * n_bytes,
                "wake_ms": 1000 * device.wake_s,
                "link_ms": None if device.address == LOCAL else 1000 * device.link_s,
                "link_bytes_per_s": None if device.address == LOCAL else device.link_bytes_per_s,
                "layers": [(first, last) for first, last, owner in found.stages if owner == device.address],
                "left_out": left_out.get(device.address),
            }
            for device in measured
        ],
    }


def _finite(seconds: float) -> float | None:
    return 1000 * seconds if seconds < float("inf") else None


def _journal_folder() -> Path | None:
    """Where hidden states are kept: on a disk, which the system's folder for such files may not be."""
    import platformdirs

    folder = Path(platformdirs.user_cache_dir("h2o-llm"))
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    return None
