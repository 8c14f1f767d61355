"""Which filter layers `--kv-layers auto` means: those that `h2o kv analyze` found for the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.session.models import BUNDLED_MODEL, profiles_folder

if TYPE_CHECKING:
    from profiler.kv_eval.layers_file import LayerChoice
    from runtime.kv.filter import Filter


def find_choice(model_hash: int) -> LayerChoice | None:
    """What was found for the model with this hash: the user's own analysis, else one that came with the program.

    None where there is none. Raises ProfileError when the file cannot be used.
    """
    from profiler.kv_eval.layers_file import layers_path, load_choice

    for folder in (profiles_folder(), BUNDLED_MODEL.parent):
        path = layers_path(folder, model_hash)
        if path.is_file():
            return load_choice(path)
    return None


def warn_of_guess(kv: Filter, path: Path, n_ctx: int, warn: Callable[[str, str], None]) -> None:
    """Say that the filter layers are a guess, where they are one and a context of n_ctx tokens can be filtered."""
    if kv.options.is_guess_in(n_ctx):
        import shlex  # for a warning only

        layers = ",".join(map(str, kv.roles.filters))
        warn(
            f"{path.name} was not analyzed, its filter layers {layers} are a guess: answers can be wrong",
            f"find its own layers first: h2o kv analyze --quick {shlex.quote(str(path))}",
        )
