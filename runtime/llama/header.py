"""Values of a GGUF header that llama.cpp's C functions have opened."""

from __future__ import annotations

import ctypes

from runtime.llama import abi

_GGUF_STRING, _GGUF_ARRAY, _TOKEN_TYPE_BYTE = 8, 9, 6
_INT_TYPES: dict[int, type[ctypes._SimpleCData[int]]] = {
    0: ctypes.c_uint8,
    1: ctypes.c_int8,
    2: ctypes.c_uint16,
    3: ctypes.c_int16,
    4: ctypes.c_uint32,
    5: ctypes.c_int32,
    10: ctypes.c_uint64,
    11: ctypes.c_int64,
}


def shapes(context: ctypes.c_void_p) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by name; context: the one that gguf_init_from_file has filled."""
    found: dict[str, tuple[int, ...]] = {}
    address = abi.ggml_get_first_tensor(context)
    while address:
        tensor = abi.Tensor.from_address(address)
        found[tensor.name.decode(errors="replace")] = tuple(tensor.ne)
        address = abi.ggml_get_next_tensor(context, address)
    return found


def string(gguf: int, key: str) -> str:
    """A text, or "" where there is none."""
    found = abi.gguf_find_key(gguf, key.encode())
    if found < 0 or abi.gguf_get_kv_type(gguf, found) != _GGUF_STRING:
        return ""
    return str(abi.gguf_get_val_str(gguf, found).decode(errors="replace"))


def integer(gguf: int, key: str) -> int | None:
    """An integer value, or None; the largest one of an array of integers (some models give one number per layer)."""
    found = abi.gguf_find_key(gguf, key.encode())
    if found < 0:
        return None
    kind = abi.gguf_get_kv_type(gguf, found)
    if kind in _INT_TYPES:
        return int(_INT_TYPES[kind].from_address(abi.gguf_get_val_data(gguf, found)).value)
    if kind == _GGUF_ARRAY and abi.gguf_get_arr_type(gguf, found) in _INT_TYPES:
        item = _INT_TYPES[abi.gguf_get_arr_type(gguf, found)]
        count = abi.gguf_get_arr_n(gguf, found)
        return max((item * count).from_address(abi.gguf_get_arr_data(gguf, found)), default=None)
    return None


def count_byte_tokens(gguf: int) -> int:
    """How many tokens of the vocabulary stand for single bytes."""
    found = abi.gguf_find_key(gguf, b"tokenizer.ggml.token_type")
    if found < 0 or abi.gguf_get_kv_type(gguf, found) != _GGUF_ARRAY or abi.gguf_get_arr_type(gguf, found) != 5:
        return 0
    count = abi.gguf_get_arr_n(gguf, found)
    types = (ctypes.c_int32 * count).from_address(abi.gguf_get_arr_data(gguf, found))
    return list(types).count(_TOKEN_TYPE_BYTE)
