"""Small models for tests, each made once per test session."""

from __future__ import annotations

import os
from pathlib import Path

from h2o_cli.bench.models.make_model import make_model, quantize

ROOT = Path(__file__).resolve().parent.parent
BUNDLED = ROOT / "model_configs" / "bundled" / "h2o-stories-q8_0.gguf"
STORIES = ROOT.parent / "shared" / "models"
SIZES = "layers=4,dim=256,ffn=512,heads=4,kv_heads=2,vocab=512,ctx=512"
ARCHS = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3")
OTHER_ARCHS = ("gpt2", "falcon", "stablelm", "olmo2", "cohere2", "qwen3moe")


def tiny_shape(arch: str) -> str:
    """The SHAPE of a test model; llama and falcon have a head of their own, so both kinds are met."""
    sizes = SIZES.replace("kv_heads=2", "kv_heads=4") if arch == "gpt2" else SIZES
    if arch in ("llama", "phi3", "falcon"):
        sizes += ",tied=0"
    return f"{arch}:{sizes}"


def tiny_model(folder: Path, arch: str, file_type: str = "f16") -> Path:
    """The test model of an architecture (or of a whole SHAPE) and file type, made in `folder` if it is not there."""
    shape = arch if ":" in arch else tiny_shape(arch)
    path = folder / f"{shape.replace(':', '-').replace(',', '_').replace('=', '')}-{file_type.lower()}.gguf"
    if not path.exists():
        make_model(shape, path, file_type=file_type)
    return path


def bundled_variant(folder: Path, file_type: str) -> Path:
    """The bundled model in another file type, requantised into `folder` if it is not there."""
    if file_type.lower() == "q8_0":
        return BUNDLED
    path = folder / f"bundled-{file_type.lower()}.gguf"
    if not path.exists():
        partial = path.with_suffix(f".{os.getpid()}")
        quantize(BUNDLED, partial, file_type, requantize=True)
        os.replace(partial, path)
    return path
