"""What the benchmark runs, and in which order: models, budgets, engines in turns, one row per run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from h2o_cli.bench.box import Device
from h2o_cli.bench.commands import shown_command
from h2o_cli.bench.models.named import BenchModel
from h2o_cli.bench.rows import circumstances
from h2o_cli.bench.speed.children import Children, Planned
from h2o_cli.bench.speed.engines import H2O, LLAMA_CPP, Job, Result, tokens_hash
from h2o_cli.bench.speed.rows import SpeedRow, Suite, Timeline
from h2o_cli.bench.speed.turns import N_TOKENS, OPENINGS, PREFILL_PAIRS
from profiler.model_profile import ModelProfile
from runtime.errors import EngineError
from runtime.sizes import MB, parse_size

SHORT_PROMPT = "Hello there"
_SENTENCE = "the rain on the hill ran to the sea and the sea sent it to the hill as rain another time "
LONG_PROMPT = _SENTENCE * 9
MMAP, DIRECT_IO = (f"{LLAMA_CPP} {load}" for load in ("mmap", "direct-io"))
SHORT_UBATCH, LLAMA_UBATCH = 128, 512  # small buffers are a favour to mmap; 512 is llama.cpp's default
FLOOR = "floor"
LONG_PROMPT_RUNS = 2  # per repeat: it shows the drift of the host the most
FITTING = 1.1  # times the file: everything fits
START_S = 2.5  # a process until its first read, cold
COMPUTE_BYTES_PER_S = 25e9  # for estimates of time only
ONE_PER_PASS = ("--speculate", "off")  # flags of `h2o run`
PREFILL_BYTES_PER_S = 5e8  # a long prompt's computing, weights per second


@dataclass(frozen=True)
class Settings:
    """What to run. repeats are of h2o, llama_repeats of llama.cpp; where everything is resident, both take turns."""

    models: tuple[BenchModel, ...]
    resident_models: tuple[BenchModel, ...] = ()
    budgets: tuple[str, ...] = (FLOOR, "40%", "60%", "80%")
    engines: tuple[str, ...] = (H2O, MMAP, DIRECT_IO)
    suites: tuple[Suite, ...] = ("budgets", "first token", "resident")
    repeats: int = 2
    llama_repeats: int = 1
    profile_repeats: int = 2
    n_predict: int = 6
    n_predict_fitting: int = 24  # where the whole file fits and tokens take milliseconds
    read_bytes_per_s: int = 400 * MB
    threads: int = 2


@dataclass(frozen=True)
class Case:
    """One run to make."""

    suite: Suite
    model: BenchModel
    budget: str
    budget_bytes: int
    engine: str
    repeat: int
    prompt: str
    n_predict: int

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What repeats have in common."""
        return self.suite, self.model.name, self.budget, self.engine


# --- budgets ---------------------------------------------------------------------------------------------------------


def check_budget(text: str) -> None:
    """Raise UsageError unless budget_bytes can read it."""
    budget_bytes(text, 10**9, 1)


def budget_bytes(text: str, file_bytes: int, floor_bytes: int) -> int:
    """Bytes of "floor", "60%" of the file, or a size."""
    if text == FLOOR:
        return floor_bytes
    if text.endswith("%") and text[:-1].isdigit() and int(text[:-1]) > 0:
        return file_bytes * int(text[:-1]) // 100
    return parse_size(text)


def resident_bytes(file_bytes: int) -> int:
    """A budget in which every engine can hold everything, repacked weights beside the mapped file included."""
    return int(2.2 * file_bytes) + 700 * MB


# --- cases -----------------------------------------------------------------------------------------------------------


