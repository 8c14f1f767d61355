"""Shapes of generated models: which sizes, which tensors, which hyper-parameters."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

from runtime.errors import UsageError

MAX_LAYERS = 512
LIMIT = 2**24
MAX_VOCABULARY = 2**20
LOGIT_STD = 3.0
"""Spread the logits are scaled to: neither flat nor one certain token."""


@dataclass(frozen=True)
class Arch:
    """How the tensors of one llama.cpp architecture are put together."""

    pre: str = ""
    """Pre-tokenizer of a byte-pair vocabulary; empty: a SentencePiece vocabulary."""
    head: str = "free"
    """free: the `tied` key decides; tied: no output tensor; own: always one."""
    layer_norm: bool = False
    norm_bias: bool = False
    qkv: str = "split"
    """split, split+bias, fused or fused+bias."""
    qk_norm: str = ""
    """head: one head wide; row: all heads wide."""
    norms: tuple[str, ...] = ("attn_norm", "ffn_norm")
    ffn: str = "gate"
    """gate (gate, up, down), fused (gate and up in one), plain (up, down) or plain+bias."""
    positions: bool = False
    wide_heads: bool = False
    """The heads may be wider than dim / heads."""
    experts: bool = False
    rotary: float = 1.0
    bos: bool = False
    pattern: int = 0
    """Every pattern-th layer looks past the sliding window; 0: no such layers."""
    embedding_scaled: bool = False
    """The graph multiplies embedding rows by sqrt(dim)."""


POST_NORMS = ("post_attention_norm", "post_ffw_norm")
ARCHS: dict[str, Arch] = {
    "llama": Arch(wide_heads=True, experts=True, bos=True),
    "qwen2": Arch("qwen2", qkv="split+bias"),
    "qwen3": Arch("qwen2", qk_norm="head", wide_heads=True),
    "qwen3moe": Arch("qwen2", qk_norm="head", wide_heads=True, experts=True),
    "gemma2": Arch(
        head="tied",
        norms=("attn_norm", "ffn_norm", *POST_NORMS),
        wide_heads=True,
        bos=True,
        pattern=2,
        embedding_scaled=True,
    ),
    "gemma3": Arch(
        qk_norm="head",
        norms=("attn_norm", "ffn_norm", *POST_NORMS),
        wide_heads=True,
        bos=True,
        pattern=6,
        embedding_scaled=True,
    ),
    "phi3": Arch(qkv="fused", ffn="fused", bos=True),
    "gpt2": Arch("gpt-2", layer_norm=True, norm_bias=True, qkv="fused+bias", ffn="plain+bias", positions=True),
    "falcon": Arch("falcon", layer_norm=True, norm_bias=True, qkv="fused", norms=("attn_norm",), ffn="plain"),
    "stablelm": Arch("stablelm2", head="own", layer_norm=True, norm_bias=True, qkv="split+bias", rotary=0.25),
    "olmo2": Arch("dbrx", head="own", qk_norm="row", norms=POST_NORMS),
    "cohere2": Arch("command-r", head="tied", layer_norm=True, norms=("attn_norm",), bos=True, pattern=4),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of one model; every integer field can be set by name after the colon of a SHAPE."""

    arch: str
    layers: int = 2
    dim: int = 64
    ffn: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 0
    vocab: int = 512
    ctx: int = 512
    tied: int = 1
    window: int = 0
    experts: int = 0
    experts_used: int = 0
    rope_base: int = 10_000
    pre: str = ""

    @property
    def traits(self) -> Arch:
        """How this architecture is put together."""
        return ARCHS[self.arch]

    @property
    def width(self) -> int:
        """Width of one attention head."""
        return self.head_dim or self.dim // self.heads

    @property
    def own_head(self) -> bool:
        """Whether the output head is a tensor of its own."""
        return self.traits.head == "own" or (self.traits.head == "free" and not self.tied)

    @property
    def tokenizer_pre(self) -> str:
        """Pre-tokenizer of a byte-pair vocabulary; empty for SentencePiece."""
        return self.pre or self.traits.pre


def _qwen(arch: str, layers: int, dim: int, ffn: int, heads: int, kv_heads: int, **more: int) -> Shape:
    sizes = {"vocab": 151_936, "ctx": 32_768, "rope_base": 1_000_000, **more}
    return Shape(arch, layers, dim, ffn, heads, kv_heads, **sizes)  # type: ignore[arg-type]


