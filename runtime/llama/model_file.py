"""The index of a GGUF model: which bytes of which file belong to which layer.

Parsing is done by llama.cpp's own C functions; nothing but the header is read. Every promise of the header that the
rest of the program relies on (offsets, sizes, layer numbers) is checked here once.
"""

from __future__ import annotations

import ctypes
import os
import re
import stat
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from runtime.errors import LIMITS, ModelError, UsageError
from runtime.llama import abi, header
from runtime.llama.checks import check_architecture, check_parts, check_splits, check_type
from runtime.sizes import PAGE, format_size, page_down, page_up

try:
    from _blake2 import blake2b  # hashlib would load OpenSSL: 4 MB
except ImportError:
    from hashlib import blake2b

TILE_BYTES = 8 * 2**20
TILED_BYTES = 16 * 2**20  # matrices of a layer larger than this are cut into tiles, like the head
_SPLIT_NAME = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")
_BLOCK_NAME = re.compile(r"^blk\.(\d+)\.(.+)$")
_PRODUCT_NAME = re.compile(r"^blk\.\d+\.(attn_(q|k|v|qkv|output)|ffn_(up|gate|down))\.weight$")
_HEAD_GLOBALS = ("output",)  # beginnings of names: the norm before the head, its bias
_EMBEDDING_GLOBALS = ("position_embd.", "token_types.")
_USE_ORDER = (
    "attn_q.",
    "attn_qkv.",
    "attn_v.",
    "attn_k.",
    "attn_",
    "attn_output.",
    "ffn_up.",
    "ffn_gate.",
    "ffn_",
    "ffn_down.",
)


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file. n_rows rows of row_bytes bytes; the first row is at `offset` of file number `file`."""

    name: str
    file: int
    offset: int
    n_bytes: int
    type_name: str
    shape: tuple[int, ...]
    row_bytes: int

    @property
    def n_rows(self) -> int:
        """Rows of the tensor seen as a matrix."""
        return self.n_bytes // self.row_bytes


@dataclass(frozen=True)
class Piece:
    """The unit of residency: a tensor, or a range of its rows. `number` is its place in the use order."""

    number: int
    layer: int
    tensor: TensorInfo
    first_row: int
    n_rows: int

    @property
    def offset(self) -> int:
        """First byte in the file."""
        return self.tensor.offset + self.first_row * self.tensor.row_bytes

    @property
    def n_bytes(self) -> int:
        """Bytes of weights."""
        return self.n_rows * self.tensor.row_bytes

    @property
    def span(self) -> tuple[int, int]:
        """The file range to read: [start, end), widened to whole pages."""
        return page_down(self.offset), page_up(self.offset + self.n_bytes)

    @cached_property  # a layout asks for it thousands of times
    def span_bytes(self) -> int:
        """Bytes of the span, which is also what the piece takes in memory."""
        start, end = self.span
        return end - start


@dataclass(frozen=True)
class Layer:
    """A group of pieces that is streamed, and the small tensors of the same layer that always stay in memory."""

    index: int
    pieces: tuple[Piece, ...]
    small: tuple[TensorInfo, ...] = ()


@dataclass(frozen=True)
class ModelFile:
    """A GGUF model on disk, in one file or several; or the part of it that this process owns (`owned`).

    Of a part, `layers`, `head`, `row_tables` and `globals` are what is owned; numbers of layers and pieces stay those
    of the whole model, and so do paths, sizes and `tensors`.
    """

    paths: tuple[Path, ...]
    file_sizes: tuple[int, ...]
    data_offsets: tuple[int, ...]
    architecture: str
    name: str
    tensors: tuple[TensorInfo, ...]
    layers: tuple[Layer, ...]
    head: Layer
    row_tables: tuple[TensorInfo, ...]  # input embeddings: only the rows of the current tokens are read
    globals: tuple[TensorInfo, ...]  # small tensors outside the layers
    tied_head: bool
    integers: dict[str, int]
    tokenizer: str
    n_byte_tokens: int
    hash: int = field(default=0)

    @classmethod
    def open(cls, path: str | Path) -> ModelFile:
        """Index the model at path. Raises ModelError when it is missing, cut, hostile or not a GGUF."""
        return _Indexer(Path(path)).index()

    def owned(self, layers: Collection[int], *, head: bool, embedding: bool) -> ModelFile:
        """The part with these layers (by number), with or without the head and the input embedding.

        It is a model of its own to plans, profiles and smallest budgets, so its hash is another one; that of everything
        is this model itself. Small tensors outside the layers belong to the head or the embedding, or else to every
        part. Raises UsageError where a layer is not there.
        """
        wrong = set(layers) - {layer.index for layer in self.layers}
        if wrong:
            raise UsageError(f"there is no layer {min(wrong)} in {self.path}", f"it has {len(self.layers)} layers")
        if len(set(layers)) == len(self.layers) and head and embedding:
            return self
        foreign = (() if head else _HEAD_GLOBALS) + (() if embedding else _EMBEDDING_GLOBALS)
        kept = sorted(set(layers))
        digest = blake2b(f"{self.hash} {kept} {head} {embedding}".encode(), digest_size=8).digest()
        return replace(
            self,
            layers=tuple(layer for layer in self.layers if layer.index in layers),
            head=self.head if head else Layer(self.head.index, ()),
            row_tables=self.row_tables if embedding else (),
            globals=tuple(info for info in self.globals if not info.name.startswith(foreign)),
            hash=int.from_bytes(digest, "little") >> 1,
        )

    @property
    def path(self) -> Path:
        """The file the user named."""
        return self.paths[0]

    @property
    def n_layers(self) -> int:
        """How many layers are here; `head.index` is how many the whole model has."""
        return len(self.layers)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(self.file_sizes)

    @property
    def groups(self) -> tuple[Layer, ...]:
        """The streamable groups in the order of their use: every layer, then the head (in a part maybe empty)."""
        return (*self.layers, self.head)

    @property
    def pieces(self) -> Iterator[Piece]:
        """All pieces in the expected order of their use."""
        return (piece for group in self.groups for piece in group.pieces)

    @property
    def small_tensors(self) -> Iterator[TensorInfo]:
        """Tensors that always stay in memory."""
        yield from self.globals
        for layer in self.groups:
            yield from layer.small

    def hyper_parameter(self, key: str) -> int:
        """An integer of the header by its name after the architecture, e.g. "embedding_length"; 0: not there."""
        return self.integers.get(key, 0)


def _split_paths(path: Path) -> list[Path]:
    match = _SPLIT_NAME.match(path.name)
    if not match:
        return [path]
    stem, _, total = match.groups()
    return [path.with_name(f"{stem}-{i:05d}-of-{total}.gguf") for i in range(1, int(total) + 1)]


def _check_file(path: Path) -> int:
    """The size of a plausible GGUF file. Raises ModelError."""
    choose = "give the path of a GGUF model file"
    try:
        status = path.stat()
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", LIMITS.get(error.errno or 0, choose)) from None
    if stat.S_ISDIR(status.st_mode):
        raise ModelError(f"{path} is a directory", choose)
    if not stat.S_ISREG(status.st_mode):
        raise ModelError(f"{path} is not a regular file", choose)
    if status.st_size == 0:
        raise ModelError(f"{path} is empty", "download the model again")
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", LIMITS.get(error.errno or 0, choose)) from None
    if magic != b"GGUF":
        raise ModelError(
            f"{path} is not a GGUF file", "convert it with llama.cpp's convert_hf_to_gguf.py, or give another file"
        )
    if status.st_size < 24:
        raise ModelError(f"{path} is cut short ({status.st_size} bytes)", "download the model again")
    return status.st_size


class _Indexer:
    """Collects the tensors of all parts of one model and groups them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        self.integers: dict[str, int] = {}
        self.architecture = self.name = self.tokenizer = ""
        self.n_byte_tokens = 0

    def index(self) -> ModelFile:
        paths = _split_paths(self.path)
        check_parts(paths)
        sizes, data_offsets = [], []
        for number, path in enumerate(paths):
            size = _check_file(path)
            data_offsets.append(self._read_part(number, len(paths), path, size))
            sizes.append(size)
        layers, globals_, tables, head = self._group()
        return ModelFile(
            paths=tuple(paths),
            file_sizes=tuple(sizes),
            data_offsets=tuple(data_offsets),
            architecture=self.architecture,
            name=self.name or self.path.stem,
            tensors=tuple(self.tensors.values()),
            layers=layers,
            head=head,
            row_tables=tables,
            globals=globals_,
            tied_head="output.weight" not in self.tensors,
            integers=self.integers,
            tokenizer=self.tokenizer,
            n_byte_tokens=self.n_byte_tokens,
            hash=_model_hash(paths, sizes, data_offsets),
        )

    def _read_part(self, number: int, n_parts: int, path: Path, size: int) -> int:
        """Take the tensors of one file; returns where its data begins."""
        tensor_context = ctypes.c_void_p()
        abi.take_log()
        parameters = abi.GgufInitParams(True, ctypes.pointer(tensor_context))
        gguf = abi.gguf_init_from_file(os.fsencode(path), parameters)
        if not gguf:
            reason = (abi.take_log() or ["the header cannot be read"])[0].split(": ", 1)[-1]
            raise ModelError(f"{path} is cut or damaged ({reason})", "download the model again")
        try:
            shapes = header.shapes(tensor_context)
            if number == 0:
                check_splits(path, n_parts, header.integer(gguf, "split.count") or 0)
                self._read_metadata(gguf)
            data_offset = int(abi.gguf_get_data_offset(gguf))
            for i in range(abi.gguf_get_n_tensors(gguf)):
                self._take_tensor(gguf, i, number, path, size, data_offset, shapes)
        finally:
            abi.gguf_free(gguf)
            if tensor_context:
                abi.ggml_free(tensor_context)
        return data_offset

    def _take_tensor(
        self,
        gguf: int,
        i: int,
        number: int,
        path: Path,
        size: int,
        data_offset: int,
        shapes: dict[str, tuple[int, ...]],
    ) -> None:
        name = abi.gguf_get_tensor_name(gguf, i).decode(errors="replace")
        n_bytes = int(abi.gguf_get_tensor_size(gguf, i))
        offset = data_offset + int(abi.gguf_get_tensor_offset(gguf, i))
        if offset + n_bytes > size:
            missing = format_size(offset + n_bytes - size)
            raise ModelError(
                f"{path} is cut short: tensor {name} ends {missing} behind the file", "download the model again"
            )
        if name in self.tensors or n_bytes == 0:
            raise ModelError(f"{path} is damaged: tensor {name} is there twice or empty", "download the model again")
        shape, type_id = shapes[name], abi.gguf_get_tensor_type(gguf, i)
        check_type(path, name, type_id)
        self.tensors[name] = TensorInfo(
            name=name,
            file=number,
            offset=offset,
            n_bytes=n_bytes,
            type_name=abi.ggml_type_name(type_id).decode(),
            shape=shape,
            row_bytes=int(abi.ggml_row_size(type_id, shape[0])),
        )

    def _read_metadata(self, gguf: int) -> None:
        self.architecture = header.string(gguf, "general.architecture")
        if not self.architecture:
            raise ModelError(f"{self.path} names no architecture", "give a model file (not an adapter or a tokenizer)")
        check_architecture(self.path, self.architecture)
        self.name = header.string(gguf, "general.name")
        self.tokenizer = header.string(gguf, "tokenizer.ggml.model")
        self.n_byte_tokens = header.count_byte_tokens(gguf)
        for key in (
            "block_count",
            "context_length",
            "embedding_length",
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
            "attention.key_length",
            "attention.sliding_window",
            "expert_count",
        ):
            value = header.integer(gguf, f"{self.architecture}.{key}")
            if value is not None:
                self.integers[key] = value

    def _group(self) -> tuple[tuple[Layer, ...], tuple[TensorInfo, ...], tuple[TensorInfo, ...], Layer]:
        blocks: dict[int, list[TensorInfo]] = {}
        globals_, tables = [], []
        head = self.tensors.get("output.weight") or self.tensors.get("token_embd.weight")
        for info in self.tensors.values():
            match = _BLOCK_NAME.match(info.name)
            if match:
                blocks.setdefault(int(match.group(1)), []).append(info)
            elif info.name in ("token_embd.weight", "per_layer_token_embd.weight"):
                tables.append(info)
            elif info is not head:
                globals_.append(info)
        if head is None or not blocks or sorted(blocks) != list(range(len(blocks))):
            found = f"{len(blocks)} layers, {'an' if head else 'no'} output head"
            raise ModelError(f"{self.path} is not a complete language model ({found})", "give a full text model")
        layers, number = [], 0
        for i in range(len(blocks)):
            layer = _layer(i, blocks[i], number)
            number += len(layer.pieces)
            layers.append(layer)
        largest = max((p.n_bytes for layer in layers for p in layer.pieces), default=TILE_BYTES)
        tiles = _tiles(head, len(layers), number, min(TILE_BYTES, largest))
        return tuple(layers), tuple(globals_), tuple(tables), Layer(len(layers), tiles)


