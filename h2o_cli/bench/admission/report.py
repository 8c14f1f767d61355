"""The report of the benchmark of admission: the simulator beside the engine, the optima, the sweeps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from h2o_cli.bench.admission.plots import FACTORS, draw
from h2o_cli.bench.admission.rows import (
    BANDIT,
    CHECK,
    ENGINE,
    FRESH,
    KNOWN,
    SWEEP,
    TWICE,
    AdmissionRow,
    Mean,
    Run,
    gain,
    mean,
    mean_of,
    off_by,
    write_csv,
)
from h2o_cli.bench.admission.runs import optimum
from h2o_cli.bench.report import document, images, machines, started_by
from h2o_cli.bench.results import Kind
from h2o_cli.bench.rows import chosen, distinct
from h2o_cli.bench.tables import markdown_table
from h2o_cli.output import table
from runtime.answer.admission import NONE

CSV = "admission.csv"
NEAR_PERCENT = 10
_METHOD = (
    "Sweeps are simulated: pool, admission and passes are those of `h2o batch`, and seconds of passes and swaps are "
    "fitted to the engine's, in CPU seconds of one thread (medians over rounds). Figures are means over the seeds, or "
    "the engine's rounds, with 95 % intervals (Student's t); gains compare seed by seed. **Fresh**: with seeds that "
    "the optimum was not chosen with. Texts arrive in bursts; their time is counted in passes."
)


def report(rows: Sequence[AdmissionRow], pictures: Sequence[str] = ()) -> str:
    """All of the report; names of pictures beside it."""
    parts = [machines(rows), _METHOD, started_by(rows)] if rows else ["No runs."]
    for model in distinct(row.model for row in rows):
        at = chosen(rows, model=model)
        row = (chosen(at, suite=SWEEP) or at)[0]
        parts += [f"## {model}, {row.fast} blocks, {row.batch_size} texts at most, {row.n_texts} in all", _costs(row)]
        parts += [markdown_table(check_rows(at)), within(at)] if chosen(at, suite=CHECK) else []
        parts += conclusions(at)
        parts += [markdown_table(engine_rows(at)), on_the_engine(at)] if chosen(at, suite=TWICE) else []
        parts += images(name for name in pictures if name.endswith(f"-{model.replace('/', '-')}.png"))
        parts += ["### Sweeps", markdown_table(_sweep_rows(at))]
    parts += images(name for name in pictures if name.endswith("-models.png"))
    return document("Admission", parts)


def check_rows(rows: Sequence[AdmissionRow]) -> list[list[str]]:
    """The simulator beside the engine, with the same texts; the head first."""
    lines = [
        ["engine and simulator", "tokens/s", "simulated", "off by, %", "swaps in", "simulated", "passes", "simulated"]
    ]
    for row in chosen(rows, suite=CHECK):
        run, beside = row.runs[0], row.simulated[0]
        simulated = mean([found.out_per_s for found in row.simulated])
        speeds = mean_of(row, lambda run: run.out_per_s).text(), simulated.text(), off_by(row).text()
        swaps, passes = (str(run.swaps_in), str(beside.swaps_in)), (str(run.n_passes), str(beside.n_passes))
        lines.append([row.admission, *speeds, *swaps, *passes])
    return lines


def within(rows: Sequence[AdmissionRow]) -> str:
    """Whether the simulator is as near to the engine as it has to be, at every point with all of its interval."""
    checks = chosen(rows, suite=CHECK)
    off = {row.admission: off_by(row) for row in checks}
    how = f"({len(checks[0].runs)} rounds, {checks[0].n_texts} texts)"
    beyond = [name for name, found in off.items() if abs(found.value) + found.half > NEAR_PERCENT]
    if not beyond:
        text = f"The simulator is within {NEAR_PERCENT} % of the engine at all {len(off)} points"
        return f"{text} {how}, intervals included."
    far = [name for name, found in off.items() if abs(found.value) > NEAR_PERCENT]
    said = (
        f"Means are beyond {NEAR_PERCENT} % at {', '.join(far)}." if far else f"All means are within {NEAR_PERCENT} %."
    )
    return f"Intervals reach beyond {NEAR_PERCENT} % at {', '.join(beyond)} {how}. {said}"


def engine_rows(rows: Sequence[AdmissionRow]) -> list[list[str]]:
    """The engine's runs with the best admission, without, and with twice the pool; the head first."""
    lines = [["engine", "blocks", "tokens/s", "beside none, %", "swaps in", "passes", "seconds of swaps, %"]]
    at = [*chosen(rows, suite=ENGINE), *chosen(rows, suite=TWICE)]
    for row in at:
        beside = gain(row, at[0]).text() if row is not at[0] else "-"
        figures = [mean_of(row, lambda run: run.swaps_in), mean_of(row, lambda run: run.n_passes), mean_of(row, _swap)]
        speed = mean_of(row, lambda run: run.out_per_s).text()
        lines.append([row.admission, str(row.fast), speed, beside, *(figure.text() for figure in figures)])
    return lines


