"""Makers of broken and hostile GGUF files: BROKEN maps a name to a function that writes one into a folder.

The files are written byte by byte, from a small valid llama model, so that everything can be wrong in them.
`python tests/broken_models.py` shows what llama.cpp itself does with each.
"""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

UINT8, INT8, UINT16, INT16, UINT32, INT32, FLOAT32, BOOL, STRING, ARRAY, UINT64, INT64, FLOAT64 = range(13)
FORMATS = {
    UINT16: "H",
    UINT32: "I",
    INT32: "i",
    FLOAT32: "f",
}
FOLDER = Path(__file__).parent
F32, F16, Q8_0, I32, F64 = 0, 1, 8, 26, 28
SIZES = {F32: 4, F16: 2, I32: 4, F64: 8}
LAYERS, DIM, FFN, HEADS, KV_HEADS, VOCAB, CTX = 2, 64, 128, 4, 2, 300, 256


def text(value):
    """A GGUF string: its length and its bytes."""
    data = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(data)) + data


@dataclass
class Key:
    """One metadata value; `raw` replaces everything after the type."""

    kind: int
    value: object = None
    item: int = STRING
    raw: bytes | None = None

    def pack(self):
        head = struct.pack("<I", self.kind)
        if self.raw is not None:
            return head + self.raw
        if self.kind == ARRAY:
            items = b"".join(self._scalar(self.item, value) for value in self.value)
            return head + struct.pack("<IQ", self.item, len(self.value)) + items
        return head + self._scalar(self.kind, self.value)

    @staticmethod
    def _scalar(kind, value):
        return text(value) if kind == STRING else struct.pack("<" + FORMATS[kind], value)


@dataclass
class Tensor:
    """One tensor: `dims` in GGUF's order (row length first); `offset` and `data` are worked out when not given."""

    name: str | bytes
    dims: tuple[int, ...]
    kind: int = F32
    offset: int | None = None
    data: bytes | None = None

    def content(self):
        if self.data is not None:
            return self.data
        n = 1
        for size in self.dims:
            n *= size
        values = np.random.default_rng(len(self.name) + n).standard_normal(n) * 0.1
        dtype = {F32: "<f4", F16: "<f2", F64: "<f8", I32: "<i4"}[self.kind]
        return values.astype(dtype).tobytes()


@dataclass
class Gguf:
    """A file to be written; every part may be set to something wrong."""

    keys: list[tuple[str, Key]] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_keys: int | None = None
    alignment: int = 32

    def set(self, key, kind, value=None, **more):
        self.drop(key)
        self.keys.append((key, Key(kind, value, **more)))
        return self

    def drop(self, key):
        self.keys = [(name, value) for name, value in self.keys if name != key]
        return self

    def put(self, **parts):
        for name, value in parts.items():
            setattr(self, name, value)
        return self

    def change(self, tensor, **parts):
        for name, value in parts.items():
            setattr(self.tensor(tensor), name, value)
        return self

    def tensor(self, name):
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def parts(self):
        """Counts, metadata, tensor infos and data, as four byte strings."""
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        counts = self.magic + struct.pack("<IQQ", self.version, n_tensors, n_keys)
        keys = b"".join(text(name) + value.pack() for name, value in self.keys)
        infos, data = b"", b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            infos += text(tensor.name) + struct.pack("<I", len(tensor.dims))
            infos += struct.pack(f"<{len(tensor.dims)}Q", *tensor.dims) + struct.pack("<IQ", tensor.kind, offset)
            content = tensor.content()
            data += content + bytes(-len(content) % self.alignment)
        head = len(counts) + len(keys) + len(infos)
        return counts, keys, infos + bytes(-head % self.alignment), data

    def write(self, path):
        path.write_bytes(b"".join(self.parts()))
        return path


