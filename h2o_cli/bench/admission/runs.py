"""The steps of the benchmark of admission: a fitted simulator, its check, the sweeps, and the bandit beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from h2o_cli.bench.admission.engine_runs import PressedEngine, Prompt, open_engine, simulated
from h2o_cli.bench.admission.rows import (
    BANDIT,
    CHECK,
    ENGINE,
    FRESH,
    KNOWN,
    SWEEP,
    TWICE,
    AdmissionRow,
    Run,
    Suite,
    gain,
)
from h2o_cli.bench.admission.workload import workload
from h2o_cli.bench.models.named import BenchModel
from h2o_cli.bench.rows import chosen, circumstances
from planner.bandit import BanditResult, Ucb1
from planner.pool_simulator import Costs, Text
from runtime.answer.admission import AVERAGE, NONE, RESERVE, SIMULATE, Admission
from runtime.answer.pool import Pool
from runtime.answer.pool_trace import open_trace
from runtime.answer.scheduler import Limits

# The engine's runs of a round: admission, and for those to fit to (not 0) what the pool is divided by, so that more is
# swapped. They are spread among those to check: the speed of a machine changes within seconds.
ROUND = (
    ("none", 1),
    ("none", 0),
    ("reserve:2", 0),
    ("none", 2),
    ("reserve:8", 0),
    ("average:4", 0),
    ("average:7", 1),
    ("average:7", 0),
)
CHECKED = tuple(text for text, divisor in ROUND if not divisor)
_WARM_UP = 4  # texts
SHARE = 5  # the bandit takes such a part of the sweep's runs
_C = 0.1  # of the bandit: a play is a run of a hundred texts, and its noise a good part of the range
_FRESH_SEEDS, _CALIBRATION_SEED, _CHECK_SEED, _ENGINE_SEEDS = 1000, 2000, 3000, 4000  # from the first one on
_TRACE_SEED, TRACED_TEXTS = 5000, 1000
_RANGES = {RESERVE: (0.0, 12.0), AVERAGE: (1.8, 7.5)}


def grid(policy: str, step: float) -> list[Admission]:
    """The values of a sweep, with both ends."""
    first, last = _RANGES[policy]
    values, i = [], 0
    while first + i * step < last - 1e-9:
        values.append(round(first + i * step, 6))
        i += 1
    return [Admission(policy, value) for value in (*values, last)]


@dataclass(frozen=True)
class Settings:
    """Of all models. fast: blocks of the pool; step: of the sweeps; repeats: seeds from `seed` on.

    rounds, n_engine_texts: of the engine's runs.
    """

    fast: int
    batch_size: int
    n_texts: int
    repeats: int
    step: float
    seed: int
    rounds: int
    n_engine_texts: int


def search(
    arms: Sequence[Admission], out_per_s: Callable[[Admission, int], float], repeats: int
) -> BanditResult[Admission]:
    """The bandit's choice among arms, with a fifth of len(arms) * repeats runs, where that is enough to try each.

    The n-th play of an arm is with the n-th seed, and its reward is seen beside that of no admission with the same:
    what makes texts of one seed faster than others is no reason to choose.
    """
    n_plays: dict[Admission, int] = {}
    base: dict[int, float] = {}

    def pull(arm: Admission) -> float:
        seed = n_plays.get(arm, 0) % repeats
        n_plays[arm] = n_plays.get(arm, 0) + 1
        if seed not in base:
            base[seed] = out_per_s(Admission(NONE), seed)
        return -base[seed] / out_per_s(arm, seed)

    rank: Callable[[Admission, float], Any] = lambda arm, ms: (round(ms, 6), arm.value)  # noqa: E731
    episodes = len(arms) * repeats // SHARE - repeats  # those of the base are left out
    bandit = Ucb1(arms, pull, rank=rank, episodes=episodes, c=_C, confirm_arms=1, confirm_plays=1)
    found = bandit.run()
    return BanditResult(found.best, found.statistics, found.n_episodes + len(base))


@dataclass
class AdmissionBench:
    """All rows of one model, and a trace of the simulator's pool without admission."""

    model: BenchModel
    settings: Settings
    trace: Path
    _texts: dict[int, list[Text]] = field(default_factory=dict)

    def run(self) -> Iterator[AdmissionRow]:
        """Rows as they are measured. Raises H2OError."""
        settings = self.settings
        with open_engine(self.model.path, 2 * settings.fast, settings.batch_size) as engine:
            checks = self._engine_checks(engine)
            simulator = self._simulator(engine)
            for text, pairs in checks.items():
                runs, beside = zip(*pairs, strict=True)
                yield self._row(CHECK, Admission.parse(text), simulator, runs=runs, simulated=beside)
            for i in range(settings.repeats):
                for start in (0, _FRESH_SEEDS):
                    prompts = self._prompts(engine, settings.n_texts, start + i)
                    self._texts[start + i] = [prompt.text for prompt in prompts]
            traced = self._prompts(engine, TRACED_TEXTS, _TRACE_SEED)
            simulator.trace([prompt.text for prompt in traced], self.trace)
            rows = []
            for row in self._sweeps(simulator):
                rows.append(row)
                yield row
            sweeps = chosen(rows, suite=SWEEP)
            none = chosen(sweeps, policy=NONE)[0]
            best = optimum([row for row in sweeps if row.policy in _RANGES], none)
            yield from self._engine_runs(engine, simulator, Admission.parse(best.admission))

    def _prompts(self, engine: PressedEngine, n: int, seed: int) -> list[Prompt]:
        """Of n texts those that fit the pool: every run then answers the same ones."""
        pool = Pool(self.settings.fast, 0)
        prompts = engine.prompts(workload(n, self.settings.seed + seed))
        return [prompt for prompt in prompts if pool.blocks_for(prompt.job.most_cells) <= self.settings.fast]

    def _engine_prompts(self, engine: PressedEngine, seed: int) -> list[Prompt]:
        return self._prompts(engine, self.settings.n_engine_texts, seed)

    def _simulator(self, engine: PressedEngine, last: int = 0) -> _Simulator:
        """A simulator that is fitted to the last runs of the engine, or all."""
        assert engine.limits
        return _Simulator(engine.limits, engine.costs(last), self.settings.fast, engine.slow(self.settings.fast))

    def _engine_checks(self, engine: PressedEngine) -> dict[str, list[tuple[Run, Run]]]:
        """By admission the engine's runs, each with that of a simulator that is fitted to the same round.

        The texts of the runs to fit are all there at once.
        """
        fast, seed = self.settings.fast, self.settings.seed
        fit = [replace(prompt, at_pass=0) for prompt in self._engine_prompts(engine, _CALIBRATION_SEED)]
        checked = self._engine_prompts(engine, _CHECK_SEED)
        engine.run(fit[:_WARM_UP], Admission(NONE), seed, fast)
        found: dict[str, list[tuple[Run, Run]]] = {text: [] for text in CHECKED}
        for i in range(self.settings.rounds):
            runs = {}
            for text, divisor in ROUND[:: -1 if i % 2 else 1]:
                admission = Admission.parse(text)
                if divisor:
                    engine.run(fit, admission, seed, fast // divisor, fit=True)
                else:
                    runs[text] = engine.run(checked, admission, seed + _CHECK_SEED, fast)
            simulator = self._simulator(engine, last=1)
            for text, run in runs.items():
                texts = [prompt.text for prompt in checked]
                found[text].append((run, simulator.run(texts, Admission.parse(text), seed + _CHECK_SEED)))
        return found

    def _engine_runs(self, engine: PressedEngine, simulator: _Simulator, best: Admission) -> Iterator[AdmissionRow]:
        """The best admission beside none, and beside none with twice the pool; in turns, a seed for each round."""
        ways: list[tuple[Suite, Admission, int]] = [
            (ENGINE, Admission(NONE), 1),
            (ENGINE, best, 1),
            (TWICE, Admission(NONE), 2),
        ]
        runs: list[list[Run]] = [[] for _ in ways]
        for i in range(self.settings.rounds):
            seed = _ENGINE_SEEDS + i
            prompts = self._engine_prompts(engine, seed)
            for (_, admission, times), found in list(zip(ways, runs, strict=True))[:: -1 if i % 2 else 1]:
                found.append(engine.run(prompts, admission, self.settings.seed + seed, times * self.settings.fast))
        for (suite, admission, times), found in zip(ways, runs, strict=True):
            at = replace(simulator, fast=times * self.settings.fast, slow=engine.slow(times * self.settings.fast))
            yield self._row(suite, admission, at, runs=tuple(found))

    def _sweeps(self, simulator: _Simulator) -> Iterator[AdmissionRow]:
        none = self._row(SWEEP, Admission(NONE), simulator, runs=self._runs(simulator, Admission(NONE)))
        yield none
        simulate = Admission(SIMULATE)
        yield self._row(SWEEP, simulate, simulator, runs=self._runs(simulator, simulate))
        yield self._row(KNOWN, simulate, simulator, runs=self._runs(simulator, simulate, known=True))
        fresh = Admission(NONE)
        yield self._row(FRESH, fresh, simulator, runs=self._runs(simulator, fresh, _FRESH_SEEDS))
        for policy in _RANGES:
            arms = grid(policy, self.settings.step)
            rows = []
            for arm in arms:
                rows.append(self._row(SWEEP, arm, simulator, runs=self._runs(simulator, arm)))
                yield rows[-1]
            best = Admission(policy, optimum(rows, none).value)
            yield self._row(FRESH, best, simulator, runs=self._runs(simulator, best, _FRESH_SEEDS))
            yield self._bandit(simulator, policy, arms)

    def _bandit(self, simulator: _Simulator, policy: str, arms: Sequence[Admission]) -> AdmissionRow:
        def out_per_s(arm: Admission, seed: int) -> float:
            return simulator.run(self._texts[seed], arm, seed).out_per_s

        found = search(arms, out_per_s, self.settings.repeats)
        return self._row(BANDIT, found.best, simulator, n_plays=found.n_episodes)

    def _runs(
        self, simulator: _Simulator, admission: Admission, start: int = 0, *, known: bool = False
    ) -> tuple[Run, ...]:
        """A run for each seed from `start` on. known: texts say how long their answers become."""
        found = []
        for seed in range(start, start + self.settings.repeats):
            texts = self._texts[seed]
            if known:
                texts = [text._replace(n_most=text.n_answer) for text in texts]
            found.append(simulator.run(texts, admission, self.settings.seed + seed))
        return tuple(found)

    def _row(self, suite: Suite, admission: Admission, simulator: _Simulator, **more: Any) -> AdmissionRow:
        return AdmissionRow(
            suite=suite,
            model=self.model.name,
            admission=str(admission),
            policy=admission.kind,
            value=admission.value,
            fast=simulator.fast,
            slow=simulator.slow,
            batch_size=self.settings.batch_size,
            n_texts=self.settings.n_engine_texts if suite in (CHECK, ENGINE, TWICE) else self.settings.n_texts,
            costs=asdict(simulator.costs),
            **self._circumstances,
            **more,
        )

    @cached_property
    def _circumstances(self) -> dict[str, Any]:
        return circumstances(self.model.path)


@dataclass(frozen=True)
class _Simulator:
    """A pool and an engine's costs."""

    limits: Limits
    costs: Costs
    fast: int
    slow: int

    def run(self, texts: Sequence[Text], admission: Admission, seed: int) -> Run:
        return simulated(texts, Pool(self.fast, self.slow), admission, self.limits, self.costs, seed)

    def trace(self, texts: Sequence[Text], path: Path) -> None:
        """Write the trace of a run without admission. Raises H2OError."""
        with open_trace(path) as writer:
            pool = Pool(self.fast, self.slow, record=writer)
            writer.begin(pool)
            simulated(texts, pool, Admission(NONE), self.limits, self.costs, 0)


def optimum(rows: Sequence[AdmissionRow], none: AdmissionRow) -> AdmissionRow:
    """The row of a sweep with the most tokens per second beside `none`, seed by seed; among equals the least value."""
    return max(rows, key=lambda row: (round(gain(row, none).value, 6), -row.value))
