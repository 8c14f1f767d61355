"""The only place that knows struct layouts of the pinned llama.cpp libraries.

Importing this module loads llama.cpp, sets what has to be set before and right after that (OpenMP wait policy, malloc
arenas, abort messages), and checks every layout used against the libraries' own answers. Any other version ends in one
clear EngineError instead of undefined behaviour.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import re
import struct
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.errors import Cancelled, EngineError

PINNED_VERSION = "0.3.36"

# libgomp reads this when it is loaded. Threads must spin for the microseconds between two nodes (passive waiting costs
# 60 % more per token here) and the fraction of a millisecond between two tokens (a resident 0.5B q8_0 model: 8 % slower
# with 1000), and must not spin through a wait for the disk, where they would take the readers' cores.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

_libc = ctypes.CDLL(None, use_errno=True)
if hasattr(_libc, "mallopt"):
    _M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8
    _libc.mallopt(_M_ARENA_MAX, 1)
    _libc.mallopt(_M_MMAP_THRESHOLD, 256 * 1024)


CACHE_LINE = 64
aligned_alloc = _libc.aligned_alloc
aligned_alloc.restype, aligned_alloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t, ctypes.c_size_t]


def _bindings() -> tuple[Any, Path, str]:
    """llama-cpp-python's ctypes bindings alone, their folder and version.

    The package's own __init__ would bring numpy, jinja2 and a server's formats: 23 MB that computing does not need.
    Whoever imports llama_cpp later gets the whole package with these same bindings.
    """
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise EngineError("llama-cpp-python is not installed", f"pip install llama-cpp-python=={PINNED_VERSION}")
    folder = Path(spec.submodule_search_locations[0])
    version = re.search(r'__version__ = "([^"]+)"', (folder / "__init__.py").read_text())
    stand_in = None
    if "llama_cpp" not in sys.modules:
        stand_in = sys.modules["llama_cpp"] = ModuleType("llama_cpp")
        stand_in.__path__ = [str(folder)]
    try:
        bindings = import_module("llama_cpp.llama_cpp")
    except Cancelled:
        raise
    except Exception as error:
        raise EngineError(
            f"llama-cpp-python cannot be loaded: {error}",
            f"reinstall it: pip install --force-reinstall llama-cpp-python=={PINNED_VERSION}",
        ) from error
    finally:
        if stand_in:
            del sys.modules["llama_cpp"]
    return bindings, folder / "lib", version.group(1) if version else "of unknown version"


llama, LIB_DIR, FOUND_VERSION = _bindings()


def _load(name: str) -> ctypes.CDLL:
    """The copy of a ggml library that llama.cpp itself is linked to (the soname ending in .so.0)."""
    path = LIB_DIR / f"{name}.so.0"
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise EngineError(
            f"{path.name} of llama-cpp-python cannot be loaded: {error}", "reinstall h2o on Linux"
        ) from error


ggml_base = _load("libggml-base")
ggml_cpu = _load("libggml-cpu")

POINTER = ctypes.c_void_p


def bind(library: ctypes.CDLL, name: str, result: Any, *arguments: Any) -> Any:
    """A C function with its types set. Raises EngineError when the library has no such function."""
    try:
        function = getattr(library, name)
    except AttributeError:
        raise _wrong_version(f"{name} is missing") from None
    function.restype, function.argtypes = result, list(arguments)
    return function


def _wrong_version(what: str) -> EngineError:
    return EngineError(
        f"llama-cpp-python {FOUND_VERSION} does not fit this program ({what})",
        f"pip install llama-cpp-python=={PINNED_VERSION}",
    )


class Tensor(ctypes.Structure):
    """struct ggml_tensor."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", POINTER),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", POINTER * 10),
        ("view_src", POINTER),
        ("view_offs", ctypes.c_size_t),
        ("data", POINTER),
        ("name", ctypes.c_char * 64),
        ("extra", POINTER),
        ("padding", ctypes.c_char * 8),
    ]


TENSOR_BYTES = ctypes.sizeof(Tensor)
SRC_OFFSET = Tensor.src.offset
OP_OFFSET = Tensor.op.offset
FLAGS_OFFSET = Tensor.flags.offset
VIEW_SRC_OFFSET = Tensor.view_src.offset
NAME_OFFSET = Tensor.name.offset
FLAG_COMPUTE = 16  # GGML_TENSOR_FLAG_COMPUTE: without it a node is passed over
SRC_BYTES = 80
unpack_src = struct.Struct("10Q").unpack

