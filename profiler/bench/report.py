"""The report of a benchmark: Markdown tables of medians, from rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from profiler.bench.engines import H2O, LLAMA_CPP
from profiler.bench.rows import Median, Row, chosen, distinct, median_of
from runtime.sizes import format_size

Quantity = Callable[[Row], float | None]
STEADY = 0.05  # a spread below this part of the median is not printed
NONE = "-"


def report(rows: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """All of the report. Rows of one run of the benchmark, in any order; names of pictures that lie beside it."""
    parts = ["# Benchmark", *_conditions(rows)]
    for model in distinct(row.model for row in chosen(rows, suite="budgets")):
        of_model = chosen(rows, suite="budgets", model=model)
        parts += [f"## {model}, {format_size(of_model[0].file_bytes)}", _engines(of_model), _h2o(of_model)]
    first = chosen(rows, suite="first token")
    if first:
        parts += ["## First token of a long prompt", _first_token(first)]
    resident = chosen(rows, suite="resident")
    if resident:
        parts += ["## Everything resident", _resident(resident)]
    if pictures:
        parts += ["## Pictures", *(f"![{name.removesuffix('.png')}]({name})" for name in pictures)]
    return "\n\n".join(parts) + "\n"


def _conditions(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["No runs."]
    row = rows[0]
    disk = f"{row.read_bytes_per_s / 1e6:.0f} MB/s" if row.read_bytes_per_s else "its own speed"
    machine = row.machine
    where = f"{machine.cpu}, {machine.n_cores} cores, {machine.kernel}" if machine else "machine not known"
    versions = ", ".join(f"{name} {version}" for name, version in row.versions.items())
    return [
        f"Device: disk at {disk}, memory limited to the budget (page cache included), cold. {where}. {versions}.",
        "Medians; least to most in brackets where they are more than 5 % apart. Budgets in percent of the file.",
    ]


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the head."""
    rule = ["---" if i == 0 else "---:" for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def _engines(rows: Sequence[Row]) -> str:
    """ms per token: a line per budget, a column per engine; how many times llama.cpp's best h2o is."""
    engines = distinct(row.engine for row in rows)
    engines.sort(key=lambda name: name != H2O)
    lines = [["budget", *(f"{engine}, ms/token" for engine in engines), "h2o faster by"]]
    for budget in distinct(row.budget for row in rows):
        at = chosen(rows, budget=budget)
        cells = [_time_or_end(chosen(at, engine=engine)) for engine in engines]
        lines.append([_budget(at[0]), *cells, _ratio(at)])
    return markdown_table(lines)


def _budget(row: Row) -> str:
    return f"{row.budget} ({row.budget_bytes / 1e6:.0f} MB)" if row.budget_bytes else row.budget


def _time_or_end(rows: Sequence[Row]) -> str:
    """The time per token, or how the runs ended: that is a result too."""
    found = median_of(rows, lambda row: row.ms_per_token)
    if found:
        return shown(found, "{:.0f}")
    ends = distinct(row.status for row in rows)
    return {"oom": "OOM"}.get(ends[0], ends[0]) if ends else NONE


def _ratio(rows: Sequence[Row]) -> str:
    """The fastest llama.cpp's time over h2o's."""
    own = median_of(chosen(rows, engine=H2O), lambda row: row.ms_per_token)
    theirs = [
        median_of(chosen(rows, engine=engine), lambda row: row.ms_per_token)
        for engine in distinct(row.engine for row in rows if row.engine.startswith(LLAMA_CPP))
    ]
    times = [found.value for found in theirs if found]
    return f"{min(times) / own.value:.2f} x" if own and times else NONE


_H2O_COLUMNS: tuple[tuple[str, Quantity, str], ...] = (
    ("ms/token", lambda row: row.ms_per_token, "{:.0f}"),
    ("limit", lambda row: row.limit_ms_per_token, "{:.0f}"),
    ("yield", lambda row: row.yield_, "{:.3f}"),
    ("predicted", lambda row: row.predicted_ms_per_token, "{:.0f}"),
    ("read, MB/token", lambda row: None if row.bytes_per_token is None else row.bytes_per_token / 1e6, "{:.0f}"),
    ("disk wait, ms", lambda row: row.disk_wait_ms_per_token, "{:.0f}"),
    ("first token, s", lambda row: row.ttft_s, "{:.2f}"),
    ("peak, MB", lambda row: row.peak_bytes / 1e6, "{:.0f}"),
)


def _h2o(rows: Sequence[Row]) -> str:
    """h2o beside its limit, a line per budget, and whether its tokens are llama.cpp's."""
    lines = [["h2o in", *(name for name, _, _ in _H2O_COLUMNS), "plan k, w", "tokens"]]
    for budget in distinct(row.budget for row in rows):
        at = chosen(rows, budget=budget, engine=H2O)
        if not at:
            continue
        cells = [shown(median_of(at, quantity), form) for _, quantity, form in _H2O_COLUMNS]
        lines.append([_budget(at[0]), *cells, _plan(at[0]), parity(rows, at)])
    return markdown_table(lines)


def _plan(row: Row) -> str:
    return f"{row.plan['k']}, {row.plan['w']} {row.plan['layout']}" if row.plan else NONE


def parity(rows: Sequence[Row], of: Sequence[Row]) -> str:
    """Whether these runs gave the tokens that llama.cpp's runs of the same rows gave: the hash, or "differ"."""
    own = {row.tokens_hash for row in of if row.tokens_hash}
    plain = {row.tokens_hash for row in rows if row.tokens_hash and row.engine.startswith(LLAMA_CPP)}
    if not own:
        return NONE
    if len(own | plain) > 1:
        return "differ"
    return f"{next(iter(own))[:8]} {'=' if plain else '(alone)'}"


def _first_token(rows: Sequence[Row]) -> str:
    lines = [["model, budget", "engine", "prompt tokens", "first token, s", "limit, s"]]
    for model in distinct(row.model for row in rows):
        of_model = chosen(rows, model=model)
        for engine in distinct(row.engine for row in of_model):
            at = chosen(of_model, engine=engine)
            found = median_of(at, lambda row: row.ttft_s)
            time = shown(found, "{:.2f}") if found else _time_or_end(at)
            limit = shown(median_of(at, lambda row: row.first_token_limit_s), "{:.2f}")
            lines.append([f"{model}, {_budget(at[0])}", engine, str(at[0].n_prompt_tokens), time, limit])
    return markdown_table(lines)


def _resident(rows: Sequence[Row]) -> str:
    """Decode and prefill of h2o and of llama.cpp with its own defaults, and the ratio of the two."""
    head = ["model", "engine", "decode, tokens/s", "prefill, tokens/s", "first token, s", "peak, MB", "h2o / llama.cpp"]
    lines = [head]
    for model in distinct(row.model for row in rows):
        of_model = chosen(rows, model=model)
        for engine in distinct(row.engine for row in of_model):
            at = chosen(of_model, engine=engine)
            speed = shown(median_of(at, _tokens_per_s), "{:.2f}")
            prefill = shown(median_of(at, lambda row: row.prefill_tokens_per_s), "{:.1f}")
            ttft = shown(median_of(at, lambda row: row.ttft_s), "{:.2f}")
            peak = shown(median_of(at, lambda row: row.peak_bytes / 1e6), "{:.0f}")
            ratio = _resident_ratio(of_model) if engine == H2O else ""
            lines.append([model, engine, speed if speed != NONE else _time_or_end(at), prefill, ttft, peak, ratio])
    return markdown_table(lines)


def _tokens_per_s(row: Row) -> float | None:
    return 1000 / row.ms_per_token if row.ms_per_token else None


def _resident_ratio(rows: Sequence[Row]) -> str:
    """h2o's decode and prefill speed over llama.cpp's."""
    ratios = []
    for name, quantity in (("decode", _tokens_per_s), ("prefill", lambda row: row.prefill_tokens_per_s)):
        own = median_of(chosen(rows, engine=H2O), quantity)
        other = median_of([row for row in rows if row.engine != H2O], quantity)
        if own and other:
            ratios.append(f"{name} {own.value / other.value:.3f}")
    return ", ".join(ratios) or NONE


def shown(found: Median | None, form: str) -> str:
    """A median, with least and most where they are apart."""
    if found is None:
        return NONE
    text = form.format(found.value)
    if found.most - found.least <= STEADY * abs(found.value):
        return text
    return f"{text} [{form.format(found.least)}-{form.format(found.most)}]"


def summary_rows(rows: Sequence[Row]) -> list[list[str]]:
    """The medians for a terminal: head first, then a line per model, budget and engine."""
    lines = [["model", "budget", "engine", "ms/token", "limit", "yield", "first token s", "peak MB", "tokens"]]
    for suite, model, budget, engine in dict.fromkeys((r.suite, r.model, r.budget, r.engine) for r in rows):
        group = chosen(rows, suite=suite, model=model, budget=budget)
        at = chosen(group, engine=engine)
        cells = [
            _time_or_end(at),
            shown(median_of(at, lambda row: row.limit_ms_per_token), "{:.0f}"),
            shown(median_of(at, lambda row: row.yield_), "{:.3f}"),
            shown(median_of(at, lambda row: row.ttft_s), "{:.2f}"),
            shown(median_of(at, lambda row: row.peak_bytes / 1e6), "{:.0f}"),
        ]
        where = _budget(at[0]) + (", long prompt" if suite == "first token" else "")
        lines.append([model, where, engine, *cells, parity(group, at)])
    return lines
