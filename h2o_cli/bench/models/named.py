"""The models that benchmarks measure: a generated one (SHAPE/TYPE), made once in the user's cache folder, or a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from h2o_cli.bench.models.make_model import make_model
from h2o_cli.bench.models.shapes import parse_shape
from h2o_cli.output import Progress
from runtime.errors import UsageError
from runtime.llama.quantize import parse_file_type


@dataclass(frozen=True)
class BenchModel:
    """A model to measure; shape and file_type are those of a generated one."""

    name: str
    path: Path
    shape: str = ""
    file_type: str = ""

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size

    def prepare(self) -> None:
        """Write a generated model, unless it is there."""
        if self.shape and not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write(self.shape, self.path, self.file_type)


def bench_model(name: str, folder: Path | None = None) -> BenchModel:
    """The model called SHAPE, SHAPE/TYPE or FILE.gguf; generated ones live in `folder`. Raises UsageError."""
    if name.endswith(".gguf"):
        path = Path(name).expanduser()
        if not path.is_file():
            raise UsageError(f"there is no file {name}", "give a GGUF file, or SHAPE/TYPE such as qwen2.5-0.5b/q8_0")
        return BenchModel(path.stem, path)
    shape, _, file_type = name.partition("/")
    parse_shape(shape)
    kind = parse_file_type(file_type or "f16")
    stem = "".join(c if c.isalnum() or c in ".-" else "_" for c in shape.lower())
    return BenchModel(f"{shape}/{kind}", (folder or models_folder()) / f"{stem}-{kind}.gguf", shape, kind)


def models_folder() -> Path:
    """Where generated models are kept."""
    import platformdirs

    return Path(platformdirs.user_cache_path("h2o")) / "models"


def write(shape: str, path: Path, file_type: str, seed: int = 0) -> None:
    """Write a model with random weights, its progress on standard error. Raises UsageError."""
    written = [0, 1]

    def count(done: int, total: int) -> None:
        written[:] = done, total

    with Progress(f"writing {path.name}", lambda: written[0] / max(1, written[1])):
        make_model(shape, path, file_type=file_type, seed=seed, progress=count)
