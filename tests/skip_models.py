"""A small real model whose every layer reads the embedding beside what the layer before gives: talkie."""

from __future__ import annotations

from broken_models import CTX, DIM, FFN, FLOAT32, HEADS, KV_HEADS, STRING, UINT32, VOCAB, Gguf, Tensor, spm_vocabulary

LAYERS = 4


def skip_model(folder):
    """Its path; made in folder if it is not there."""
    path = folder / "talkie.gguf"
    return path if path.exists() else _model().write(path)


def _model():
    model = Gguf().set("general.architecture", STRING, "talkie")
    for key, value in {
        "context_length": CTX,
        "embedding_length": DIM,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
    }.items():
        model.set(f"talkie.{key}", UINT32, value)
    model.set("talkie.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5).set("talkie.logit_scale", FLOAT32, 1.0)
    spm_vocabulary(model)
    kv = DIM // HEADS * KV_HEADS
    layer = {"attn_q": (DIM, DIM), "attn_k": (DIM, kv), "attn_v": (DIM, kv), "attn_output": (DIM, DIM)}
    layer |= {"attn_q_norm": (1, HEADS), "ffn_gate": (DIM, FFN), "ffn_up": (DIM, FFN), "ffn_down": (FFN, DIM)}
    layer |= {"layer_output_scale": (1,)}
    model.tensors.append(Tensor("token_embd.weight", (DIM, VOCAB)))
    for i in range(LAYERS):
        model.tensors += [Tensor(f"blk.{i}.{name}.weight", dims) for name, dims in layer.items()]
    model.tensors.append(Tensor("output.weight", (DIM, VOCAB)))
    return model
