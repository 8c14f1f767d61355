"""How long one token takes under an arm: the source system's formulas, and this program's pipeline.

The pipeline has a disk lane and a compute lane, both serial, and a ring of window_bytes between them. Layers and head
are cut into segments, in order of use. The disk lane reads a segment as soon as the ring has room for it, also those of
the next token. The compute lane takes a segment when it has arrived. Its bytes are free again when that compute ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from planner.arms import pinned_per_unit
from planner.source.profile import SourceProfile
from profiler.model_profile import HeadProfile, LayerProfile, ModelProfile, Spread
from runtime.plans.plan import Plan

HANDOVER_S = 0.0005  # from the end of a computation to the first byte read into the room it leaves
SEGMENTS = 4  # a layer's bytes arrive and are freed in this many parts, or more when the window is small
MAX_SEGMENTS = 256  # bounds the time for a window that is a tiny part of a layer
MAX_TOKENS = 64  # simulated where no steady state comes: then the mean of the second half counts
SAME = 1e-9  # relative difference below which two tokens took the same time: rounding errors are smaller
Segment = tuple[float, int, float]  # (time on the disk lane, bytes in the ring, time on the compute lane)


@dataclass(frozen=True)
class Rates:
    """What the lanes need per token, in seconds. The lists hold the layers, then the head."""

    disk_bytes_per_s: float
    compute_s: list[float]
    release_s: list[float]
    overhead_s: float


def decode_rates(profile: ModelProfile, value: Callable[[Spread], float] = lambda spread: spread.mean) -> Rates:
    """The rates of a decode pass: the measured means, or what value() makes of each spread."""
    units: list[LayerProfile | HeadProfile] = [*profile.layers, profile.head]
    return Rates(
        disk_bytes_per_s=value(profile.disk.bytes_per_s),
        compute_s=[value(unit.decode_compute_s) for unit in units],
        release_s=[value(unit.release_s) for unit in units],
        overhead_s=value(profile.overhead_s),
    )


def draw(spread: Spread, rng: random.Random) -> float:
    """A value a measurement might have given: normal with the spread's mean and sd, within three sd, above 0."""
    error = max(-3.0, min(3.0, rng.gauss(0.0, 1.0))) * spread.sd
    return max(spread.mean + error, spread.mean * 0.01)


def limit_s(profile: ModelProfile, streamed_bytes: int) -> float:
    """The least time a token can take: max(streamed bytes / disk rate, all compute). No plan is faster."""
    rates = decode_rates(profile)
    return max(streamed_bytes / rates.disk_bytes_per_s, sum(rates.compute_s) + rates.overhead_s)


def token_s(profile: ModelProfile, arm: Plan, rates: Rates | None = None) -> float:
    """Seconds per token in the steady state (rates: other than the measured means)."""
    rates = rates or decode_rates(profile)
    segments = _token_segments(profile, arm, rates)
    lanes = Lanes(arm.window_bytes)
    n = len(segments)
    took = 0.0
    token_ends = [0.0]
    read_ends = [0.0]
    for _ in range(MAX_TOKENS):
        token_ends.append(lanes.run(segments))
        read_ends.append(lanes.read_end_s)
        last, took = took, token_ends[-1] - token_ends[-2]
        near = SAME * took
        # Steady: every event of this token came `took` after the same one of the last, so all later ones will.
        if (
            abs(took - last) <= near
            and abs(read_ends[-1] - read_ends[-2] - took) <= near
            and all(abs(b - a - took) <= near for a, b in zip(lanes.ends[-2 * n : -n], lanes.ends[-n:], strict=True))
        ):
            return took
    half = MAX_TOKENS // 2
    return (token_ends[-1] - token_ends[half]) / half


