"""The profile of one model on one machine: what was measured, with units in the key names, as JSON.

docs/profile-schema.md describes every key. A profile is checked when it is built and when it is read.
"""

from __future__ import annotations

import contextlib
import math
import os
import stat
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import msgspec

from runtime.errors import ProfileError
from runtime.settings import Machine
from runtime.weights.files import BUFFERED, has_direct_reads

SCHEMA = 2
_MOST_BYTES = 64 * 2**20
PROFILE_AGAIN = "measure again with `h2o profile MODEL`"

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Quantity = Annotated[float, msgspec.Meta(ge=0)]
Mode = Literal["direct", "buffered"]
Hash = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]


class Spread(msgspec.Struct, frozen=True):
    """One measured quantity over n repeats; sd is the sample standard deviation (n - 1), 0 for one repeat."""

    mean: Quantity
    sd: Quantity
    n: Positive
    minimum: Quantity
    maximum: Quantity

    def __post_init__(self) -> None:
        if not all(math.isfinite(value) for value in (self.mean, self.sd, self.minimum, self.maximum)):
            raise ValueError("a measured value is not a finite number")
        slack = 1e-9 * self.maximum
        if not self.minimum - slack <= self.mean <= self.maximum + slack:
            raise ValueError(f"the mean {self.mean} is outside minimum {self.minimum} .. maximum {self.maximum}")

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of repeated measurements (at least one)."""
        n, mean = len(values), math.fsum(values) / len(values)
        sd = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (n - 1)) if n > 1 else 0.0
        return cls(mean, sd, n, min(values), max(values))


class ModelInfo(msgspec.Struct, frozen=True):
    """Which model was measured; hash 0 means unknown."""

    path: str
    name: str
    hash: Hash
    architecture: str
    file_bytes: Count
    n_layers: Positive
    tied_head: bool


class DeviceInfo(msgspec.Struct, frozen=True):
    """Which machine it was measured on."""

    id: str
    cpu: str
    n_cores: Count
    memory_bytes: Count
    kernel: str


class DiskPoint(msgspec.Struct, frozen=True):
    """Read rate at one request size and queue depth."""

    mode: Mode
    request_bytes: Count
    depth: Count
    bytes_per_s: Spread


class DiskProfile(msgspec.Struct, frozen=True):
    """The fastest way to read weights, and every way that was tried."""

    bytes_per_s: Spread
    mode: Mode
    request_bytes: Count
    depth: Count
    points: tuple[DiskPoint, ...]


class LayerProfile(msgspec.Struct, frozen=True):
    """One decoder layer: streamable bytes, small tensors that always stay resident, and times per pass."""

    bytes: Positive
    resident_bytes: Count
    io_s: Spread
    decode_compute_s: Spread
    prefill_compute_s: Spread
    release_s: Spread


class HeadProfile(msgspec.Struct, frozen=True):
    """The output head, read and multiplied in tiles."""

    bytes: Count
    tile_bytes: Count
    io_s: Spread
    decode_compute_s: Spread
    prefill_compute_s: Spread
    release_s: Spread


class EmbeddingProfile(msgspec.Struct, frozen=True):
    """The input embedding; io_s is the time to read one row."""

    bytes: Count
    row_bytes: Count
    io_s: Spread


class MemoryProfile(msgspec.Struct, frozen=True):
    """What a run needs besides weights, measured at ctx_tokens and ubatch_tokens.

    prompt_bytes is the part of compute_bytes that only a prompt needs: weights take its place afterwards. The two
    figures per token are what those grow by for each position of the context. filter_process_bytes: what a run that
    filters keys and values takes on top of process_bytes. unused_bytes: the part of process_bytes that only prompts
    use.
    """

    process_bytes: Count
    ctx_tokens: Count
    ubatch_tokens: Count
    kv_bytes: Count
    compute_bytes: Count
    min_window_bytes: Positive
    margin_bytes: Count
    prompt_bytes: Count = 0
    compute_bytes_per_token: Count = 0
    prompt_bytes_per_token: Count = 0
    filter_process_bytes: Count = 0
    unused_bytes: Count = 0


class KvLayer(msgspec.Struct, frozen=True):
    """Bytes of one position's keys and values (f16) in one layer; all_positions: it has no sliding window."""

    layer: Count
    key_bytes: Positive
    value_bytes: Positive
    all_positions: bool


class KvProfile(msgspec.Struct, frozen=True):
    """A model's cache of keys and values, layer by layer. n_heads: of the queries."""

    n_heads: Positive
    layers: tuple[KvLayer, ...]


