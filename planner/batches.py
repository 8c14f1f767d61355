"""How many texts to answer at once: what a pass takes is predicted from the profile and the memory limit.

Every text more takes memory of its own, which weights do not have then, and computes its token. Reads and computing are
simulated beside each other as those of a single text are (simulator.py).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace

from planner.arms import h2o_arms
from planner.choose import pick
from planner.footprint import Footprint, measure_footprint, streamable_bytes
from planner.kv import KvUse
from planner.simulator import decode_rates, token_s
from profiler.model_profile import BatchProfile, ModelProfile
from runtime.errors import BudgetError
from runtime.plans.ledger import sampler_bytes
from runtime.plans.plan import Plan
from runtime.settings import FULL_TILES, MARGIN_BYTES, TURNS_MARGIN_BYTES

_LOGIT_BYTES = 8  # of a token in the vocabulary: in the graph, and where llama.cpp hands it out
USED = 2 / 3  # of its positions a text has on average: its prompt is a third of them, and its answer grows
MEASURED_POSITIONS = 64  # of each text, while batches were measured
SIZES = (1, 2, 3, 4, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32)
F16 = KvUse()
POSITIONS_EACH = 256  # where nothing is said
_FEW = 4  # texts: with fewer of them a text more says nothing of many
LEAST_EACH = 64  # positions: with fewer of them not much of an answer fits
WORTH = 1.02  # a larger batch has to be so much faster than a smaller one


@dataclass(frozen=True)
class Prediction:
    """A pass over one token of n_texts, in seconds; read_s and compute_s: what it would take alone of each."""

    n_texts: int
    plan: Plan
    streamed_bytes: int
    read_s: float
    compute_s: float
    pass_s: float

    @property
    def tokens_per_s(self) -> float:
        """Of all texts together."""
        return self.n_texts / self.pass_s


def predict(
    profile: ModelProfile, budget_bytes: int, sizes: Iterable[int], positions_each: int, kv: KvUse = F16
) -> list[Prediction]:
    """What passes take for each of these batch sizes that fits the budget, each text with so many positions.

    The keys and values of all positions count, as those of texts near their ends. Raises BudgetError where no size
    fits.
    """
    found, refused = [], BudgetError("no batch fits the budget", "raise -m")
    for n in sizes:
        try:
            available = batch_footprint(profile, n, positions_each, kv).available_bytes(budget_bytes)
        except BudgetError as error:
            refused = error
            continue
        arm = pick(profile, h2o_arms(profile, available)).arm
        found.append(_predicted(profile, n, arm, positions_each))
    if not found:
        raise refused
    return found


def predict_inside(profile: ModelProfile, budget_bytes: int, n_cells: int, kv: KvUse = F16) -> list[Prediction]:
    """The same where so many positions are shared out among the texts."""
    found = []
    for n in SIZES:
        if n == 1 or n_cells // n >= LEAST_EACH:
            with suppress(BudgetError):
                found += predict(profile, budget_bytes, [n], n_cells // n, kv)
    return found


def _predicted(profile: ModelProfile, n_texts: int, arm: Plan, positions_each: int) -> Prediction:
    rates, streamed = decode_rates(profile), streamable_bytes(profile) - arm.pinned_bytes
    one_s = sum(rates.compute_s) + rates.overhead_s
    took_s = compute_s(profile, n_texts, streamed / max(1, streamable_bytes(profile)))
    if n_texts > 1 and profile.batches:
        more = USED * positions_each - MEASURED_POSITIONS
        took_s = max(one_s, took_s + n_texts * more * profile.batches[-1].position_s)
    factor = took_s / one_s if one_s else 0.0
    scaled = replace(
        rates, compute_s=[factor * seconds for seconds in rates.compute_s], overhead_s=factor * rates.overhead_s
    )
    read_s = streamed / rates.disk_bytes_per_s
    return Prediction(n_texts, arm, streamed, read_s, took_s, token_s(profile, arm, scaled))


def batch_footprint(profile: ModelProfile, n_texts: int, positions_each: int, kv: KvUse = F16) -> Footprint:
    """What a process needs besides weights, all its positions in use."""
    one = measure_footprint(profile, positions_each * n_texts, FULL_TILES, kv)
    compute_bytes, prompt_bytes = one.compute_bytes, one.prompt_bytes
    if n_texts > 1 and profile.batches:
        compute_bytes = int(_between([(b.n_texts, b.pass_bytes) for b in profile.batches], n_texts))
        prompt_bytes = int(_between([(b.n_texts, b.prompt_bytes) for b in profile.batches], n_texts))
    elif profile.embedding.row_bytes:
        n_vocab = profile.embedding.bytes // profile.embedding.row_bytes
        compute_bytes += (n_texts - 1) * n_vocab * _LOGIT_BYTES
        compute_bytes += sampler_bytes(n_vocab, n_texts) - sampler_bytes(n_vocab, 1)
    return replace(
        one,
        compute_bytes=compute_bytes,
        prompt_bytes=max(0, prompt_bytes),
        later_bytes=0,
        margin_bytes=one.margin_bytes + TURNS_MARGIN_BYTES - MARGIN_BYTES,
    )


def compute_s(profile: ModelProfile, n_texts: int, streamed_share: float) -> float:
    """Computing time of a pass over one token of n_texts, and of the choice of the next ones.

    Between the numbers of texts that were measured, one of which is 1, and behind them it is a straight line. Where
    none were, or few alone, a token more costs what it costs in a prompt: kernels for few tokens are slower.
    streamed_share: of all weights. Putting a streamed weight under its node takes the same time for any number of
    texts: what is streamed less than everything is spared it.
    """
    one = sum(layer.decode_compute_s.mean for layer in profile.layers) + profile.head.decode_compute_s.mean
    one += profile.overhead_s.mean
    more_s = sum(layer.prefill_compute_s.mean for layer in profile.layers) / max(1, profile.prefill_tokens)
    if not profile.batches:
        return one + (n_texts - 1) * more_s
    few = profile.batches[0]
    handover_s = max(0.0, few.streamed_s.mean - few.resident_s.mean) if few.resident_s else 0.0
    streams = streamed_share > 0
    points = [(1, one + handover_s * streams)]
    points += [(batch.n_texts, _pass_s(batch, streams=streams)) for batch in profile.batches]
    most, most_s = points[-1]
    if most < _FEW:
        points.append((most + 1, most_s + more_s))
    return max(one, _between(points, n_texts) - handover_s * (1 - streamed_share) * streams)


def _pass_s(batch: BatchProfile, *, streams: bool) -> float:
    spread = batch.streamed_s if streams or batch.resident_s is None else batch.resident_s
    return spread.mean


def _between(points: list[tuple[int, float]], x: int) -> float:
    """The value at x of a line through points (x, value), which are sorted; it goes on straight at its ends."""
    if len(points) == 1:
        return points[0][1] * x / points[0][0]
    i = next((i for i, (at, _) in enumerate(points[1:], 1) if x <= at), len(points) - 1)
    (x0, y0), (x1, y1) = points[i - 1 : i + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def best(predictions: Iterable[Prediction]) -> Prediction:
    """The smallest batch that no larger one beats by more than a little."""
    found = sorted(predictions, key=lambda prediction: prediction.n_texts)
    most = max(prediction.tokens_per_s for prediction in found)
    return next(prediction for prediction in found if prediction.tokens_per_s * WORTH >= most)