AllocBuffer = ctypes.CFUNCTYPE(POINTER, POINTER, ctypes.c_size_t)
GetName = ctypes.CFUNCTYPE(POINTER, POINTER)
GetAlignment = ctypes.CFUNCTYPE(ctypes.c_size_t, POINTER)
GetBase = ctypes.CFUNCTYPE(POINTER, POINTER)
InitTensor = ctypes.CFUNCTYPE(ctypes.c_int, POINTER, POINTER)
SetTensor = ctypes.CFUNCTYPE(None, POINTER, POINTER, POINTER, ctypes.c_size_t, ctypes.c_size_t)
Clear = ctypes.CFUNCTYPE(None, POINTER, ctypes.c_uint8)
EvalCallback = llama.ggml_backend_sched_eval_callback


class BufferType(ctypes.Structure):
    """struct ggml_backend_buffer_type with its interface."""

    _fields_ = [
        ("get_name", POINTER),
        ("alloc_buffer", POINTER),
        ("get_alignment", POINTER),
        ("get_max_size", POINTER),
        ("get_alloc_size", POINTER),
        ("is_host", POINTER),
        ("device", POINTER),
        ("context", POINTER),
    ]


class Buffer(ctypes.Structure):
    """struct ggml_backend_buffer with its interface."""

    _fields_ = [
        ("free_buffer", POINTER),
        ("get_base", POINTER),
        ("init_tensor", POINTER),
        ("memset_tensor", POINTER),
        ("set_tensor", POINTER),
        ("get_tensor", POINTER),
        ("set_tensor_2d", POINTER),
        ("get_tensor_2d", POINTER),
        ("cpy_tensor", POINTER),
        ("clear", POINTER),
        ("reset", POINTER),
        ("buft", POINTER),
        ("context", POINTER),
        ("size", ctypes.c_size_t),
        ("usage", ctypes.c_int),
    ]


class Backend(ctypes.Structure):
    """struct ggml_backend with its interface (16 functions)."""

    _fields_ = [("guid", POINTER), ("interface", POINTER * 16), ("device", POINTER), ("context", POINTER)]


class CpuBackend(ctypes.Structure):
    """struct ggml_backend_cpu_context: what a CPU backend keeps; work_data is its scratch memory."""

    _fields_ = [
        ("n_threads", ctypes.c_int),
        ("threadpool", POINTER),
        ("work_data", POINTER),
        ("work_size", ctypes.c_size_t),
    ]


class GraphPlan(ctypes.Structure):
    """struct ggml_cplan: what computing a graph takes; work_size is its scratch."""

    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", POINTER),
        ("n_threads", ctypes.c_int),
        ("pointers", POINTER * 3),
        ("use_ref", ctypes.c_bool),
    ]


class BufferTypeOverride(ctypes.Structure):
    """struct llama_model_tensor_buft_override."""

    _fields_ = [("pattern", ctypes.c_char_p), ("buft", POINTER)]


class TypeTraitsCpu(ctypes.Structure):
    """struct ggml_type_traits_cpu: what the CPU code can do with a type."""

    _fields_ = [
        ("from_float", POINTER),
        ("vec_dot", POINTER),
        ("vec_dot_type", ctypes.c_int),
        ("nrows", ctypes.c_int64),
    ]


class GgufInitParams(ctypes.Structure):
    """struct gguf_init_params."""

    _fields_ = [("no_alloc", ctypes.c_bool), ("ctx", ctypes.POINTER(POINTER))]


