"""The keys and values of llama.cpp's cache, layer by layer, and whether a filter can act on them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import ModelError
from runtime.llama import abi
from runtime.llama.model_file import ModelFile

_NAME = re.compile(r"^cache_([kv])_l(\d+)$")
K, V = 0, 1
_F32, _F16 = 0, 1
_KV_TYPE = "use --kv-type f16, q8_0 or q4_0"
OFF = "run without --kv-filter"


@dataclass(frozen=True)
class Rows2D:
    """One tensor of the cache: n_cells rows of row_bytes bytes, f16 or not. `root` is its ggml_tensor."""

    root: int
    row_bytes: int
    n_cells: int
    is_half: bool

    @property
    def n_bytes(self) -> int:
        """Bytes of all rows."""
        return self.row_bytes * self.n_cells

    @property
    def data(self) -> int:
        """Address of row 0."""
        return int(abi.Tensor.from_address(self.root).data)


@dataclass(frozen=True)
class CacheLayer:
    """Keys and values of one layer."""

    parts: tuple[Rows2D, Rows2D]  # K, V

    @property
    def row_bytes(self) -> int:
        """Bytes of one position."""
        return self.parts[K].row_bytes + self.parts[V].row_bytes


@dataclass(frozen=True)
class Cache:
    """All layers that have keys and values; `filterable`: those that see every position."""

    layers: Mapping[int, CacheLayer]
    filterable: tuple[int, ...]


def find_cache(groups: list[dict[str, int]], file: ModelFile, model: int) -> Cache:
    """The cache of a context. groups: cache tensors (name -> address) of each buffer, in order of creation.

    Raises ModelError for models whose state is no plain cache of keys and values.
    """
    if abi.llama.llama_model_is_recurrent(model) or abi.llama.llama_model_is_hybrid(model):
        raise ModelError(f"{file.architecture} keeps a recurrent state, which has no rows to filter", OFF)
    if file.hyper_parameter("attention.kv_lora_rank"):
        raise ModelError(f"{file.architecture} keeps compressed keys and values (MLA), which cannot be filtered", OFF)
    found = [_layers(group, file) for group in groups if group]
    windowed = abi.llama.llama_model_n_swa(model) > 0
    if not found or (windowed and len(found) < 2):
        raise ModelError(f"no layer of this {file.architecture} model sees all positions", OFF)
    layers = {layer: both for group in found for layer, both in group.items()}
    return Cache(layers, tuple(sorted(found[0])))  # the cache without a window is made first


def _layers(group: Mapping[str, int], file: ModelFile) -> dict[int, CacheLayer]:
    parts: dict[int, list[Rows2D | None]] = {}
    for name, address in group.items():
        match = _NAME.match(name)
        if not match:
            raise ModelError(f"{file.architecture} has a special cache ({name}), which cannot be filtered", OFF)
        tensor = abi.Tensor.from_address(address)
        if tensor.type == _F32:
            raise ModelError("keys and values of 32 bits are converted for every token: nothing is gained", _KV_TYPE)
        both = parts.setdefault(int(match[2]), [None, None])
        both["kv".index(match[1])] = Rows2D(address, tensor.nb[1], tensor.ne[1], tensor.type == _F16)
    layers = {}
    for layer, (keys, values) in parts.items():
        if keys is None or values is None:
            raise ModelError(f"layer {layer} has keys without values (MLA), which cannot be filtered", OFF)
        layers[layer] = CacheLayer((keys, values))
    return layers
