"""llama.cpp's own quantiser: a model file in another file type, and the low-bit copy that drafts for its original."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from runtime.errors import EngineError, H2OError, UsageError
from runtime.sizes import format_size

if TYPE_CHECKING:
    from runtime.llama.model_file import ModelFile

FILE_TYPES: dict[str, int] = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q8_0": 7,
    "q5_0": 8,
    "q5_1": 9,
    "q2_k": 10,
    "q4_k_s": 14,
    "q4_k_m": 15,
    "q4_k": 15,
    "q5_k_m": 17,
    "q6_k": 18,
    "iq4_nl": 25,
    "iq4_xs": 30,
}
"""File types by name and llama.cpp's number for each."""


@dataclass(frozen=True)
class CopyType:
    """A file type for copies that draft.

    bits: per weight of a matrix; odd_bits: where its rows are no multiple of 256 values, and llama.cpp takes another
    type; head_bits, odd_head_bits: of the output matrix. odds_power: a copy proposes the token that the model chooses
    about as often as that token's probability to this power.
    """

    name: str
    bits: float
    odd_bits: float
    head_bits: float
    odd_head_bits: float
    odds_power: float


COPY_TYPES = (
    CopyType("q4_k_m", 4.9, 5.7, 6.6, 8.5, odds_power=0.25),
    CopyType("q6_k", 6.6, 8.5, 6.6, 8.5, odds_power=0.12),
    CopyType("q8_0", 8.5, 8.5, 8.5, 8.5, odds_power=0.08),
)
"""The smallest first."""

_WORTH = 0.8  # a copy of more than this share of its original is no use as a draft
_BUFFER_BYTES = 8 * 2**20  # rows that llama.cpp converts at a time; it takes whole tensors unless told
_K_BLOCK = 256
_POLL_S = 0.2
_CHILD = (
    "import sys; sys.path[0] = sys.argv[1]; from runtime.llama.quantize import child; sys.exit(child(*sys.argv[2:]))"
)


def parse_file_type(name: str) -> str:
    """The file type in the spelling of FILE_TYPES; UsageError if there is none of that name."""
    kind = name.strip().lower()
    if kind not in FILE_TYPES:
        raise UsageError(f"unknown file type {name!r}", f"choose one of {', '.join(FILE_TYPES)}")
    return kind


def quantize(source: Path, target: Path, file_type: str, *, requantize: bool = False) -> None:
    """Write `source` to `target` in another file type with llama.cpp's own quantiser.

    `requantize` allows a source that is itself quantised.
    """
    from runtime.llama import abi

    params = abi.llama.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[parse_file_type(file_type)]
    params.nthread = len(os.sched_getaffinity(0))
    params.allow_requantize = requantize
    params.max_buf_size = _BUFFER_BYTES
    abi.take_log()
    status = abi.llama.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    if status != 0:
        target.unlink(missing_ok=True)
        reason = next(
            (line for line in reversed(abi.take_log()) if "fail" in line or "error" in line), "no reason given"
        )
        raise EngineError(
            f"llama.cpp could not quantise to {file_type}: {reason}", "check the free disk space, or use --type f16"
        )


# --- a low-bit copy --------------------------------------------------------------------------------------------------

Progress = Callable[[Callable[[], float]], contextlib.AbstractContextManager[object]]
"""Shows progress while a block runs; called with a function that gives the share done."""


def copy_path(file: ModelFile, kind: CopyType, folder: Path) -> Path:
    """Where a copy of a model is, once it was made."""
    return folder / f"{file.path.stem}-{file.hash:016x}-{kind.name}.gguf"


