"""Which layers go to which device: what was measured of them, put to the planner."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from h2o_cli.session.device_profiles import kept
from h2o_cli.session.smallest import of_worker
from planner.placement import Choice, Device, Placement, SplitModel, choose_devices
from planner.rebalance import as_seen
from runtime.distributed.head_time import measure_head
from runtime.distributed.hidden import F32, NUMBER_BYTES
from runtime.distributed.link import Link
from runtime.distributed.offer import measure
from runtime.distributed.worker import build
from runtime.llama.model_file import ModelFile
from runtime.plans.residency import layer_bytes, smallest_window

LOCAL = "local"
_LARGE_BYTES = 2**20
_TIMES = 5
_NEAR, _NEAR_S = 2.0, 0.0005  # times as long, and seconds more or less: a round trip that is near what was kept


@dataclass(frozen=True)
class Place:
    """Where the layers go. stages: (first, last, address) in order; window_bytes: of each device, 0: its own choice.

    token_s: what a token is predicted to take; 0 where nobody has worked it out. placement: the planner's own, of a
    model and devices as they were measured; None where layers were given by hand.
    """

    stages: tuple[tuple[int, int, str], ...]
    window_bytes: dict[str, int]
    left_out: tuple[tuple[str, float, float], ...]
    token_s: float
    placement: Placement | None = None
    devices: tuple[Device, ...] = ()

    def layers_of(self, address: str) -> list[int]:
        """The layers of one device."""
        return [layer for first, last, owner in self.stages if owner == address for layer in range(first, last)]


def split_model(file: ModelFile, hidden: str = F32, root_s: float = 0.0) -> SplitModel:
    """The layers as the planner sees them; the head stays where the token is chosen, and takes root_s there."""
    return SplitModel(
        group_bytes=tuple(layer_bytes(layer) for layer in file.layers),
        hidden_bytes=hidden_bytes(file, hidden),
        piece_bytes=max(1, smallest_window(file.owned(range(file.n_layers), head=False, embedding=False))),
        root_s=root_s,
    )


def hidden_bytes(file: ModelFile, hidden: str = F32) -> int:
    """Bytes of a token's hidden state as it travels."""
    return NUMBER_BYTES[hidden] * file.hyper_parameter("embedding_length")


def device_of(link: Link, n_bytes: int, *, refresh: bool = False) -> Device:
    """A worker: what it offers, and its link, measured with messages of n_bytes. Raises WorkerError.

    What was measured in the last hour holds while one more round trip takes about as long.
    """
    hello = link.hello

    def is_near(numbers: tuple[float, ...]) -> bool:
        now_s = min(link.round_trip_s(n_bytes) for _ in range(2))
        return numbers[0] / _NEAR - _NEAR_S < now_s < numbers[0] * _NEAR + _NEAR_S

    key = f"link {link.address} {n_bytes}"
    short_s, rate = kept(key, lambda: _link(link, n_bytes), refresh=refresh, holds=is_near)
    return Device(
        link.address,
        hello.weights_bytes,
        hello.disk_bytes_per_s,
        hello.compute_s_per_byte,
        short_s,
        rate,
        hello.streaming_s_per_byte,
        hello.wake_s,
    )


def _link(link: Link, n_bytes: int) -> tuple[float, float]:
    """Seconds of a message of n_bytes there and back, as every range of layers is one; bytes per second."""
    short_s = statistics.median(link.round_trip_s(n_bytes) for _ in range(_TIMES))
    long_s = min(link.round_trip_s(_LARGE_BYTES) for _ in range(2))
    return short_s, max((_LARGE_BYTES - n_bytes) / max(long_s - short_s, 1e-6), 1.0)


def here(file: ModelFile, budget_bytes: int, n_threads: int, *, refresh: bool = False) -> Device:
    """This machine, as it was measured in the last hour, or now; the head's room is taken off. Raises H2OError."""

    def numbers() -> tuple[float, ...]:
        offer = measure(file, budget_bytes, n_threads, of_worker)
        computing = offer.compute_s_per_byte, offer.streaming_s_per_byte, offer.wake_s
        return offer.weights_bytes, offer.disk_bytes_per_s, *computing

    found = kept(_key("this machine", file, budget_bytes, n_threads), numbers, refresh=refresh)
    weights_bytes, rate, each, more, wake_s = found
    room = max(0, int(weights_bytes) - layer_bytes(file.head))
    return Device(LOCAL, room, rate, each, streaming_s_per_byte=more, wake_s=wake_s)


def head_s(file: ModelFile, budget_bytes: int, n_threads: int, *, refresh: bool = False) -> float:
    """Seconds that the head takes this machine for a token, as it was measured in the last hour, or now."""

    def numbers() -> tuple[float, ...]:
        return (measure_head(file, budget_bytes, n_threads),)

    return kept(_key("head", file, budget_bytes, n_threads), numbers, refresh=refresh)[0]


def _key(what: str, file: ModelFile, budget_bytes: int, n_threads: int) -> str:
    """Of something that was measured on this machine."""
    group = Path("/proc/self/cgroup").read_text()  # with limits of its own
    return f"{what} {file.hash} {file.path} {budget_bytes} {n_threads} {build()} {group.strip()}"


def place(model: SplitModel, devices: Sequence[Device], slower: Mapping[str, float] | None = None) -> Place:
    """The fastest placement on these devices, which are in the order of their priority. Raises BudgetError.

    slower: address -> how many times longer it was seen to take than it was measured.
    """
    choice: Choice = choose_devices(model, as_seen(devices, slower or {}))
    placement = choice.placement
    return Place(
        tuple((r.begin, r.end, placement.devices[r.device].address) for r in placement.ranges),
        {d.address: share.window_bytes for d, share in zip(placement.devices, placement.shares, strict=True)},
        tuple((left.device.address, left.with_s, left.without_s) for left in choice.left_out),
        placement.token_s,
        placement,
        tuple(devices),
    )


def given(addresses: Sequence[str], counts: Sequence[int]) -> Place:
    """So many layers for each, one range after the other."""
    ends = list(accumulate(counts))
    return Place(tuple(zip((0, *ends[:-1]), ends, addresses, strict=True)), {}, (), 0.0)
