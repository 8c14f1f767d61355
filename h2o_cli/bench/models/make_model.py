"""Write GGUF models with random weights of real shapes, for benchmarks and tests."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
import numpy.typing as npt

from h2o_cli.bench.models.shapes import Shape, TensorSpec, hyper_parameters, parse_shape, tensor_specs
from runtime.errors import H2OError, UsageError
from runtime.llama.quantize import FILE_TYPES, parse_file_type, quantize
from runtime.sizes import format_size

if TYPE_CHECKING:
    from gguf import GGUFWriter

__all__ = ["FILE_TYPES", "make_model", "parse_file_type", "quantize"]

Progress = Callable[[int, int], None]
"""Called with bytes written so far and bytes in all."""

ALIGNMENT = 32
CHUNK = 1 << 20
LETTERS = "etaoinshrdlcumwfgypbvkjxqz"
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6


def make_model(
    shape: str, output: Path, *, file_type: str = "f16", seed: int = 0, progress: Progress | None = None
) -> None:
    """Write a model of `shape` with random weights to `output`; the same arguments give the same bytes.

    A file already there is replaced when the new one is complete. Types other than f32 and f16 are made by llama.cpp's
    quantiser from an f16 file written beside the output and removed afterwards.
    """
    sizes = parse_shape(shape)
    kind = parse_file_type(file_type)
    if not 0 <= seed < 2**63:
        raise UsageError(f"seed {seed} is not usable", "give a whole number from 0")
    output = Path(output)
    stem = f".h2o-{os.getpid()}-{zlib.crc32(os.fsencode(output.name)):08x}"
    new, plain = output.parent / f"{stem}.new", output.parent / f"{stem}.f16"
    try:
        _check_output(output)
        if kind in ("f32", "f16"):
            _write(sizes, new, kind, seed, progress)
        else:
            _write(sizes, plain, "f16", seed, progress)
            quantize(plain, new, kind)
        os.replace(new, output)
    except OSError as error:
        raise _file_error(error, output) from error
    finally:
        for leftover in (new, plain):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def _check_output(output: Path) -> None:
    if not output.name or (output.exists() and not output.is_file()):
        raise UsageError(f"{output} is not a file that can be replaced", "give the path of a .gguf file")
    if not output.parent.is_dir():
        raise UsageError(f"the folder {output.parent} does not exist", "create it or choose another")


def _file_error(error: OSError, output: Path) -> H2OError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UsageError(f"the disk of {output} is full", "free space or choose another disk")
    reason = error.strerror or str(error)
    return UsageError(f"{output} cannot be written: {reason}", "choose a folder you may write to")


# --- the file --------------------------------------------------------------------------------------------------------


def _write(shape: Shape, path: Path, kind: str, seed: int, progress: Progress | None) -> None:
    specs = tensor_specs(shape)
    total = sum(_n_bytes(spec, kind) for spec in specs)
    free = shutil.disk_usage(path.parent).free
    if total > free:
        raise UsageError(
            f"the file needs {format_size(total)} and the disk has {format_size(free)} free",
            "free space or choose another disk",
        )
    writer = _open_writer(shape, kind)
    for spec in specs:
        writer.add_tensor_info(spec.name, spec.dims, _dtype(spec, kind), _n_bytes(spec, kind))
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        _write_data(writer.fout[0], specs, kind, seed, progress and (lambda done: progress(done, total)))
    finally:
        with contextlib.suppress(OSError):  # what matters was flushed before
            writer.close()


def _write_data(
    file: BinaryIO, specs: list[TensorSpec], kind: str, seed: int, progress: Callable[[int], None] | None
) -> None:
    done = 0
    for spec in specs:
        file.write(bytes(-file.tell() % ALIGNMENT))
        _write_tensor(file, spec, _dtype(spec, kind), seed)
        done += _n_bytes(spec, kind)
        if progress is not None:
            progress(done)
    file.write(bytes(-file.tell() % ALIGNMENT))
    file.flush()


def _n_bytes(spec: TensorSpec, kind: str) -> int:
    return spec.n_values * _dtype(spec, kind).itemsize


def _dtype(spec: TensorSpec, kind: str) -> np.dtype[np.float32] | np.dtype[np.float16]:
    return np.dtype(np.float32) if spec.small or kind == "f32" else np.dtype(np.float16)


def _write_tensor(file: BinaryIO, spec: TensorSpec, dtype: np.dtype[np.floating], seed: int) -> None:
    """Write one tensor in chunks; its values follow from the seed and its name."""
    bits = np.random.PCG64([seed, zlib.crc32(spec.name.encode())])
    table = (_quantiles() * spec.std + spec.mean).astype(dtype)
    left = spec.n_values
    while left > 0:
        n = min(left, CHUNK)
        raw: npt.NDArray[np.uint64] = np.asarray(bits.random_raw(-(-n // 8)), dtype="<u8")
        file.write(table[raw.view(np.uint8)[:n]].tobytes())
        left -= n


def _quantiles() -> npt.NDArray[np.float64]:
    """256 equally likely values of the normal distribution: a random byte picks one."""
    normal = NormalDist()
    values: npt.NDArray[np.float64] = np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)])
    scale: float = np.sqrt(np.mean(values**2))
    return values / scale


def _open_writer(shape: Shape, kind: str) -> GGUFWriter:
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise UsageError(
            "writing models needs the Python package gguf", "in the project's folder: pip install '.[bench]'"
        ) from error
    writer = GGUFWriter(None, shape.arch)
    writer.add_string("general.name", f"random {shape.arch}")
    writer.add_uint32("general.quantization_version", 2)
    writer.add_uint32("general.file_type", FILE_TYPES[kind])
    for key, value in hyper_parameters(shape).items():
        if isinstance(value, bool):
            writer.add_bool(f"{shape.arch}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{shape.arch}.{key}", value)
        else:
            writer.add_float32(f"{shape.arch}.{key}", value)
    _add_vocabulary(writer, byte_pair(shape.vocab) if shape.tokenizer_pre else sentence_piece(shape), shape)
    return writer


# --- the vocabulary --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vocabulary:
    """Tokens that can write every text, and the special ones."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    bos: int
    eos: int
    unknown: int = -1


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, shape: Shape) -> None:
    prefix = "tokenizer.ggml"
    pre = shape.tokenizer_pre
    writer.add_string(f"{prefix}.model", "gpt2" if pre else "llama")
    writer.add_string(f"{prefix}.pre", pre or "default")
    writer.add_array(f"{prefix}.tokens", vocabulary.tokens)
    if not pre:
        writer.add_array(f"{prefix}.scores", [float(-i) for i in range(shape.vocab)])
        writer.add_uint32(f"{prefix}.unknown_token_id", vocabulary.unknown)
        writer.add_bool(f"{prefix}.add_space_prefix", not shape.arch.startswith("gemma"))
    writer.add_array(f"{prefix}.token_type", vocabulary.types)
    if vocabulary.merges:
        writer.add_array(f"{prefix}.merges", vocabulary.merges)
    writer.add_uint32(f"{prefix}.bos_token_id", vocabulary.bos)
    writer.add_uint32(f"{prefix}.eos_token_id", vocabulary.eos)
    writer.add_bool(f"{prefix}.add_bos_token", shape.traits.bos or pre == "llama-bpe")
    writer.add_bool(f"{prefix}.add_eos_token", False)
    if pre:
        writer.add_string("tokenizer.chat_template", CHATML)


