"""`h2o inspect`: what a model file holds, and the smallest budget it runs in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, Any

import typer

from h2o_cli.floor_run import smallest_budget
from h2o_cli.interrupts import interrupts
from h2o_cli.output import emit, note, print_json, table
from h2o_cli.session.defaults import CONVERSATION_CONTEXT, PROMPT_CONTEXT, default_threads
from h2o_cli.session.models import DEFAULT_MODEL, find_profile, resolve_model
from h2o_cli.session.smallest import CONVERSATION, PROMPT
from runtime.errors import EngineError, H2OError, ModelError, ProfileError, UsageError
from runtime.llama.model_file import Layer, ModelFile, TensorInfo
from runtime.plans.residency import layer_bytes
from runtime.settings import Settings
from runtime.sizes import MB, format_size

EPILOG = """Examples:

\b
  h2o inspect model.gguf
  h2o inspect model.gguf --ctx 4096      with the smallest budget for this context
  h2o inspect model.gguf --json | jq .floor_bytes
"""

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help=f"Path of a GGUF file. {DEFAULT_MODEL}")
]
Ctx = Annotated[
    int | None, typer.Option("--ctx", metavar="N", help="Context of the smallest budget. [default: that of a run]")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


@dataclass(frozen=True)
class Budget:
    """The smallest budgets of a prompt and of a conversation, and KV bytes per token; None where there is an error."""

    ctx_tokens: int
    conversation_tokens: int
    floor_bytes: int | None = None
    conversation_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    error: H2OError | None = None


def inspect(model: Model = None, ctx: Ctx = None, as_json: Json = False) -> None:
    """Show a model's layers, bytes by part and type, context length and smallest budget."""
    if ctx is not None and ctx < 1:
        raise UsageError(f"--ctx {ctx} is not possible", "give 1 or more")
    file = ModelFile.open(resolve_model(model))
    budget = find_budget(file, ctx)
    found = facts(file, budget)
    if as_json:
        print_json(found)
    else:
        emit(describe(file, found) + "\n")
    if budget.error:
        raise budget.error


def find_budget(file: ModelFile, ctx: int | None) -> Budget:
    """What runs with a context of ctx tokens need (None: what they have when --ctx is not given)."""
    longest = file.hyper_parameter("context_length") or CONVERSATION_CONTEXT
    budget = Budget(ctx or min(PROMPT_CONTEXT, longest), ctx or min(CONVERSATION_CONTEXT, longest))
    try:
        return replace(
            budget,
            floor_bytes=smallest_budget(file, PROMPT, _settings(budget.ctx_tokens)),
            conversation_bytes=smallest_budget(file, CONVERSATION, _settings(budget.conversation_tokens)),
            kv_bytes_per_token=_kv_bytes_per_token(file),
        )
    except (ModelError, EngineError) as error:
        return replace(budget, error=error)


def _settings(n_ctx: int) -> Settings:
    return Settings(n_ctx=n_ctx, n_threads=default_threads())


def _kv_bytes_per_token(file: ModelFile) -> int:
    """From the model's profile if there is one, else by opening the model without its weights."""
    path = find_profile(file.hash)
    if path is not None:
        from profiler.model_profile import load_profile

        try:
            return load_profile(path).kv_bytes_per_token
        except ProfileError as error:
            note(f"the profile {path.name} was not used: {error}")
    from profiler.measure import default_settings, measure_memory
    from runtime.llama.hollow import HollowModel

    with interrupts.held():
        hollow = HollowModel(file)
        try:
            return measure_memory(file, hollow, default_settings(file)).kv_bytes_per_token
        finally:
            hollow.free()


