"""The filter layers that were found for a model, as a JSON file named by the model's hash.

docs/kv-eval.md describes every key. The file is checked when it is built and when it is read.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import msgspec

from profiler.model_profile import read_whole, write_whole
from runtime.errors import ProfileError
from runtime.kv.options import SELECTORS

SCHEMA = 2
PREFIX = "kv-layers-"
ANALYZE_AGAIN = "make it again with `h2o kv analyze MODEL`"

Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Count = Annotated[int, msgspec.Meta(ge=0)]
Select = Annotated[str, msgspec.Meta(pattern=f"^({'|'.join(SELECTORS)})$")]


class Candidate(msgspec.Struct, frozen=True):
    """A set of filter layers, and a selector, that was considered.

    dense_share: part of the model's keys and values that stays dense. similarity: mean over all layers, dense ones
    count as 1. n_prompts: sample prompts it was measured on; kl: mean divergence from full attention in nats per token;
    same: part of the sample answers that stay as they are, token by token.
    """

    layers: tuple[Count, ...]
    wait: Count
    select: Select
    dense_share: Share
    similarity: Share
    n_prompts: Count = 0
    kl: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    same: Share = 1.0


class LayerChoice(msgspec.Struct, frozen=True):
    """What was found for one model. layers, wait and select are the choice.

    keep: share of the prompt that the similarities and divergences are for; lengths: of the sample prompts, in tokens.
    similarity[a][b]: mass of layer b's scores on layer a's best rows, mean over n_steps decode steps. curves: n -> mean
    of similarity[a][a .. a+n-1] for every a. layer_numbers: the layers of the matrix, those that see all positions.
    most_kl: what was good enough, nats per token (0: not known). complete: the analysis was not ended early.
    """

    schema: int
    model_hash: Count
    model: str
    n_layers: Annotated[int, msgspec.Meta(ge=1)]
    layers: Annotated[tuple[Count, ...], msgspec.Meta(min_length=1)]
    wait: Count
    select: Select
    keep: Share
    lengths: tuple[Count, ...]
    n_prompts: Count
    n_steps: Count
    layer_numbers: tuple[Count, ...]
    similarity: tuple[tuple[Share, ...], ...]
    curves: dict[int, tuple[Share, ...]]
    candidates: tuple[Candidate, ...]
    versions: dict[str, str]
    most_kl: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    complete: bool = True

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema} is not {SCHEMA}")
        if list(self.layers) != sorted(set(self.layers)) or self.layers[-1] >= self.n_layers:
            raise ValueError(f"the filter layers {list(self.layers)} are no rising list below {self.n_layers}")

    @property
    def chosen(self) -> Candidate | None:
        """What was measured of the choice; None where it was not (a file written by hand)."""
        wanted = (self.layers, self.wait, self.select)
        return next((c for c in self.candidates if (c.layers, c.wait, c.select) == wanted), None)


def layers_path(folder: Path, model_hash: int) -> Path:
    """Where the filter layers of a model are kept in a folder."""
    return folder / f"{PREFIX}{model_hash:016x}.json"


def load_choice(path: str | os.PathLike[str]) -> LayerChoice:
    """The choice in a file. Raises ProfileError."""
    try:
        return msgspec.json.decode(read_whole(path), type=LayerChoice)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProfileError(f"{path} cannot be used: {error}", ANALYZE_AGAIN) from None


def save_choice(choice: LayerChoice, path: str | os.PathLike[str]) -> None:
    """Write the file whole: a temporary one beside it, then a rename. Raises ProfileError."""
    write_whole(path, msgspec.json.encode(choice) + b"\n")
