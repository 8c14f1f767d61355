"""Load a model into llama.cpp without its weights, and create a context whose buffers are ours.

llama.cpp maps a memory file that holds the real header and ends behind it, and copies weights from that mapping into
buffers that are address space of ours: copies that we leave out. So loading reads no weights and touches no pages for
them, however large the model is. Afterwards touching a weight that nobody has placed is a fault, never a wrong number.
`weights` gives the address of every ggml_tensor by name: a weight is present once its `data` points at bytes.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from runtime.errors import LIMITS, NO_PROC, DiskError, EngineError, H2OError, ModelError
from runtime.llama import abi
from runtime.llama.model_file import ModelFile
from runtime.memory import Region, keep_heap_small, trim_heap, view

_LOAD_MODE_MMAP = 1
_LAZY_MODE_OFF = 0
_CHUNK = 2**20


class _HeaderCopies:
    """Memory files with the headers of a model's files, at first as long as those are: llama.cpp checks that."""

    def __init__(self, model: ModelFile) -> None:
        self._ends = model.data_offsets
        self._fds: list[int] = []
        self.paths: list[bytes] = []
        for path, header_bytes, file_bytes in zip(model.paths, model.data_offsets, model.file_sizes, strict=True):
            try:
                self._copy(path, header_bytes, file_bytes)
            except BaseException as error:
                self.close()
                if isinstance(error, OSError):
                    raise EngineError(
                        f"the header of {path} cannot be copied ({error.strerror})", LIMITS.get(error.errno or 0, "")
                    ) from None
                raise

    def _copy(self, path: Path, header_bytes: int, file_bytes: int) -> None:
        fd = os.memfd_create("h2o-header", os.MFD_CLOEXEC)
        self._fds.append(fd)
        self.paths.append(f"/proc/self/fd/{fd}".encode())
        if not os.path.exists(self.paths[-1]):
            raise EngineError(*NO_PROC)
        with open(path, "rb", buffering=0) as source:
            os.posix_fadvise(source.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no read-ahead into the weights
            done = 0
            while done < header_bytes:
                part = source.read(min(_CHUNK, header_bytes - done))
                if not part:
                    raise DiskError(f"{path} became shorter while it was opened", "run again when it is complete")
                while part:
                    n_written = os.write(fd, part)
                    done, part = done + n_written, part[n_written:]
        os.ftruncate(fd, file_bytes)

    def cut(self) -> None:
        """End the files behind their headers: mapping them fills no more memory."""
        for fd, end in zip(self._fds, self._ends, strict=True):
            os.ftruncate(fd, end)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds.clear()


class _WeightBuffers:
    """The buffer type that gives llama.cpp address space instead of memory, and learns every weight's address.

    `begin` is called when the model's files were opened and are not mapped yet.
    """

    def __init__(self, begin: Callable[[], None]) -> None:
        self.regions: list[Region] = []
        self.buffers: list[int] = []
        self.weights: dict[str, list[int]] = {}
        self.error: H2OError | None = None  # why no buffer could be given: nothing passes through C
        self._begin: Callable[[], None] | None = begin
        self._name_text = ctypes.create_string_buffer(b"h2o")
        self._name = abi.GetName(self._get_name)
        self._alloc = abi.AllocBuffer(self._alloc_buffer)
        self._init = abi.InitTensor(self._init_tensor)
        self._base = abi.GetBase(self._get_base)
        self._set = abi.SetTensor(lambda *_: None)
        self.type = abi.BufferType()
        source = abi.ggml_backend_cpu_buffer_type()
        ctypes.memmove(ctypes.addressof(self.type), source, ctypes.sizeof(abi.BufferType))
        self.type.get_name = ctypes.cast(self._name, ctypes.c_void_p)
        self.type.alloc_buffer = ctypes.cast(self._alloc, ctypes.c_void_p)

    def _get_name(self, _buffer_type: int) -> int:
        """llama.cpp asks for the name whenever it has chosen this type for a weight."""
        if self._begin:
            self._begin()
            self._begin = None
        return ctypes.addressof(self._name_text)

    def _alloc_buffer(self, buffer_type: int, n_bytes: int) -> int:
        try:
            region = Region(n_bytes)
        except H2OError as error:
            self.error = error
            return 0
        address = abi.ggml_backend_cpu_buffer_from_ptr(region.address, n_bytes)
        buffer = abi.Buffer.from_address(address)
        buffer.init_tensor = ctypes.cast(self._init, ctypes.c_void_p)
        buffer.set_tensor = ctypes.cast(self._set, ctypes.c_void_p)
        buffer.get_base = ctypes.cast(self._base, ctypes.c_void_p)
        buffer.buft = buffer_type
        self.regions.append(region)
        self.buffers.append(address)
        return int(address)

    def _get_base(self, buffer: int) -> int:
        return self.regions[self.buffers.index(buffer)].address

    def _init_tensor(self, _buffer: int, tensor: int) -> int:
        name = abi.Tensor.from_address(tensor).name.decode(errors="replace")
        self.weights.setdefault(name, []).append(tensor)
        return 0

    def seal(self) -> None:
        """After the load: every weight not placed by us is a fault."""
        for region in self.regions:
            region.forbid()

    def free(self) -> None:
        for region in self.regions:
            region.free()


class HollowModel:
    """A llama_model whose weights are placed by us. `weights`: name -> addresses of its ggml_tensor structs."""

    def __init__(self, model: ModelFile) -> None:
        keep_heap_small()
        headers = _HeaderCopies(model)
        self._buffers = _WeightBuffers(headers.cut)
        self.weights = self._buffers.weights
        try:
            self.pointer = self._load(model, headers.paths)
            self._buffers.seal()
        except BaseException:
            self._buffers.free()
            raise
        finally:
            headers.close()
        trim_heap()

    def _load(self, model: ModelFile, paths: Sequence[bytes]) -> Any:
        overrides = (abi.BufferTypeOverride * 2)()
        overrides[0].pattern = b".*"
        overrides[0].buft = ctypes.addressof(self._buffers.type)
        parameters = abi.llama.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.load_mode = _LOAD_MODE_MMAP
        parameters.lazy_mode = _LAZY_MODE_OFF  # tables above 4 GiB would be left to the mapping, which has no pages
        parameters.use_extra_bufts = False
        parameters.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)  # looked at during the load only
        abi.take_log()
        if len(paths) == 1:
            pointer = abi.llama.llama_model_load_from_file(paths[0], parameters)
        else:
            names = (ctypes.c_char_p * len(paths))(*paths)
            pointer = abi.llama.llama_model_load_from_splits(names, len(paths), parameters)
        if not pointer:
            if self._buffers.error:
                raise self._buffers.error
            raise _load_error(model, dict(zip(paths, model.paths, strict=True)))
        if not self.weights:
            abi.llama.llama_model_free(pointer)
            raise EngineError("llama.cpp placed no weight in our buffers", "report this model")
        return pointer

    def free(self) -> None:
        """Free the model; contexts made from it must be freed first."""
        abi.llama.llama_model_free(self.pointer)
        self._buffers.free()


