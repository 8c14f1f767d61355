"""The engines under test: each is a command, and a way to read the figures it printed.

Being killed for want of memory is a result like any other.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec

from h2o_cli.bench.box import Outcome
from h2o_cli.bench.commands import h2o, last_words, python
from h2o_cli.bench.speed.llama_cpp_run import LOADS
from runtime.sizes import MB

Status = Literal["ok", "oom", "too small", "timeout", "failed"]
CTX = 512
H2O = "h2o"
LLAMA_CPP = "llama.cpp"
_FLOOR = re.compile(r"smallest budget that works here is -m (\d+)")


@dataclass(frozen=True)
class Job:
    """One answer of one model: what every engine is asked for. budget_bytes is for the engines that keep one."""

    model: Path
    budget_bytes: int
    prompt: str
    n_predict: int
    ctx: int = CTX
    ubatch: int = 128  # llama.cpp's; h2o chooses its own
    threads: int = 2
    plan_file: Path = Path("/nonexistent")
    flags: tuple[str, ...] = ()  # more flags for h2o run


@dataclass(frozen=True)
class Result:
    """What an engine did with a job. None: not known. ttft_s runs from the start of the process."""

    status: Status
    note: str = ""
    tokens: tuple[int, ...] = ()
    n_prompt_tokens: int = 0
    ttft_s: float | None = None
    ms_per_token: float | None = None
    pass_ms: float | None = None
    disk_wait_ms_per_token: float | None = None
    bytes_per_token: float | None = None
    prefill_tokens_per_s: float | None = None
    floor_bytes: int = 0
    plan: dict[str, Any] | None = None
    ledger: dict[str, int] | None = None


def h2o_command(job: Job) -> list[str]:
    """`h2o run` with greedy tokens, as a user would call it."""
    sizes = ["--ctx", str(job.ctx), "-t", str(job.threads), "-n", str(job.n_predict)]
    budget = ["-m", f"{job.budget_bytes}B"] if job.budget_bytes else []
    run = h2o("run", job.model, "-p", job.prompt, "--temp", "0", "--json")
    return [*run, *budget, *sizes, "-s", str(job.plan_file), *job.flags]


def llama_cpp_command(job: Job, load: str) -> list[str]:
    """llama.cpp alone, on the same sizes."""
    sizes = ["--ctx", str(job.ctx), "--ubatch", str(job.ubatch), "--threads", str(job.threads)]
    run = python("h2o_cli.bench.speed.llama_cpp_run", job.model, "--load", load, "--prompt", job.prompt)
    return [*run, "--predict", str(job.n_predict), *sizes]


def turns_commands(job: Job) -> tuple[list[str], list[str]]:
    """h2o and llama.cpp with its own defaults, each doing rounds of the same answer on demand."""
    sizes = ["--prompt", job.prompt, "--ctx", str(job.ctx), "--threads", str(job.threads)]
    own = python("h2o_cli.bench.speed.turns_run", job.model, "--budget", job.budget_bytes)
    return [*own, *sizes, "--plan-file", str(job.plan_file)], [*llama_cpp_command(job, "default"), "--turns"]


def _llama_cpp(load: str) -> Callable[[Job], list[str]]:
    return lambda job: llama_cpp_command(job, load)


COMMANDS: dict[str, Callable[[Job], list[str]]] = {
    H2O: h2o_command,
    **{f"{LLAMA_CPP} {load}": _llama_cpp(load) for load in LOADS if load != "default"},
}
"""The engines by name."""


def command(engine: str, job: Job) -> list[str]:
    """The command of an engine."""
    return COMMANDS[engine](job)


def read_result(engine: str, outcome: Outcome) -> Result:
    """What an engine's command came to."""
    if outcome.timed_out or outcome.rc != 0:
        return failure(outcome)
    try:
        figures = msgspec.json.decode(outcome.stdout)
        return _h2o_result(figures) if engine == H2O else _llama_cpp_result(figures, outcome)
    except (msgspec.DecodeError, KeyError, TypeError, AttributeError) as error:
        return Result("failed", f"its output cannot be read: {error}")


def failure(outcome: Outcome) -> Result:
    """How a command failed."""
    if outcome.timed_out:
        return Result("timeout", f"ended after {outcome.wall_s:.0f} s")
    if outcome.oom_killed and outcome.rc in (-9, 137):
        return Result("oom", "killed: out of memory")
    floor = _FLOOR.search(outcome.stderr)
    if floor:
        return Result("too small", "the budget is too small", floor_bytes=int(floor.group(1)) * MB)
    return Result("oom" if outcome.oom_killed else "failed", last_words(outcome.stderr, outcome.rc)[:200])


def _h2o_result(figures: dict[str, Any]) -> Result:
    """Its time to first token begins a clock tick (0.01 s) or less before the process."""
    rate = figures["tokens_per_s"]
    return Result(
        status="ok",
        tokens=tuple(figures["tokens"]),
        n_prompt_tokens=len(figures["prompt_tokens"]),
        ttft_s=figures["ttft_process_s"],
        ms_per_token=1000 / rate if rate else None,
        pass_ms=figures["decode_ms_per_token"],
        disk_wait_ms_per_token=figures["disk_wait_ms_per_token"],
        bytes_per_token=figures["bytes_read_per_token"],
        prefill_tokens_per_s=figures["prefill_tokens_per_s"],
        plan=figures["plan"],
        ledger=figures["ledger"],
    )


def _llama_cpp_result(figures: dict[str, Any], outcome: Outcome) -> Result:
    return Result(
        status="ok",
        tokens=tuple(figures["tokens"]),
        n_prompt_tokens=len(figures["prompt_tokens"]),
        ttft_s=figures["first_token_monotonic_s"] - outcome.started_s,
        ms_per_token=figures["decode_ms_per_token"],
        bytes_per_token=figures["bytes_read_per_token"],
    )


def tokens_hash(tokens: Sequence[int]) -> str:
    """The parity hash: equal tokens, equal hash."""
    return hashlib.sha256(" ".join(map(str, tokens)).encode()).hexdigest()
