"""The report of the speed benchmark: Markdown tables of medians, and the summary for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from h2o_cli.bench.report import commands, document, images, machines, started_by
from h2o_cli.bench.results import Kind
from h2o_cli.bench.rows import chosen, distinct, median_of
from h2o_cli.bench.speed.engines import H2O, LLAMA_CPP
from h2o_cli.bench.speed.plots import draw
from h2o_cli.bench.speed.rows import Rounds, Setup, SpeedRow, read_timelines, setups
from h2o_cli.bench.tables import NONE, markdown_table, millions, number, shown
from h2o_cli.output import duration, table
from runtime.sizes import format_size

Quantity = Callable[[SpeedRow], float | None]
TIMELINES = "timelines.jsonl"


def report(rows: Sequence[SpeedRow], pictures: Sequence[str] = ()) -> str:
    """All of the report. Rows of one or more runs of the benchmark, in any order; names of pictures beside it."""
    parts = [machines(rows), _METHOD, started_by(rows)] if rows else ["No runs."]
    budgets = chosen(rows, suite="budgets")
    for setup in setups(budgets):
        at = setup.of(budgets)
        parts += [f"## {setup.model}, {format_size(at[0].file_bytes)}, {setup.disk}", _engines(at)]
        parts += images(name for name in pictures if name.endswith(f"-{setup.stem}.png"))
        parts += [_details(at), commands(at, _name)]
    first = chosen(rows, suite="first token")
    if first:
        parts += ["## First token of a long prompt", _first_token(first), commands(first, _name)]
    resident = chosen(rows, suite="resident")
    if resident:
        parts += ["## Everything resident", _resident(resident), commands(resident, _name)]
    return document("Benchmark", parts)


_METHOD = (
    "Memory limited to the budget (page cache included), caches cold. Medians of the runs, least to most in brackets "
    "where they are more than 5 % apart. Budgets in percent of the file."
)


def _name(row: SpeedRow) -> str:
    return f"{row.model}, {_budget(row)}, {row.engine}"


# --- tables ----------------------------------------------------------------------------------------------------------


def _engines(rows: Sequence[SpeedRow]) -> str:
    """ms per token: a line per budget, a column per engine; how many times llama.cpp's best h2o is."""
    engines = _sorted_engines(rows)
    lines = [["budget", *(f"{engine}, ms/token" for engine in engines), "h2o faster by"]]
    for budget in _budgets(rows):
        at = chosen(rows, budget=budget)
        cells = [_time_or_end(chosen(at, engine=engine)) for engine in engines]
        lines.append([_budget(at[0]), *cells, _ratio(at)])
    return markdown_table(lines)


def _budget(row: SpeedRow) -> str:
    size = f"{row.budget_bytes / 1e6:.0f} MB"
    return size if row.budget in size else f"{row.budget} ({size})"


def _time_or_end(rows: Sequence[SpeedRow]) -> str:
    """The time per token, and how the other runs ended: that is a result too."""
    found = median_of(rows, lambda row: row.ms_per_token)
    ends = [{"oom": "OOM"}.get(row.status, row.status) for row in rows if row.status != "ok"]
    if found:
        return shown(found) + (f", {len(ends)} of {len(rows)} {ends[0]}" if ends else "")
    return ends[0] if ends else NONE


def _ratio(rows: Sequence[SpeedRow]) -> str:
    """The fastest llama.cpp's time over h2o's."""
    own = median_of(chosen(rows, engine=H2O), lambda row: row.ms_per_token)
    theirs = [
        median_of(chosen(rows, engine=engine), lambda row: row.ms_per_token)
        for engine in distinct(row.engine for row in rows if row.engine.startswith(LLAMA_CPP))
    ]
    times = [found.value for found in theirs if found]
    return f"{min(times) / own.value:.2f} x" if own and times else NONE


