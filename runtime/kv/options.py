"""What a KV filter shall do, checked when it is built; no numpy here, a plain run imports this module."""

from __future__ import annotations

import re
from dataclasses import dataclass

from runtime.errors import UsageError

SELECTORS = ("last", "softmax", "uniform", "exp")
WINDOWED = ("uniform", "exp")
STORES = ("ram", "disk")
STRATEGIES = ("multi", "without_pack", "lazy", "brutal")
METHODS = ("omnikv", "full", "sinks", "heavy", "random")
WINDOW = 16  # queries that "uniform" and "exp" look back
READERS = 4
LAZY_THRESHOLD = 0.4
_MOST = 2**31 - 1
DEFAULT_KEEP = 0.1
LEAST_KEPT = 256  # rows: a share of a short prompt would keep too few for any answer
DEFAULT_SELECT = "last"
DEFAULT_WAIT, GUESSED_WAIT = 1, 0
GUESS = "guess"


@dataclass(frozen=True)
class KvFilter:
    """Which keys and values of a prompt a decode pass attends to, and where the others are. Rows are positions.

    layers: the filter layers; empty: chosen for the model. analyzed: an analysis found them. wait: layers behind each
    filter layer that attend to everything. keep: rows kept in the others, a count (int) or a fraction of the prompt
    (float), then at least `least` of them. select: how scores become a choice. sinks, recent: first and last rows of
    the prompt that are always kept, part of the budget. block: rows that are chosen together. readers: threads that
    read a disk store. tail: most rows decoded in one answer (0: as many as the context takes); more are taken back into
    the prompt. folder: where a disk store has its file.
    """

    layers: tuple[int, ...] = ()
    wait: int = DEFAULT_WAIT
    keep: float | int = DEFAULT_KEEP
    least: int = LEAST_KEPT
    analyzed: bool = False
    select: str = DEFAULT_SELECT
    store: str = "ram"
    strategy: str = "multi"
    lazy_threshold: float = LAZY_THRESHOLD
    sinks: int = 0
    recent: int = 0
    block: int = 1
    window: int = WINDOW
    readers: int = READERS
    method: str = "omnikv"
    seed: int = 0
    tail: int = 0
    folder: str = ""

    def __post_init__(self) -> None:
        _check_name("--kv-select", self.select, SELECTORS)
        _check_name("--kv-store", self.store, STORES)
        _check_name("--kv-strategy", self.strategy, STRATEGIES)
        _check_name("--kv-method", self.method, METHODS)
        _check_count("--kv-wait", self.wait, 0)
        _check_count("--kv-sinks", self.sinks, 0)
        _check_count("--kv-recent", self.recent, 0)
        _check_count("--kv-block", self.block, 1)
        _check_count("window_size", self.window, 1)
        _check_count("cpu_num_threads", self.readers, 1)
        if isinstance(self.keep, int):
            _check_count("--kv-keep", self.keep, 1)
        elif not 0 < self.keep <= 1:
            raise UsageError(
                f"--kv-keep {self.keep} is not possible", "give a fraction such as 0.1, or a whole number of tokens"
            )
        if not 0 <= self.lazy_threshold <= 1:
            raise UsageError(f"a lazy threshold of {self.lazy_threshold} is not possible", "give 0 to 1")
        if any(layer < 0 for layer in self.layers) or list(self.layers) != sorted(set(self.layers)):
            raise UsageError(f"--kv-layers {_joined(self.layers)} is not a rising list", "give layers such as 2,8,18")

    @property
    def keeps_all(self) -> bool:
        """Whether sparse layers attend to all rows of any prompt."""
        return self.strategy == "brutal" or (isinstance(self.keep, float) and self.keep == 1.0)

    def n_rows(self, n_prompt: int) -> int:
        """Rows of a prompt of n_prompt that a sparse layer attends to: the budget, at least what is always kept."""
        if self.strategy == "brutal":
            return n_prompt
        wanted = self.keep if isinstance(self.keep, int) else max(int(self.keep * n_prompt), self.least)
        always = self.window if self.select in WINDOWED else 0
        return min(n_prompt, max(wanted, self.sinks + self.recent + always, 1))

    @property
    def layers_from(self) -> str:
        """Who chose the filter layers: "given" by the user, found by an "analysis", or a "guess"."""
        if not self.layers:
            return GUESS
        return "analysis" if self.analyzed else "given"

    def is_guess_in(self, n_positions: int) -> bool:
        """Whether a context of n_positions can be filtered by layers that are a guess."""
        return self.layers_from == GUESS and self.method != "full" and self.n_rows(n_positions) < n_positions


def _joined(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))


def _check_name(flag: str, value: str, names: tuple[str, ...]) -> None:
    if value not in names:
        raise UsageError(f"{flag} {value} is not possible", f"choose one of {', '.join(names)}")


def _check_count(flag: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{flag} {value} is not possible", f"give {least} or more")
    if value > _MOST:
        raise UsageError(f"{flag} {value} is more than any context has", "give a smaller number")


def parse_layers(text: str) -> tuple[int, ...]:
    """The layers of "2,8,18"; none for "auto". Raises UsageError."""
    if text == "auto":
        return ()
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--kv-layers {text} is not a list of layers", "give layers such as 2,8,18, or auto") from None


def parse_keep(text: str) -> float | int:
    """A fraction ("0.067", "1.0") or a count of tokens ("4096"). Raises UsageError."""
    try:
        return int(text) if re.fullmatch(r"\d+", text) else float(text)
    except ValueError:
        raise UsageError(
            f"--kv-keep {text} is not a number", "give a fraction such as 0.1, or a whole number of tokens"
        ) from None


def parse_strategy(text: str) -> tuple[str, float]:
    """Strategy and threshold of "multi", "lazy", "lazy(0.6)". Raises UsageError."""
    match = re.fullmatch(r"(\w+)(?:\((\d*\.?\d+)\))?", text)
    if not match or (match[2] and match[1] != "lazy"):
        raise UsageError(f"--kv-strategy {text} is not possible", f"choose one of {', '.join(STRATEGIES)}, lazy(0.6)")
    return match[1], float(match[2]) if match[2] else LAZY_THRESHOLD