def _diagonal(first: Sequence[str], second: Sequence[str], most: int) -> list[tuple[str, str]]:
    """At most `most` pairs, those of early members first."""
    pairs: list[tuple[str, str]] = []
    for total in itertools.count():
        low = max(0, total - len(second) + 1)
        row = [(first[i], second[total - i]) for i in range(low, min(total + 1, len(first)))]
        pairs += row
        if not row or len(pairs) >= most:
            return pairs[:most]
    return pairs


def _word_parts(space: str, most: int) -> list[tuple[str, str]]:
    """Pieces of two and of four characters, as the pairs they are merged from."""
    twos = _diagonal([space, *LETTERS], LETTERS, most)
    joined = [a + b for a, b in twos]
    inner = [text for text in joined if not text.startswith(space)]
    return twos + (_diagonal(joined, inner, most - len(twos)) if most > len(twos) else [])


def byte_pair(n_tokens: int) -> Vocabulary:
    """A byte-pair vocabulary: every byte, merged letters, and three special tokens at the end."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    tokens = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(len(hidden))]
    parts = _word_parts(chr(256 + 32), n_tokens - 256 - len(special))
    tokens += [a + b for a, b in parts]
    n_filler = n_tokens - len(tokens) - len(special)
    types = [NORMAL] * len(tokens) + [UNUSED] * n_filler + [CONTROL] * len(special)
    tokens += [f"<|unused_{i}|>" for i in range(n_filler)] + special
    merges = [f"{a} {b}" for a, b in parts]
    return Vocabulary(tokens, types, merges, bos=n_tokens - 3, eos=n_tokens - 1)


def sentence_piece(shape: Shape) -> Vocabulary:
    """A SentencePiece vocabulary with byte tokens, pieces of one, two and four characters."""
    gemma = shape.arch.startswith("gemma")
    special = ["<pad>", "<eos>", "<bos>", "<unk>"] if gemma else ["<unk>", "<s>", "</s>"]
    if shape.arch == "phi3":
        special.append("<|endoftext|>")  # llama.cpp refuses a model of this name without it
    tokens = special + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [UNKNOWN if text == "<unk>" else CONTROL for text in special] + [BYTE] * 256
    printable = [chr(c) for c in range(33, 127) if chr(c) not in LETTERS]
    pieces = ["\u2581", *LETTERS, *printable][: shape.vocab - len(tokens)]
    pieces += [a + b for a, b in _word_parts("\u2581", shape.vocab - len(tokens) - len(pieces))]
    n_filler = shape.vocab - len(tokens) - len(pieces)
    types += [NORMAL] * len(pieces) + [UNUSED] * n_filler
    tokens += [*pieces, *(f"<unused{i}>" for i in range(n_filler))]
    bos, eos = (2, 1) if gemma else (1, 2)
    return Vocabulary(tokens, types, [], bos=bos, eos=eos, unknown=special.index("<unk>"))
