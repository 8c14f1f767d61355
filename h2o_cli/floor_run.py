"""The smallest budget of a run, from a process like that run: commands that have loaded other code ask one.

`python -m h2o_cli.floor_run KIND FLAGS...` is this process: a run with these flags that only says the number.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from io import StringIO

from h2o_cli.run_memory import output_of
from h2o_cli.session.smallest import CHAT, CONVERSATION, PROMPT, least_settings, written
from runtime.errors import (
    BudgetError,
    DiskError,
    EngineError,
    H2OError,
    ModelError,
    ProfileError,
    PromptError,
    UsageError,
)
from runtime.llama.model_file import ModelFile
from runtime.settings import Settings

_ERRORS = {kind.__name__: kind for kind in (ModelError, PromptError, UsageError, DiskError, ProfileError)}


def smallest_budget(file: ModelFile, kind: str, settings: Settings, flags: Sequence[str] = ()) -> int:
    """The smallest budget of such a run in bytes, measured where it was not written down.

    flags: those of `h2o run` that make these settings, but for --ctx. Raises what the run would, EngineError where no
    process can be started.
    """
    known = written(file.hash, least_settings(settings, None), kind)
    return known or ask(kind, [str(file.path), "--ctx", str(settings.n_ctx), *flags])


def ask(kind: str, flags: Sequence[str]) -> int:
    """The smallest budget of a run of this kind with these flags of `h2o run` (model included), in bytes.

    Raises what the run would, EngineError where no process can be started.
    """
    try:
        found = json.loads(output_of("h2o_cli.floor_run", kind, *flags))
    except ValueError:
        raise EngineError("the smallest budget could not be measured", "try again with more free memory") from None
    if "floor_bytes" in found:
        return int(found["floor_bytes"])
    raise _ERRORS.get(found["error"], EngineError)(found["message"], found["next_step"])


class _Terminal(StringIO):
    """A standard input at which somebody seems to sit: a run without a prompt becomes a conversation."""

    def isatty(self) -> bool:
        """Always."""
        return True


def main() -> None:
    """Begin a run in a budget of nothing; the error says the number."""
    from h2o_cli.main import app

    kind, *flags = sys.argv[1:]
    more = {PROMPT: ["-p", "x"], CHAT: ["-p", "x", "--chat"], CONVERSATION: []}[kind]
    sys.stdin = _Terminal()
    answer: dict[str, str | int] = {"error": "", "message": "a run in 1 MB was not refused", "next_step": "report this"}
    try:
        app(["run", *flags, *more, "-m", "1"], prog_name="h2o", standalone_mode=False)
    except H2OError as error:
        answer = {"error": type(error).__name__, "message": error.message, "next_step": error.next_step}
        if isinstance(error, BudgetError) and error.floor_bytes:
            answer = {"floor_bytes": error.floor_bytes}
    sys.stdout.write(json.dumps(answer))


if __name__ == "__main__":
    main()