class BatchProfile(msgspec.Struct, frozen=True):
    """A pass over one token of each of n_texts, and the choice of the tokens that follow.

    pass_bytes: buffers, logits, samplers, copies of keys and values. prompt_bytes: what prompts take on top.
    streamed_s: with everything streamed, without its waits. resident_s: with everything in memory; None where there
    was no room. Both with 64 positions of each text; position_s: what a position more of one text adds.
    """

    n_texts: Annotated[int, msgspec.Meta(ge=2)]
    pass_bytes: Count
    prompt_bytes: Count
    streamed_s: Spread
    resident_s: Spread | None
    position_s: Quantity


class ModelProfile(msgspec.Struct, frozen=True):
    """Everything measured about one model on one machine. kv: None where its cache cannot be filtered.

    batches: of several texts, few to many; none where there was no room, or the model's texts cannot share a cache.
    """

    schema: int
    model: ModelInfo
    device: DeviceInfo
    versions: dict[str, str]
    disk: DiskProfile
    layers: tuple[LayerProfile, ...]
    head: HeadProfile
    embedding: EmbeddingProfile
    prefill_tokens: Positive
    overhead_s: Spread
    kv_bytes_per_token: Count
    kv: KvProfile | None
    memory: MemoryProfile
    floor_bytes: Count
    batches: tuple[BatchProfile, ...] = ()

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema} is not {SCHEMA}")
        if len(self.layers) != self.model.n_layers:
            raise ValueError(f"the model has {self.model.n_layers} layers but {len(self.layers)} were measured")
        if self.disk.bytes_per_s.mean <= 0:
            raise ValueError("the disk's bytes_per_s is 0")

    @property
    def machine(self) -> Machine:
        """What a run compares itself with."""
        units: list[LayerProfile | HeadProfile] = [*self.layers, self.head]
        compute_s = sum(unit.decode_compute_s.mean for unit in units) + self.overhead_s.mean
        return Machine(self.disk.bytes_per_s.mean, compute_s)

    def checked(self, paths: Sequence[Path]) -> ModelProfile:
        """This profile. Raises ProfileError where it was measured with buffered reads and these files of the model have
        direct ones, which a run uses."""
        if self.disk.mode == BUFFERED and has_direct_reads(paths):
            raise ProfileError("it was measured with buffered reads, a run reads directly", PROFILE_AGAIN)
        return self

    @property
    def knows_memory(self) -> bool:
        """Whether what a process takes was measured; a profile of the source system has the layers only."""
        return self.memory.process_bytes > 0

    def check_model(self, model_hash: int) -> None:
        """Raise ProfileError unless this profile is of the model with that hash (0 on either side: unknown, passes)."""
        if model_hash and self.model.hash and model_hash != self.model.hash:
            raise ProfileError(f"the profile is of another model ({self.model.name})", PROFILE_AGAIN)


class _Header(msgspec.Struct):
    schema: int


def decode_profile(data: bytes, source: str = "the profile") -> ModelProfile:
    """The profile in JSON bytes; source names it in errors. Raises ProfileError."""
    try:
        schema = msgspec.json.decode(data, type=_Header).schema
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{source} is not a profile: {error}", PROFILE_AGAIN) from None
    if schema != SCHEMA:
        raise ProfileError(f"{source} has schema {schema}, this program reads schema {SCHEMA}", PROFILE_AGAIN)
    try:
        return msgspec.json.decode(data, type=ModelProfile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{source} cannot be used: {error}", PROFILE_AGAIN) from None


def load_profile(path: str | os.PathLike[str]) -> ModelProfile:
    """The profile in a JSON file. Raises ProfileError."""
    return decode_profile(read_whole(path), str(path))


def read_whole(path: str | os.PathLike[str]) -> bytes:
    """A profile's file, never a pipe or a device that has no end. Raises ProfileError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(fd, "rb") as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ProfileError(f"{path} is not a regular file", "give the JSON file of a profile")
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"cannot read {path}: {error.strerror}", "make a profile with `h2o profile`") from None
    if len(data) > _MOST_BYTES:
        raise ProfileError(f"{path} is too long for a profile", "give the JSON file of a profile")
    return data


def save_profile(profile: ModelProfile, path: str | os.PathLike[str]) -> None:
    """Write the profile whole: a temporary file beside the target, then a rename. Raises ProfileError."""
    write_whole(path, msgspec.json.format(msgspec.json.encode(profile), indent=1) + b"\n")


def write_whole(path: str | os.PathLike[str], data: bytes) -> None:
    """Replace a file by data in one step, so a reader sees the old or the new one. Raises ProfileError."""
    target = Path(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
            temporary = file.name
            file.write(data)
        os.replace(temporary, target)
    except OSError as error:
        if temporary is not None:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        raise ProfileError(f"cannot write {target}: {error.strerror}", "give another file with -o") from None
