"""Small real models whose memory is a state instead of positions: mamba, and jamba (half of it attends)."""

from __future__ import annotations

import numpy as np
from broken_models import ARRAY, DIM, FFN, FLOAT32, INT32, STRING, UINT32, VOCAB, Gguf, Tensor, spm_vocabulary

LAYERS, CTX, HEADS, KV_HEADS = 4, 1024, 4, 2
INNER, STATE, CONV, RANK = 2 * DIM, 16, 4, 8
ARCHS = ("mamba", "jamba")


def recurrent_model(folder, arch):
    """Path of the model of one of ARCHS, made in folder if it is not there."""
    path = folder / f"{arch}.gguf"
    return path if path.exists() else _model(arch).write(path)


def _model(arch):
    model = Gguf()
    model.set("general.architecture", STRING, arch)
    for key, value in {
        "context_length": CTX,
        "embedding_length": DIM,
        "block_count": LAYERS,
        "feed_forward_length": FFN if arch == "jamba" else 0,
        "attention.head_count": HEADS if arch == "jamba" else 0,
        "ssm.conv_kernel": CONV,
        "ssm.inner_size": INNER,
        "ssm.state_size": STATE,
        "ssm.time_step_rank": RANK,
    }.items():
        model.set(f"{arch}.{key}", UINT32, value)
    if arch == "jamba":
        model.set("jamba.attention.head_count_kv", ARRAY, [KV_HEADS * (i % 2) for i in range(LAYERS)], item=INT32)
    model.set(f"{arch}.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5)
    spm_vocabulary(model)
    model.tensors.append(Tensor("token_embd.weight", (DIM, VOCAB)))
    for i in range(LAYERS):
        attends = arch == "jamba" and i % 2
        tensors = {"attn_norm.weight": (DIM,), **(_attention() if attends else _mamba(arch == "jamba"))}
        if arch == "jamba":
            tensors |= {"ffn_norm.weight": (DIM,), "ffn_gate.weight": (DIM, FFN), "ffn_up.weight": (DIM, FFN)}
            tensors |= {"ffn_down.weight": (FFN, DIM)}
        model.tensors += [_tensor(f"blk.{i}.{name}", dims, i) for name, dims in tensors.items()]
    model.tensors.append(Tensor("output_norm.weight", (DIM,)))
    return model


def _attention():
    kv = DIM // HEADS * KV_HEADS
    return {f"attn_{k}.weight": (DIM, n) for k, n in (("q", DIM), ("k", kv), ("v", kv), ("output", DIM))}


def _mamba(norms):
    tensors = {
        "ssm_in.weight": (DIM, 2 * INNER),
        "ssm_conv1d.weight": (CONV, INNER),
        "ssm_conv1d.bias": (INNER,),
        "ssm_x.weight": (INNER, RANK + 2 * STATE),
        "ssm_dt.weight": (RANK, INNER),
        "ssm_dt.bias": (INNER,),
        "ssm_a": (STATE, INNER),
        "ssm_d": (INNER,),
        "ssm_out.weight": (INNER, DIM),
    }
    if norms:
        tensors |= {"ssm_dt_norm.weight": (RANK,), "ssm_b_norm.weight": (STATE,), "ssm_c_norm.weight": (STATE,)}
    return tensors


def _tensor(name, dims, seed):
    """Random, and so that what a token leaves in the state is seen in the logits for a while."""
    values = np.random.default_rng([seed, *name.encode()]).standard_normal(dims[::-1]) * 0.3
    if name.endswith("ssm_a"):
        values = -np.exp(values)
    elif "norm" in name:
        values = np.ones(dims)
    return Tensor(name, dims, data=values.astype("<f4").tobytes())
