"""What `h2o plan --batch` says: how fast `h2o batch` should be with each batch size."""

from __future__ import annotations

from typing import Any

from h2o_cli.output import emit, print_json, table
from planner.batches import POSITIONS_EACH, SIZES, Prediction, best, predict
from profiler.model_profile import ModelProfile
from runtime.sizes import MB


def show(profile: ModelProfile, budget_bytes: int, positions_each: int | None, *, json: bool) -> None:
    """Print the predictions and the best batch size. Raises BudgetError where none fits."""
    found = predict(profile, budget_bytes, SIZES, positions_each or POSITIONS_EACH)
    chosen = best(found)
    if json:
        print_json(
            {
                "batch_size": chosen.n_texts,
                "predicted_tokens_per_s": chosen.tokens_per_s,
                "budget_bytes": budget_bytes,
                "batch_sizes": [as_json(prediction) for prediction in found],
            }
        )
        return
    lines = [["texts", "tokens/s", "ms/token", "reads ms", "computing ms", "streamed MB"]]
    for one in found:
        times = (1000 * one.pass_s, 1000 * one.read_s, 1000 * one.compute_s)
        cells = [f"{one.tokens_per_s:.2f}", *(f"{ms:.0f}" for ms in times), f"{one.streamed_bytes / MB:.0f}"]
        lines.append([str(one.n_texts), *cells])
    emit(table(lines, right=range(6)) + "\n")
    emit(f"h2o batch -m {budget_bytes / MB:.0f} --batch-size {chosen.n_texts}\n")


def as_json(one: Prediction) -> dict[str, Any]:
    """The figures of a prediction."""
    return {
        "n_texts": one.n_texts,
        "tokens_per_s": one.tokens_per_s,
        "ms_per_token": 1000 * one.pass_s,
        "read_ms": 1000 * one.read_s,
        "compute_ms": 1000 * one.compute_s,
        "streamed_bytes": one.streamed_bytes,
    }
