"""Which layers of a model run on which of several machines: the placement with the shortest time per token.

Every device holds `memory_bytes` of weights: resident ones, and a window that it reads ahead into while others compute.
The groups (layers, and the head as the last one) go through the devices in their order, in one round (contiguous
ranges) or in several (a ring of short ranges). A token takes the longer of two times:

    the busiest disk     max over devices  streamed_i / disk_i
    one after the other  sum over devices  max(compute_i, rounds * max(0, streamed_i / rounds - window_i) / disk_i)
                         + what the hops to devices take + what the root takes for the head

where compute_i is longer by what computing takes more with weights that are waited for, and by the threads that wake up
at the beginning of every range.

A device reads ahead while the others compute, but only as far as its window goes; what is more than that in one round
has to be waited for. The formula was checked against 12 measured set-ups (tests/test_placement.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, pairwise

from runtime.errors import BudgetError
from runtime.sizes import format_size

_MOST_TRIED = 3000  # divisions of the layers: up to so many all are tried, of more the neighbours of good ones
_ROUNDS = (1, 2, 3, 4, 6, 8, 12, 16)  # more rounds are more hops, and two slots suffice with the shortest ranges
_WINDOW_PIECES = 2  # one is read while the other is computed with
_LEAST_S_PER_BYTE = 1e-12  # of computing: faster than any processor
_WORTH_JOINING = 0.01  # share of a token's time that one more device has to save
_HOP_RISK = 0.1  # share of a hop's time that counts against it also where disks hide it: links take longer now and then


@dataclass(frozen=True)
class Device:
    """A machine: bytes for weights, bytes per second of its disk, seconds per byte of weights it computes with.

    link_s, link_bytes_per_s: what a message to it takes, and how fast its bytes go. streaming_s_per_byte: more seconds
    for a byte that is waited for. wake_s: of its threads at the beginning of each range, as they rested meanwhile.
    """

    address: str
    memory_bytes: int
    disk_bytes_per_s: float
    compute_s_per_byte: float = 0.0
    link_s: float = 0.0
    link_bytes_per_s: float = math.inf
    streaming_s_per_byte: float = 0.0
    wake_s: float = 0.0

    def hop_s(self, n_bytes: int) -> float:
        """Seconds for n_bytes from the device before it."""
        return self.link_s + n_bytes / self.link_bytes_per_s


@dataclass(frozen=True)
class SplitModel:
    """A model that can be cut between its groups: bytes of each layer and, last, of the head; bytes of a hidden state.

    piece_bytes: of the largest piece, the least that a window takes. root_s: what a token takes at the root, between
    the last group and the first one, wherever the groups are.
    """

    group_bytes: tuple[int, ...]
    hidden_bytes: int
    piece_bytes: int
    root_s: float = 0.0

    @property
    def n_bytes(self) -> int:
        """All weights."""
        return sum(self.group_bytes)


@dataclass(frozen=True)
class Range:
    """Groups `begin` to `end` - 1 on the device of this number."""

    device: int
    begin: int
    end: int


@dataclass(frozen=True)
class Share:
    """What one device does for a token: bytes that it holds for good, its window, and what it reads."""

    n_groups: int
    resident_bytes: int
    window_bytes: int
    streamed_bytes: int
    compute_s: float


@dataclass(frozen=True)
class Placement:
    """Ranges in the order of the computation, and the seconds a token is predicted to take.

    others_s: what it would take if no disk were busier than that. hops_s: the part of it that hops take.
    """

    devices: tuple[Device, ...]
    ranges: tuple[Range, ...]
    shares: tuple[Share, ...]
    token_s: float
    others_s: float
    hops_s: float

    @property
    def n_rounds(self) -> int:
        """How often a token comes to the device with most ranges."""
        return _rounds(self.ranges, len(self.devices))

    @property
    def n_hops(self) -> int:
        """How often a token is handed to a device and comes back: once for each range."""
        return len(self.ranges)

    @property
    def turns_s(self) -> tuple[float, ...]:
        """Seconds of a token in which each device computes or waits for its disk while the others wait for it."""
        turns = [_turn_s(share, device, self.n_rounds) for share, device in zip(self.shares, self.devices, strict=True)]
        spare_s = self.token_s - self.others_s
        disks = [_seconds(share.streamed_bytes, d) for share, d in zip(self.shares, self.devices, strict=True)]
        busiest = max(range(len(disks)), key=disks.__getitem__)
        return tuple(turn + spare_s * (i == busiest) for i, turn in enumerate(turns))

    def layers_of(self, device: int) -> list[tuple[int, int]]:
        """The ranges (begin, end) of one device."""
        return [(r.begin, r.end) for r in self.ranges if r.device == device]


def predicted(
    model: SplitModel, devices: Sequence[Device], ranges: Sequence[Range], windows: Sequence[int] | None = None
) -> Placement | None:
    """These ranges and the time they take; None where a memory is too small. windows None: those that suit them."""
    rounds = _rounds(ranges, len(devices))
    n_groups, n_bytes = [0] * len(devices), [0] * len(devices)
    for r in ranges:
        n_groups[r.device] += r.end - r.begin
        n_bytes[r.device] += sum(model.group_bytes[r.begin : r.end])
    hops_s = sum(devices[r.device].hop_s(model.hidden_bytes) for r in ranges)  # none to this machine
    rests = len(ranges) > 1 or hops_s > 0  # a machine that computes alone goes on and on
    shares, disk_s, others_s = [], 0.0, hops_s + model.root_s
    for i, device in enumerate(devices):
        window = windows[i] if windows else _window(n_bytes[i] - device.memory_bytes, rounds, model.piece_bytes)
        if n_bytes[i] > device.memory_bytes < window:
            return None
        woken_s = device.wake_s * sum(r.device == i for r in ranges) if rests else 0.0
        share = _share(device, n_groups[i], n_bytes[i], window, woken_s)
        shares.append(share)
        disk_s = max(disk_s, _seconds(share.streamed_bytes, device))
        others_s += _turn_s(share, device, rounds)
    return Placement(tuple(devices), tuple(ranges), tuple(shares), max(disk_s, others_s), others_s, hops_s)


def _rounds(ranges: Sequence[Range], n_devices: int) -> int:
    return max(sum(r.device == i for r in ranges) for i in range(n_devices))


def _turn_s(share: Share, device: Device, rounds: int) -> float:
    """Seconds of a token in which the others wait for a device: it computes, or reads what was not in its window."""
    behind = rounds * max(0.0, share.streamed_bytes / rounds - share.window_bytes)
    return max(share.compute_s + behind * device.streaming_s_per_byte, _seconds(behind, device))


def _window(missing_bytes: int, rounds: int, piece_bytes: int) -> int:
    """Bytes of the window that suits a device whose memory lacks so many bytes.

    It holds what is read in one round, so that the disk works while others compute. Where there is one round only,
    bytes of a window and bytes that stay save the same time, so it is as small as can be.
    """
    least = _WINDOW_PIECES * piece_bytes
    return least if rounds == 1 else max(least, -(-missing_bytes // (rounds - 1)))


def _share(device: Device, n_groups: int, n_bytes: int, window: int, woken_s: float) -> Share:
    """A device's memory shared out between what stays and a window. woken_s: what its threads take to wake up."""
    compute_s = n_bytes * device.compute_s_per_byte + woken_s
    if n_bytes <= device.memory_bytes:
        return Share(n_groups, n_bytes, 0, 0, compute_s)
    resident = device.memory_bytes - window
    return Share(n_groups, resident, window, n_bytes - resident, compute_s)


