"""A slow second opinion on filtered attention: what every node of a decode pass read, recomputed with numpy."""

from __future__ import annotations

import ctypes

import numpy as np

from runtime.llama import abi


def floats(address, shape, strides, dtype=np.float32):
    """Memory as an array."""
    raw = ctypes.c_char * (sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) + np.dtype(dtype).itemsize)
    return np.ndarray(shape, dtype, raw.from_address(address), strides=strides)


class Recorder:
    """Takes part in an engine's passes: queries and outputs of every attention node, in `seen`[layer]."""

    def __init__(self, engine):
        self.engine, self.kv = engine, engine.kv
        self.queries, self.outputs, self.scales = {}, {}, {}
        self._before, self._after = self.kv.before, self.kv.after
        self._nodes = {}
        self.kv.before, self.kv.after = self.before, self.after

    def before(self, address):
        op = ctypes.c_int.from_address(address + abi.OP_OFFSET).value
        found = self._before(address)  # which may switch the node off
        if op != abi.OP_FLASH_ATTN_EXT:
            return found
        node = abi.Tensor.from_address(address)
        own = self.kv._originals.get(address, (node.src[1],))[0]
        self._nodes[address] = self.kv._part_of[abi.Tensor.from_address(own).view_src][0]
        return True

    def after(self, address):
        self._after(address)  # which may compute the node
        layer = self._nodes.pop(address, None)
        if layer is not None:
            node = abi.Tensor.from_address(address)
            query = abi.Tensor.from_address(node.src[0])
            d, n, h = query.ne[0], query.ne[1], query.ne[2]
            self.queries.setdefault(layer, []).extend(
                floats(query.data, (n, h, d), (query.nb[1], query.nb[2], 4)).astype(np.float64)
            )
            d = node.ne[0]
            self.outputs[layer] = floats(node.data, (h, d), (node.nb[1], 4)).copy()
            self.scales[layer] = (ctypes.c_float * 3).from_buffer(node.op_params)[0]

    def cached(self, layer, n_rows, n_kv_heads):
        """Keys and values [n_rows, n_kv_heads, head_dim] of llama.cpp's own cache (f16)."""
        parts = []
        for part in self.kv.cache.layers[layer].parts:
            rows = floats(part.data, (n_rows, part.row_bytes // 2), (part.row_bytes, 2), np.float16)
            parts.append(rows.astype(np.float64).reshape(n_rows, n_kv_heads, -1))
        return parts


def per_head(keys, query):
    """Products [n_heads, n_rows] of queries [n_heads, d] and keys [n_rows, n_kv_heads, d]."""
    group = len(query) // keys.shape[1]
    return np.stack([keys[:, h // group] @ query[h] for h in range(len(query))])


def softmax(logits):
    """Attention weights of every head."""
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def attend(keys, values, query, scale):
    """Outputs [n_heads, d] over these rows."""
    weights, group = softmax(per_head(keys, query) * scale), len(query) // keys.shape[1]
    return np.stack([weights[h] @ values[:, h // group] for h in range(len(query))])


def best(scores, n):
    """The n best rows, rising."""
    return np.sort(np.argsort(-scores, kind="stable")[:n])
