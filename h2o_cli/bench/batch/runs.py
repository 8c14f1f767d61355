"""What the benchmark of batches runs, and in which order: budgets, batch sizes, engines in turns, one row per run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from h2o_cli.bench.batch.rows import BatchRow, Figures, with_figures
from h2o_cli.bench.box import Device, Outcome, run_in_device
from h2o_cli.bench.commands import environment, python, shown_command
from h2o_cli.bench.models.named import BenchModel
from h2o_cli.bench.rows import circumstances
from h2o_cli.bench.speed.children import Children
from h2o_cli.bench.speed.engines import H2O, failure
from h2o_cli.bench.speed.runs import FLOOR, MMAP, budget_bytes
from profiler.model_profile import ModelProfile
from runtime.errors import BudgetError, EngineError
from runtime.sizes import MB

ENGINES = (H2O, MMAP)
CTX_STEP = 256
_TIMEOUT_S = 900.0


@dataclass(frozen=True)
class Settings:
    """What to run. cut_gen_len: tokens that are really made of gen_len; 0: all. predict: measure a profile first."""

    model: BenchModel
    budgets: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    engines: tuple[str, ...] = ENGINES
    prompt_len: int = 32
    gen_len: int = 64
    cut_gen_len: int = 0
    read_bytes_per_s: int = 0
    threads: int = 2
    predict: bool = True

    @property
    def n_steps(self) -> int:
        """Steps that are measured."""
        return (self.cut_gen_len or self.gen_len) - 1


class BatchBench:
    """One benchmark. run() yields rows as they are measured; `share` is how much is done."""

    def __init__(self, settings: Settings, work: Path) -> None:
        """work: a folder for files of its own."""
        self.settings = settings
        self.share = 0.0
        self._children = Children(work)
        self._profile: ModelProfile | None = None
        self._env = environment(H2O_PROFILES=str(work / "none"))  # the same plan as without a profile
        self._plan_file = work / "no-plan.bin"

    def run(self) -> Iterator[BatchRow]:
        """Measure. Raises H2OError where there is no device, or no smallest budget where that was asked for."""
        settings = self.settings
        if H2O in settings.engines and settings.predict:
            model = settings.model.path
            self._profile = self._children.profile(model, Device(0, settings.read_bytes_per_s, model.parent), 1)
        floor = self._floor_bytes() if FLOOR in settings.budgets else 0
        n_done, n_all = 0, len(settings.budgets) * len(settings.batch_sizes) * len(settings.engines)
        for text in settings.budgets:
            size = budget_bytes(text, settings.model.file_bytes, floor)
            for i, n_streams in enumerate(settings.batch_sizes):
                for engine in settings.engines[:: -1 if i % 2 else 1]:
                    yield self._measure(engine, text, size, n_streams)
                    n_done += 1
                    self.share = min(0.99, n_done / n_all)

    def _floor_bytes(self) -> int:
        """The smallest budget of the largest batch, as the refusal of one byte names it."""
        outcome = self._start(self._command(H2O, 1, max(self.settings.batch_sizes)), 0)
        found = failure(outcome)
        if not found.floor_bytes:
            raise EngineError(f"there is no smallest budget: {found.note}", "run it by hand to see more")
        return found.floor_bytes + MB

    def _measure(self, engine: str, budget: str, size: int, n_streams: int) -> BatchRow:
        settings = self.settings
        command = self._command(engine, size, n_streams)
        outcome = self._start(command, size)
        ours = engine == H2O
        row = BatchRow(
            suite="batch",
            model=settings.model.name,
            file_bytes=settings.model.file_bytes,
            budget=budget,
            budget_bytes=size,
            read_bytes_per_s=settings.read_bytes_per_s,
            engine=engine,
            n_streams=n_streams,
            prompt_len=settings.prompt_len,
            gen_len=settings.gen_len,
            cut_gen_len=settings.cut_gen_len,
            commands=(shown_command(command),),
            predicted_decode_tokens_per_s=self._predicted(size, n_streams) if ours else None,
            peak_bytes=outcome.peak_bytes,
            wall_s=outcome.wall_s,
            **circumstances(settings.model.path),
        )
        return finished(row, outcome)

    def _predicted(self, size: int, n_streams: int) -> float | None:
        """The planner's tokens per second; None without a profile, and where it has no such batch."""
        from planner.batches import predict

        if self._profile is None:
            return None
        positions = self.settings.prompt_len + self.settings.n_steps + 1
        with suppress(BudgetError):
            return predict(self._profile, size, [n_streams], positions)[0].tokens_per_s
        return None

    def _start(self, command: list[str], size: int) -> Outcome:
        path = self.settings.model.path
        device = Device(size, self.settings.read_bytes_per_s, path.parent)
        return run_in_device(command, device, env=self._env, timeout_s=_TIMEOUT_S, cold=[path])

    def _command(self, engine: str, size: int, n_streams: int) -> list[str]:
        """The same streams for both engines."""
        settings = self.settings
        sizes = ["--streams", n_streams, "--prompt-len", settings.prompt_len, "--steps", settings.n_steps]
        sizes += ["--threads", settings.threads]
        if engine == H2O:
            run = python("h2o_cli.bench.batch.batch_run", settings.model.path, *sizes)
            return [*run, "--budget", str(size), "--plan-file", str(self._plan_file)]
        ctx = n_streams * -(-(settings.prompt_len + settings.n_steps + 1) // CTX_STEP) * CTX_STEP
        run = python("h2o_cli.bench.speed.llama_cpp_run", settings.model.path, *sizes)
        return [*run, "--load", "mmap", "--ctx", str(ctx), "--ubatch", "512"]


def finished(row: BatchRow, outcome: Outcome) -> BatchRow:
    """The row with what became of its command."""
    if outcome.rc != 0 or outcome.timed_out:
        found = failure(outcome)
        return msgspec.structs.replace(row, status=found.status, note=found.note)
    try:
        figures = msgspec.json.decode(outcome.stdout, type=Figures)
    except msgspec.DecodeError as error:
        return msgspec.structs.replace(row, status="failed", note=f"its output cannot be read: {error}")
    return with_figures(msgspec.structs.replace(row, status="ok"), figures)
