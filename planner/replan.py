"""The live search tries plans on the running process, to find the fastest one there.

It is a bandit. Its arms are plans that fit the budget, and its pulls are measured passes. The simulator's prediction
for an arm counts as a first observation of limited weight, so arms that are predicted to be far off are never tried.
Where the predictions are far off, the profile's disk and computing speeds are scaled until they fit the pulls. When
later pulls say that the machine has changed, everything measured is dropped and the search starts again.

LiveSearch decides and measures nothing. search() pulls. RunningProcess is a pull on a real process.

The score is that of UCB1 (Auer, Cesa-Bianchi, Fischer 2002): mean - C * sqrt(2 ln t) * width for times. The lowest one
is played. UCB1's width is sigma / sqrt(n). Here it is the standard deviation of what is believed of the arm, as in
GP-UCB (Srinivas, Krause, Kakade, Seeger 2010). For an arm of which nothing else is known the two are the same. But the
arms' prediction errors go together, so a pull of one arm says something of the others, and there may be fewer pulls
than arms. As in LUCB (Kalyanakrishnan, Tewari, Auer, Stone 2012) the leader and its strongest rival are played in
turns. The search ends when no rival can still be better by more than a tolerance. Changes are found with Page's
cumulative sums (Page 1954, Hinkley 1971).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import numpy as np
import numpy.typing as npt

from planner.arms import filled, tie_order
from planner.choose import BESIDE, pick, with_disk_speed
from planner.footprint import streamable_bytes
from planner.simulator import decode_rates, limit_s, token_s
from profiler.model_profile import ModelProfile, Spread
from runtime.plans.plan import Layout, Plan

MOST_PULLS = 39  # what the tests allow; a pull takes half a second to five
MOST_RESTARTS = 3  # a machine that changes more often has no best plan
MISFIT = 0.15  # log of measured / predicted that no prediction error explains: it is another machine
HOPELESS = 1.3  # arms whose limit is this many times the best prediction are left out: errors are smaller
SMALLER_WINDOWS = (2, 4)  # parts of one layer's window that are tried as well; below a quarter few pieces fit

C = 0.5  # weight of exploring; with 1 some searches among noisy pulls end at an arm that is 3 % off
# Relative standard deviations that the simulator's errors are taken to have: see errors_covariance.
SPEED_ERROR = 0.08  # of the profile's disk and computing speeds
LAYOUT_ERROR = 0.02  # of the arms of one layout: a real machine may like one better than the simulator does
WINDOW_ERROR = 0.02  # of arms with similar windows
OWN_ERROR = 0.005  # of one arm; without it no arm would need a pull of its own
SLOWER = 1.1  # the step over which sensitivities are taken: about the size of the speeds' errors
WINDOW_LENGTH = 0.7  # in logarithms of window bytes: windows are similar up to twice the size
FIRST_NOISE = 0.04  # relative noise of a pull until it is known: of a machine that does other work, too
FIRST_NOISE_WEIGHT = 3  # pulls that this guess is worth; a few pulls that are equal by chance tell little of noise
TOLERANCE = 0.01  # a rival that may be better by less than this is not worth more pulls
SURE = 2.0  # standard deviations: 97.7 % sure of a rival
SURPRISE = 4.0  # standard deviations after which a pull is repeated before it is believed: 1 in 16000 by chance
DRIFT_ALLOWED = 0.5  # Page's test: half of the shift to be found, in standard deviations
DRIFT_ALARM = 10.0  # Page's test: with this a false alarm comes once in some 70000 pulls
WORTH_CHANGING = 0.005  # relative gain for which the planner's own choice is given up: half of TOLERANCE


@dataclass(frozen=True)
class Pulled:
    """Medians over the passes of one pull: the time of a pass, and how much of it was spent waiting for the disk.

    available_bytes: what the process had for weights meanwhile (0: what it had before).
    """

    pass_ms: float
    wait_ms: float
    available_bytes: int = 0

    def scaled(self, factor: float) -> Pulled:
        """The same with passes that take factor times as long, because more or less is read."""
        pass_ms = self.pass_ms * factor
        return replace(self, pass_ms=pass_ms, wait_ms=max(0.0, self.wait_ms + pass_ms - self.pass_ms))


Floats = npt.NDArray[np.float64]
Pull = Callable[[Plan], Pulled]


@dataclass
class Row:
    """What is known of one arm: its prediction and its pulls."""

    arm: Plan
    predicted_ms: float
    disk_share: float = 0.0  # relative change of predicted_ms per relative change of the time the disk takes
    compute_share: float = 0.0
    pulls: list[Pulled] = field(default_factory=list)

    @property
    def n(self) -> int:
        """Number of pulls."""
        return len(self.pulls)

    @property
    def log_ms(self) -> float:
        """The mean of its pulls' logarithms (at least one)."""
        return statistics.fmean(math.log(pulled.pass_ms) for pulled in self.pulls)

    @property
    def measured_ms(self) -> float:
        """The geometric mean of its pulls (at least one)."""
        return math.exp(self.log_ms)