def valid_model():
    """A llama model with random weights that llama.cpp loads and runs."""
    model = Gguf()
    model.set("general.architecture", STRING, "llama")
    for key, value in {
        "context_length": CTX,
        "embedding_length": DIM,
        "block_count": LAYERS,
        "feed_forward_length": FFN,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "rope.dimension_count": DIM // HEADS,
    }.items():
        model.set(f"llama.{key}", UINT32, value)
    model.set("llama.attention.layer_norm_rms_epsilon", FLOAT32, 1e-5)
    spm_vocabulary(model)
    model.tensors.append(Tensor("token_embd.weight", (DIM, VOCAB)))
    kv = DIM // HEADS * KV_HEADS
    for i in range(LAYERS):
        for name, dims in {
            "attn_norm": (DIM,),
            "attn_q": (DIM, DIM),
            "attn_k": (DIM, kv),
            "attn_v": (DIM, kv),
            "attn_output": (DIM, DIM),
            "ffn_norm": (DIM,),
            "ffn_gate": (DIM, FFN),
            "ffn_up": (DIM, FFN),
            "ffn_down": (FFN, DIM),
        }.items():
            model.tensors.append(Tensor(f"blk.{i}.{name}.weight", dims))
    model.tensors.append(Tensor("output_norm.weight", (DIM,)))
    return model


def spm_vocabulary(model, *, byte_tokens=True):
    """Give the model a SentencePiece vocabulary of VOCAB tokens."""
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" if byte_tokens else f"byte{b}" for b in range(256)]
    tokens += ["\u2581", *"etaoinshrdlcumwfgypbvkjxqz"]
    tokens += [f"piece{i}" for i in range(VOCAB - len(tokens))]
    types = [2, 3, 3] + [6 if byte_tokens else 1] * 256 + [1] * (VOCAB - 259)
    model.set("tokenizer.ggml.model", STRING, "llama")
    model.set("tokenizer.ggml.tokens", ARRAY, tokens, item=STRING)
    model.set("tokenizer.ggml.scores", ARRAY, [float(-i) for i in range(VOCAB)], item=FLOAT32)
    model.set("tokenizer.ggml.token_type", ARRAY, types, item=INT32)
    return model


def cut(model, part, fraction):
    """The file up to a fraction of one of its four parts."""
    parts = model.parts()
    return b"".join(parts[:part]) + parts[part][: int(len(parts[part]) * fraction)]


def token_list(change):
    """A change of the token texts."""

    def apply(model):
        tokens = next(value.value for name, value in model.keys if name == "tokenizer.ggml.tokens")
        model.set("tokenizer.ggml.tokens", ARRAY, change(list(tokens)), item=STRING)

    return apply


def hyper(key, value):
    """A hyper-parameter with another value; None drops it, a list is an array."""
    if value is None:
        return lambda m: m.drop(f"llama.{key}")
    kind = {int: UINT32, float: FLOAT32, str: STRING, list: ARRAY}[type(value)]
    return lambda m: m.set(f"llama.{key}", kind, value, item=UINT32)


def both(*changes):
    """Several changes of one model."""

    def apply(model):
        for change in changes:
            change(model)

    return apply


