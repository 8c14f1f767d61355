"""Every error a user can meet, each with the next step.

H2OError                    the work failed (exit 1)
 +- ModelError              a GGUF that cannot be used: missing, cut, hostile, unsupported
 +- BudgetError             the memory budget is below what this model needs
 +- PlanError               a plan or plan file that cannot be used
 +- ProfileError            a profile that cannot be used
 +- PromptError             a prompt or setting that does not fit the model
 +- DiskError               a read failed while the model was running
 +- WorkerError             a worker on another machine is not there, or refuses
 +- EngineError             llama.cpp or its libraries failed or are not the ones we know
 +- UsageError              a wrong argument (exit 2)
 +- Cancelled               Ctrl-C (exit 130) or SIGTERM (exit 143)
"""

from __future__ import annotations

import errno

LIMITS = {
    errno.EFBIG: "raise `ulimit -f`",
    errno.EMFILE: "raise `ulimit -n`",
    errno.ENFILE: "end other programs: the system has no more open files",
    errno.ENOSPC: "free some space on the disk",
}
"""What to do when the system gives no more of something."""
NO_PROC = ("there is no /proc here, which this program needs", "mount it: mount -t proc proc /proc")
NO_THREADS = ("the system starts no more threads", "raise `ulimit -u`, or end other programs")


class H2OError(Exception):
    """A failure with one line that says what happened and one that says what to do next."""

    exit_code = 1

    def __init__(self, message: str, next_step: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.next_step = next_step

    def __str__(self) -> str:
        return f"{self.message}; {self.next_step}" if self.next_step else self.message


class ModelError(H2OError):
    """The model file cannot be used."""


class BudgetError(H2OError):
    """The memory budget is too small; `floor_bytes` is the smallest one that works (0: not known)."""

    def __init__(self, message: str, next_step: str = "", floor_bytes: int = 0) -> None:
        super().__init__(message, next_step)
        self.floor_bytes = floor_bytes


class PlanError(H2OError):
    """The plan or the plan file cannot be used."""


class ProfileError(H2OError):
    """The profile cannot be used."""


class PromptError(H2OError):
    """The prompt or a generation setting does not fit the model."""


class DiskError(H2OError):
    """Reading weights failed."""


class EngineError(H2OError):
    """llama.cpp failed, or is not the version this program knows."""


class WorkerError(H2OError):
    """A worker cannot be reached, was lost, or does not go on."""


class UsageError(H2OError):
    """Wrong arguments."""

    exit_code = 2


class Cancelled(H2OError):
    """The user or the system asked us to stop; `signal_number` says how."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("cancelled")
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number