def first_token_s(profile: ModelProfile, arm: Plan, prompt_tokens: int, ubatch_tokens: int) -> float:
    """Seconds to the first token after a prompt, read in passes of at most ubatch_tokens.

    A resident byte is read when it is first used, a streamed one in every pass. A layer's compute is its measured
    prefill time in proportion to the pass's tokens, and at least its decode time. The head runs once, for the last
    token.
    """
    rates = decode_rates(profile)
    pinned = pinned_per_unit(profile, arm)
    n_passes = max(1, -(-prompt_tokens // ubatch_tokens))
    lanes = Lanes(arm.window_bytes)
    for i_pass in range(n_passes):
        n_tokens = min(ubatch_tokens, prompt_tokens - i_pass * ubatch_tokens)
        scale = n_tokens / profile.prefill_tokens
        segments: list[Segment] = []
        for i, layer in enumerate(profile.layers):
            streamed = layer.bytes - pinned[i]
            compute_s = max(rates.compute_s[i], layer.prefill_compute_s.mean * scale)
            n_read = streamed if i_pass else layer.bytes
            segments += _cut(n_read, streamed, compute_s, rates.release_s[i], rates.disk_bytes_per_s, arm.window_bytes)
        lanes.run(segments)
    head_streamed = profile.head.bytes - pinned[-1]
    lanes.run(
        _cut(
            profile.head.bytes,
            head_streamed,
            rates.compute_s[-1],
            rates.release_s[-1],
            rates.disk_bytes_per_s,
            arm.window_bytes,
        )
    )
    return lanes.compute_end_s + rates.overhead_s


class Lanes:
    """The two lanes and the ring. A pass goes on where the one before it ended."""

    def __init__(self, window_bytes: int) -> None:
        """Start cold: an empty ring of window_bytes."""
        self.window_bytes = window_bytes
        self.read_end_s = 0.0
        self.compute_end_s = 0.0
        self.ends: list[float] = []  # when each segment's compute ended, since the start
        self._ring: list[int] = []  # each segment's bytes in the ring
        self._i_freed = 0  # segments before this one have been waited for
        self._n_read = 0
        self._n_freed = 0

    def run(self, segments: list[Segment]) -> float:
        """Run one pass and return the time its compute ends. No segment may be larger than the window."""
        ring, ends = self._ring, self.ends
        read_end, compute_end = self.read_end_s, self.compute_end_s
        i_freed, n_freed, n_read = self._i_freed, self._n_freed, self._n_read
        for read_s, ring_bytes, compute_s in segments:
            if read_s > 0:
                n_read += ring_bytes
                while n_read - n_freed > self.window_bytes:
                    n_freed += ring[i_freed]
                    i_freed += 1
                if i_freed and ends[i_freed - 1] + HANDOVER_S > read_end:
                    read_end = ends[i_freed - 1] + HANDOVER_S
                read_end += read_s
                compute_end = max(compute_end, read_end)
            compute_end += compute_s
            ring.append(ring_bytes)
            ends.append(compute_end)
        self.read_end_s, self.compute_end_s = read_end, compute_end
        self._i_freed, self._n_freed, self._n_read = i_freed, n_freed, n_read
        return compute_end


def _token_segments(profile: ModelProfile, arm: Plan, rates: Rates) -> list[Segment]:
    """The segments of one decode pass. The rest of the pass (sampling) is a compute after them."""
    pinned = pinned_per_unit(profile, arm)
    segments: list[Segment] = []
    for i, size in enumerate([*(layer.bytes for layer in profile.layers), profile.head.bytes]):
        streamed = size - pinned[i]
        release_s = rates.release_s[i] * streamed / size if size else 0.0
        segments += _cut(streamed, streamed, rates.compute_s[i], release_s, rates.disk_bytes_per_s, arm.window_bytes)
    return [*segments, (0.0, 0, rates.overhead_s)]


def _cut(
    read_bytes: int, ring_bytes: int, compute_s: float, release_s: float, bytes_per_s: float, window_bytes: int
) -> list[Segment]:
    """A layer or the head as segments, each at most half the window (never more than MAX_SEGMENTS).

    Releasing is on the disk lane. A segment pays for its own bytes; over a token that is the same as if it paid for the
    bytes that it replaces.
    """
    if read_bytes == 0:
        return [(0.0, 0, compute_s)]
    n = min(MAX_SEGMENTS, max(SEGMENTS, -(-2 * ring_bytes // max(1, window_bytes))))
    lane_s = (read_bytes / bytes_per_s + release_s) / n
    sizes = [ring_bytes * (j + 1) // n - ring_bytes * j // n for j in range(n)]
    return [(lane_s, min(size, window_bytes), compute_s / n) for size in sizes]


def source_token_ms(source: SourceProfile, k: int, w: int) -> float:
    """The source system's simulated ms per token of plan (k, w), with its formulas.

    Resident layers compute first. Layers k.. are loaded one after the other, each into a free one of w places. The load
    of layer k+j waits until layer k+j-w is computed and released. If every layer is resident, only their compute
    counts.
    """
    loaded: float = 0.0
    computed: list[float] = []
    last: float = sum(source.t_compute[:k])
    for j, i in enumerate(range(k, source.n_layers)):
        if j >= w:
            loaded = max(loaded, computed[j - w] + source.t_release[i - w])
        loaded += source.layer_sizes[i] / source.io_speed * 1000
        last = max(loaded, last) + source.t_compute[i]
        computed.append(last)
    return last