_COLUMNS: tuple[tuple[str, Quantity, int], ...] = (
    ("ms/token", lambda row: row.ms_per_token, 0),
    ("limit", lambda row: row.limit_ms_per_token, 0),
    ("yield", lambda row: row.yield_, 3),
    ("predicted", lambda row: row.predicted_ms_per_token, 0),
    ("read, MB/token", lambda row: None if row.bytes_per_token is None else row.bytes_per_token / 1e6, 0),
    ("disk wait, ms", lambda row: row.disk_wait_ms_per_token, 0),
    ("first token, s", lambda row: row.ttft_s, 2),
    ("peak, MB", lambda row: row.peak_bytes / 1e6, 0),
)
"""Title, figure, and digits after the point."""


def _details(rows: Sequence[SpeedRow]) -> str:
    """All figures of the engines that ran, a line per budget and engine, and whether the tokens are the same."""
    lines = [["budget", "engine, runs", *(name for name, _, _ in _COLUMNS), "plan k, w", "tokens"]]
    for budget in _budgets(rows):
        for engine in _sorted_engines(rows):
            at = chosen(rows, budget=budget, engine=engine)
            if any(row.status == "ok" for row in at):
                cells = [shown(median_of(at, quantity), digits) for _, quantity, digits in _COLUMNS]
                tokens = parity(chosen(rows, budget=budget), rows, at)
                lines.append([_budget(at[0]), f"{engine}, {len(at)}", *cells, _plan(at[0]), tokens])
    return markdown_table(lines)


def _budgets(rows: Sequence[SpeedRow]) -> list[str]:
    return distinct(row.budget for row in sorted(rows, key=lambda row: row.budget_bytes))


def _sorted_engines(rows: Sequence[SpeedRow]) -> list[str]:
    return sorted(distinct(row.engine for row in rows), key=lambda name: name != H2O)


def _plan(row: SpeedRow) -> str:
    return f"{row.plan['k']}, {row.plan['w']} {row.plan['layout']}" if row.plan else NONE


def parity(at_budget: Sequence[SpeedRow], rows: Sequence[SpeedRow], of: Sequence[SpeedRow]) -> str:
    """The hash of the tokens of some runs, and how it compares with llama.cpp's.

    "=": the same as llama.cpp's in the same budget, or where it gave none, in the others; "differ" would be an error.
    """
    own = {row.tokens_hash for row in of if row.tokens_hash}
    lengths = {row.n_tokens for row in of}
    plain = _plain_hashes(at_budget) or _plain_hashes([row for row in rows if row.n_tokens in lengths])
    if not own:
        return NONE
    if len(own | plain) > 1:
        return "differ"
    return f"{next(iter(own))[:8]} {'=' if plain else '(alone)'}"


def _plain_hashes(rows: Sequence[SpeedRow]) -> set[str]:
    alone = {row.tokens_hash for row in rows if row.tokens_hash and row.engine.startswith(LLAMA_CPP)}
    return alone | {row.in_turns.llama_cpp_tokens_hash for row in rows if row.in_turns}


def _first_token(rows: Sequence[SpeedRow]) -> str:
    lines = [["model, budget", "disk", "engine, runs", "prompt tokens", "first token, s", "limit, s", "tokens"]]
    for setup in setups(rows):
        at_setup = setup.of(rows)
        for budget in _budgets(at_setup):
            at_budget = chosen(at_setup, budget=budget)
            for engine in _sorted_engines(at_budget):
                at = chosen(at_budget, engine=engine)
                found = median_of(at, lambda row: row.ttft_s)
                time = shown(found, 2) if found else _time_or_end(at)
                limit = shown(median_of(at, lambda row: row.first_token_limit_s), 2)
                what = [f"{setup.model}, {_budget(at[0])}", setup.disk, f"{engine}, {len(at)}"]
                lines.append([*what, str(at[0].n_prompt_tokens), time, limit, parity(at_budget, at_budget, at)])
    return markdown_table(lines)