def facts(file: ModelFile, budget: Budget) -> dict[str, Any]:
    """Everything `--json` prints."""
    head = file.head.pieces[0].tensor
    return {
        "model": str(file.path),
        "name": file.name,
        "hash": file.hash,
        "architecture": file.architecture,
        "files": len(file.paths),
        "file_bytes": file.n_bytes,
        "n_layers": file.n_layers,
        "context_length": file.hyper_parameter("context_length") or None,
        "embedding_length": file.hyper_parameter("embedding_length") or None,
        "vocabulary": head.n_rows,
        "tokenizer": file.tokenizer or None,
        "tied_head": file.tied_head,
        "types": types_of(file.tensors),
        "parts": parts_of(file),
        "layers": [_layer_facts(layer) for layer in file.layers],
        "head": {"bytes": layer_bytes(file.head), "tiles": len(file.head.pieces), "type": head.type_name},
        "kv_bytes_per_token": budget.kv_bytes_per_token,
        "floor_bytes": budget.floor_bytes,
        "floor_ctx_tokens": budget.ctx_tokens,
        "conversation_floor_bytes": budget.conversation_bytes,
        "conversation_ctx_tokens": budget.conversation_tokens,
    }


def types_of(tensors: Iterable[TensorInfo]) -> dict[str, int]:
    """Bytes by quantisation type, the largest first."""
    found: Counter[str] = Counter()
    for tensor in tensors:
        found[tensor.type_name] += tensor.n_bytes
    return dict(found.most_common())


def parts_of(file: ModelFile) -> dict[str, dict[str, Any]]:
    """Bytes, number of tensors and types of each part. A tied head is the embedding's own tensor."""
    head = [] if file.tied_head else [file.head.pieces[0].tensor]
    parts = {
        "layers": [tensor for layer in file.layers for tensor in _matrices(layer)],
        "head": head,
        "embedding": list(file.row_tables),
        "always resident": list(file.small_tensors),
    }
    return {
        name: {"bytes": sum(t.n_bytes for t in tensors), "tensors": len(tensors), "types": types_of(tensors)}
        for name, tensors in parts.items()
    }


def _layer_facts(layer: Layer) -> dict[str, Any]:
    return {
        "bytes": layer_bytes(layer),
        "resident_bytes": sum(info.n_bytes for info in layer.small),
        "tensors": len(_matrices(layer)) + len(layer.small),
        "types": types_of(_matrices(layer)),
    }


def _matrices(layer: Layer) -> list[TensorInfo]:
    """The tensors of a layer's pieces; a large one is several pieces."""
    return list({piece.tensor.name: piece.tensor for piece in layer.pieces}.values())


# --- for people -----------------------------------------------------------------------------------------------------


def describe(file: ModelFile, found: dict[str, Any]) -> str:
    """The facts as text."""
    files = f", {found['files']} files" if found["files"] > 1 else ""
    rows = [["part", "bytes", "tensors", "types"]]
    for name, part in found["parts"].items():
        shown = "the embedding" if name == "head" and file.tied_head else format_size(part["bytes"])
        rows.append([name, shown, str(part["tensors"]), _types(part["types"])])
    return "\n".join(
        [
            f"{found['name']} ({found['architecture']}, {format_size(found['file_bytes'])}{files})",
            _layers_line([layer["bytes"] for layer in found["layers"]]),
            f"context {found['context_length'] or 'unknown'}, width {found['embedding_length'] or 'unknown'},"
            f" vocabulary {found['vocabulary']} ({found['tokenizer'] or 'no tokenizer'})",
            "",
            table(rows, right=(1, 2)),
            "",
            *_budget_lines(found),
        ]
    )


def _layers_line(sizes: list[int]) -> str:
    least, most = format_size(min(sizes)), format_size(max(sizes))
    each = f"{most} each" if least == most else f"{least} to {most}"
    return f"{len(sizes)} layers, {each}"


def _types(types: dict[str, int]) -> str:
    if len(types) == 1:
        return next(iter(types))
    return ", ".join(f"{name} {format_size(n_bytes)}" for name, n_bytes in types.items())


def _budget_lines(found: dict[str, Any]) -> list[str]:
    if found["floor_bytes"] is None:
        return ["smallest budget: not known"]
    lines = []
    if found["kv_bytes_per_token"]:
        lines.append(f"KV cache {format_size(found['kv_bytes_per_token'])} per token (f16)")
    lines.append(
        f"smallest budget: {_least(found['floor_bytes'], found['floor_ctx_tokens'])};"
        f" a conversation: {_least(found['conversation_floor_bytes'], found['conversation_ctx_tokens'])}"
    )
    return lines


def _least(n_bytes: int, ctx_tokens: int) -> str:
    return f"-m {n_bytes // MB} (context of {ctx_tokens} tokens)"