def cases(settings: Settings, floors: dict[str, int]) -> list[Case]:
    """All runs, in order: within a repeat every engine has its turn in every budget."""
    found: list[Case] = []
    for model in settings.models:
        floor = floors.get(model.name, 0)
        budgets = {text: budget_bytes(text, model.file_bytes, floor) for text in settings.budgets}
        usable = {text: size for text, size in budgets.items() if size >= floor}
        for repeat in range(max(settings.repeats, settings.llama_repeats)):
            found += _budget_cases(settings, model, usable, repeat)
        found += _first_token_cases(settings, model, usable)
    for model in settings.resident_models:
        size = resident_bytes(model.file_bytes)
        found.append(Case("resident", model, "resident", size, H2O, 0, LONG_PROMPT, N_TOKENS))
    return [case for case in found if case.suite in settings.suites]


def _first_token_cases(settings: Settings, model: BenchModel, budgets: dict[str, int]) -> Iterator[Case]:
    """A long prompt in 60 % of the file, or the largest budget where that is none."""
    middle = "60%" if "60%" in budgets else next(reversed(budgets), "")
    if middle:
        for repeat in range(LONG_PROMPT_RUNS * settings.repeats):
            for engine in (H2O, MMAP) if repeat == 0 else (H2O,):
                yield Case("first token", model, middle, budgets[middle], engine, repeat, LONG_PROMPT, 2)


def _budget_cases(settings: Settings, model: BenchModel, budgets: dict[str, int], repeat: int) -> Iterator[Case]:
    for text, size in budgets.items():
        fits = size > FITTING * model.file_bytes
        n_predict = max(settings.n_predict, settings.n_predict_fitting if fits else 0)
        for engine in _in_turn(settings.engines, repeat):
            if repeat < (settings.repeats if engine == H2O else settings.llama_repeats):
                yield Case("budgets", model, text, size, engine, repeat, SHORT_PROMPT, n_predict)


def _in_turn(engines: tuple[str, ...], repeat: int) -> tuple[str, ...]:
    """The engines, the other way round in every second repeat."""
    return engines[::-1] if repeat % 2 else engines


def estimate_s(case: Case, read_bytes_per_s: float) -> float:
    """About how long a run takes."""
    rate = read_bytes_per_s or 2e9
    file_bytes = case.model.file_bytes
    read_s, compute_s = file_bytes / rate, file_bytes / COMPUTE_BYTES_PER_S
    streamed_s = max(0.0, file_bytes + 100 * MB - case.budget_bytes) / rate
    prompt_s = file_bytes / PREFILL_BYTES_PER_S if case.prompt is LONG_PROMPT else 0.0
    if case.suite == "resident":
        both_s = read_s + (1 + PREFILL_PAIRS) * prompt_s + N_TOKENS * compute_s
        return OPENINGS * (START_S + 2 * both_s)
    if case.engine == H2O:
        return START_S + max(read_s, prompt_s) + case.n_predict * max(streamed_s, compute_s)
    if streamed_s == 0:
        return START_S + read_s + prompt_s + case.n_predict * compute_s
    if case.engine == MMAP:
        return START_S + 2 * read_s + prompt_s + case.n_predict * read_s
    return START_S + case.budget_bytes / rate


# --- running ---------------------------------------------------------------------------------------------------------