def _resident(rows: Sequence[SpeedRow]) -> str:
    """Decode and prefill of h2o and of llama.cpp with its own defaults in turns: a line per time they took turns."""
    speeds = [f"{kind}, tokens/s: {engine}" for kind in ("decode", "prefill") for engine in (H2O, LLAMA_CPP)]
    head = ["model", *speeds, "decode, h2o / llama.cpp", "prefill, h2o / llama.cpp", "peak, MB: h2o", LLAMA_CPP]
    lines = [[*head, "tokens"]]
    for row in rows:
        found = row.in_turns
        if found is None:
            lines.append([row.model, row.note or row.status, *[NONE] * (len(head) - 1)])
            continue
        own, other = (millions(n_bytes) for n_bytes in (row.peak_bytes, found.llama_cpp_peak_bytes))
        ratios = [_with_quartiles(found.decode), _with_quartiles(found.prefill)]
        cells = [*_speeds(found.decode, 2), *_speeds(found.prefill, 1), *ratios, own, other]
        lines.append([row.model, *cells, parity([row], [row], [row])])
    return markdown_table(lines)


def _speeds(rounds: Rounds, digits: int) -> tuple[str, str]:
    return number(rounds.h2o_tokens_per_s, digits), number(rounds.llama_cpp_tokens_per_s, digits)


def _with_quartiles(rounds: Rounds) -> str:
    low, high = rounds.quartiles
    return f"{rounds.ratio:.3f} [{low:.3f}-{high:.3f}]"


# --- for the terminal ------------------------------------------------------------------------------------------------


def summary_rows(rows: Sequence[SpeedRow]) -> list[list[str]]:
    """The medians for a terminal: head first, then a line per model, budget and engine."""
    lines = [["model", "budget", "engine", "ms/token", "limit", "yield", "first token s", "peak MB", "tokens"]]
    for suite, setup, budget in distinct((r.suite, Setup(r.model, r.read_bytes_per_s), r.budget) for r in rows):
        of_suite = setup.of(chosen(rows, suite=suite))
        group = chosen(of_suite, budget=budget)
        for engine in _sorted_engines(group):
            at = chosen(group, engine=engine)
            cells = [
                _time_or_end(at),
                shown(median_of(at, lambda row: row.limit_ms_per_token)),
                shown(median_of(at, lambda row: row.yield_), 3),
                shown(median_of(at, lambda row: row.ttft_s), 2),
                shown(median_of(at, lambda row: row.peak_bytes / 1e6)),
            ]
            more = (", long prompt" if suite == "first token" else "") + (
                "" if setup.read_bytes_per_s else ", full disk"
            )
            name = engine + _beside_llama_cpp(at[0])
            lines.append([setup.model, _budget(at[0]) + more, name, *cells, parity(group, of_suite, at)])
    return lines


def _beside_llama_cpp(row: SpeedRow) -> str:
    found = row.in_turns
    return f": {found.decode.ratio:.3f} x, prompt {found.prefill.ratio:.3f} x {LLAMA_CPP}" if found else ""


def told(row: SpeedRow) -> str:
    """A finished run in one line."""
    what = f"{row.model}, {row.budget}, {row.engine}"
    if row.status != "ok":
        return f"{what}: {row.status} ({row.note})"
    parts = [f"{row.ms_per_token:.0f} ms per token"] if row.ms_per_token else []
    parts += [f"first token after {row.ttft_s:.1f} s"] if row.ttft_s is not None else []
    parts += [f"{row.yield_:.1%} of the limit"] if row.yield_ else []
    if row.in_turns:
        decode, prefill = row.in_turns.decode.ratio, row.in_turns.prefill.ratio
        parts.append(f"{decode:.3f} x llama.cpp, prompt {prefill:.3f} x")
    return f"{what}: {', '.join(parts)} ({duration(row.wall_s)})"


def _summary(rows: Sequence[SpeedRow]) -> str:
    return table(summary_rows(rows), right=(3, 4, 5, 6, 7))


def _draw(rows: Sequence[SpeedRow], folder: Path) -> list[Path]:
    return draw(rows, read_timelines(folder / TIMELINES), folder)


SPEED = Kind(SpeedRow, report, _summary, told, _draw, beside=(TIMELINES,))
