"""What the flags of `h2o run` say: how a session is opened, and what is asked of it."""

from __future__ import annotations

from dataclasses import dataclass

from h2o_cli.session.options import SessionOptions
from runtime.errors import UsageError


@dataclass(frozen=True)
class RunOptions:
    """n_predict: most tokens of an answer (None: not given, -1: no limit). stop: texts that end an answer.

    max_context: most tokens of a prompt, from a configuration file (0: no limit).
    """

    session: SessionOptions
    n_predict: int | None = None
    stop: tuple[str, ...] = ()
    chat: bool = False
    json: bool = False
    max_context: int = 0

    def __post_init__(self) -> None:
        if self.n_predict is not None and self.n_predict < -1:
            raise UsageError(f"-n {self.n_predict} is not possible", "give 0 or more, or -1 for no limit")
