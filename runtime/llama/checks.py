"""What llama.cpp accepts when it loads a model and crashes on when it computes: refused before that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from runtime.errors import ModelError
from runtime.llama import abi

_F32 = 0
_OTHER_ROWS = ("graniteswitch", "qwen4exp")  # they look rows up by numbers made from the tokens
_LOOKUPS = ("ffn_gate_tid2eid.weight",)  # tables of integers: rows are looked up, nothing is multiplied
_QUANTIZE = "make the file again with llama.cpp's convert_hf_to_gguf.py (--outtype f16) and llama-quantize"


def check_type(path: Path, name: str, type_id: int) -> None:
    """Raise ModelError for a tensor whose type llama.cpp's CPU code cannot compute with.

    Norms and biases are added and multiplied element by element, which it does in f32 only; all other weights are
    matrices, whose type needs a dot product.
    """
    if not name.endswith((".weight", ".bias")) or name.endswith(_LOOKUPS):
        return
    element_wise = name.endswith(".bias") or "norm" in name.split(".")[-2]
    usable = type_id == _F32 if element_wise else abi.has_dot_product(type_id)
    if not usable:
        type_name = abi.ggml_type_name(type_id).decode()
        raise ModelError(f"{path}: tensor {name} has type {type_name}, which llama.cpp cannot compute with", _QUANTIZE)


def check_architecture(path: Path, architecture: str) -> None:
    """Raise ModelError where llama.cpp reads other rows of an embedding table than those of a pass's tokens."""
    if architecture in _OTHER_ROWS:
        raise ModelError(
            f"{path}: models of the architecture {architecture} read other embedding rows than those of their tokens",
            "run it with llama.cpp itself",
        )


def check_parts(paths: Sequence[Path]) -> None:
    """Raise ModelError when a part of a model in several files is missing."""
    for number, path in enumerate(paths, 1):
        if len(paths) > 1 and not path.exists():
            raise ModelError(f"part {number} of {len(paths)} is missing: {path}", "put all parts into one folder")


def check_splits(path: Path, n_named: int, n_told: int) -> None:
    """Raise ModelError unless a model in n_told files (its header) is named as one of n_named files."""
    if n_named == max(n_told, 1):
        return
    if n_named == 1:
        raise ModelError(
            f"{path} is a part of a model in {n_told} files, and its name does not say which",
            f"name the parts NAME-00001-of-{n_told:05d}.gguf and so on, and give the first one",
        )
    raise ModelError(
        f"{path} is named as one of {n_named} files, and its header tells of {n_told}", "download the model again"
    )