NAMED: dict[str, Shape] = {
    "qwen2.5-0.5b": _qwen("qwen2", 24, 896, 4864, 14, 2),
    "qwen2.5-1.5b": _qwen("qwen2", 28, 1536, 8960, 12, 2),
    "qwen2.5-3b": _qwen("qwen2", 36, 2048, 11_008, 16, 2),
    "qwen2.5-7b": _qwen("qwen2", 28, 3584, 18_944, 28, 4, vocab=152_064, tied=0),
    "qwen3-0.6b": _qwen("qwen3", 28, 1024, 3072, 16, 8, head_dim=128, ctx=40_960),
    "qwen3-1.7b": _qwen("qwen3", 28, 2048, 6144, 16, 8, head_dim=128, ctx=40_960),
    "qwen3-4b": _qwen("qwen3", 36, 2560, 9728, 32, 8, head_dim=128, ctx=40_960),
    "qwen3moe-small": _qwen("qwen3moe", 12, 1024, 512, 16, 4, head_dim=64, experts=64, experts_used=4, vocab=32_000),
    "qwen3moe-30b": _qwen("qwen3moe", 48, 2048, 768, 32, 4, head_dim=128, experts=128, experts_used=8, tied=0),
    "tinyllama-1.1b": Shape("llama", 22, 2048, 5632, 32, 4, vocab=32_000, ctx=2048, tied=0),
    "llama-7b": Shape("llama", 32, 4096, 11_008, 32, 32, vocab=32_000, ctx=4096, tied=0),
    "llama-3.2-1b": Shape(
        "llama", 16, 2048, 8192, 32, 8, vocab=128_256, ctx=131_072, rope_base=500_000, pre="llama-bpe"
    ),
    "llama-3-8b": Shape(
        "llama", 32, 4096, 14_336, 32, 8, vocab=128_256, ctx=8192, tied=0, rope_base=500_000, pre="llama-bpe"
    ),
    "gemma2-2b": Shape("gemma2", 26, 2304, 9216, 8, 4, 256, vocab=256_000, ctx=8192, window=4096),
    "gemma3-1b": Shape("gemma3", 26, 1152, 6912, 4, 1, 256, vocab=262_144, ctx=32_768, window=512, rope_base=1_000_000),
    "phi3-mini": Shape("phi3", 32, 3072, 8192, 32, 32, vocab=32_064, ctx=4096, tied=0),
    "gpt2-small": Shape("gpt2", 12, 768, 3072, 12, 12, vocab=50_257, ctx=1024),
    "olmo2-1b": Shape("olmo2", 16, 2048, 8192, 16, 16, vocab=100_352, ctx=4096, tied=0, rope_base=500_000),
}

KEYS = tuple(f.name for f in fields(Shape) if f.name not in ("arch", "pre"))


def parse_shape(text: str) -> Shape:
    """The Shape of "qwen2.5-0.5b", "qwen2.5-0.5b:layers=2" or "llama:layers=2,dim=64"; UsageError if it is none."""
    name, _, rest = text.strip().partition(":")
    name = name.strip().lower()
    if name in NAMED:
        shape = NAMED[name]
    elif name in ARCHS:
        shape = _defaults(name)
    else:
        raise UsageError(
            f"unknown model shape {name!r}",
            f"choose {', '.join(NAMED)}, or ARCH:key=value,... with ARCH one of {', '.join(ARCHS)}",
        )
    values = dict(_key_value(part) for part in rest.split(",") if part.strip())
    if "heads" in values and "kv_heads" not in values and shape.kv_heads > values["heads"]:
        values["kv_heads"] = values["heads"]
    shape = replace(shape, **values)  # type: ignore[arg-type]
    _check(shape)
    return shape


def _defaults(arch: str) -> Shape:
    shape = Shape(arch)
    if arch == "qwen3moe":
        shape = replace(shape, experts=8, experts_used=2)
    if ARCHS[arch].pattern:
        shape = replace(shape, window=128)
    return replace(shape, kv_heads=4) if arch == "gpt2" else shape


