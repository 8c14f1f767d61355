"""llama.cpp alone, as its own low-level API runs it: one prompt, greedy, one JSON object with the figures.

With --turns it does rounds instead (see rounds.py), with --streams several texts at once (see ../batch/streams.py). It
is a process of its own, so that nothing of this program is in it: `python -m h2o_cli.bench.speed.llama_cpp_run`. It
imports only the ctypes bindings of llama-cpp-python, because the whole package would take 23 MB of a small budget, and
time before the first token.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import sys
import time
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

from h2o_cli.bench.batch import streams
from h2o_cli.bench.speed.rounds import serve


def _bindings() -> Any:
    spec = find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("llama-cpp-python is not installed")
    package = sys.modules["llama_cpp"] = ModuleType("llama_cpp")
    package.__path__ = list(spec.submodule_search_locations)
    return import_module("llama_cpp.llama_cpp")


llama_cpp: Any = None  # set where this module is the process

LOADS = ("default", "mmap", "direct-io")
"""default: llama.cpp's own choice, repacked weights included. The other two load the weights as they are."""


def main() -> None:
    """Run one prompt and print the figures, or do rounds."""
    arguments = _arguments()
    model = _load(arguments)
    context = _context(model, arguments)
    if arguments.streams:
        print(json.dumps(_streams(model, context, arguments)), flush=True)
        return
    if arguments.turns:
        serve(PlainAnswer(model, context, arguments.prompt))
        return
    print(json.dumps(_answer(model, context, arguments)), flush=True)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--load", choices=LOADS, default="default")
    parser.add_argument("--prompt", default="")
    parser.add_argument("--predict", type=int, default=8)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--ubatch", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", action="store_true", help="do rounds as standard input asks for them")
    streams.add_arguments(parser)
    return parser.parse_args()


def _load(arguments: argparse.Namespace) -> Any:
    quiet = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(quiet, ctypes.c_void_p())
    _kept.append(quiet)
    llama_cpp.llama_backend_init()
    parameters = llama_cpp.llama_model_default_params()
    if arguments.load != "default":
        modes = {"mmap": llama_cpp.LLAMA_LOAD_MODE_MMAP, "direct-io": llama_cpp.LLAMA_LOAD_MODE_DIRECT_IO}
        parameters.load_mode = modes[arguments.load]
        parameters.use_extra_bufts = False
    model = llama_cpp.llama_model_load_from_file(os.fsencode(arguments.model), parameters)
    if not model:
        raise SystemExit(f"llama.cpp did not load {arguments.model}")
    return model


_kept: list[object] = []  # callbacks that C code still has


def _context(model: Any, arguments: argparse.Namespace) -> Any:
    parameters = llama_cpp.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = arguments.ctx
    parameters.n_seq_max = max(1, arguments.streams)  # streams of a cache, as its own batched decoding has them
    parameters.n_ubatch = arguments.ubatch
    parameters.n_threads = parameters.n_threads_batch = arguments.threads
    context = llama_cpp.llama_init_from_model(model, parameters)
    if not context:
        raise SystemExit("llama.cpp made no context")
    return context


class PlainAnswer:
    """A greedy answer, token by token."""

    def __init__(self, model: Any, context: Any, prompt: str) -> None:
        self._context = context
        self._vocabulary = llama_cpp.llama_model_get_vocab(model)
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        self.prompt = _tokenize(self._vocabulary, prompt)
        self._ahead, self._position = self.prompt, 0

    def forget(self) -> None:
        """Begin anew; nothing is computed yet."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._ahead, self._position = self.prompt, 0

    def next_token(self) -> int | None:
        """The next token, for the first one the prompt is computed; None: the model ended its answer."""
        if self._position and llama_cpp.llama_vocab_is_eog(self._vocabulary, self._ahead[-1]):
            return None
        token = _decode(self._context, self._sampler, self._ahead, self._position)
        self._position += len(self._ahead)
        self._ahead = [token]
        return token


def _answer(model: Any, context: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Generate greedily; the first token is told apart from the others."""
    answer = PlainAnswer(model, context, arguments.prompt)
    tokens = [answer.next_token()]
    first_s, first_bytes = time.monotonic(), _bytes_read()
    while len(tokens) < arguments.predict and (token := answer.next_token()) is not None:
        tokens.append(token)
    last_s, last_bytes = time.monotonic(), _bytes_read()
    n = len(tokens) - 1
    return {
        "tokens": tokens,
        "prompt_tokens": answer.prompt,
        "first_token_monotonic_s": first_s,
        "decode_ms_per_token": 1000 * (last_s - first_s) / n if n else None,
        "bytes_read_per_token": (last_bytes - first_bytes) / n if n else None,
    }


def _streams(model: Any, context: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Answer several texts together: their prompts, then steps of one token of each."""
    n_streams, n_prompt = arguments.streams, arguments.prompt_len
    vocabulary = llama_cpp.llama_model_get_vocab(model)
    n_vocab = llama_cpp.llama_vocab_n_tokens(vocabulary)
    sampler = llama_cpp.llama_sampler_init_greedy()
    ahead = [streams.prompt(i, n_prompt, n_vocab) for i in range(n_streams)]
    position, seconds, read = 0, [time.perf_counter()], _bytes_read()
    for step in range(arguments.steps + 1):
        ahead = [[token] for token in _decode_together(context, sampler, ahead, position)]
        seconds.append(time.perf_counter())
        position = n_prompt + step
        read = read if step else _bytes_read()
    steps_s = [end - begin for begin, end in pairwise(seconds[1:])]
    return streams.answer(seconds[1] - seconds[0], steps_s, _bytes_read() - read)


def _decode_together(context: Any, sampler: Any, texts: list[list[int]], position: int) -> list[int]:
    """Compute the tokens of every text, all from one position on; the likeliest next one of each."""
    batch = llama_cpp.llama_batch_init(sum(map(len, texts)), 0, 1)
    try:
        last = []
        for number, tokens in enumerate(texts):
            for i, token in enumerate(tokens):
                at = batch.n_tokens
                batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, position + i, 1
                batch.seq_id[at][0] = number
                batch.logits[at] = i == len(tokens) - 1
                batch.n_tokens = at + 1
            last.append(batch.n_tokens - 1)
        status = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise SystemExit(f"llama_decode returned {status}")
    return [int(llama_cpp.llama_sampler_sample(sampler, context, at)) for at in last]


def _tokenize(vocabulary: Any, text: str) -> list[int]:
    data = text.encode()
    tokens = (llama_cpp.llama_token * (len(data) + 8))()
    n = llama_cpp.llama_tokenize(vocabulary, data, len(data), tokens, len(tokens), True, False)
    return list(tokens[:n])


def _decode(context: Any, sampler: Any, tokens: list[int], position: int) -> int:
    """Compute tokens; the likeliest next one."""
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i == len(tokens) - 1
        status = llama_cpp.llama_decode(context, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise SystemExit(f"llama_decode returned {status}")
    return int(llama_cpp.llama_sampler_sample(sampler, context, -1))


def _bytes_read() -> int:
    """Bytes this process had the disk read, page faults of mapped files included."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


if __name__ == "__main__":
    llama_cpp = _bindings()
    main()
