"""Hidden states as they travel: float32, or rounded to 16 bits where the root asked for it, which is not exact."""

from __future__ import annotations

import ctypes
import math

from runtime.errors import EngineError
from runtime.llama import abi

F32, F16 = "f32", "f16"
NUMBER_BYTES = {F32: 4, F16: 2}
_LARGEST = 65504  # of 16 bits; what is larger becomes infinite


_CONVERSIONS = {(F32, F16): abi.ggml_fp32_to_fp16_row, (F16, F32): abi.ggml_fp16_to_fp32_row}


def converted(numbers: bytes | memoryview, kind: str, wanted: str) -> bytes:
    """Numbers of one kind as those of another: on their way, or behind it."""
    source = bytes(numbers)
    if kind == wanted:
        return source
    n = len(source) // NUMBER_BYTES[kind]
    target = ctypes.create_string_buffer(n * NUMBER_BYTES[wanted])
    _CONVERSIONS[kind, wanted](source, target, n)
    return target.raw


def refuse_too_large(data: bytes, kind: str, layer: int) -> None:
    """Raise EngineError where what goes into a layer was too large for 16 bits: the sum of its squares is no number
    then. Only the root asks, which sees all: what a worker raises would be the loss of that worker.
    """
    if kind == F32:
        return
    numbers, total = converted(data, kind, F32), ctypes.c_float()
    abi.ggml_vec_dot_f32(len(numbers) // NUMBER_BYTES[F32], ctypes.byref(total), 0, numbers, 0, numbers, 0, 1)
    if not math.isfinite(total.value):
        raise EngineError(
            f"what goes into layer {layer} is beyond {_LARGEST}, the most that f16 holds", "leave --hidden f16 out"
        )
