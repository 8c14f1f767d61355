"""llama.cpp's context: computes batches, keeps keys and values, holds the logits of the last pass."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from runtime.errors import EngineError
from runtime.llama import abi
from runtime.llama.compiled import LIBRARY
from runtime.llama.hollow import ContextBuffers, HollowModel
from runtime.llama.node_filter import NodeFilter
from runtime.llama.scratch import Scratch
from runtime.memory import drop_pages, trim_heap
from runtime.passes import Pass
from runtime.settings import KV_TYPES, Settings
from runtime.sizes import PAGE, page_up

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_NO_CALLBACK = abi.EvalCallback()


class _Batch:
    """llama.cpp's batch of at most n tokens, each of one sequence, in memory of ours. It copies what it needs."""

    def __init__(self, n: int) -> None:
        self._tokens, self._positions, self._texts = ((ctypes.c_int32 * n)() for _ in range(3))
        self._ones, self._wanted = (ctypes.c_int32 * n)(*[1] * n), (ctypes.c_int8 * n)()
        step, first = ctypes.sizeof(ctypes.c_int32), ctypes.addressof(self._texts)
        self._lists = (ctypes.c_void_p * n)(*range(first, first + n * step, step))
        self._batch = abi.llama.llama_batch()
        arrays: dict[str, ctypes.Array[Any]] = {
            "token": self._tokens,
            "pos": self._positions,
            "n_seq_id": self._ones,
            "seq_id": self._lists,
            "logits": self._wanted,
        }
        for name, array in arrays.items():
            setattr(self._batch, name, ctypes.cast(array, type(getattr(self._batch, name))))

    def of(self, pass_: Pass) -> Any:
        """The batch of a pass, until another one is asked for."""
        tokens: list[Any] = []
        positions: list[Any] = []
        texts: list[Any] = []
        wanted: list[Any] = []
        for part in pass_.parts:
            n, n_outputs = len(part.tokens), part.n_outputs
            tokens += part.tokens
            positions += range(part.first, part.first + n)
            texts += [part.sequence] * n
            wanted += [0] * (n - n_outputs) + [1] * n_outputs
        n = self._batch.n_tokens = len(tokens)
        self._tokens[:n], self._positions[:n], self._texts[:n], self._wanted[:n] = tokens, positions, texts, wanted
        return self._batch


