"""What `h2o plan --batch` says: how fast `h2o batch` should be with each batch size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from h2o_cli.output import emit, print_json, table
from planner.batches import POSITIONS_EACH, SIZES, Prediction, best, predict
from planner.kv import KvUse
from profiler.model_profile import ModelProfile
from runtime.errors import ModelError
from runtime.sizes import MB


def show(profile: ModelProfile, budget_bytes: int, positions_each: int | None, kv: KvUse, *, json: bool) -> None:
    """Print the predictions and the best batch size. Raises BudgetError where none fits."""
    found = predict(profile, budget_bytes, SIZES, positions_each or POSITIONS_EACH, kv)
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
    kv_flag = f" --kv-type {kv.kv_type}" if kv != KvUse() else ""
    emit(table(lines, right=range(6)) + "\n")
    emit(f"h2o batch -m {budget_bytes / MB:.0f} --batch-size {chosen.n_texts}{kv_flag}\n")


def show_as_source(model: Path, cpu_bytes: int, prompt_tokens: int | None, *, json: bool) -> None:
    """Print the policy that the source system's cost model finds for a model of these widths on its machine.

    cpu_bytes: of its CPU. Raises ModelError, UsageError without scipy, BudgetError where nothing fits.
    """
    from planner.source.cost_model import Machine, Shape, search
    from runtime.llama.model_file import ModelFile

    file = ModelFile.open(model)
    names = ("embedding_length", "feed_forward_length", "attention.head_count")
    widths = [file.hyper_parameter(name) for name in names]
    if not all(widths):
        raise ModelError(f"{model.name} has no single width of its layers", "give a model like OPT or Llama")
    hidden, inner, heads = widths
    shape = Shape(file.n_layers, hidden, inner, heads, prompt_tokens or Shape.prompt)
    found = search(shape, Machine(cpu_bytes=cpu_bytes))
    batch, seconds = found.batch, {"prompt_s": found.prompt_s, "decode_s": found.decode_s}
    if json:
        sizes = {"gpu_batch_size": batch.gpu, "num_gpu_batches": batch.block // batch.gpu}
        shares = {"percent": found.placement.percents, "placement": found.placement._asdict()}
        print_json(sizes | shares | seconds | {"tokens_per_s": found.tokens_per_s, "method": "source"})
        return
    percents = " ".join(map(str, found.placement.percents))
    emit(
        f"policy: --gpu-batch-size {batch.gpu} --num-gpu-batches {batch.block // batch.gpu} --percent {percents}\n"
        f"predicted: {found.tokens_per_s:.2f} tokens/s ({shape.prompt} tokens of a prompt, {shape.answer} of an"
        f" answer), prompts {found.prompt_s:.1f} s, answers {found.decode_s:.1f} s\n"
        "by the source system's cost model, for its T4 and layers of OPT's form; here no GPU computes\n"
    )


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