class Bench:
    """One benchmark. run() yields rows as they are measured; `share` is how much is done."""

    def __init__(self, settings: Settings, children: Children) -> None:
        self.settings = settings
        self.timelines: list[Timeline] = []
        self.notes: list[str] = []  # what could not be measured
        self._children = children
        self._done_s, self._total_s = 0.0, 1.0
        self._step_s, self._step_start_s = 0.0, time.monotonic()
        self._hopeless: set[tuple[str, str, str, str]] = set()
        self._profiles: dict[str, ModelProfile] = {}
        self._plans: dict[tuple[str, int], Planned] = {}

    @property
    def share(self) -> float:
        """The part of the estimated time that is over."""
        inside_s = min(time.monotonic() - self._step_start_s, self._step_s)
        return min(0.99, (self._done_s + inside_s) / self._total_s)

    def run(self) -> Iterator[SpeedRow]:
        """Measure: first profile and floor of every model, then all runs. Raises H2OError."""
        streaming = set(self.settings.suites) & {"budgets", "first token"}
        models = self.settings.models if streaming else ()
        profile_s = [self._profile_s(model) for model in models]
        guess = cases(self.settings, {model.name: 200 * MB for model in models})
        self._total_s = sum(profile_s) + sum(self._estimate_s(case) for case in guess)
        floors = {}
        for model, seconds in zip(models, profile_s, strict=True):
            self._begin(seconds)
            device = self._device(model)
            self._profiles[model.name] = self._children.profile(model.path, device, self.settings.profile_repeats)
            floors[model.name] = self._children.floor_bytes(self._job(model, 1, SHORT_PROMPT, 1), device)
        todo = cases(self.settings, floors)
        self._total_s = sum(profile_s) + sum(self._estimate_s(case) for case in todo)
        for case in todo:
            self._begin(self._estimate_s(case))
            if case.suite == "resident":
                yield self._take_turns(case)
            elif case.key not in self._hopeless:
                yield self._measure(case)
        for model in models:
            self._timeline(model, floors[model.name])

    def _device(self, model: BenchModel, memory_bytes: int = 0) -> Device:
        """The emulated device, its slow disk the one that holds the model."""
        return Device(memory_bytes, self.settings.read_bytes_per_s, model.path.parent)

    def _timeline(self, model: BenchModel, floor_bytes: int) -> None:
        """The timeline of one token in the middle budget, where a plan can be made for it."""
        size = max(floor_bytes * 6 // 5, model.file_bytes * 6 // 10)
        self._begin(START_S + 3 * model.file_bytes / (self.settings.read_bytes_per_s or 2e9))
        planned = self._children.plan(model.path, size)
        try:
            seen = self._children.timeline(model.path, planned, self._device(model, size), self.settings.threads)
            self.timelines.append(msgspec.structs.replace(seen, model=model.name))
        except EngineError as error:
            self.notes.append(f"no timeline of {model.name}: {error.message}")

    def _profile_s(self, model: BenchModel) -> float:
        rate = self.settings.read_bytes_per_s or 2e9
        repeats = self.settings.profile_repeats
        return 12 + 2 * START_S + (3 * repeats + 2) * model.file_bytes / rate

    def _estimate_s(self, case: Case) -> float:
        return estimate_s(case, self.settings.read_bytes_per_s)

    def _begin(self, seconds: float) -> None:
        """The next step, and about how long it takes."""
        self._done_s += self._step_s
        self._step_s, self._step_start_s = seconds, time.monotonic()

    def _job(self, model: BenchModel, size: int, prompt: str, n_predict: int) -> Job:
        settings = self.settings
        return Job(model.path, size, prompt, n_predict, threads=settings.threads, flags=ONE_PER_PASS)

    def _measure(self, case: Case) -> SpeedRow:
        """One run of one engine."""
        job = self._job(case.model, case.budget_bytes, case.prompt, case.n_predict)
        job = replace(job, ubatch=SHORT_UBATCH if case.prompt == SHORT_PROMPT else LLAMA_UBATCH)
        planned = None
        if case.engine == H2O:
            planned = self._planned(case)
            job = replace(job, plan_file=planned.plan_file)
        command, outcome, result = self._children.answer(case.engine, job, self._device(case.model, case.budget_bytes))
        if result.status != "ok":
            self._hopeless.add(case.key)
        row = self._row(
            case,
            [*([planned.command] if planned and planned.command else []), command],
            status=result.status,
            note=result.note,
            n_prompt_tokens=result.n_prompt_tokens,
            n_tokens=len(result.tokens),
            ttft_s=result.ttft_s,
            ms_per_token=result.ms_per_token,
            prefill_tokens_per_s=result.prefill_tokens_per_s,
            bytes_per_token=result.bytes_per_token,
            disk_wait_ms_per_token=result.disk_wait_ms_per_token,
            peak_bytes=outcome.peak_bytes,
            bytes_read=outcome.bytes_read,
            wall_s=outcome.wall_s,
            tokens_hash=tokens_hash(result.tokens) if result.tokens else "",
            plan=result.plan,
            ledger=result.ledger,
        )
        return with_limits(row, result, planned, self._profiles.get(case.model.name))

    def _take_turns(self, case: Case) -> SpeedRow:
        """h2o and llama.cpp's defaults in turns, everything in memory."""
        job = replace(self._job(case.model, case.budget_bytes, case.prompt, case.n_predict), ubatch=LLAMA_UBATCH)
        start_s = time.monotonic()
        try:
            commands, taken = self._children.take_turns(job, self._device(case.model, case.budget_bytes))
        except EngineError as error:
            return self._row(case, [], status="failed", note=error.message)
        figures = taken.figures
        return self._row(
            case,
            commands,
            status="ok",
            n_prompt_tokens=figures.prefill.n_tokens,
            n_tokens=len(taken.tokens),
            ms_per_token=1000 / figures.decode.h2o_tokens_per_s,
            prefill_tokens_per_s=figures.prefill.h2o_tokens_per_s,
            peak_bytes=taken.peak_bytes,
            wall_s=time.monotonic() - start_s,
            tokens_hash=tokens_hash(taken.tokens),
            in_turns=figures,
        )

    def _row(self, case: Case, commands: Iterable[Sequence[str]], **measured: Any) -> SpeedRow:
        """A row of a case, with the circumstances."""
        return SpeedRow(
            suite=case.suite,
            model=case.model.name,
            file_bytes=case.model.file_bytes,
            budget=case.budget,
            budget_bytes=case.budget_bytes,
            read_bytes_per_s=self.settings.read_bytes_per_s,
            engine=case.engine,
            repeat=case.repeat,
            commands=tuple(shown_command(started) for started in commands),
            **circumstances(case.model.path),
            **measured,
        )

    def _planned(self, case: Case) -> Planned:
        """The planner's choice for a budget, made once."""
        key = (case.model.name, case.budget_bytes)
        if key not in self._plans:
            profile = case.model.name in self._profiles
            self._plans[key] = self._children.plan(case.model.path, case.budget_bytes) if profile else Planned()
        return self._plans[key]


def with_limits(row: SpeedRow, result: Result, planned: Planned | None, profile: ModelProfile | None) -> SpeedRow:
    """The row with what theory says: prediction, limit, yield, and the least a cold first token can take.

    limit = max(bytes this run read per token / disk rate, computing time of the resident model). The disk rate is the
    device's, or where the disk is not slowed down, the profile's; the computing time is the profile's while the run
    read anything, at most its own.
    """
    more: dict[str, object] = {}
    if planned:
        more["predicted_ms_per_token"] = planned.predicted_ms_per_token
    if profile and row.status == "ok":
        rate = row.read_bytes_per_s or profile.disk.bytes_per_s.mean
        pass_bytes = sum(layer.bytes for layer in profile.layers) + profile.head.bytes
        more["first_token_limit_s"] = max(pass_bytes / rate, prompt_compute_s(profile, row.n_prompt_tokens))
        if row.suite == "budgets" and result.pass_ms is not None and result.bytes_per_token is not None:
            compute_ms = result.pass_ms - (result.disk_wait_ms_per_token or 0.0)
            if result.bytes_per_token:
                compute_ms = min(compute_ms, 1000 * profile.machine.compute_s)
            limit_ms = max(1000 * result.bytes_per_token / rate, compute_ms)
            yield_ = limit_ms / row.ms_per_token if row.ms_per_token else None
            more |= {"limit_ms_per_token": limit_ms, "yield_": yield_}
    return msgspec.structs.replace(row, **more)


def prompt_compute_s(profile: ModelProfile, n_tokens: int) -> float:
    """Computing time of a prompt, by the profile."""
    passes = n_tokens / max(1, profile.prefill_tokens)
    layers_s = sum(layer.prefill_compute_s.mean for layer in profile.layers)
    return passes * layers_s + profile.head.decode_compute_s.mean + profile.overhead_s.mean
