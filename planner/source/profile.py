"""The H2O source system's profile: its JSON with four keys, and the log from which that system makes it.

Its "MB" are MiB (2^20 bytes) cut to whole numbers, and its times are whole milliseconds. t_compute was measured on the
prompt. An imported profile uses it for decode and prefill alike. It has no head, embedding, KV and process, so it knows
no smallest budget.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from profiler.model_profile import (
    SCHEMA,
    DeviceInfo,
    DiskProfile,
    EmbeddingProfile,
    HeadProfile,
    LayerProfile,
    MemoryProfile,
    ModelInfo,
    ModelProfile,
    Spread,
    decode_profile,
    read_whole,
    write_whole,
)
from runtime.errors import ProfileError
from runtime.sizes import MIB

FOUR_KEYS = "it needs io_speed, layer_sizes, t_compute and t_release"
NUMBER = r"([0-9.eE+-]+|inf|nan)"
PATTERNS = {
    "prefetch": re.compile(
        rf"prefetch index:blk\.(\d+), prefetch time:{NUMBER}(?: ms)?, layer size:{NUMBER} MB, IO Speed:{NUMBER} MB/s"
    ),
    "compute": re.compile(rf"compute index:blk\.(\d+),? compute time:{NUMBER} ms"),
    "release": re.compile(rf"release index:blk\.(\d+), release time:{NUMBER} ms"),
}
MS_SLACK = 1e-6  # whole milliseconds that became seconds and came back are cut to the same number


class SourceProfile(msgspec.Struct, frozen=True):
    """The four keys: io_speed MiB/s, layer_sizes MiB, t_compute and t_release ms per layer."""

    io_speed: int
    layer_sizes: tuple[int, ...]
    t_compute: tuple[int, ...]
    t_release: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = (len(self.layer_sizes), len(self.t_compute), len(self.t_release))
        if len(set(lengths)) != 1 or not lengths[0]:
            raise ValueError("layer_sizes, t_compute and t_release have {}, {} and {} entries".format(*lengths))
        if self.io_speed <= 0 or min(self.layer_sizes) <= 0:
            raise ValueError("io_speed and every layer size must be above 0")
        if min(self.t_compute + self.t_release) < 0:
            raise ValueError("a time is negative")

    @property
    def n_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_sizes)


class SourceLog(msgspec.Struct, frozen=True):
    """What the source system logs per layer: MiB and milliseconds, as printed."""

    size_mib: tuple[float, ...]
    io_ms: tuple[float, ...]
    compute_ms: tuple[float, ...]
    release_ms: tuple[float, ...]

    def to_profile(self, name: str = "source log") -> ModelProfile:
        """A profile of this program. Its disk speed is all bytes / all time, not a mean of speeds."""
        sizes = [int(size * MIB) for size in self.size_mib]
        io_s = [ms / 1000 for ms in self.io_ms]
        return _profile(name, sum(sizes) / sum(io_s), sizes, io_s, [self.compute_ms, self.release_ms])


def load_foreign(path: str | os.PathLike[str]) -> ModelProfile:
    """A profile from the source system's JSON or log, or one of our own. Raises ProfileError."""
    data, name = read_whole(path), Path(path).stem
    if not data.lstrip().startswith(b"{"):
        return parse_log(data.decode(errors="replace")).to_profile(name)
    if b'"schema"' in data:
        return decode_profile(data, str(path))
    return import_source(decode_source(data, str(path)), name)


def decode_source(data: bytes, path: str) -> SourceProfile:
    """The source system's JSON. path names it in errors. Raises ProfileError."""
    try:
        return msgspec.json.decode(data, type=SourceProfile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} is not a source profile: {error}", FOUR_KEYS) from None


def save_source(source: SourceProfile, path: str | os.PathLike[str]) -> None:
    """Write the source system's JSON file, whole. Raises ProfileError."""
    write_whole(path, msgspec.json.encode(source) + b"\n")


def import_source(source: SourceProfile, name: str = "source profile") -> ModelProfile:
    """A profile of this program from the four keys. MiB become bytes, ms become s, and the rest is zero."""
    sizes = [size * MIB for size in source.layer_sizes]
    rate = float(source.io_speed * MIB)
    return _profile(name, rate, sizes, [size / rate for size in sizes], [source.t_compute, source.t_release])


