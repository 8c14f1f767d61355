"""What the head takes a root for a token, on top of what the machines with layers take."""

from __future__ import annotations

import ctypes
import time
from contextlib import ExitStack
from statistics import median

from runtime.llama import abi
from runtime.llama.model_file import ModelFile
from runtime.llama.own_graph import OwnGraph, describe, operate
from runtime.memory import Region
from runtime.plans.residency import layer_bytes
from runtime.sizes import MB

_MOST_BYTES = 64 * MB  # of weights to measure with: more than a processor keeps near itself
_SHARE = 4  # of the budget, at most
_TIMES = 7  # and once before, which wakes the threads
_REST_S = 0.01  # as long as threads rest while workers compute
_TYPES = 64  # more than ggml has


def measure_head(file: ModelFile, budget_bytes: int, n_threads: int) -> float:
    """Seconds of the head's product for one token, after a rest.

    Nothing is read: a product takes as long whatever the numbers are, so these are zeros. Where the head is larger than
    what is measured with, its time grows with its bytes.
    """
    if not file.head.pieces:
        return 0.0
    matrix = file.head.pieces[0].tensor
    n_rows = max(1, min(matrix.n_rows, min(_MOST_BYTES, budget_bytes // _SHARE) // matrix.row_bytes))
    n_bytes, n_in = n_rows * matrix.row_bytes, matrix.shape[0]
    weights, inputs, outputs = abi.Tensor(), abi.Tensor(), abi.Tensor()
    operate(outputs, abi.OP_MUL_MAT, weights, inputs)
    with ExitStack() as opened:
        region = Region(n_bytes + 4 * (n_in + n_rows))
        opened.callback(region.free)
        ctypes.memset(region.address, 0, region.n_bytes)  # pages that nobody has written are all the same one
        describe(weights, region.address, (n_in, n_rows), _type_number(matrix.type_name))
        describe(outputs, region.address + n_bytes, (n_rows, 1))
        describe(inputs, region.address + n_bytes + 4 * n_rows, (n_in, 1))
        graph = OwnGraph(n_threads, [outputs])
        opened.callback(graph.close)
        seconds = min([_seconds(graph) for _ in range(1 + _TIMES)][1:])
        wake_s = max(0.0, median(_seconds(graph, _REST_S) for _ in range(_TIMES)) - seconds)
    return seconds * layer_bytes(file.head) / n_bytes + wake_s


def _seconds(graph: OwnGraph, rest_s: float = 0.0) -> float:
    time.sleep(rest_s)
    start_s = time.perf_counter()
    graph.compute("the head", "report this")
    return time.perf_counter() - start_s


def _type_number(name: str) -> int:
    return next(i for i in range(_TYPES) if abi.ggml_type_name(i) == name.encode())
