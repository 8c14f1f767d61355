"""The report of a benchmark: Markdown tables of medians, from rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from h2o_cli.bench.speed.engines import H2O, LLAMA_CPP
from h2o_cli.bench.speed.rows import Median, Rounds, Row, Setup, chosen, distinct, median_of, setups
from runtime.sizes import format_size

Quantity = Callable[[Row], float | None]
STEADY = 0.05  # a spread below this part of the median is not printed
NONE = "-"


def report(rows: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """All of the report. Rows of one or more runs of the benchmark, in any order; names of pictures beside it."""
    parts = ["# Benchmark", *_conditions(rows)]
    budgets = chosen(rows, suite="budgets")
    for setup in setups(budgets):
        at = setup.of(budgets)
        parts += [f"## {setup.model}, {format_size(at[0].file_bytes)}, {setup.disk}", _engines(at)]
        parts += [f"![{name.removesuffix('.png')}]({name})" for name in pictures if name.endswith(f"-{setup.stem}.png")]
        parts += [_details(at), _commands(at)]
    first = chosen(rows, suite="first token")
    if first:
        parts += ["## First token of a long prompt", _first_token(first), _commands(first)]
    resident = chosen(rows, suite="resident")
    if resident:
        parts += ["## Everything resident", _resident(resident), _commands(resident)]
    return "\n\n".join(parts) + "\n"


def _conditions(rows: Sequence[Row]) -> list[str]:
    if not rows:
        return ["No runs."]
    found = []
    for machine, versions in distinct((row.machine, tuple(row.versions.items())) for row in rows):
        where = f"{machine.cpu}, {machine.n_cores} cores, {machine.kernel}" if machine else "Machine not known"
        found.append(f"{where}. {', '.join(f'{name} {version}' for name, version in versions)}.")
    made = "\n".join(distinct(row.bench for row in rows if row.bench))
    return [
        *found,
        "Memory limited to the budget (page cache included), caches cold. Medians of the runs, least to most in"
        " brackets where they are more than 5 % apart. Budgets in percent of the file.",
        *([f"```\n{made}\n```"] if made else []),
    ]


# --- tables ----------------------------------------------------------------------------------------------------------


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is the head."""
    rule = ["---" if i == 0 else "---:" for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def _engines(rows: Sequence[Row]) -> str:
    """ms per token: a line per budget, a column per engine; how many times llama.cpp's best h2o is."""
    engines = _sorted_engines(rows)
    lines = [["budget", *(f"{engine}, ms/token" for engine in engines), "h2o faster by"]]
    for budget in _budgets(rows):
        at = chosen(rows, budget=budget)
        cells = [_time_or_end(chosen(at, engine=engine)) for engine in engines]
        lines.append([_budget(at[0]), *cells, _ratio(at)])
    return markdown_table(lines)


def _budget(row: Row) -> str:
    size = f"{row.budget_bytes / 1e6:.0f} MB"
    return size if row.budget in size else f"{row.budget} ({size})"


def _time_or_end(rows: Sequence[Row]) -> str:
    """The time per token, and how the other runs ended: that is a result too."""
    found = median_of(rows, lambda row: row.ms_per_token)
    ends = [{"oom": "OOM"}.get(row.status, row.status) for row in rows if row.status != "ok"]
    if found:
        return shown(found, "{:.0f}") + (f", {len(ends)} of {len(rows)} {ends[0]}" if ends else "")
    return ends[0] if ends else NONE


def _ratio(rows: Sequence[Row]) -> str:
    """The fastest llama.cpp's time over h2o's."""
    own = median_of(chosen(rows, engine=H2O), lambda row: row.ms_per_token)
    theirs = [
        median_of(chosen(rows, engine=engine), lambda row: row.ms_per_token)
        for engine in distinct(row.engine for row in rows if row.engine.startswith(LLAMA_CPP))
    ]
    times = [found.value for found in theirs if found]
    return f"{min(times) / own.value:.2f} x" if own and times else NONE


_COLUMNS: tuple[tuple[str, Quantity, str], ...] = (
    ("ms/token", lambda row: row.ms_per_token, "{:.0f}"),
    ("limit", lambda row: row.limit_ms_per_token, "{:.0f}"),
    ("yield", lambda row: row.yield_, "{:.3f}"),
    ("predicted", lambda row: row.predicted_ms_per_token, "{:.0f}"),
    ("read, MB/token", lambda row: None if row.bytes_per_token is None else row.bytes_per_token / 1e6, "{:.0f}"),
    ("disk wait, ms", lambda row: row.disk_wait_ms_per_token, "{:.0f}"),
    ("first token, s", lambda row: row.ttft_s, "{:.2f}"),
    ("peak, MB", lambda row: row.peak_bytes / 1e6, "{:.0f}"),
)


def _details(rows: Sequence[Row]) -> str:
    """All figures of the engines that ran, a line per budget and engine, and whether the tokens are the same."""
    lines = [["budget", "engine, runs", *(name for name, _, _ in _COLUMNS), "plan k, w", "tokens"]]
    for budget in _budgets(rows):
        for engine in _sorted_engines(rows):
            at = chosen(rows, budget=budget, engine=engine)
            if any(row.status == "ok" for row in at):
                cells = [shown(median_of(at, quantity), form) for _, quantity, form in _COLUMNS]
                tokens = parity(chosen(rows, budget=budget), rows, at)
                lines.append([_budget(at[0]), f"{engine}, {len(at)}", *cells, _plan(at[0]), tokens])
    return markdown_table(lines)


def _budgets(rows: Sequence[Row]) -> list[str]:
    return distinct(row.budget for row in sorted(rows, key=lambda row: row.budget_bytes))


def _sorted_engines(rows: Sequence[Row]) -> list[str]:
    return sorted(distinct(row.engine for row in rows), key=lambda name: name != H2O)


def _commands(rows: Sequence[Row]) -> str:
    """The commands of every row, folded away."""
    lines = []
    for row in {(row.model, row.budget, row.engine): row for row in rows}.values():
        lines += [f"# {row.model}, {_budget(row)}, {row.engine}", *row.commands]
    text = "\n".join(lines)
    return f"<details><summary>The command of every row</summary>\n\n```\n{text}\n```\n\n</details>"


def _plan(row: Row) -> str:
    return f"{row.plan['k']}, {row.plan['w']} {row.plan['layout']}" if row.plan else NONE


def parity(at_budget: Sequence[Row], rows: Sequence[Row], of: Sequence[Row]) -> str:
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


def _plain_hashes(rows: Sequence[Row]) -> set[str]:
    alone = {row.tokens_hash for row in rows if row.tokens_hash and row.engine.startswith(LLAMA_CPP)}
    return alone | {row.in_turns.llama_cpp_tokens_hash for row in rows if row.in_turns}


def _first_token(rows: Sequence[Row]) -> str:
    lines = [["model, budget", "disk", "engine, runs", "prompt tokens", "first token, s", "limit, s", "tokens"]]
    for setup in setups(rows):
        at_setup = setup.of(rows)
        for budget in _budgets(at_setup):
            at_budget = chosen(at_setup, budget=budget)
            for engine in _sorted_engines(at_budget):
                at = chosen(at_budget, engine=engine)
                found = median_of(at, lambda row: row.ttft_s)
                time = shown(found, "{:.2f}") if found else _time_or_end(at)
                limit = shown(median_of(at, lambda row: row.first_token_limit_s), "{:.2f}")
                what = [f"{setup.model}, {_budget(at[0])}", setup.disk, f"{engine}, {len(at)}"]
                lines.append([*what, str(at[0].n_prompt_tokens), time, limit, parity(at_budget, at_budget, at)])
    return markdown_table(lines)


def _resident(rows: Sequence[Row]) -> str:
    """Decode and prefill of h2o and of llama.cpp with its own defaults in turns: a line per time they took turns."""
    speeds = [f"{kind}, tokens/s: {engine}" for kind in ("decode", "prefill") for engine in (H2O, LLAMA_CPP)]
    head = ["model", *speeds, "decode, h2o / llama.cpp", "prefill, h2o / llama.cpp", "peak, MB: h2o", LLAMA_CPP]
    lines = [[*head, "tokens"]]
    for row in rows:
        found = row.in_turns
        if found is None:
            lines.append([row.model, row.note or row.status, *[NONE] * (len(head) - 1)])
            continue
        own, other = (f"{n_bytes / 1e6:.0f}" for n_bytes in (row.peak_bytes, found.llama_cpp_peak_bytes))
        ratios = [_with_quartiles(found.decode), _with_quartiles(found.prefill)]
        cells = [*_speeds(found.decode, "{:.2f}"), *_speeds(found.prefill, "{:.1f}"), *ratios, own, other]
        lines.append([row.model, *cells, parity([row], [row], [row])])
    return markdown_table(lines)


def _speeds(rounds: Rounds, form: str) -> tuple[str, str]:
    return form.format(rounds.h2o_tokens_per_s), form.format(rounds.llama_cpp_tokens_per_s)


def _with_quartiles(rounds: Rounds) -> str:
    low, high = rounds.quartiles
    return f"{rounds.ratio:.3f} [{low:.3f}-{high:.3f}]"


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
    for suite, setup, budget in distinct((r.suite, Setup(r.model, r.read_bytes_per_s), r.budget) for r in rows):
        of_suite = setup.of(chosen(rows, suite=suite))
        group = chosen(of_suite, budget=budget)
        for engine in _sorted_engines(group):
            at = chosen(group, engine=engine)
            cells = [
                _time_or_end(at),
                shown(median_of(at, lambda row: row.limit_ms_per_token), "{:.0f}"),
                shown(median_of(at, lambda row: row.yield_), "{:.3f}"),
                shown(median_of(at, lambda row: row.ttft_s), "{:.2f}"),
                shown(median_of(at, lambda row: row.peak_bytes / 1e6), "{:.0f}"),
            ]
            more = (", long prompt" if suite == "first token" else "") + (
                "" if setup.read_bytes_per_s else ", full disk"
            )
            name = engine + _beside_llama_cpp(at[0])
            lines.append([setup.model, _budget(at[0]) + more, name, *cells, parity(group, of_suite, at)])
    return lines


def _beside_llama_cpp(row: Row) -> str:
    found = row.in_turns
    return f": {found.decode.ratio:.3f} x, prompt {found.prefill.ratio:.3f} x {LLAMA_CPP}" if found else ""