def _seconds(n_bytes: float, device: Device) -> float:
    if n_bytes <= 0:
        return 0.0
    return n_bytes / device.disk_bytes_per_s if device.disk_bytes_per_s else math.inf


def ranges_of(counts: Sequence[int], rounds: int) -> list[Range]:
    """counts[i] groups for device i, in so many rounds: as even as can be, neighbours on one device joined."""
    ranges: list[Range] = []
    begin = 0
    for j in range(rounds):
        for device, n in enumerate(counts):
            end = begin + n * (j + 1) // rounds - n * j // rounds
            if end > begin and ranges and ranges[-1].device == device:
                ranges[-1] = replace(ranges[-1], end=end)
            elif end > begin:
                ranges.append(Range(device, begin, end))
            begin = end
    return ranges


def placed(model: SplitModel, devices: Sequence[Device]) -> Placement | None:
    """The best placement on all of these devices, in this order; None where their memory is too small."""
    n = len(model.group_bytes)
    if not devices or len(devices) > n:
        return None
    tried: dict[tuple[int, ...], Placement | None] = {}

    def best_of(counts: tuple[int, ...]) -> Placement | None:
        if counts not in tried:
            rounds = (r for r in _ROUNDS if r == 1 or (r <= max(counts) and len(counts) > 1))
            found = (predicted(model, devices, ranges_of(counts, r)) for r in rounds)
            tried[counts] = min((p for p in found if p), key=_order, default=None)
        return tried[counts]

    if math.comb(n - 1, len(devices) - 1) <= _MOST_TRIED:
        every = [best_of(counts) for counts in _divisions(n, len(devices))]
        return min((p for p in every if p), key=_order, default=None)
    ends = (_climb(start, best_of) for start in _starts(model, devices))
    return min((p for p in ends if p), key=_order, default=None)


