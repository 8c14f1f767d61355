"""llama.cpp's own answer, through the low-level API, for comparing the engine with it bit by bit.

The logits of step 0 follow the prompt; step i follows token i-1. Run in a process of its own by
`reference_in_subprocess`, so that the tests of the engine do not share its state.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np

KV_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}


@contextmanager
def loaded_model(path, *, vocab_only=False, repack=False):
    """The llama_model pointer of a file loaded with llama.cpp's defaults, with or without repacked weights."""
    import llama_cpp

    llama_cpp.llama_backend_init()
    params = llama_cpp.llama_model_default_params()
    params.use_extra_bufts = repack
    params.vocab_only = vocab_only
    with quiet():
        model = llama_cpp.llama_model_load_from_file(os.fsencode(path), params)
        if not model:
            raise RuntimeError(f"llama.cpp did not load {path}")
        try:
            yield model
        finally:
            llama_cpp.llama_model_free(model)


@contextmanager
def quiet():
    """Send llama.cpp's log nowhere, and afterwards where it went before."""
    import llama_cpp

    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, ctypes.c_void_p())
    try:
        yield
    finally:
        llama_cpp.llama_log_set(before, data)


def system_info():
    """What llama.cpp was compiled for, in its own words."""
    import llama_cpp

    return llama_cpp.llama_print_system_info().decode()


@contextmanager
def context(model, *, n_ctx, n_batch, n_ubatch, n_threads, kv_type="f16", flash_attn=None):
    """A llama_context with the library's defaults except for what is given."""
    import llama_cpp

    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, n_batch, n_ubatch
    params.n_threads = params.n_threads_batch = n_threads
    params.type_k = params.type_v = KV_TYPES[kv_type]
    if flash_attn is not None:
        params.flash_attn_type = flash_attn
    ctx = llama_cpp.llama_init_from_model(model, params)
    if not ctx:
        raise RuntimeError("llama.cpp made no context")
    try:
        yield ctx
    finally:
        llama_cpp.llama_free(ctx)


def decode(ctx, tokens, first_pos, *, want_logits=True):
    """One llama_decode call; logits for the last token only."""
    import llama_cpp

    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, first_pos + i, 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = int(want_logits and i == len(tokens) - 1)
        status = llama_cpp.llama_decode(ctx, batch)
    finally:
        llama_cpp.llama_batch_free(batch)
    if status != 0:
        raise RuntimeError(f"llama_decode returned {status}")


def tokenize(model, text, *, add_special=True, parse_special=False):
    """Token ids of a text."""
    import llama_cpp

    data = text.encode()
    vocab = llama_cpp.llama_model_get_vocab(model)
    ids = (llama_cpp.llama_token * (len(data) + 8))()
    n = llama_cpp.llama_tokenize(vocab, data, len(data), ids, len(ids), add_special, parse_special)
    if n < 0:
        raise RuntimeError(f"llama_tokenize returned {n}")
    return list(ids[:n])


def detokenize(model, ids, *, remove_special=True):
    """The text of token ids."""
    import llama_cpp

    vocab = llama_cpp.llama_model_get_vocab(model)
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    buffer = ctypes.create_string_buffer(64 * len(ids) + 64)
    n = llama_cpp.llama_detokenize(vocab, tokens, len(ids), buffer, len(buffer), remove_special, False)
    if n < 0:
        raise RuntimeError(f"llama_detokenize returned {n}")
    return buffer.raw[:n].decode(errors="replace")


def reference_logits_and_tokens(
    path,
    prompt_tokens,
    n_predict,
    *,
    n_ctx,
    n_ubatch,
    n_threads,
    kv_type="f16",
    flash_attn=None,
    per_ubatch=False,
    repack=False,
):
    """Greedy decoding by llama.cpp alone: (one float32 array of logits per step, the token chosen at each).

    `prompt_tokens` may be a text. The prompt is one llama_decode call which llama.cpp cuts into ubatches;
    `per_ubatch` makes each ubatch a call of its own instead.
    """
    import llama_cpp

    with loaded_model(path, repack=repack) as model:
        prompt = tokenize(model, prompt_tokens) if isinstance(prompt_tokens, str) else list(prompt_tokens)
        n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        options = {"n_threads": n_threads, "kv_type": kv_type, "flash_attn": flash_attn}
        n_batch = max(len(prompt), n_ubatch)
        with context(model, n_ctx=n_ctx, n_batch=n_batch, n_ubatch=n_ubatch, **options) as ctx:
            step = n_ubatch if per_ubatch else len(prompt)
            for start in range(0, len(prompt), step):
                decode(ctx, prompt[start : start + step], start, want_logits=start + step >= len(prompt))
            logits, tokens = [], []
            for i in range(n_predict):
                row = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), (n_vocab,)).astype(np.float32)
                logits.append(row)
                tokens.append(int(row.argmax()))
                if i + 1 < n_predict:
                    decode(ctx, tokens[-1:], len(prompt) + i)
    return logits, tokens


def reference_in_subprocess(path, prompt_tokens, n_predict, *, timeout=300, **options):
    """`reference_logits_and_tokens` in a process of its own; the same arguments and result."""
    prompt = prompt_tokens if isinstance(prompt_tokens, str) else [int(token) for token in prompt_tokens]
    with tempfile.TemporaryDirectory() as folder:
        request = {"path": str(path), "prompt_tokens": prompt, "n_predict": n_predict, **options}
        (Path(folder) / "request.json").write_text(json.dumps(request))
        env = {**os.environ, "GOMP_SPINCOUNT": "0"}
        command = [sys.executable, __file__, folder]
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False, env=env)
        if done.returncode != 0:
            raise RuntimeError(f"the reference process ended with {done.returncode}: {done.stderr[-2000:]}")
        tokens = json.loads((Path(folder) / "tokens.json").read_text())
        with np.load(Path(folder) / "logits.npz") as arrays:
            logits = list(arrays["logits"])
    return logits, tokens


def _main(folder):
    request = json.loads((folder / "request.json").read_text())
    logits, tokens = reference_logits_and_tokens(**request)
    np.savez(folder / "logits.npz", logits=np.array(logits, dtype=np.float32))
    (folder / "tokens.json").write_text(json.dumps(tokens))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