def _key_value(part: str) -> tuple[str, int]:
    key, _, value = (piece.strip() for piece in part.partition("="))
    if key not in KEYS:
        raise UsageError(f"unknown key {key!r} in the model shape", f"the keys are {', '.join(KEYS)}")
    if not re.fullmatch("[0-9]{1,9}", value) or int(value) > LIMIT:
        raise UsageError(f"{key}={value} is not a whole number from 0 to {LIMIT}", "write for example layers=2,dim=64")
    return key, int(value)


def smallest_vocabulary(shape: Shape) -> int:
    """Special tokens, one token per byte and one more piece: below this, not every text can be written."""
    return 256 + (4 if shape.tokenizer_pre else 5)


def _problems(shape: Shape) -> Iterator[tuple[bool, str]]:
    traits = shape.traits
    for key in ("layers", "dim", "ffn", "heads", "kv_heads", "ctx", "rope_base"):
        yield getattr(shape, key) < 1, f"{key} must be at least 1"
    yield shape.layers > MAX_LAYERS, f"layers must be at most {MAX_LAYERS}"
    yield shape.tied > 1, "tied must be 0 or 1"
    yield shape.vocab < (least := smallest_vocabulary(shape)), f"vocab must be at least {least} for {shape.arch}"
    yield shape.vocab > MAX_VOCABULARY, f"vocab must be at most {MAX_VOCABULARY}"
    yield shape.heads % max(shape.kv_heads, 1) != 0, "heads must be a multiple of kv_heads"
    yield not shape.head_dim and shape.dim % max(shape.heads, 1) != 0, "dim must be a multiple of heads"
    wide = shape.heads * shape.head_dim not in (0, shape.dim)
    yield wide and not traits.wide_heads, f"{shape.arch} wants heads x head_dim = dim"
    yield shape.heads > 0 and int(shape.width * traits.rotary) % 2 != 0, "head_dim must be even"
    yield shape.heads > 0 and int(shape.width * traits.rotary) < 2, "head_dim is too small"
    yield bool(shape.experts) and not traits.experts, f"{shape.arch} has no experts"
    yield shape.arch == "qwen3moe" and not shape.experts, "qwen3moe needs experts"
    yield bool(shape.experts) != bool(shape.experts_used), "give both experts and experts_used, or none"
    yield shape.experts_used > shape.experts, "experts_used must be at most experts"
    yield shape.experts > 512, "experts must be at most 512"
    yield bool(shape.window) and not traits.pattern, f"{shape.arch} has no sliding window"
    yield bool(traits.pattern) and not shape.window, f"{shape.arch} needs a sliding window: window=128"


def _check(shape: Shape) -> None:
    for wrong, message in _problems(shape):
        if wrong:
            raise UsageError(f"this model shape cannot be built: {message}", "change that key")


@dataclass(frozen=True)
class TensorSpec:
    """One tensor: `dims` as numpy shows them (rows first), normal values of `mean` and `std`; `small` stays float32."""

    name: str
    dims: tuple[int, ...]
    std: float
    mean: float = 0.0
    small: bool = False

    @property
    def n_values(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.dims)


def embedding_std(shape: Shape) -> float:
    """Small enough that what the layers add decides the next token, so a tied head does not repeat its input."""
    std = math.sqrt(0.4 * shape.layers / shape.dim)
    return std / math.sqrt(shape.dim) if shape.traits.embedding_scaled else std


def tensor_specs(shape: Shape) -> list[TensorSpec]:
    """Every tensor of the model, in file order."""
    embedding = embedding_std(shape)
    head = 1 / math.sqrt(shape.dim) if shape.own_head else embedding
    scale = LOGIT_STD / (head * math.sqrt(shape.dim))
    specs = [TensorSpec("token_embd.weight", (shape.vocab, shape.dim), embedding)]
    if shape.traits.positions:
        specs.append(TensorSpec("position_embd.weight", (shape.ctx, shape.dim), embedding / 2, small=True))
    for i in range(shape.layers):
        specs += [replace(spec, name=f"blk.{i}.{spec.name}") for spec in _layer(shape)]
    if shape.arch == "cohere2":
        scale /= LOGIT_SCALE
    specs += _norm(shape, "output_norm", scale)
    if shape.own_head:
        specs.append(TensorSpec("output.weight", (shape.vocab, shape.dim), head))
    return specs


