"""How many texts `h2o batch` answers at once: as --batch-size says, or as many as the profile promises most of."""

from __future__ import annotations

from dataclasses import replace

from h2o_cli.session.batch_pool import PoolChoice, position_bytes
from h2o_cli.session.batch_schedule import MOST_SEQUENCES
from h2o_cli.session.model import OpenModel
from h2o_cli.session.options import SessionOptions
from runtime.errors import UsageError

AUTO = "auto"
WITHOUT_PROFILE = 16


def parse_batch_size(text: str) -> int | None:
    """The number of texts; None: to be chosen. Raises UsageError."""
    if text == AUTO:
        return None
    if not text.isdecimal():
        raise UsageError(f"--batch-size {text} is not possible", f"give 1 to {MOST_SEQUENCES}, or {AUTO}")
    return int(text)


def with_best_size(model: OpenModel, options: SessionOptions, pool: PoolChoice) -> SessionOptions:
    """The options with the batch size that is predicted to be the fastest; says which one that is."""
    n_cells = options.ctx or (pool.kv_pool or 0) // position_bytes(model.file, options.kv_type)
    found = model.profile.batch_size(model.first_plan.budget_bytes, n_cells, options.kv_type) if model.profile else None
    if found:
        n_texts, tokens_per_s = found
        model.caller.note(f"--batch-size {n_texts} is chosen: about {tokens_per_s:.3g} tokens/s by the profile")
    else:
        n_texts = WITHOUT_PROFILE
        reason = "the profile has no batch for this budget" if model.profile else "`h2o profile` can say what is best"
        model.caller.note(f"--batch-size {n_texts} is taken: {reason}")
    return replace(options, sequences=n_texts)
