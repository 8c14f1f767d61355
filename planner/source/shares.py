"""The formulas of a source system for several devices (HSM-DIF): order, selection, token shares, rebalancing.

Here they are used for shares and orders only: layers are placed by planner/placement.py. Memory in MB as it has them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from runtime.errors import BudgetError

RUNTIME_MB = 2000  # what it adds for everything but weights and keys and values
_KEPT, _NEW = 0.9, 0.1  # of a device's mean latency, of the last one
_WINDOW = 10  # latencies that a device is compared with
_SLOW = 1.5  # times their mean


@dataclass(frozen=True)
class Offer:
    """What a device says of itself: memory in MB, tokens per second, load 0 to 1."""

    address: str
    total_memory: int
    memfree: int
    speed: float
    load: float = 0.0


def in_order(offers: Sequence[Offer], priority: Sequence[str] = (), *, by_memory: bool = False) -> list[Offer]:
    """The devices in the order they are used; the first one is the root (rows D1 and D2).

    by_memory: the largest first. Otherwise as `priority` names their addresses; those that it does not name come after
    them, the largest first. (The source system puts those at the top, which nobody can have wanted.)
    """
    rank = {address: i for i, address in enumerate(priority)}
    if by_memory:
        return sorted(offers, key=lambda offer: -offer.total_memory)
    return sorted(offers, key=lambda offer: (rank.get(offer.address, len(rank)), -offer.total_memory))


def memory_need_mb(n_parameters: int, max_seq_len: int, *, four_bit: bool) -> int:
    """MB that a model of n_parameters takes with a context of max_seq_len tokens (row D4, what-if)."""
    weights = int(n_parameters * (0.5 if four_bit else 1.0) / 2**20)
    return weights + max_seq_len * 4 * 100 // 2**20 + RUNTIME_MB


def enough(offers: Sequence[Offer], need_mb: int) -> list[Offer]:
    """The fewest devices, in this order, whose free memory is at least need_mb (row D3). Raises BudgetError."""
    have = 0
    for i, offer in enumerate(offers, 1):
        have += offer.memfree
        if have >= need_mb:
            return list(offers[:i])
    raise BudgetError(
        f"the devices have {have} MB free together, and the model takes {need_mb} MB", "add devices, or free memory"
    )


def token_shares(offers: Sequence[Offer], n_tokens: int) -> dict[str, int]:
    """Address -> how many of n_tokens (row D5): in proportion to memory x speed, at least one while there are any.

    The fastest device has what rounding leaves.
    """
    total = sum(offer.memfree * offer.speed for offer in offers) or 1.0
    shares, left = {}, n_tokens
    for offer in offers:
        share = min(max(1, int(n_tokens * offer.memfree * offer.speed / total)), left)
        shares[offer.address] = share
        left -= share
    shares[max(offers, key=lambda offer: offer.speed).address] += left
    return shares


@dataclass
class Latencies:
    """How long the devices took lately, and whose share is too large (row D6)."""

    _means: dict[str, float] = field(default_factory=dict)
    _recent: dict[str, deque[float]] = field(default_factory=dict)

    def see(self, address: str, seconds: float) -> None:
        """A device took so long for a pass."""
        self._means[address] = _KEPT * self._means.get(address, seconds) + _NEW * seconds
        self._recent.setdefault(address, deque(maxlen=_WINDOW)).append(seconds)

    def rebalanced(self, shares: Mapping[str, int], fastest: str) -> dict[str, int]:
        """The shares, with half of each slow device's moved to the fastest one.

        A device is slow where its mean latency is more than 1.5 times the mean of all recent ones.
        """
        recent = [seconds for window in self._recent.values() for seconds in window]
        limit = _SLOW * sum(recent) / len(recent) if recent else float("inf")
        after = dict(shares)
        for address, share in shares.items():
            if address != fastest and share > 1 and self._means.get(address, 0.0) > limit:
                after[address] -= share // 2
                after[fastest] += share // 2
        return after
