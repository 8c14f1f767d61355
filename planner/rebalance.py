"""Layers move off a device that has become slow: what was seen of a placement, put to the planner again.

What a device takes for a token is smoothed and compared with what was predicted, and with how the others keep to it: on
machines that are all slower than predicted nothing is gained by moving layers. A device counts as slow, or as quick
again, only outside a factor of 1.5, and layers move only where that saves a fifth of a token's time. So what varies
from token to token moves nothing, and what moved does not move back for little.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from planner.placement import Choice, Device, Placement, SplitModel, choose_devices, predicted

LEAST_SEEN = 10  # tokens, before anything is judged
_NEW = 0.1  # share of the last token in the mean; 0.9 stays
_SLOW = 1.5
_GAIN = 0.2  # of a token's time


def smoothed(latencies: Iterable[float]) -> float:
    """The moving mean of seconds per token, each new one with a tenth; 0 without any."""
    mean = 0.0
    for i, seconds in enumerate(latencies):
        new = max(_NEW, 1 / (i + 1))  # the first ones count alike
        mean = (1 - new) * mean + new * seconds
    return mean


def slowness(predicted_s: Mapping[str, float], seen_s: Mapping[str, float]) -> dict[str, float]:
    """Address -> how many times longer than predicted it takes, beside the quickest of the others.

    A device that keeps to what was predicted is the measure for the others, and so is the prediction itself.
    """
    ratios = {a: seen_s[a] / predicted_s[a] for a in seen_s if predicted_s.get(a, 0.0) > 0}
    return {
        address: ratio / max(1.0, min((r for a, r in ratios.items() if a != address), default=1.0))
        for address, ratio in ratios.items()
    }


def corrected(factors: Mapping[str, float], seen: Mapping[str, float]) -> dict[str, float]:
    """What devices take, as multiples of what was measured of them (1: as measured).

    factors: those that a placement was made with. seen: its slowness() under them.
    """
    found = dict(factors)
    for address, ratio in seen.items():
        if not 1 / _SLOW <= ratio <= _SLOW:
            found[address] = max(1.0, found.get(address, 1.0) * ratio)
    return found


def as_seen(devices: Sequence[Device], factors: Mapping[str, float]) -> list[Device]:
    """The devices, each as slow as it was seen to be; those that are slower than measured come last."""

    def slowed(device: Device) -> Device:
        factor = factors.get(device.address, 1.0)
        return replace(
            device,
            disk_bytes_per_s=device.disk_bytes_per_s / factor,
            compute_s_per_byte=device.compute_s_per_byte * factor,
            streaming_s_per_byte=device.streaming_s_per_byte * factor,
            wake_s=device.wake_s * factor,
        )

    return sorted(map(slowed, devices), key=lambda device: factors.get(device.address, 1.0) > 1)


def moved(
    model: SplitModel, devices: Sequence[Device], placement: Placement, factors: Mapping[str, float]
) -> Choice | None:
    """A better placement with these factors; None where it saves too little beside the one there is.

    devices: all that there are, as measured, in the order of their priority.
    """
    now = as_seen(devices, factors)
    by_address = {device.address: device for device in now}
    used = [by_address[device.address] for device in placement.devices]
    stays = predicted(model, used, placement.ranges, [share.window_bytes for share in placement.shares])
    choice = choose_devices(model, now)
    if stays and choice.placement.token_s > (1 - _GAIN) * stays.token_s:
        return None
    return choice