class GgmlInitParams(ctypes.Structure):
    """struct ggml_init_params."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", POINTER), ("no_alloc", ctypes.c_bool)]


ggml_tensor_overhead = bind(ggml_base, "ggml_tensor_overhead", ctypes.c_size_t)
ggml_init = bind(ggml_base, "ggml_init", POINTER, GgmlInitParams)
ggml_free = bind(ggml_base, "ggml_free", None, POINTER)
ggml_new_tensor_2d = bind(
    ggml_base, "ggml_new_tensor_2d", POINTER, POINTER, ctypes.c_int, ctypes.c_int64, ctypes.c_int64
)
ggml_set_name = bind(ggml_base, "ggml_set_name", POINTER, POINTER, ctypes.c_char_p)
ggml_get_data = bind(ggml_base, "ggml_get_data", POINTER, POINTER)
ggml_nbytes = bind(ggml_base, "ggml_nbytes", ctypes.c_size_t, POINTER)
ggml_blck_size = bind(ggml_base, "ggml_blck_size", ctypes.c_int64, ctypes.c_int)
ggml_row_size = bind(ggml_base, "ggml_row_size", ctypes.c_size_t, ctypes.c_int, ctypes.c_int64)
ggml_op_name = bind(ggml_base, "ggml_op_name", ctypes.c_char_p, ctypes.c_int)
ggml_type_name = bind(ggml_base, "ggml_type_name", ctypes.c_char_p, ctypes.c_int)
ggml_mul_mat = bind(ggml_base, "ggml_mul_mat", POINTER, POINTER, POINTER, POINTER)
ggml_new_graph = bind(ggml_base, "ggml_new_graph", POINTER, POINTER)
ggml_build_forward_expand = bind(ggml_base, "ggml_build_forward_expand", None, POINTER, POINTER)
ggml_graph_add_node = bind(ggml_base, "ggml_graph_add_node", None, POINTER, POINTER)
ggml_graph_clear = bind(ggml_base, "ggml_graph_clear", None, POINTER)
ggml_graph_n_nodes = bind(ggml_base, "ggml_graph_n_nodes", ctypes.c_int, POINTER)
ggml_graph_nodes = bind(ggml_base, "ggml_graph_nodes", POINTER, POINTER)
ggml_graph_plan = bind(ggml_cpu, "ggml_graph_plan", GraphPlan, POINTER, ctypes.c_int, POINTER)
ggml_tiled_wdata_size = bind(ggml_cpu, "ggml_tiled_wdata_size", ctypes.c_size_t, ctypes.c_int, POINTER)
ggml_get_first_tensor = bind(ggml_base, "ggml_get_first_tensor", POINTER, POINTER)
ggml_get_next_tensor = bind(ggml_base, "ggml_get_next_tensor", POINTER, POINTER, POINTER)
ggml_backend_graph_compute = bind(ggml_base, "ggml_backend_graph_compute", ctypes.c_int, POINTER, POINTER)
ggml_backend_free = bind(ggml_base, "ggml_backend_free", None, POINTER)
ggml_backend_cpu_buffer_type = bind(ggml_base, "ggml_backend_cpu_buffer_type", POINTER)
ggml_backend_cpu_buffer_from_ptr = bind(
    ggml_base, "ggml_backend_cpu_buffer_from_ptr", POINTER, POINTER, ctypes.c_size_t
)
ggml_backend_cpu_repack_buffer_type = bind(ggml_cpu, "_Z35ggml_backend_cpu_repack_buffer_typev", POINTER)
ggml_backend_buft_alloc_buffer = bind(ggml_base, "ggml_backend_buft_alloc_buffer", POINTER, POINTER, ctypes.c_size_t)
ggml_backend_buffer_free = bind(ggml_base, "ggml_backend_buffer_free", None, POINTER)
ggml_backend_cpu_init = bind(ggml_cpu, "ggml_backend_cpu_init", POINTER)
ggml_backend_cpu_set_n_threads = bind(ggml_cpu, "ggml_backend_cpu_set_n_threads", None, POINTER, ctypes.c_int)
ggml_vec_dot_f32 = bind(ggml_cpu, "ggml_vec_dot_f32", None, ctypes.c_int, *[POINTER, ctypes.c_size_t] * 3, ctypes.c_int)
ggml_vec_soft_max_f32 = bind(
    ggml_cpu, "ggml_vec_soft_max_f32", ctypes.c_double, ctypes.c_int, POINTER, POINTER, ctypes.c_float
)
ggml_fp32_to_fp16_row = bind(ggml_base, "ggml_fp32_to_fp16_row", None, POINTER, POINTER, ctypes.c_int64)
ggml_fp16_to_fp32_row = bind(ggml_base, "ggml_fp16_to_fp32_row", None, POINTER, POINTER, ctypes.c_int64)
_type_traits_cpu = bind(ggml_cpu, "ggml_get_type_traits_cpu", POINTER, ctypes.c_int)

ggml_backend_sched_get_n_backends = bind(ggml_base, "ggml_backend_sched_get_n_backends", ctypes.c_int, POINTER)
ggml_backend_sched_get_backend = bind(ggml_base, "ggml_backend_sched_get_backend", POINTER, POINTER, ctypes.c_int)
ggml_backend_sched_set_eval_callback = bind(
    ggml_base, "ggml_backend_sched_set_eval_callback", None, POINTER, EvalCallback, POINTER
)
llama_graph_reserve = bind(
    llama._lib, "_Z19llama_graph_reserveP13llama_contextjjj", POINTER, POINTER, *[ctypes.c_uint32] * 3
)
llama_context_get_sched = bind(llama._lib, "_ZNK13llama_context9get_schedEv", POINTER, POINTER)

gguf_init_from_file = bind(ggml_base, "gguf_init_from_file", POINTER, ctypes.c_char_p, GgufInitParams)
gguf_free = bind(ggml_base, "gguf_free", None, POINTER)
gguf_get_n_tensors = bind(ggml_base, "gguf_get_n_tensors", ctypes.c_int64, POINTER)
gguf_get_tensor_name = bind(ggml_base, "gguf_get_tensor_name", ctypes.c_char_p, POINTER, ctypes.c_int64)
gguf_get_tensor_offset = bind(ggml_base, "gguf_get_tensor_offset", ctypes.c_size_t, POINTER, ctypes.c_int64)
gguf_get_tensor_size = bind(ggml_base, "gguf_get_tensor_size", ctypes.c_size_t, POINTER, ctypes.c_int64)
gguf_get_tensor_type = bind(ggml_base, "gguf_get_tensor_type", ctypes.c_int, POINTER, ctypes.c_int64)
gguf_get_data_offset = bind(ggml_base, "gguf_get_data_offset", ctypes.c_size_t, POINTER)
gguf_find_key = bind(ggml_base, "gguf_find_key", ctypes.c_int64, POINTER, ctypes.c_char_p)
gguf_get_kv_type = bind(ggml_base, "gguf_get_kv_type", ctypes.c_int, POINTER, ctypes.c_int64)
gguf_get_val_str = bind(ggml_base, "gguf_get_val_str", ctypes.c_char_p, POINTER, ctypes.c_int64)
gguf_get_val_data = bind(ggml_base, "gguf_get_val_data", POINTER, POINTER, ctypes.c_int64)
gguf_get_arr_type = bind(ggml_base, "gguf_get_arr_type", ctypes.c_int, POINTER, ctypes.c_int64)
gguf_get_arr_n = bind(ggml_base, "gguf_get_arr_n", ctypes.c_size_t, POINTER, ctypes.c_int64)
gguf_get_arr_data = bind(ggml_base, "gguf_get_arr_data", POINTER, POINTER, ctypes.c_int64)


def cpu_traits(type_id: int) -> TypeTraitsCpu:
    """What the CPU code can do with a type."""
    return TypeTraitsCpu.from_address(_type_traits_cpu(type_id))


def has_dot_product(type_id: int) -> bool:
    """Whether weights of this type can be multiplied on the CPU."""
    return cpu_traits(type_id).vec_dot is not None


def cpu_backend(address: int) -> CpuBackend:
    """What a CPU backend keeps."""
    return CpuBackend.from_address(Backend.from_address(address).context)


def op_code(name: bytes) -> int:
    """The number of a ggml operation, looked up by its name."""
    for code in range(256):
        found = ggml_op_name(code)
        if found == name:
            return code
        if found is None or found == b"":
            break
    raise _wrong_version(f"operation {name.decode()} is unknown")


def _self_check() -> None:
    """Compare the layouts above with what the libraries say of a tensor they made. Raises EngineError."""
    if FOUND_VERSION != PINNED_VERSION:
        raise _wrong_version(f"this program knows {PINNED_VERSION}")
    object_header = 32
    if ggml_tensor_overhead() != TENSOR_BYTES + object_header:
        raise _wrong_version("struct ggml_tensor has another size")
    context = ggml_init(GgmlInitParams(64 * 1024, None, False))
    address = ggml_new_tensor_2d(context, 0, 48, 5)
    ggml_set_name(address, b"layout check")
    tensor = Tensor.from_address(address)
    facts = (
        tensor.name == b"layout check",
        tensor.data == ggml_get_data(address),
        tuple(tensor.ne) == (48, 5, 1, 1),
        tensor.nb[1] == 192 and ggml_nbytes(address) == 960,
        tensor.op == OP_NONE and not any(tensor.src),
    )
    other = ggml_new_tensor_2d(context, 0, 48, 3)
    product = Tensor.from_address(ggml_mul_mat(context, address, other))
    product_facts = (product.op == OP_MUL_MAT, product.src[0] == address, product.src[1] == other)
    ggml_free(context)
    if not all(facts + product_facts):
        raise _wrong_version("struct ggml_tensor has another layout")
    backend = ggml_backend_cpu_init()
    cpu = cpu_backend(backend)
    for n_threads in (3, 5):
        ggml_backend_cpu_set_n_threads(backend, n_threads)
        if (cpu.n_threads, cpu.threadpool, cpu.work_data, cpu.work_size) != (n_threads, None, None, 0):
            raise _wrong_version("struct ggml_backend has another layout")
    ggml_backend_free(backend)


OP_NONE = op_code(b"NONE")
OP_MUL_MAT = op_code(b"MUL_MAT")
OP_MUL_MAT_ID = op_code(b"MUL_MAT_ID")
OP_GET_ROWS = op_code(b"GET_ROWS")
OP_SET_ROWS = op_code(b"SET_ROWS")
OP_FLASH_ATTN_EXT = op_code(b"FLASH_ATTN_EXT")
OP_SOFT_MAX = op_code(b"SOFT_MAX")
OP_CUSTOM = op_code(b"CUSTOM")
VIEW_OPS = frozenset(op_code(name) for name in (b"VIEW", b"RESHAPE", b"PERMUTE", b"TRANSPOSE"))
_self_check()


# --- what llama.cpp says, and what it must not do -------------------------------------------------------------------

_log_tail: list[str] = []
_SOURCE_FOLDER = re.compile(r"^/\S*/(?=[^/\s]+:\d+: )")


@llama.llama_log_callback  # type: ignore[untyped-decorator]
def _keep_log(level: int, text: bytes, _data: int) -> None:
    """Keep the last warnings and errors for our own one-line messages; print nothing."""
    if level >= 3:
        _log_tail.append(text.decode(errors="replace").strip())
        del _log_tail[:-20]


def take_log() -> list[str]:
    """The last warnings and errors of llama.cpp, oldest first; forgets them.

    Also takes the log back: the whole llama_cpp package, where something imports it, prints what llama.cpp says.
    """
    llama.llama_log_set(_keep_log, POINTER(0))
    lines = [line for line in _log_tail if line]
    _log_tail.clear()
    return lines


def _die(reason: str) -> None:
    """The last word before the C side would abort: what and what next, then a plain exit (output is flushed first)."""
    try:
        sys.stdout.flush()
        reason = _SOURCE_FOLDER.sub("", " ".join(reason.split()))
        print(f"h2o: llama.cpp cannot go on: {reason}", file=sys.stderr)
        print("  next: try another model file: this one is damaged or unusual", file=sys.stderr, flush=True)
    finally:
        os._exit(1)


# Any of ggml's threads may call it: they compute while Python's lock is free.
@ctypes.CFUNCTYPE(None, ctypes.c_char_p)  # type: ignore[untyped-decorator]
def _on_abort(message: bytes) -> None:
    _die(message.decode(errors="replace").strip().split("\n")[0])


@ctypes.CFUNCTYPE(None)  # type: ignore[untyped-decorator]
def _on_terminate() -> None:
    lines = take_log()
    _die(lines[-1] if lines else "an exception inside the library")


# Other libraries' threads and destructors run on when Python has ended and these functions are gone: so each is taken
# back before that.
_set_abort_callback = bind(ggml_base, "ggml_set_abort_callback", POINTER, POINTER)
atexit.register(_set_abort_callback, _set_abort_callback(ctypes.cast(_on_abort, POINTER)))
llama.llama_log_set(_keep_log, POINTER(0))
atexit.register(llama.llama_log_set, llama.llama_log_callback(), POINTER(0))
llama.llama_backend_init()
try:
    _set_terminate = ctypes.CDLL("libstdc++.so.6")["_ZSt13set_terminatePFvvE"]
    _set_terminate.restype, _set_terminate.argtypes = POINTER, [POINTER]
    atexit.register(_set_terminate, _set_terminate(ctypes.cast(_on_terminate, POINTER)))
except (OSError, AttributeError):
    pass  # another C++ library: an uncaught exception then ends in the library's own message