def _use_rank(info: TensorInfo) -> int:
    """Where in its layer a tensor is probably used; the store learns the true order in the first pass."""
    suffix = info.name.split(".", 2)[2]
    exact = [i for i, part in enumerate(_USE_ORDER) if part.endswith(".") and suffix.startswith(part)]
    loose = [i for i, part in enumerate(_USE_ORDER) if suffix.startswith(part)]
    return (exact or loose or [len(_USE_ORDER)])[0]


def _is_small(info: TensorInfo) -> bool:
    return info.n_bytes < PAGE or all(n == 1 for n in info.shape[1:])


def _layer(index: int, tensors: list[TensorInfo], number: int) -> Layer:
    large = sorted((t for t in tensors if not _is_small(t)), key=lambda t: (_use_rank(t), t.offset))
    pieces: list[Piece] = []
    for info in large:
        tiled = info.n_bytes > TILED_BYTES and info.shape[2:] == (1, 1) and _PRODUCT_NAME.match(info.name)
        pieces += _tiles(info, index, number + len(pieces), TILE_BYTES if tiled else info.n_bytes)
    return Layer(index, tuple(pieces), tuple(t for t in tensors if _is_small(t)))


def _tiles(info: TensorInfo, layer: int, number: int, tile_bytes: int) -> tuple[Piece, ...]:
    """A matrix in pieces of about tile_bytes: whole multiples of 16 rows, the last one what remains."""
    if info.n_bytes <= tile_bytes:
        return (Piece(number, layer, info, 0, info.n_rows),)
    rows = max(16, tile_bytes // info.row_bytes // 16 * 16)
    starts = range(0, info.n_rows, rows)
    return tuple(
        Piece(number + i, layer, info, start, min(rows, info.n_rows - start)) for i, start in enumerate(starts)
    )


def _model_hash(paths: list[Path], sizes: list[int], data_offsets: list[int]) -> int:
    """63 bits over the headers, the sizes and eight samples of the weights of every file."""
    digest = blake2b(digest_size=8)
    for path, size, start in zip(paths, sizes, data_offsets, strict=True):
        digest.update(size.to_bytes(8, "little"))
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead into the weights
            for offset in range(0, start, 2**20):
                digest.update(os.pread(fd, min(2**20, start - offset), offset))
            for i in range(8):
                digest.update(os.pread(fd, 4096, start + (size - start) * i // 8))
        finally:
            os.close(fd)
    return int.from_bytes(digest.digest(), "little") >> 1
