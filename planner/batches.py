"""How many texts to answer at once: what a pass takes is predicted from the profile and the memory limit.

A pass over one token of n texts takes as long as its reads or its computing, whichever is longer. Every text more takes
memory of its own, which weights do not have then, and computes its token; what a token more costs is what it costs in a
prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from planner.footprint import measure_footprint, streamable_bytes
from profiler.model_profile import ModelProfile
from runtime.errors import BudgetError
from runtime.plans.ledger import SAMPLER_BYTES_PER_TOKEN

_LOGIT_BYTES = 8  # of a token in the vocabulary: in the graph, and where llama.cpp hands it out
WORTH = 1.02  # a larger batch has to be so much faster than a smaller one


@dataclass(frozen=True)
class Prediction:
    """A pass over one token of n_texts. tokens_per_s: of all texts together."""

    n_texts: int
    streamed_bytes: int
    read_s: float
    compute_s: float

    @property
    def pass_s(self) -> float:
        """Reads and computing go on at the same time."""
        return max(self.read_s, self.compute_s)

    @property
    def tokens_per_s(self) -> float:
        """Of all texts together."""
        return self.n_texts / self.pass_s


def predict(profile: ModelProfile, budget_bytes: int, sizes: Iterable[int], positions_each: int) -> list[Prediction]:
    """What passes take for each of these batch sizes that fits the budget, each text with so many positions.

    Raises BudgetError where none does.
    """
    found, refused = [], BudgetError("no batch fits the budget", "raise -m")
    n_vocab = profile.embedding.bytes // profile.embedding.row_bytes if profile.embedding.row_bytes else 0
    for n in sizes:
        footprint = measure_footprint(profile, positions_each * n, min(profile.prefill_tokens, 128))
        more_bytes = (n - 1) * n_vocab * (_LOGIT_BYTES + SAMPLER_BYTES_PER_TOKEN) + footprint.prompt_bytes
        try:
            left = footprint.available_bytes(budget_bytes - more_bytes)
        except BudgetError as error:
            refused = error
            continue
        total = streamable_bytes(profile)
        streamed = 0 if left >= total else total - left + footprint.smallest_window_bytes
        read_s = min(streamed, total) / profile.disk.bytes_per_s.mean
        found.append(Prediction(n, min(streamed, total), read_s, compute_s(profile, n)))
    if not found:
        raise refused
    return found


def compute_s(profile: ModelProfile, n_texts: int) -> float:
    """Computing time of a pass over one token of n_texts."""
    one = sum(layer.decode_compute_s.mean for layer in profile.layers)
    prompt = sum(layer.prefill_compute_s.mean for layer in profile.layers)
    more = max(0.0, prompt - one) / max(1, profile.prefill_tokens - 1)  # of each token more, in all layers
    times = 1 + (n_texts - 1) * (more / one if one else 0.0)
    return times * (one + profile.head.decode_compute_s.mean) + profile.overhead_s.mean


def best(predictions: Iterable[Prediction]) -> Prediction:
    """The smallest batch that no larger one beats by more than a little."""
    found = sorted(predictions, key=lambda prediction: prediction.n_texts)
    chosen = found[0]
    for other in found[1:]:
        if other.tokens_per_s > WORTH * chosen.tokens_per_s:
            chosen = other
    return chosen