def export_source(profile: ModelProfile) -> SourceProfile:
    """The four keys of a profile, by the source system's rules: cut MiB and ms, rounded mean of layer speeds."""
    layers = profile.layers
    rate = profile.disk.bytes_per_s.mean
    speeds = [layer.bytes / layer.io_s.mean if layer.io_s.mean > 0 else rate for layer in layers]
    try:
        return SourceProfile(
            round(sum(speeds) / len(speeds) / MIB),
            tuple(layer.bytes // MIB for layer in layers),
            tuple(int(layer.decode_compute_s.mean * 1000 + MS_SLACK) for layer in layers),
            tuple(int(layer.release_s.mean * 1000 + MS_SLACK) for layer in layers),
        )
    except ValueError as error:
        raise ProfileError(f"the profile has no four-key form: {error}", "use this program's own format") from None


def parse_log(text: str) -> SourceLog:
    """The source system's profile log. Lines of other kinds are skipped. Raises ProfileError naming the bad line."""
    found: dict[str, dict[int, tuple[float, ...]]] = {kind: {} for kind in PATTERNS}
    for number, line in enumerate(text.splitlines(), 1):
        kind = line.strip().split(" ", 1)[0]
        if kind in PATTERNS and " index:" in line:
            index, values = _parse_line(kind, line.strip(), number)
            if index in found[kind]:
                raise _line_error(
                    number, f"layer {index} has a second {kind} line (profile with one token, no warm-up)"
                )
            found[kind][index] = values
    if not any(found.values()):
        raise ProfileError("this is neither a profile nor a profile log", "make a profile with `h2o profile`")
    n_layers = len(found["prefetch"])
    for kind, lines in found.items():
        if sorted(lines) != list(range(n_layers)) or not lines:
            counts = ", ".join(f"{len(of_kind)} {name}" for name, of_kind in found.items())
            raise ProfileError(f"the log has no complete set of {kind} lines (found {counts})", "profile with k=0")
    io_ms, size, _speed = zip(*(found["prefetch"][i] for i in range(n_layers)), strict=True)
    compute, release = (tuple(found[kind][i][0] for i in range(n_layers)) for kind in ("compute", "release"))
    return SourceLog(size, io_ms, compute, release)


def _parse_line(kind: str, line: str, number: int) -> tuple[int, tuple[float, ...]]:
    """(layer, numbers) of one log line."""
    match = PATTERNS[kind].fullmatch(line)
    if match is None:
        raise _line_error(number, f"not a {kind} line: {line[:80]!r}")
    try:
        values = tuple(float(value) for value in match.groups()[1:])
    except ValueError:
        raise _line_error(number, f"not a number in {line[:80]!r}") from None
    may_be_zero = kind == "release"
    if not all((value > 0 or (may_be_zero and value == 0)) and value < float("inf") for value in values):
        raise _line_error(number, f"a {kind} line with a zero, negative or infinite value: {line[:80]!r}")
    return int(match.group(1)), values


def _line_error(number: int, message: str) -> ProfileError:
    return ProfileError(f"log line {number}: {message}", "profile again with k=0, w=1 and one token")


def _profile(
    name: str, bytes_per_s: float, sizes: list[int], io_s: list[float], times_ms: list[tuple[float, ...]]
) -> ModelProfile:
    """A profile with layers and disk only. The smallest window is one whole layer, as in the source system."""
    zero = Spread.of([0.0])
    compute_s, release_s = ([ms / 1000 for ms in times] for times in times_ms)
    layers = tuple(
        LayerProfile(size, 0, Spread.of([io]), Spread.of([compute]), Spread.of([compute]), Spread.of([release]))
        for size, io, compute, release in zip(sizes, io_s, compute_s, release_s, strict=True)
    )
    return ModelProfile(
        schema=SCHEMA,
        model=ModelInfo("", name, 0, "unknown", sum(sizes), len(sizes), False),
        device=DeviceInfo("unknown", "unknown", 0, 0, "unknown"),
        versions={},
        disk=DiskProfile(Spread.of([bytes_per_s]), "buffered", 0, 1, ()),
        layers=layers,
        head=HeadProfile(0, 0, zero, zero, zero, zero),
        embedding=EmbeddingProfile(0, 0, zero),
        prefill_tokens=1,
        overhead_s=zero,
        kv_bytes_per_token=0,
        kv=None,
        memory=MemoryProfile(0, 0, 0, 0, 0, max(sizes), 0),
        floor_bytes=0,
    )
