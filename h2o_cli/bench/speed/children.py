"""The commands a benchmark starts: profile, plan and answers, each a process of its own, most of them in the device."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from h2o_cli.bench.box import Device, Outcome, Talk, run_in_device, talk_in_device
from h2o_cli.bench.commands import environment, h2o, last_words, python
from h2o_cli.bench.speed.engines import CTX, H2O, Job, Result, command, h2o_command, read_result, turns_commands
from h2o_cli.bench.speed.rows import Timeline
from h2o_cli.bench.speed.turns import Taken, take_turns
from profiler.model_profile import ModelProfile, load_profile
from runtime.errors import EngineError
from runtime.sizes import MB

_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Planned:
    """A plan in a file, with its prediction; the default is no plan."""

    plan_file: Path = Path("/nonexistent/plan")
    predicted_ms_per_token: float | None = None
    command: tuple[str, ...] = ()


class Children:
    """Starts the commands. `work` is a folder for files of this benchmark, profiles of the emulated device included."""

    def __init__(self, work: Path) -> None:
        self._work = work
        self._env = environment(H2O_PROFILES=str(work))

    def profile(self, model: Path, device: Device, repeats: int) -> ModelProfile:
        """Measure a model in the device. Raises H2OError."""
        path = self._profile_path(model)
        run = h2o("profile", model, "-o", path, "--repeats", repeats)
        outcome = self._run(run, device, {**self._env, "XDG_DATA_HOME": str(self._work)}, model)
        if outcome.rc != 0:
            raise _failed("`h2o profile`", outcome)
        return load_profile(path)

    def floor_bytes(self, job: Job, device: Device) -> int:
        """The smallest budget, as the refusal of one byte names it."""
        outcome = self._run(h2o_command(replace(job, budget_bytes=1)), device, self._env, job.model)
        found = read_result(H2O, outcome)
        if not found.floor_bytes:
            raise _failed("`h2o run`", outcome)
        return found.floor_bytes + MB

    def plan(self, model: Path, budget_bytes: int) -> Planned:
        """The planner's choice for a budget, outside the device; no plan where it has none."""
        path = self._work / f"plan-{model.stem}-{budget_bytes}.bin"
        sizes = ["-m", f"{budget_bytes}B", "--ctx", CTX]
        plan = h2o("plan", "-c", self._profile_path(model), *sizes, "-s", path, "--json")
        done = subprocess.run(plan, env=self._env, capture_output=True, stdin=subprocess.DEVNULL, check=False)
        if done.returncode != 0:
            return Planned()
        figures = msgspec.json.decode(done.stdout)
        return Planned(path, figures["predicted_ms_per_token"], tuple(plan))

    def answer(self, engine: str, job: Job, device: Device) -> tuple[list[str], Outcome, Result]:
        """Run a job in the device."""
        started = command(engine, job)
        outcome = self._run(started, device, self._env, job.model)
        return started, outcome, read_result(engine, outcome)

    def take_turns(self, job: Job, device: Device) -> tuple[tuple[list[str], list[str]], Taken]:
        """h2o and llama.cpp with its own defaults in turns, each in a device of its own. Raises EngineError."""
        own, other = turns_commands(replace(job, plan_file=self._work / "no-plan.bin"))

        @contextmanager
        def both() -> Iterator[tuple[Talk, Talk]]:
            with (
                talk_in_device(own, device, env=self._env) as h2o,
                talk_in_device(other, device, env=self._env) as llama_cpp,
            ):
                yield h2o, llama_cpp

        return (own, other), take_turns(both)

    def timeline(self, model: Path, planned: Planned, device: Device, threads: int) -> Timeline:
        """One token under the clock. Raises EngineError where that could not be measured."""
        run = python("h2o_cli.bench.speed.timeline_run", model, "--plan", planned.plan_file, "--threads", threads)
        outcome = self._run(run, device, self._env, model)
        if outcome.rc != 0:
            raise _failed("the timeline", outcome)
        seen = msgspec.json.decode(outcome.stdout, type=Timeline)
        return msgspec.structs.replace(seen, read_bytes_per_s=device.read_bytes_per_s)

    def _profile_path(self, model: Path) -> Path:
        return self._work / f"{model.stem}.json"

    def _run(self, started: Sequence[str], device: Device, env: dict[str, str], model: Path) -> Outcome:
        return run_in_device(started, device, env=env, timeout_s=_TIMEOUT_S, cold=[model])


def _failed(what: str, outcome: Outcome) -> EngineError:
    reason = last_words(outcome.stderr, outcome.rc)
    return EngineError(f"{what} failed in the emulated device: {reason}", "run it by hand to see more")