def low_bit_copy(
    file: ModelFile, kind: CopyType, folder: Path, note: Callable[[str], None], progress: Progress
) -> Path:
    """The copy of a model in `folder`, made if it is not there. Raises H2OError.

    It is made by a process of its own, so that the caller keeps to its memory budget; of several callers one makes
    it and the others wait.
    """
    target = copy_path(file, kind, folder)
    if _usable(target):
        return target
    n_bytes = copy_bytes(file, kind)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock(folder / f".{target.name}.lock", note):
            if not _usable(target):
                _check_space(folder, n_bytes)
                note(f"making a {kind.name} copy of {file.path.name}, once ({format_size(n_bytes)})")
                _make(file.path, kind, target, n_bytes, progress)
    except OSError as error:
        raise H2OError(
            f"the copy for --draft auto cannot be written to {folder}: {error.strerror}",
            "set XDG_CACHE_HOME to a folder with room, or give a draft model: --draft FILE",
        ) from None
    return target


def _usable(path: Path) -> bool:
    from runtime.errors import ModelError
    from runtime.llama.model_file import ModelFile

    try:
        return path.is_file() and bool(ModelFile.open(path).n_layers)
    except ModelError:
        return False


def copy_bytes(file: ModelFile, kind: CopyType) -> int:
    """About the size of a copy."""
    heads = [tensor.name for tensor in file.tensors if tensor.name == "output.weight"] or ["token_embd.weight"]
    n_bytes = float(sum(file.data_offsets))
    for tensor in file.tensors:
        if tensor.shape[1] == 1:  # no matrix: it stays as it is
            n_bytes += tensor.n_bytes
            continue
        is_odd = tensor.shape[0] % _K_BLOCK > 0
        if tensor.name in heads:
            bits = kind.odd_head_bits if is_odd else kind.head_bits
        else:
            bits = kind.odd_bits if is_odd else kind.bits
        n_bytes += math.prod(tensor.shape) * bits / 8
    return int(n_bytes)


def useful_copies(file: ModelFile) -> list[CopyType]:
    """The types whose copy would be much smaller than the original, the smallest first."""
    return [kind for kind in COPY_TYPES if copy_bytes(file, kind) <= _WORTH * file.n_bytes]


def _check_space(folder: Path, n_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < n_bytes:
        raise H2OError(
            f"the copy for --draft auto needs {format_size(n_bytes)} and {folder} has {format_size(free)} free",
            "free space, or set XDG_CACHE_HOME to another disk",
        )


@contextlib.contextmanager
def _lock(path: Path, note: Callable[[str], None]) -> Iterator[None]:
    """Hold a lock file; it is free again when its process ends, however it ends."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note("another process makes the copy for --draft auto: waiting for it")
            while not _taken(fd):
                time.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


def _taken(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _make(source: Path, kind: CopyType, target: Path, n_bytes: int, progress: Progress) -> None:
    """Quantise into a file beside the target and put it in place when it is complete."""
    partial = target.with_name(f".{target.name}.part")
    root = str(Path(__file__).resolve().parents[2])
    command = [sys.executable, "-c", _CHILD, root, str(source), str(partial), kind.name]

    def share() -> float:  # llama.cpp writes the file from front to back
        return partial.stat().st_size / n_bytes if partial.exists() else 0.0

    try:
        with (
            progress(share),
            subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            ) as made,
        ):
            try:
                said, _ = made.communicate()
            except BaseException:
                made.kill()
                raise
        if made.returncode != 0:
            raise _not_made(made.returncode, said.decode(errors="replace"), source)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def _not_made(code: int, said: str, source: Path) -> H2OError:
    lines = [line for line in said.splitlines() if line.strip()]
    reason = "it was killed, perhaps for want of memory" if code < 0 else (lines or ["no reason given"])[-1]
    return H2OError(
        f"no copy of {source.name} could be made: {reason}",
        "give a draft model: --draft FILE, or leave --draft out",
    )


def child(source: str, target: str, file_type: str) -> int:
    """The process that makes a copy; the last line it says is the reason of a failure."""
    try:
        quantize(Path(source), Path(target), file_type, requantize=True)
    except H2OError as error:
        print(error.message)
        return 1
    except OSError as error:
        print(errno.errorcode.get(error.errno or 0, ""), error.strerror)
        return 1
    return 0
