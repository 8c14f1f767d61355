"""Nodes of llama.cpp's graph that are turned into ones that call a function of ours in C (turned.h)."""

from __future__ import annotations

import ctypes

from runtime.llama import abi
from runtime.llama.compiled import LIBRARY

_MOST_NODES = 1024  # of a pass, that one kind of them turns
SMALL_HALF = bytes(upper & 0xBF for upper in range(256))  # the upper byte of a half: it is a number below 2 then
NEAR_ONE = bytes(upper & 0x80 | 0x3F for upper in range(256))  # that of a float: from 0.5 to 2, of either sign


class _Turned(ctypes.Structure):
    """struct turned: a node, its own parameters, who turned it, its own operation, tasks that are taken."""

    _fields_ = [
        ("node", abi.POINTER),
        ("parameters", ctypes.c_uint64 * 3),
        ("owner", abi.POINTER),
        ("operation", ctypes.c_int32),
        ("next", ctypes.c_int32),
    ]


class Turning(ctypes.Structure):
    """struct turning, which the structs of all kinds begin with."""

    _fields_ = [
        ("op", ctypes.c_size_t),
        ("parameters", ctypes.c_size_t),
        ("custom", ctypes.c_int32),
        ("n_turned", ctypes.c_int32),
        ("most_turned", ctypes.c_int32),
        ("nodes", abi.POINTER),
    ]


class Turner:
    """A kind of nodes that are turned. The functions of the library begin with `name`; struct begins with a Turning."""

    def __init__(self, name: str, struct: ctypes.Structure) -> None:
        self._struct, self._nodes = struct, (_Turned * _MOST_NODES)()
        self._turning = Turning.from_buffer(struct)
        self._turning.op, self._turning.parameters = abi.OP_OFFSET, abi.Tensor.op_params.offset
        self._turning.custom, self._turning.most_turned = abi.OP_CUSTOM, _MOST_NODES
        self._turning.nodes = ctypes.addressof(self._nodes)
        self._turn, self._put_back = getattr(LIBRARY, f"{name}_turn"), getattr(LIBRARY, f"{name}_put_back")
        self.function = ctypes.cast(self._turn, abi.POINTER).value
        self.data = ctypes.addressof(struct)

    @property
    def turned(self) -> list[abi.Tensor]:
        """The nodes that are turned just now."""
        return [abi.Tensor.from_address(one.node) for one in self._nodes[: self._turning.n_turned]]

    def turn(self, node: abi.Tensor) -> None:
        """Turn a node that is computed next, if it is one of these."""
        self._turn(ctypes.byref(node), ctypes.byref(self._struct))

    def put_back(self) -> None:
        """Make the nodes what they were."""
        if self._turning.n_turned:
            self._put_back(ctypes.byref(self._struct))


def is_there(name: str) -> bool:
    """Whether the functions were compiled, and the processor has what they take."""
    return LIBRARY is not None and bool(getattr(LIBRARY, f"{name}_is_there")())