class Context:
    """A context for passes of at most n_tokens, in buffers of ours. `nodes` is called for every node of a pass."""

    def __init__(self, model: HollowModel, settings: Settings, n_tokens: int, nodes: NodeFilter | None = None) -> None:
        """Raises EngineError when llama.cpp cannot create it."""
        parameters = abi.llama.llama_context_default_params()
        parameters.n_ctx = settings.n_ctx
        parameters.n_batch = parameters.n_ubatch = n_tokens
        parameters.n_threads = parameters.n_threads_batch = settings.n_threads
        several = settings.n_sequences > 1
        swaps = several and settings.swap_bytes > 0  # one more sequence, whose state is saved (answer/swapping.py)
        parameters.n_outputs_max = settings.n_logits + swaps
        parameters.n_seq_max = settings.n_sequences + swaps
        parameters.kv_unified = several  # any mix of sequences is one pass then
        parameters.type_k = parameters.type_v = KV_TYPES[settings.kv_type]
        if nodes:
            parameters.cb_eval, parameters.cb_eval_user_data = nodes.callback, nodes.data
        parameters.no_perf = True
        abi.take_log()
        with ContextBuffers() as self.buffers:
            pointer = abi.llama.llama_init_from_model(model.pointer, parameters)
        if not pointer:
            self.buffers.free()
            if self.buffers.error:
                raise self.buffers.error
            reason = (abi.take_log() or ["no reason given"])[-1]
            raise EngineError(f"llama.cpp could not create a context ({reason})", "lower --ctx or use --kv-type f16")
        self.pointer = int(pointer)
        self.n_tokens, self.n_sequences = n_tokens, settings.n_sequences
        self._reserved_outputs, self._n_threads = min(n_tokens, settings.n_logits), settings.n_threads
        self._nodes = nodes  # llama.cpp has the addresses of its callback and data
        self._memory = abi.llama.llama_get_memory(self.pointer)
        self._scheduler = abi.llama_context_get_sched(self.pointer)
        self.n_vocab = int(abi.llama.llama_vocab_n_tokens(abi.llama.llama_model_get_vocab(model.pointer)))
        self._n_outputs = self._most_outputs = 1
        self._batch = _Batch(n_tokens)
        self._odds: Any = None

    def call_back(self, *, wanted: bool) -> None:
        """Whether llama.cpp calls back in the next pass (a graph that is built anew does once more)."""
        nodes = self._nodes if wanted else None
        callback, data = (nodes.callback, nodes.data) if nodes else (_NO_CALLBACK, None)
        abi.ggml_backend_sched_set_eval_callback(self._scheduler, callback, data)

    def decode(self, pass_: Pass) -> int:
        """Compute a pass. Returns llama.cpp's status."""
        n_outputs = pass_.n_outputs
        status = int(abi.llama.llama_decode(self.pointer, self._batch.of(pass_)))
        self._n_outputs = n_outputs
        if status == 0:
            self._most_outputs = max(n_outputs, self._most_outputs)
        return status

    def n_past(self, sequence: int = 0) -> int:
        """Positions of a sequence that are in the cache, without a gap."""
        return int(abi.llama.llama_memory_seq_pos_max(self._memory, sequence)) + 1

    @property
    def n_cells(self) -> int:
        """Cells of the cache that are taken, by all sequences."""
        return sum(self.n_past(sequence) for sequence in range(self.n_sequences))

    def share(self, source: int, target: int, n: int) -> None:
        """Have another sequence, which has no positions, begin with the first n of one: in the same cells.

        llama.cpp keeps cells under numbers that no pass may have, too.
        """
        abi.llama.llama_memory_seq_cp(self._memory, source, target, 0, n)

    def truncate(self, n_past: int, sequence: int = 0) -> None:
        """Forget a sequence's positions from n_past on. Raises EngineError where the model's memory cannot do that."""
        if not abi.llama.llama_memory_seq_rm(self._memory, sequence, n_past, -1):
            if n_past or self.n_sequences > 1:
                raise EngineError("this model's state cannot be shortened", "start a new conversation")
            abi.llama.llama_memory_clear(self._memory, True)

    def has_numbers(self) -> bool:
        """Whether the last logits are numbers (a damaged model computes NaN): the sum of their squares is one then."""
        row, total = abi.llama.llama_get_logits_ith(self.pointer, -1), ctypes.c_float()
        abi.ggml_vec_dot_f32(self.n_vocab, ctypes.byref(total), 0, row, 0, row, 0, 1)
        return not math.isnan(total.value)

    def is_number(self, token: int, i: int) -> bool:
        """Whether the logit of one token in the last pass's i-th output is a number."""
        return not math.isnan(abi.llama.llama_get_logits_ith(self.pointer, i)[token])

    def likeliest(self, i: int) -> int | None:
        """The token with the largest logit in the last pass's i-th output; None without the compiled function."""
        if LIBRARY is None:
            return None
        return int(LIBRARY.h2o_argmax(abi.llama.llama_get_logits_ith(self.pointer, i), self.n_vocab))

    def likeliest_of_all(self) -> Sequence[int] | None:
        """The same of each output of the last pass, in their order; -1 where that logit is no number."""
        if LIBRARY is None or not self._n_outputs:
            return None
        rows = abi.llama.llama_get_logits_ith(self.pointer, -self._n_outputs)  # they lie one behind the other
        tokens = (ctypes.c_int32 * self._n_outputs)()
        LIBRARY.h2o_argmax_of_rows(rows, self.n_vocab, self._n_outputs, tokens)
        return tokens[:]

    def odds(self, token: int, i: int) -> float:
        """The probability (at temperature 1) of one token in the last pass's i-th output (negative: from the end)."""
        self._odds = self._odds or (ctypes.c_float * self.n_vocab)()
        row = abi.llama.llama_get_logits_ith(self.pointer, i)
        total = abi.ggml_vec_soft_max_f32(self.n_vocab, self._odds, row, row[token])
        return 1 / total if total > 0 else 0.0

    def logits(self, i: int) -> npt.NDArray[np.float32]:
        """Logits [n_vocab] of the last pass's i-th output (negative: from the end)."""
        import numpy as np  # 16 MB that a run does not need

        pointer = abi.llama.llama_get_logits_ith(self.pointer, i - self._n_outputs if i >= 0 else i)
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    @property
    def scratch_bytes(self) -> int:
        """All buffers but that of keys and values."""
        return self.buffers.n_bytes - self.buffers.kv_bytes

    def plan_scratch(self) -> Scratch:
        """What the nodes of passes need besides their results. ggml has it from now on; it is touched lazily.

        Before the first pass. ggml's own begins 16 bytes behind a page: then half of all vector loads span two lines,
        and a prompt in f16 takes 2 % longer. It frees this memory like its own (with delete[], which is free() in
        GNU's C++ library), and takes other memory where this is too little.
        """
        scratch = Scratch.of(self.pointer, (self.n_tokens, self._reserved_outputs), self.n_sequences, self._n_threads)
        n_bytes = page_up(scratch.planned_bytes)
        trim_heap()  # what was used for the plan is no part of it
        for backend in self._backends():
            address = abi.aligned_alloc(PAGE, n_bytes) if not backend.work_data else None
            if address:
                backend.work_data, backend.work_size = address, n_bytes
        return scratch

    def drop_scratch(self) -> None:
        """Give back the memory the last pass computed in. Its logits are gone; keys and values stay.

        Safe between two passes: in each llama.cpp writes all inputs and computes all results anew, also where it uses a
        graph again. Scratch is written before it is read in every node.
        """
        self.buffers.drop_scratch()
        logits = ctypes.cast(abi.llama.llama_get_logits(self.pointer), ctypes.c_void_p).value
        if logits:
            drop_pages(logits, logits + 4 * self.n_vocab * self._most_outputs)
        for backend in self._backends():
            if backend.work_data:
                drop_pages(backend.work_data, backend.work_data + backend.work_size)

    @property
    def backend(self) -> int:
        """The CPU backend that computes passes."""
        return int(abi.ggml_backend_sched_get_backend(self._scheduler, 0))

    def _backends(self) -> Iterator[abi.CpuBackend]:
        for i in range(abi.ggml_backend_sched_get_n_backends(self._scheduler)):
            yield abi.cpu_backend(abi.ggml_backend_sched_get_backend(self._scheduler, i))

    def close(self) -> None:
        """Free it; the model stays its owner's."""
        abi.llama.llama_free(self.pointer)
        self.buffers.free()