def _order(placement: Placement) -> tuple[float, int]:
    """Less is better: the time, in which hops that disks hide count a little, too; among equals fewer hops."""
    return placement.token_s + _HOP_RISK * placement.hops_s, placement.n_hops


def _divisions(n: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways to cut n groups into so many parts of at least one."""
    for cuts in combinations(range(1, n), parts - 1):
        edges = (0, *cuts, n)
        yield tuple(b - a for a, b in pairwise(edges))


def _starts(model: SplitModel, devices: Sequence[Device]) -> Iterator[tuple[int, ...]]:
    """Divisions to begin at: by memory, by disk, by what memory leaves for the disks, by computing, all alike, and
    nearly all on one device: from there a climb finds the ends that it does not reach from the middle."""
    n, each = len(model.group_bytes), model.n_bytes / len(model.group_bytes)
    held = [device.memory_bytes / each for device in devices]
    left = max(0.0, n - sum(held))
    disk = sum(device.disk_bytes_per_s for device in devices) or 1.0
    yield _rounded(held, n)
    yield _rounded([device.disk_bytes_per_s for device in devices], n)
    yield _rounded([h + left * d.disk_bytes_per_s / disk for h, d in zip(held, devices, strict=True)], n)
    yield _rounded([1 / max(device.compute_s_per_byte, _LEAST_S_PER_BYTE) for device in devices], n)
    yield _rounded([1.0] * len(devices), n)
    for most in range(len(devices)):
        yield tuple(n - len(devices) + 1 if i == most else 1 for i in range(len(devices)))


def _rounded(weights: Sequence[float], n: int) -> tuple[int, ...]:
    """n groups in proportion to weights, at least one each (largest remainders)."""
    total, spare = sum(weights) or 1.0, n - len(weights)
    exact = [spare * weight / total for weight in weights]
    counts = [int(share) for share in exact]
    for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: spare - sum(counts)]:
        counts[i] += 1
    return tuple(count + 1 for count in counts)


def _climb(counts: tuple[int, ...], best_of: Callable[[tuple[int, ...]], Placement | None]) -> Placement | None:
    """Move groups from one device to another as long as that makes a token faster: first many at once, then few."""
    best, step = best_of(counts), max(1, sum(counts) // 8)
    while step:
        moved = [
            tuple(c - step * (i == a) + step * (i == b) for i, c in enumerate(counts))
            for a in range(len(counts))
            for b in range(len(counts))
            if a != b and counts[a] > step
        ]
        found = min(((p, c) for c in moved if (p := best_of(c))), key=lambda f: _order(f[0]), default=None)
        if found and (best is None or _order(found[0]) < _order(best)):
            best, counts = found
        else:
            step //= 2
    return best


@dataclass(frozen=True)
class LeftOut:
    """A device that would not help: what a token takes with it and without it (inf: not possible)."""

    device: Device
    with_s: float
    without_s: float


@dataclass(frozen=True)
class Choice:
    """The devices that take part with their placement, and those left out."""

    placement: Placement
    left_out: tuple[LeftOut, ...]


def choose_devices(model: SplitModel, devices: Sequence[Device]) -> Choice:
    """The devices that make a token fastest; `devices` are in the order of their priority.

    It begins with the fewest devices, from the first on, that can run the model, and with the fewest whose memory holds
    all of it (row D3), adds the others one by one where a token gets faster by at least 1 %, and takes the faster way.
    Raises BudgetError where all of them together cannot run the model.
    """
    can_run = ((n, p) for n in range(1, len(devices) + 1) if (p := placed(model, devices[:n])))
    first = next(can_run, None)
    if first is None:
        have = sum(device.memory_bytes for device in devices)
        raise BudgetError(
            f"the devices have {format_size(have)} for weights together, the model has {format_size(model.n_bytes)}",
            "add devices, or give them more memory (-m)",
        )
    begins = [first, *((n, p) for n, p in can_run if sum(d.memory_bytes for d in devices[:n]) >= model.n_bytes)][:2]
    return min((_joined(model, devices, n, p) for n, p in begins), key=lambda choice: _order(choice.placement))


def _joined(model: SplitModel, devices: Sequence[Device], n: int, best: Placement) -> Choice:
    """The first n devices, and of the others those that help."""
    chosen, left_out = list(devices[:n]), []
    for device in devices[n:]:
        more = placed(model, [*chosen, device])
        if more and more.token_s < best.token_s * (1 - _WORTH_JOINING):
            chosen, best = [*chosen, device], more
        else:
            left_out.append(LeftOut(device, more.token_s if more else math.inf, best.token_s))
    return Choice(best, tuple(left_out))