def _load_error(model: ModelFile, names: dict[bytes, Path]) -> ModelError:
    """What llama.cpp said; names: what it was given -> the user's file."""
    lines = abi.take_log()
    reason = next((line for line in lines if "error loading model" in line), lines[0] if lines else "unknown reason")
    reason = reason.split("error loading model: ")[-1].strip()
    for given, path in names.items():
        reason = path.name.join(re.split(rf"{given.decode()}\b", reason))
    if "unknown model architecture" in reason:
        return ModelError(f"{model.path}: {reason}", "this llama.cpp does not support it; convert another model")
    return ModelError(f"{model.path} cannot be loaded ({reason})", "download the model again or try another one")


class ContextBuffers:
    """Memory for everything a context allocates, lazily touched: KV cache, compute and output buffers.

    Use as a context manager around llama_init_from_model: inside, the CPU buffer type's allocations come here.
    `kv_bytes` is what was cleared: the KV cache, and the output's first row of logits. `caches` are the cache's tensors
    (name -> address), buffer by buffer. One thread makes contexts, so nothing else allocates from that type meanwhile.
    """

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self.error: H2OError | None = None  # why no buffer could be given
        self.kv_bytes = 0
        self.caches: list[dict[str, int]] = []
        self._buffers: list[int] = []
        self._cleared: list[Region] = []
        self._type = abi.BufferType.from_address(abi.ggml_backend_cpu_buffer_type())
        self._alloc = abi.AllocBuffer(self._alloc_buffer)
        self._clear = abi.Clear(self._clear_buffer)
        self._init = abi.InitTensor(self._init_tensor)
        # with ggml's 32 bytes what comes behind an odd number of tokens is read across two lines
        self._alignment = abi.GetAlignment(lambda _: abi.CACHE_LINE)

    def __enter__(self) -> ContextBuffers:
        self._original = self._type.alloc_buffer, self._type.get_alignment
        self._type.alloc_buffer = ctypes.cast(self._alloc, ctypes.c_void_p)
        self._type.get_alignment = ctypes.cast(self._alignment, ctypes.c_void_p)
        return self

    def __exit__(self, *_: object) -> None:
        self._type.alloc_buffer, self._type.get_alignment = self._original
        for address in self._buffers:
            abi.Buffer.from_address(address).init_tensor = None  # not for every node of every graph

    def _alloc_buffer(self, buffer_type: int, n_bytes: int) -> int:
        try:
            region = Region(n_bytes)
            region.use_huge_pages(0)
        except H2OError as error:
            self.error = error
            return 0
        self.regions.append(region)
        address = abi.ggml_backend_cpu_buffer_from_ptr(region.address, n_bytes)
        buffer = abi.Buffer.from_address(address)
        buffer.buft = buffer_type
        buffer.clear = ctypes.cast(self._clear, ctypes.c_void_p)
        buffer.init_tensor = ctypes.cast(self._init, ctypes.c_void_p)
        self._buffers.append(address)
        self.caches.append({})
        return int(address)

    def _init_tensor(self, buffer: int, address: int) -> int:
        tensor = abi.Tensor.from_address(address)
        if tensor.name.startswith(b"cache_") and not tensor.view_src:
            self.caches[self._buffers.index(buffer)][tensor.name.decode(errors="replace")] = address
        return 0

    def _clear_buffer(self, buffer: int, value: int) -> None:
        """llama.cpp clears its KV cache and its output at birth, and the cache when it forgets everything: fresh pages
        are zero already, later clears give the pages back."""
        size = int(abi.Buffer.from_address(buffer).size)
        base = next(r for r in self.regions if r.address == _base_of(buffer))
        if value == 0:
            base.drop(0, base.n_bytes)
        else:
            view(base.address, size)[:] = bytes([value]) * size
        if base not in self._cleared:
            self._cleared.append(base)
            self.kv_bytes += size

    @property
    def n_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(region.n_bytes for region in self.regions)

    def drop_scratch(self) -> None:
        """Give back everything but keys and values."""
        for region in self.regions:
            if region not in self._cleared:
                region.drop(0, region.n_bytes)

    def free(self) -> None:
        """Unmap; the context must have been freed before."""
        for region in self.regions:
            region.free()


def _base_of(buffer: int) -> int:
    return int(abi.Buffer.from_address(buffer).context)
