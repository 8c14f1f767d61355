"""The smallest budget: one number for a model, a context and flags, whoever names it, and no run takes less.

It is what an engine without weights takes, and its smallest window, in whole MB. What a process takes differs by some
hundred KB from run to run. So the number is written down in the user's cache folder, and stays for as long as later
measurements agree with it. Commands that have loaded other code than a run ask a process that has not
(h2o_cli/floor_run.py).
"""

from __future__ import annotations

import gc
import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from h2o_cli.session.models import replace_file
from runtime.engine.engine import Engine
from runtime.engine.pass_memory import rows_for
from runtime.llama.abi import PINNED_VERSION
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.ledger import budget_for, floor_for, more_margin
from runtime.plans.plan import Plan
from runtime.plans.residency import smallest_window
from runtime.settings import FULL_TILES, MARGIN_BYTES, Settings
from runtime.sizes import MB

PROMPT, CHAT, CONVERSATION, WORKER = "prompt", "chat", "conversation", "worker"  # kinds of runs: they load other code
NEAR_BYTES = 20 * MB  # an engine with so much more than it needs is above the smallest budget for certain
_AGREES_BYTES = 4 * MB  # a written number may be so much above what is measured
_MOST_WRITTEN = 200
_ROOT = Path(__file__).resolve().parents[2]
_CODE = ("runtime", "h2o_cli")  # what a run imports


def least_settings(settings: Settings, ubatch: int | None) -> Settings:
    """Those of the smallest budget: the shortest passes of a prompt, no drafts from the text, tokens chosen in any way.

    ubatch: as given.
    """
    n_logits = rows_for(2, settings.n_logits) if settings.draft_bytes else settings.n_sequences
    return replace(settings, n_ubatch=min(ubatch or FULL_TILES, FULL_TILES), n_logits=n_logits, lists_tokens=True)


def measure(file: ModelFile, hollow: HollowModel, settings: Settings, kind: str) -> int:
    """The smallest budget in bytes, from an engine that reads no weights; no other may be open on this model."""
    gc.collect()  # an engine that was closed before leaves objects in circles
    engine = Engine(file, hollow, Plan(0, 1, window_bytes=smallest_window(file)), settings)
    engine.close()
    return agreed(file.hash, settings, kind, engine.layout.fixed_bytes + smallest_window(file))


def of_worker(file: ModelFile, hollow: HollowModel, settings: Settings, budget_bytes: int) -> int:
    """The smallest budget of a worker: the number written down where it is at most budget_bytes, else measured."""
    known = written(file.hash, settings, WORKER)
    return known if 0 < known <= budget_bytes else measure(file, hollow, settings, WORKER)


def agreed(model_hash: int, settings: Settings, kind: str, need_bytes: int) -> int:
    """The smallest budget where need_bytes were measured: the number written down, if they agree; else a new one."""
    old, need = written(model_hash, settings, kind), budget_for(need_bytes)
    if need <= old <= need + _AGREES_BYTES:
        return old
    floor = floor_for(need_bytes)
    if not settings.draft_bytes:
        _write(_key(model_hash, settings, kind), floor)
    return floor


def written(model_hash: int, settings: Settings, kind: str) -> int:
    """The number that was written down for such a run; 0: none."""
    return 0 if settings.draft_bytes else _read().get(_key(model_hash, settings, kind), 0)


def _key(model_hash: int, settings: Settings, kind: str) -> str:
    """All that decides about the number."""
    kv = settings.kv and replace(settings.kv, folder="")
    margin = MARGIN_BYTES + more_margin(settings.n_ctx, settings.n_threads)
    facts = [margin, settings.n_ctx, settings.n_ubatch, settings.kv_type, settings.prefetch_input, kv]
    facts += [f"{settings.n_threads} threads"]  # each has tiles of its own
    facts += [settings.n_sequences] if settings.n_sequences > 1 else []
    facts += [f"{settings.swap_bytes} swapped"] if settings.swap_bytes else []
    facts += [f"{settings.snapshot_bytes} on their way"] if settings.snapshot_bytes else []
    return " ".join(map(str, [_code(), PINNED_VERSION, sys.hexversion, model_hash, kind, *facts]))


def _code() -> int:
    """When this program's code was last changed: other code takes more or less memory."""
    walks = (walk for room in _CODE for walk in os.walk(_ROOT / room))
    files = (f"{folder}/{name}" for folder, _, names in walks for name in names if name.endswith(".py"))
    return max((os.stat(file).st_mtime_ns for file in files), default=0)


def _path() -> Path:
    import platformdirs

    return Path(platformdirs.user_cache_dir("h2o-llm")) / "smallest-budgets.json"


def _read() -> dict[str, int]:
    """All that was written down. Anything but that is as good as nothing."""
    import json  # here, as platformdirs: a budget with room to spare asks for no number

    try:
        found = json.loads(_path().read_bytes())
        return {str(key): int(n_bytes) for key, n_bytes in found.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}


def _write(key: str, floor: int) -> None:
    """Write a number down; silent where the folder cannot be written."""
    import json

    others = {old: n_bytes for old, n_bytes in _read().items() if old != key}
    kept = dict([*others.items(), (key, floor)][-_MOST_WRITTEN:])
    with suppress(OSError):
        path = _path()
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps(kept, indent=0).encode())
