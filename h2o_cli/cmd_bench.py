"""`h2o bench`: benchmarks, and the models with random weights they use."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from h2o_cli.output import Progress, note

EPILOG = """Examples:

\b
  h2o bench make-model qwen2.5-0.5b -o model.gguf
  h2o bench make-model llama-7b -o model.gguf --type q4_0
  h2o bench make-model llama:layers=4,dim=256,ffn=512,heads=4,vocab=512 -o tiny.gguf
"""

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True)


@app.callback(epilog=EPILOG)
def bench() -> None:
    """Benchmarks, and models with random weights for them."""


@app.command("make-model", epilog=EPILOG)
def make_model(
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="A known name, or ARCH:key=value,...")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The GGUF file to write.")],
    file_type: Annotated[str, typer.Option("--type", help="f32, f16, q8_0, q4_0, q4_k_m, ...")] = "f16",
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same bytes.")] = 0,
) -> None:
    """Write a model with random weights of a real shape."""
    from profiler.bench.make_model import make_model as write_model
    from runtime.sizes import format_size

    written = [0, 1]

    def count(done: int, total: int) -> None:
        written[:] = done, total

    with Progress(f"writing {output}", lambda: written[0] / max(1, written[1])):
        write_model(shape, output, file_type=file_type, seed=seed, progress=count)
    note(f"wrote {output} ({format_size(output.stat().st_size)})")