Q, K, NORM = "blk.0.attn_q.weight", "blk.1.attn_k.weight", "output_norm.weight"
CHANGES: dict[str, Callable[[Gguf], object]] = {
    # cut files, and files that are something else; a change that returns bytes gives the whole file
    "zero_length": lambda m: b"",
    "random_bytes": lambda m: np.random.default_rng(0).bytes(100_000),
    "text_file": lambda m: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "magic_only": lambda m: b"GGUF",
    "cut_in_counts": lambda m: cut(m, 0, 0.6),
    "cut_in_keys": lambda m: cut(m, 1, 0.03),
    "cut_in_vocabulary": lambda m: cut(m, 1, 0.5),
    "cut_in_tensor_infos": lambda m: cut(m, 2, 0.5),
    "cut_before_data": lambda m: cut(m, 3, 0),
    "cut_in_data": lambda m: cut(m, 3, 0.5),
    "cut_last_byte": lambda m: b"".join(m.parts())[:-1],
    "trailing_bytes": lambda m: b"".join(m.parts()) + bytes(1_000_000),
    # counts and lengths
    "huge_tensor_count": lambda m: m.put(n_tensors=2**60),
    "large_tensor_count": lambda m: m.put(n_tensors=50_000_000),
    "negative_tensor_count": lambda m: m.put(n_tensors=2**64 - 1),
    "no_tensors": lambda m: m.put(tensors=[]),
    "huge_key_count": lambda m: m.put(n_keys=2**60),
    "large_key_count": lambda m: m.put(n_keys=50_000_000),
    "negative_key_count": lambda m: m.put(n_keys=2**64 - 1),
    "one_key_too_many": lambda m: m.put(n_keys=len(m.keys) + 1),
    "huge_string": lambda m: m.set("general.name", STRING, raw=struct.pack("<Q", 2**62) + b"abc"),
    "large_string": lambda m: m.set("general.name", STRING, raw=struct.pack("<Q", 8 * 10**9) + b"abc"),
    "huge_key_name": lambda m: m.parts()[0] + struct.pack("<Q", 2**62) + b"abc",
    "huge_array": lambda m: m.set("general.sizes", ARRAY, raw=struct.pack("<IQ", UINT32, 2**61) + bytes(16)),
    "large_array": lambda m: m.set("general.sizes", ARRAY, raw=struct.pack("<IQ", UINT32, 2 * 10**9) + bytes(16)),
    "large_string_array": lambda m: m.set("general.tags", ARRAY, raw=struct.pack("<IQ", STRING, 10**8) + bytes(16)),
    "array_of_arrays": lambda m: m.set("general.sizes", ARRAY, raw=struct.pack("<IQ", ARRAY, 1) + bytes(32)),
    "unknown_key_type": lambda m: m.set("general.name", 77, raw=bytes(8)),
    "duplicate_key": lambda m: m.keys.append(m.keys[1]),
    "key_not_utf8": lambda m: m.set("general.name", STRING, b"\xff\xfe\x80"),
    # version and alignment
    "wrong_magic": lambda m: m.put(magic=b"GGUX"),
    "version_1": lambda m: m.put(version=1),
    "version_99": lambda m: m.put(version=99),
    "big_endian_version": lambda m: m.put(version=3 << 24),
    "alignment_zero": lambda m: m.set("general.alignment", UINT32, 0),
    "alignment_not_a_power": lambda m: m.set("general.alignment", UINT32, 48),
    "alignment_huge": lambda m: m.set("general.alignment", UINT32, 2**31),
    # the architecture and its hyper-parameters
    "no_architecture": lambda m: m.drop("general.architecture"),
    "unsupported_architecture": lambda m: m.set("general.architecture", STRING, "notanarch"),
    "vision_architecture": lambda m: m.set("general.architecture", STRING, "clip"),
    "architecture_not_a_string": lambda m: m.set("general.architecture", UINT32, 7),
    "split_file": lambda m: m.set("split.count", UINT16, 3).set("split.no", UINT16, 0),
    "no_block_count": hyper("block_count", None),
    "no_embedding_length": hyper("embedding_length", None),
    "no_norm_epsilon": hyper("attention.layer_norm_rms_epsilon", None),
    "block_count_is_a_string": hyper("block_count", "two"),
    "zero_layers": hyper("block_count", 0),
    "too_many_layers": hyper("block_count", LAYERS + 1),
    "too_few_layers": hyper("block_count", LAYERS - 1),
    "huge_layers": hyper("block_count", 2**32 - 1),
    "huge_embedding_length": hyper("embedding_length", 2**32 - 1),
    "zero_embedding_length": hyper("embedding_length", 0),
    "heads_not_dividing": both(hyper("attention.head_count", 7), hyper("attention.head_count_kv", 7)),
    "zero_heads": hyper("attention.head_count", 0),
    "zero_kv_heads": hyper("attention.head_count_kv", 0),
    "kv_heads_not_dividing": hyper("attention.head_count_kv", 3),
    "short_head_array": hyper("attention.head_count", [HEADS]),
    "different_heads_per_layer": hyper("attention.head_count", [HEADS, 2 * HEADS]),
    "huge_key_length": both(hyper("attention.key_length", 2**31), hyper("attention.value_length", 2**31)),
    "zero_context_length": hyper("context_length", 0),
    "odd_rope_dimension": hyper("rope.dimension_count", 5),
    "unknown_rope_scaling": hyper("rope.scaling.type", "rubber"),
    "rope_base_not_a_number": hyper("rope.freq_base", float("nan")),
    "huge_expert_count": both(hyper("expert_count", 2**31), hyper("expert_used_count", 2)),
    "too_many_experts_used": both(hyper("expert_count", 2), hyper("expert_used_count", 4)),
    # the vocabulary
    "no_vocabulary": lambda m: m.drop("tokenizer.ggml.tokens").drop("tokenizer.ggml.scores"),
    "no_tokenizer_model": lambda m: m.drop("tokenizer.ggml.model"),
    "unknown_tokenizer_model": lambda m: m.set("tokenizer.ggml.model", STRING, "wordsmith"),
    "no_byte_tokens": lambda m: spm_vocabulary(m, byte_tokens=False),
    "byte_pairs_without_merges": lambda m: m.set("tokenizer.ggml.model", STRING, "gpt2"),
    "unknown_pre_tokenizer": lambda m: (
        m.set("tokenizer.ggml.model", STRING, "gpt2")
        .set("tokenizer.ggml.pre", STRING, "scissors")
        .set("tokenizer.ggml.merges", ARRAY, ["a b"], item=STRING)
    ),
    "small_vocabulary": token_list(lambda tokens: tokens[:3]),
    "duplicate_tokens": token_list(lambda tokens: tokens[:3] + ["same"] * (VOCAB - 3)),
    "large_token": token_list(lambda tokens: [*tokens[:-1], "x" * 5_000_000]),
    "short_scores": lambda m: m.set("tokenizer.ggml.scores", ARRAY, [0.0], item=FLOAT32),
    "short_token_types": lambda m: m.set("tokenizer.ggml.token_type", ARRAY, [1], item=INT32),
    "wild_token_types": lambda m: m.set("tokenizer.ggml.token_type", ARRAY, [-7, 2**31 - 1] * (VOCAB // 2), item=INT32),
    "bos_out_of_range": lambda m: m.set("tokenizer.ggml.bos_token_id", UINT32, 10**6),
    "endless_chat_template": lambda m: m.set(
        "tokenizer.chat_template", STRING, "{% for i in range(10**12) %}{{ i }}{% endfor %}"
    ),
    "broken_chat_template": lambda m: m.set("tokenizer.chat_template", STRING, "{% for {{ messages"),
    # the tensors
    "offset_beyond_file": lambda m: m.change(NORM, offset=2**40),
    "offset_overflowing": lambda m: m.change(NORM, offset=2**64 - 32),
    "offset_unaligned": lambda m: m.change(Q, offset=7),
    "overlapping_tensors": lambda m: m.change(Q, offset=0),
    "unknown_tensor_type": lambda m: m.change(Q, kind=999, data=bytes(DIM * DIM * 4)),
    "negative_tensor_type": lambda m: m.change(Q, kind=2**32 - 1, data=bytes(DIM * DIM * 4)),
    "removed_tensor_type": lambda m: m.change(Q, kind=4, data=bytes(DIM * DIM * 4)),
    "quantized_row_not_a_block": lambda m: m.change(Q, kind=Q8_0, dims=(DIM + 1, DIM), data=bytes(8192)),
    "double_weights": lambda m: m.change(Q, kind=F64),
    "integer_weights": lambda m: m.change(Q, kind=I32),
    "half_norm": lambda m: m.change(NORM, kind=F16),
    "double_norm": lambda m: m.change(NORM, kind=F64),
    "duplicate_tensor": lambda m: m.tensors.append(Tensor(NORM, (DIM,))),
    "missing_layer_tensor": lambda m: m.tensors.remove(m.tensor(K)),
    "missing_embedding": lambda m: m.tensors.remove(m.tensor("token_embd.weight")),
    "missing_output_norm": lambda m: m.tensors.remove(m.tensor(NORM)),
    "extra_tensor": lambda m: m.tensors.append(Tensor("blk.0.surprise.weight", (DIM, DIM))),
    "wrong_shape": lambda m: m.change(K, dims=(DIM, 31)),
    "transposed_shape": lambda m: m.change("blk.1.ffn_down.weight", dims=(DIM, FFN)),
    "dims_overflowing": lambda m: m.change(Q, dims=(2**40, 2**40), data=bytes(64)),
    "dims_wrapping_to_small": lambda m: m.change(Q, dims=(2**33, 2**31 + 1, 1, 1), data=bytes(64)),
    "zero_dim": lambda m: m.change(Q, dims=(DIM, 0), data=b""),
    "negative_dim": lambda m: m.change(Q, dims=(DIM, 2**64 - 1), data=bytes(64)),
    "five_dims": lambda m: m.change(Q, dims=(DIM, DIM, 1, 1, 1)),
    "long_tensor_name": lambda m: m.tensors.append(Tensor("x" * 200, (DIM,))),
    "empty_tensor_name": lambda m: m.tensors.append(Tensor("", (DIM,))),
    "tensor_name_not_utf8": lambda m: m.tensors.append(Tensor(b"\xff\xfe", (DIM,))),
    "weights_not_numbers": lambda m: m.change(NORM, data=np.full(DIM, np.nan, dtype="<f4").tobytes()),
}
LLAMA_CPP = {
    "trailing_bytes": "decodes",
    "key_not_utf8": "decodes",
    "zero_context_length": "decodes",
    "different_heads_per_layer": "decodes",
    "large_token": "decodes",
    "wild_token_types": "decodes",
    "bos_out_of_range": "decodes",
    "endless_chat_template": "decodes",
    "broken_chat_template": "decodes",
    "rope_base_not_a_number": "decodes to NaN",
    "weights_not_numbers": "decodes to NaN",
    "no_byte_tokens": "aborts in llama_tokenize",
    "double_weights": "crashes in llama_decode",
    "integer_weights": "crashes in llama_decode",
    "half_norm": "aborts in llama_decode",
    "double_norm": "aborts in llama_decode",
    "zero_layers": "aborts in the load",
    "huge_layers": "aborts in the load",
    "unknown_rope_scaling": "aborts in the load",
    "huge_expert_count": "aborts in the load",
    "too_many_experts_used": "aborts in the load",
    "duplicate_tokens": "aborts in the load",
}
"""What llama.cpp alone does with a file; with all others the load is refused (a null pointer)."""


def _maker(name):
    def write(folder: Path) -> Path:
        path = Path(folder) / f"{name}.gguf"
        model = valid_model()
        content = CHANGES[name](model)
        if not isinstance(content, bytes):
            return model.write(path)
        path.write_bytes(content)
        return path

    return write


BROKEN: dict[str, Callable[[Path], Path]] = {name: _maker(name) for name in CHANGES}


# --- what llama.cpp does with them -----------------------------------------------------------------------------------

TRY = """
import contextlib
import resource
import sys
import numpy as np
import reference, llama_cpp
said = []
@llama_cpp.llama_log_callback
def keep(level, line, data):
    if level >= 3:
        said.append(line.decode(errors="replace").strip())
llama_cpp.llama_log_set(keep, None)
reference.quiet = contextlib.nullcontext
try:
    with reference.loaded_model(sys.argv[1]) as model:
        print("loads", flush=True)
        with reference.context(model, n_ctx=64, n_batch=64, n_ubatch=64, n_threads=1) as ctx:
            print("context", flush=True)
            reference.decode(ctx, [1, 2, 3], 0)
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(ctx, -1), (300,))
            print("decodes" if np.isfinite(logits).all() else "decodes to NaN", flush=True)
            print("tokenizes" if reference.tokenize(model, "the cat in Z\\u00fcrich") else "no tokens", flush=True)
except RuntimeError:
    print("refused", flush=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000
print(f"{peak} MB log:", " / ".join(said[-3:])[:160].replace("\\n", " "))
"""


def llama_cpp_does(path, timeout=60):
    """(exit code, steps reached and last log lines) of plain llama.cpp with a file, in a process of its own."""
    command = [sys.executable, "-c", TRY, str(path)]
    env = {**os.environ, "GGML_NO_BACKTRACE": "1", "GOMP_SPINCOUNT": "0"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=timeout, cwd=FOLDER, env=env, check=False)
    except subprocess.TimeoutExpired:
        return 124, ["no end"]
    lines = done.stdout.decode(errors="replace").splitlines()
    if done.returncode != 0:
        lines.append("stderr: " + " ".join(done.stderr.decode(errors="replace").split())[-160:])
    return done.returncode, lines


def main(folder):
    """Print one line per broken file."""
    valid_model().write(folder / "valid.gguf")
    print("valid", llama_cpp_does(folder / "valid.gguf"), sep=" | ")
    for name, make in BROKEN.items():
        code, steps = llama_cpp_does(make(folder))
        print(name, code, *steps, sep=" | ", flush=True)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))