def on_the_engine(rows: Sequence[AdmissionRow]) -> str:
    """Whether the best admission is better than none where it is not simulated, and what twice the pool would give."""
    none, best = chosen(rows, suite=ENGINE)
    beside, twice = gain(best, none), gain(best, chosen(rows, suite=TWICE)[0])
    text = f"On the engine ({len(best.runs)} rounds of {best.n_texts} texts) "
    text += f"{best.admission} is {_verdict(beside)} ({beside.text()} %)"
    text += f", and has {1 + twice.value / 100:.2f} ± {twice.half / 100:.2f} of the speed of twice the pool."
    return f"{text} Swaps take {mean_of(none, _swap).text(2)} % of the seconds of none: who avoids them gains no more."


def _swap(run: Run) -> float:
    return 100 * run.swap_s / run.seconds


def _verdict(beside: Mean) -> str:
    if not beside.is_apart:
        return "no different from none"
    return f"{'better' if beside.value > 0 else 'worse'} than none"


def conclusions(rows: Sequence[AdmissionRow]) -> list[str]:
    """A line for each sweep of a model: its optimum, whether that is better than none, and what the bandit found."""
    found, sweeps = [], chosen(rows, suite=SWEEP)
    for policy in FACTORS:
        at = chosen(sweeps, policy=policy)
        none = chosen(sweeps, policy=NONE)
        fresh, base = chosen(rows, suite=FRESH, policy=policy), chosen(rows, suite=FRESH, policy=NONE)
        if not (at and none and fresh and base):
            continue
        best = optimum(at, none[0])
        speed = mean_of(best, lambda run: run.out_per_s).text()
        beside = gain(fresh[-1], base[-1])
        text = f"{policy}: best is {best.admission} with {speed} tokens/s, {gain(best, none[0]).text()} % beside none; "
        text += f"with fresh seeds {beside.text()} %: {_verdict(beside)}."
        for row in chosen(rows, suite=BANDIT, policy=policy):
            there = chosen(at, value=row.value)[0]
            behind = mean_of(there, lambda run: run.out_per_s).value / mean_of(best, lambda run: run.out_per_s).value
            n_runs = sum(len(other.runs) for other in at)
            text += f" The bandit takes {row.admission} after {row.n_plays} of {n_runs} runs, "
            text += f"{100 * (behind - 1):+.1f} % beside the best."
        found.append(text)
    for row in chosen(rows, suite=KNOWN):
        beside = gain(row, chosen(sweeps, policy=NONE)[0])
        found.append(f"Were lengths known, simulate would be {beside.text()} % beside none: {_verdict(beside)}.")
    return found


def _sweep_rows(rows: Sequence[AdmissionRow]) -> list[list[str]]:
    lines = [
        ["admission", "tokens/s out", "tokens/s in", "beside none, %", "swaps in", "swaps out", "blocks in", "out"]
    ]
    sweeps = chosen(rows, suite=SWEEP)
    none = chosen(sweeps, policy=NONE)[:1]
    for row in sweeps:
        speeds = [mean_of(row, lambda run: run.out_per_s).text(), mean_of(row, lambda run: run.in_per_s).text()]
        swaps = [mean_of(row, lambda run: run.swaps_in).text(), mean_of(row, lambda run: run.swaps_out).text()]
        blocks = [mean_of(row, lambda run: run.blocks_in).text(), mean_of(row, lambda run: run.blocks_out).text()]
        lines.append([row.admission, *speeds, gain(row, none[0]).text() if none else "-", *swaps, *blocks])
    return lines


def _costs(row: AdmissionRow) -> str:
    names = ("pass_s", "prompt_token_s", "text_s", "position_s", "block_out_s", "block_in_s")
    costs = row.costs or {}
    shown = ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {1e3 * costs.get(name, 0):.4f}" for name in names)
    return f"ms: {shown}."


def _told(row: AdmissionRow) -> str:
    if row.suite == BANDIT:
        return f"{row.model}: the bandit takes {row.admission} after {row.n_plays} runs"
    kind = row.suite.removeprefix("admission ")
    return f"{row.model}, {kind}, {row.admission}: {mean_of(row, lambda run: run.out_per_s).value:.1f} tokens/s"


def _summary(rows: Sequence[AdmissionRow]) -> str:
    parts = []
    for model in distinct(row.model for row in rows):
        at = chosen(rows, model=model)
        parts += [model, table(check_rows(at), right=range(1, 8)), within(at), *conclusions(at)]
        parts += [on_the_engine(at)] if chosen(at, suite=TWICE) else []
    return "\n".join(parts)


def _draw(rows: Sequence[AdmissionRow], folder: Path) -> list[Path]:
    """The pictures, and the CSV beside them."""
    write_csv(rows, folder / CSV)
    return draw(rows, folder)


ADMISSION = Kind(
    AdmissionRow, report, _summary, _told, _draw, rows="admission.jsonl", report="admission.md", beside=(CSV,)
)