def smaller_windows(profile: ModelProfile, arms: Sequence[Plan]) -> list[Plan]:
    """Balanced arms with a window below one layer. The simulator flatters them, so only a live search tries them."""
    ones = [arm for arm in arms if arm.layout == Layout.BALANCED and arm.w == 1 and arm.window_bytes]
    if not ones:
        return []
    one = max(ones, key=lambda arm: arm.window_bytes)  # the others have the narrowest window worth planning
    available_bytes = one.pinned_bytes + one.window_bytes
    windows = {max(one.window_bytes // part, profile.memory.min_window_bytes) for part in SMALLER_WINDOWS}
    new = windows - {arm.window_bytes for arm in ones}
    smaller = [window for window in sorted(new) if window < one.window_bytes]
    return [filled(profile, replace(one, window_bytes=window), available_bytes) for window in smaller]


def adapted(profile: ModelProfile, rows: Sequence[Row]) -> ModelProfile:
    """The profile with computing and disk speeds scaled so that simulated tokens fit what was measured of some arms.

    Computing: the part of the passes that was not waiting. Disk: the least squares of the logarithms, from 1/16 to 16
    times the profile's speed. Predictions that are all off by less than MISFIT stay. The bandit learns such errors by
    itself (see errors_covariance), and few pulls cannot tell where they come from.
    """

    def misfits(profile: ModelProfile) -> list[float]:
        return [row.log_ms - math.log(1000 * token_s(profile, row.arm)) for row in rows]

    if max(map(abs, misfits(profile))) < MISFIT:
        return profile
    rates = decode_rates(profile)
    compute_ms = 1000 * (sum(rates.compute_s) + rates.overhead_s)
    if compute_ms:
        busy_ms = statistics.median(pulled.pass_ms - pulled.wait_ms for row in rows for pulled in row.pulls)
        profile = with_compute_time(profile, max(0.05, busy_ms / compute_ms))

    def loss(log2_speed: float) -> float:
        offs = misfits(with_disk_speed(profile, 2**log2_speed))
        return sum(row.n * off * off for row, off in zip(rows, offs, strict=True))

    best = min((x / 2 for x in range(-8, 9)), key=loss)
    for step in (2**-n for n in range(2, 10)):
        best = min((best - step, best, best + step), key=loss)
    return with_disk_speed(profile, 2**best)


def with_compute_time(profile: ModelProfile, factor: float) -> ModelProfile:
    """The profile as if every computation of a decode pass took factor times as long."""

    def scaled(spread: Spread) -> Spread:
        values = (spread.mean, spread.sd, spread.minimum, spread.maximum)
        mean, sd, minimum, maximum = (factor * value for value in values)
        return Spread(mean, sd, spread.n, minimum, maximum)

    change = msgspec.structs.replace
    layers = tuple(change(layer, decode_compute_s=scaled(layer.decode_compute_s)) for layer in profile.layers)
    head = change(profile.head, decode_compute_s=scaled(profile.head.decode_compute_s))
    return change(profile, layers=layers, head=head, overhead_s=scaled(profile.overhead_s))


def predictions(profile: ModelProfile, arms: Sequence[Plan], always: Collection[Plan]) -> list[Row]:
    """A row per arm that is worth a thought, best first. Arms in `always` have one, whatever their prediction."""
    total = streamable_bytes(profile)
    rows: list[Row] = []
    best_ms = math.inf
    for arm in sorted(arms, key=lambda arm: (arm not in always, -arm.pinned_bytes)):
        if arm not in always and 1000 * limit_s(profile, total - arm.pinned_bytes) > HOPELESS * best_ms:
            continue
        rows.append(Row(arm, 1000 * token_s(profile, arm)))
        best_ms = min(best_ms, rows[-1].predicted_ms)
    slow_disk, slow_compute = with_disk_speed(profile, 1 / SLOWER), with_compute_time(profile, SLOWER)
    worth = [row for row in rows if row.arm in always or row.predicted_ms <= HOPELESS * best_ms]
    for row in worth:
        row.disk_share = math.log(1000 * token_s(slow_disk, row.arm) / row.predicted_ms) / math.log(SLOWER)
        row.compute_share = math.log(1000 * token_s(slow_compute, row.arm) / row.predicted_ms) / math.log(SLOWER)
    return sorted(worth, key=lambda row: tie_order(row.arm, row.predicted_ms))


def errors_covariance(rows: Sequence[Row]) -> Floats:
    """How the relative errors of these predictions go together: [arm, arm].

    An error has several parts. One comes from a disk and a computing speed that are not quite right: it moves every arm
    by its sensitivity. One is that of the layout. One changes smoothly with the window (a small window forgives less).
    One is the arm's own.
    """
    arms = [row.arm for row in rows]
    windows = np.log([max(1, arm.window_bytes) for arm in arms])
    near = np.exp(-0.5 * ((windows[:, None] - windows[None, :]) / WINDOW_LENGTH) ** 2)
    layouts = np.array([int(arm.layout) for arm in arms])
    disk, compute = np.array([row.disk_share for row in rows]), np.array([row.compute_share for row in rows])
    errors: Floats = (
        SPEED_ERROR**2 * (np.outer(disk, disk) + np.outer(compute, compute))
        + LAYOUT_ERROR**2 * (layouts[:, None] == layouts[None, :])
        + WINDOW_ERROR**2 * near
        + OWN_ERROR**2 * np.eye(len(arms))
    )
    return errors


class LiveSearch:
    """Says which arm to pull next, takes in what was measured, and knows when it is enough.

    next_arm() is None when the search is over. best is the arm to keep, at any time. The planner would choose from the
    arms in `planned`. Those in `more` are tried as well.
    """

    def __init__(
        self, profile: ModelProfile, planned: Sequence[Plan], more: Sequence[Plan] = (), most_pulls: int = MOST_PULLS
    ) -> None:
        self._profile = profile
        self._planned = planned
        self._arms = [*planned, *more]
        self._most_pulls = most_pulls
        self._noise_squares = FIRST_NOISE_WEIGHT * FIRST_NOISE**2
        self._noise_weight = float(FIRST_NOISE_WEIGHT)
        self.first = pick(profile, planned).arm
        self.available_bytes = self.first.pinned_bytes + self.first.window_bytes
        self.best = self.first
        self.rows: list[Row] = [Row(self.first, math.nan)]
        self.n_pulls = self.n_restarts = 0
        self._n_left = most_pulls
        self._again: Row | None = None  # to be pulled next, whatever the scores say
        self._doubt: Pulled | None = None  # a surprising pull that has not been confirmed
        self._up = self._down = 0.0
        self._adapted: ModelProfile | None = None  # what the predictions were made with

    # --- what is known ------------------------------------------------------------------------------------------

    @property
    def noise(self) -> float:
        """Relative standard deviation of one pull, as far as it is known."""
        return math.sqrt(self._noise_squares / self._noise_weight)

    @property
    def _n_known(self) -> int:
        """Pulls that count: those since the machine changed last."""
        return sum(row.n for row in self.rows)

    @property
    def is_settled(self) -> bool:
        """Whether no other arm can still be better than the leader by more than the tolerance."""
        mean, covariance = self._belief()
        i = self._leader(mean)
        variance = np.diag(covariance)
        spread = np.sqrt(np.maximum(0.0, variance + variance[i] - 2 * covariance[i]))
        return bool(np.all(mean - mean[i] + TOLERANCE >= SURE * spread))

    def _belief(self) -> tuple[Floats, Floats]:
        """Mean and covariance of the logarithm of every row's ms, given all pulls (see errors_covariance)."""
        n = np.array([row.n for row in self.rows])
        played = np.flatnonzero(n)
        prior = np.log([row.predicted_ms for row in self.rows])
        off = np.array([self.rows[i].log_ms - prior[i] for i in played])
        seen = self._errors[np.ix_(played, played)] + np.diag(self.noise**2 / n[played])
        gain = np.linalg.solve(seen, self._errors[played]).T
        return prior + gain @ off, self._errors - gain @ self._errors[played]

    def _leader(self, mean: Floats) -> int:
        """The row with the best mean among those that were measured."""
        measured = [i for i, row in enumerate(self.rows) if row.n]
        best = min(measured, key=lambda i: float(mean[i]))
        own = next((i for i in measured if self.rows[i].arm == self.first), best)
        return own if mean[own] <= mean[best] + WORTH_CHANGING else best

    @property
    def best_row(self) -> Row:
        """What is known of the best arm."""
        return next(row for row in self.rows if row.arm == self.best)

    # --- deciding -----------------------------------------------------------------------------------------------

    def next_arm(self) -> Plan | None:
        """The arm to pull now."""
        if not self.n_pulls:
            return self.first
        if self._n_left <= 0:
            return None
        if self._again:
            return self._again.arm
        return None if self.is_settled else self._choose().arm

    def _choose(self) -> Row:
        """The row with the lowest score. If that is the leader, and it was played more, it is its strongest rival."""
        mean, covariance = self._belief()
        leader = self._leader(mean)
        n_all = max(2, self._n_known)
        score = mean - C * np.sqrt(2 * math.log(n_all) * np.maximum(0.0, np.diag(covariance)))
        rival = min((i for i in range(len(self.rows)) if i != leader), key=lambda i: float(score[i]))
        if score[leader] < score[rival] and self.rows[leader].n <= self.rows[rival].n:
            return self.rows[leader]
        return self.rows[rival]

    # --- learning -----------------------------------------------------------------------------------------------

    def saw(self, arm: Plan, pulled: Pulled) -> str:
        """Take a pull in. Returns a word where it was not an ordinary one: "surprise", "noise" or "change"."""
        self.n_pulls += 1
        self._n_left -= 1
        row = next(row for row in self.rows if row.arm == arm)
        if pulled.available_bytes not in (0, self.available_bytes):
            self._fill(pulled.available_bytes)
        self._again, word = None, ""
        if self.n_pulls == 1:
            self._take(row, pulled)
            self._predict()
        else:
            word = self._judge(row, pulled) if row.n else self._judge_first(row, pulled)
        self.best = self.rows[self._leader(self._belief()[0])].arm
        return word

    def _fill(self, available_bytes: int) -> None:
        """The process leaves so many bytes for weights now: every arm pins others, and earlier pulls of it are scaled.

        Keys and values grow while the search goes on. Without this an arm that was pulled early would look faster than
        the same arm does later.
        """
        profile = self._adapted or self._profile
        arms = {arm: filled(profile, arm, available_bytes) for arm in self._arms}
        for row in self.rows:
            factor = token_s(profile, arms[row.arm]) / token_s(profile, row.arm)
            row.arm, row.predicted_ms = arms[row.arm], row.predicted_ms * factor
            row.pulls = [pulled.scaled(factor) for pulled in row.pulls]
        self._planned, self._arms = [arms[arm] for arm in self._planned], list(dict.fromkeys(arms.values()))
        self.first, self.best = arms[self.first], arms[self.best]
        self.available_bytes = available_bytes

    def _judge_first(self, row: Row, pulled: Pulled) -> str:
        """The first pull of an arm. One far from the prediction is repeated before it is believed."""
        log = math.log(pulled.pass_ms)
        before, self._doubt = self._doubt, None
        if before:
            if abs(log - math.log(before.pass_ms)) > SURPRISE * self.noise:
                self._take(row, pulled)
                return "noise"
            self._take(row, before)
            self._take(row, pulled)
            self._predict()
            self._again = max(self.rows, key=lambda other: (other.arm != row.arm, other.n))
            return ""
        mean, covariance = self._belief()
        i = self.rows.index(row)
        if abs(log - mean[i]) > SURPRISE * math.sqrt(covariance[i, i] + self.noise**2):
            self._doubt, self._again = pulled, row
            return "surprise"
        self._take(row, pulled)
        return ""

    def _judge(self, row: Row, pulled: Pulled) -> str:
        """A pull of an arm that was measured before: ordinary, a disturbance, or the sign of a change."""
        z = (math.log(pulled.pass_ms) - row.log_ms) / (self.noise * math.sqrt(1 + 1 / row.n))
        before, self._doubt = self._doubt, None
        if before:
            if abs(z) > SURPRISE / 2 and (z > 0) == (before.pass_ms > row.measured_ms):
                return self._restart(row, [before, pulled])
            self._take(row, pulled)
            return "noise"
        if abs(z) > SURPRISE:
            self._doubt, self._again = pulled, row
            return "surprise"
        self._up = max(0.0, self._up + z - DRIFT_ALLOWED)
        self._down = max(0.0, self._down - z - DRIFT_ALLOWED)
        if max(self._up, self._down) > DRIFT_ALARM:
            return self._restart(row, [pulled])
        self._take(row, pulled)
        return ""

    def _take(self, row: Row, pulled: Pulled) -> None:
        """Add an observation. Its distance from the arm's mean is noise, as far as it is no surprise."""
        if row.n:
            square = (math.log(pulled.pass_ms) - row.log_ms) ** 2 * row.n / (row.n + 1)
            self._noise_squares += min(square, (SURPRISE * self.noise) ** 2)
            self._noise_weight += 1
        row.pulls.append(pulled)

    def _restart(self, row: Row, pulls: list[Pulled]) -> str:
        """The machine has changed: forget what was measured on the old one."""
        if self.n_restarts >= MOST_RESTARTS:
            for pulled in pulls:
                self._take(row, pulled)
            return "noise"
        self.n_restarts += 1
        self._n_left = self._most_pulls - len(pulls)
        self._up = self._down = 0.0
        self.rows, self._adapted = [Row(row.arm, math.nan)], None
        for pulled in pulls:
            self._take(self.rows[0], pulled)
        self._predict()
        return "change"

    def _predict(self) -> None:
        """Adapt the profile to what was measured, and predict every arm with it."""
        seen = {row.arm: row for row in self.rows if row.n}
        profile = adapted(self._profile, list(seen.values()))
        if profile is self._adapted:
            return
        self._adapted = profile
        # An adapted disk is as fast as it was beside computations.
        self.first = pick(profile, self._planned, BESIDE if profile is self._profile else 1.0).arm
        self.rows = predictions(profile, self._arms, seen.keys())
        for row in self.rows:
            if row.arm in seen:
                row.pulls = seen[row.arm].pulls
        self._errors = errors_covariance(self.rows)


def search(
    found: LiveSearch, pull: Pull, seen: Callable[[Plan, Pulled, str], None] = lambda _arm, _pulled, _word: None
) -> None:
    """Pull until the search is over."""
    while (arm := found.next_arm()) is not None:
        pulled = pull(arm)
        seen(arm, pulled, found.saw(arm, pulled))