def _linear(name: str, n_out: int, n_in: int, gain: float = 1.0, bias: bool = False) -> list[TensorSpec]:
    specs = [TensorSpec(f"{name}.weight", (n_out, n_in), gain / math.sqrt(n_in))]
    return [*specs, TensorSpec(f"{name}.bias", (n_out,), 0.1, small=True)] if bias else specs


def _norm(shape: Shape, name: str, mean: float = 1.0) -> list[TensorSpec]:
    specs = [TensorSpec(f"{name}.weight", (shape.dim,), 0.1 * mean, mean, small=True)]
    if shape.traits.norm_bias:
        specs.append(TensorSpec(f"{name}.bias", (shape.dim,), 0.05, small=True))
    return specs


def _layer(shape: Shape) -> list[TensorSpec]:
    traits = shape.traits
    specs: list[TensorSpec] = []
    for name in traits.norms:
        specs += _norm(shape, name, 0.5 if name in POST_NORMS else 1.0)
    q, kv = shape.heads * shape.width, shape.kv_heads * shape.width
    bias = traits.qkv.endswith("+bias")
    if traits.qkv.startswith("fused"):
        specs += _linear("attn_qkv", q + 2 * kv, shape.dim, bias=bias)
    else:
        for name, n_out in (("attn_q", q), ("attn_k", kv), ("attn_v", kv)):
            specs += _linear(name, n_out, shape.dim, bias=bias)
    if traits.qk_norm:
        widths = (q, kv) if traits.qk_norm == "row" else (shape.width, shape.width)
        for name, n in zip(("attn_q_norm", "attn_k_norm"), widths, strict=True):
            specs.append(TensorSpec(f"{name}.weight", (n,), 0.1, 1.0, small=True))
    specs += _linear("attn_output", shape.dim, q, 0.5, bias=traits.ffn == "plain+bias")
    return specs + (_experts(shape) if shape.experts else _ffn(shape))


def _ffn(shape: Shape) -> list[TensorSpec]:
    kind, _, bias = shape.traits.ffn.partition("+")
    up = 2 * shape.ffn if kind == "fused" else shape.ffn
    gate = _linear("ffn_gate", shape.ffn, shape.dim) if kind == "gate" else []
    return [
        *gate,
        *_linear("ffn_up", up, shape.dim, bias=bool(bias)),
        *_linear("ffn_down", shape.dim, shape.ffn, bias=bool(bias)),
    ]


def _experts(shape: Shape) -> list[TensorSpec]:
    n, dim, ffn = shape.experts, shape.dim, shape.ffn
    return [
        TensorSpec("ffn_gate_inp.weight", (n, dim), 2 / math.sqrt(dim), small=True),
        TensorSpec("ffn_gate_exps.weight", (n, ffn, dim), 1 / math.sqrt(dim)),
        TensorSpec("ffn_up_exps.weight", (n, ffn, dim), 1 / math.sqrt(dim)),
        TensorSpec("ffn_down_exps.weight", (n, dim, ffn), 1 / math.sqrt(ffn)),
    ]


LOGIT_SCALE = 0.0625


def hyper_parameters(shape: Shape) -> dict[str, int | float | bool]:
    """Metadata keys (without the architecture prefix) and their values; int, float and bool keep their kind."""
    traits = shape.traits
    values: dict[str, int | float | bool] = {
        "vocab_size": shape.vocab,
        "context_length": shape.ctx,
        "embedding_length": shape.dim,
        "block_count": shape.layers,
        "feed_forward_length": shape.ffn,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.layer_norm_epsilon" if traits.layer_norm else "attention.layer_norm_rms_epsilon": 1e-5,
    }
    if traits.wide_heads:
        values |= {"attention.key_length": shape.width, "attention.value_length": shape.width}
    if not traits.positions:
        values |= {"rope.dimension_count": int(shape.width * traits.rotary), "rope.freq_base": float(shape.rope_base)}
    if shape.experts:
        values |= {"expert_count": shape.experts, "expert_used_count": shape.experts_used}
        values["expert_feed_forward_length"] = shape.ffn
    if shape.window:
        values["attention.sliding_window"] = shape.window
    if shape.arch == "gemma2":
        values |= {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    if shape.arch == "cohere2":
        values["logit_scale"] = LOGIT_SCALE
    if shape.arch == "stablelm":
        values["use_parallel_residual"] = False
    return values
