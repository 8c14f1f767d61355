"""Speculation on the bundled model, streamed from a slow disk: tokens per pass, speed, whether the tokens are equal.

Every prompt is answered greedily with one token per pass and with each drafter in turn, each run a process of its own
in the emulated device, in the smallest budget that works for it.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from h2o_cli.bench.box import Device
from h2o_cli.bench.commands import shown_command
from h2o_cli.bench.report import commands, document, machines, started_by
from h2o_cli.bench.results import Kind
from h2o_cli.bench.rows import Row, circumstances, distinct
from h2o_cli.bench.speed.children import Children
from h2o_cli.bench.speed.engines import H2O, Job, tokens_hash
from h2o_cli.bench.tables import NONE, markdown_table, number
from h2o_cli.output import table

OFF, LOOKUP, DRAFT = "off", "look-up", "draft auto"
MODES: dict[str, tuple[str, ...]] = {OFF: ("--speculate", "off"), LOOKUP: (), DRAFT: ("--draft", "auto")}
RECALL, QUOTES, PLAIN = "recall", "quotes", "plain text"


@dataclass(frozen=True)
class Text:
    """A prompt, how many tokens to generate, and what kind of text it is."""

    kind: str
    prompt: str
    n_predict: int


# Made by the generators of model_configs/bundled/corpus.py with a seed that the training did not use.
TEXTS = (
    Text(
        RECALL,
        "Paul's hedgehog is in the purple bag. Sam's coin is in the green box. Once upon a time there was a girl "
        "named Eva. The gardener gave Eva an old map. It was very quiet near the hill. The map showed a way to the "
        "hill. Ivy's mirror is in the big hut. Martin's spoon is in the small pot. Lily took a lamp and a long rope. "
        "They climbed over the hill and through the forest. Adam's lamp is in the grey box. Where is Martin's spoon?",
        8,
    ),
    Text(
        RECALL,
        "Long ago, a girl called Alice lived with a gardener near the lake. Molly's hat is in the silver jar. Alice "
        "and Tina made soup in the kitchen. First she took eggs, milk and honey. Robert's brush is in the small barn. "
        "Then the pot fell on the floor. Maya's button is in the red tower. Tom's lamb is in the pink jar. They "
        "laughed and tried once more. At last it tasted very good. Where is Robert's brush?",
        8,
    ),
    Text(
        RECALL,
        "It was a rainy day and Henry felt tired. Emma's scarf is in the green pot. Henry found an old map in a tin. "
        "George's book is in the yellow bucket. The map showed a way to the museum. Zoe's frog is in the red drawer. "
        "Henry and Molly packed tea and a drum. Bill's shell is in the small tent. They walked for hours. Where is "
        "Zoe's frog?",
        8,
    ),
    Text(
        QUOTES,
        "grey milk lonely proud teacher tin harbour goat farmer frog red blue mill brave drum silver spoon afraid. "
        "Again: grey",
        18,
    ),
    Text(QUOTES, "doll proud shepherd drum fox hill spoon soup wooden pony worried orange. Again: doll", 12),
    Text(QUOTES, "locker blue museum green bird market sad turtle hedgehog red. Again: locker", 10),
    Text(PLAIN, "In a village by the island lived a girl called Clara. Clara wanted to learn to swim.", 32),
    Text(PLAIN, "Tom lived in a green house near the park. Tom and Ivy made cookies in the kitchen.", 32),
    Text(PLAIN, "One foggy summer Simon went to the castle.", 32),
)


class SpeculationRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """One answer. Times in ms per token; limit_ms_per_token is that of one token per pass."""

    suite: Literal["speculation"]
    kind: str
    prompt: int
    mode: str
    status: str
    repeat: int = 0
    note: str = ""
    budget_bytes: int = 0
    read_bytes_per_s: int = 0
    n_tokens: int = 0
    tokens_per_pass: float | None = None
    drafted: int = 0
    accepted: int = 0
    ms_per_token: float | None = None
    limit_ms_per_token: float | None = None
    peak_bytes: int = 0
    tokens_hash: str = ""


def measure(
    children: Children, model: Path, device: Device, threads: int, repeats: int = 1, texts: Sequence[Text] = TEXTS
) -> Iterator[SpeculationRow]:
    """A row per text and mode, every mode in turn; plain text without drafts and with look-up `repeats` times.

    Raises H2OError where there is no device or no smallest budget.
    """
    longest = max(texts, key=lambda text: len(text.prompt))
    budgets = {
        mode: children.floor_bytes(
            Job(model, 1, longest.prompt, longest.n_predict, threads=threads, flags=flags), device
        )
        for mode, flags in MODES.items()
    }
    budgets[OFF] = budgets[LOOKUP] = max(budgets[OFF], budgets[LOOKUP])  # compared in pairs: as much memory for both
    for i, text in enumerate(texts):
        for repeat in range(repeats if text.kind == PLAIN else 1):
            modes = list(MODES) if repeat == 0 else [OFF, LOOKUP]
            for mode in modes if (i + repeat) % 2 == 0 else reversed(modes):
                job = Job(model, budgets[mode], text.prompt, text.n_predict, threads=threads, flags=MODES[mode])
                row = SpeculationRow(
                    suite="speculation", model=model.name, kind=text.kind, prompt=i, mode=mode, status="", repeat=repeat
                )
                yield _measured(children, job, device, row)


def _measured(children: Children, job: Job, device: Device, row: SpeculationRow) -> SpeculationRow:
    started, outcome, found = children.answer(H2O, job, device)
    row = msgspec.structs.replace(
        row,
        commands=(shown_command(started),),
        status=found.status,
        note=found.note,
        budget_bytes=job.budget_bytes,
        read_bytes_per_s=device.read_bytes_per_s,
        peak_bytes=outcome.peak_bytes,
        **circumstances(job.model),
    )
    if found.status != "ok":
        return row
    figures = msgspec.json.decode(outcome.stdout)
    return msgspec.structs.replace(
        row,
        n_tokens=len(found.tokens),
        tokens_per_pass=figures["tokens_per_pass"],
        drafted=figures["drafted"],
        accepted=figures["accepted"],
        ms_per_token=figures["decode_ms_per_token"],
        limit_ms_per_token=figures["limit_ms_per_token"],
        tokens_hash=tokens_hash(found.tokens),
    )


_Run = tuple[int, int]  # prompt and repeat


@dataclass(frozen=True)
class Summary:
    """All answers of one kind of text in one mode; means are over tokens.

    ratio: speed against one token per pass; pair_ratio: the median of that over the pairs of runs made in turn.
    """

    kind: str
    mode: str
    tokens_per_pass: float
    drafted: int
    accepted: int
    ms_per_token: float
    limit_ms_per_token: float
    ratio: float
    pair_ratio: float
    n_pairs: int
    equal: bool


def summaries(rows: Sequence[SpeculationRow]) -> list[Summary]:
    """A line per kind of text and mode, over the runs that there are without drafts too. The limit is of those."""
    found = []
    for kind in distinct(row.kind for row in rows):
        by_mode = {mode: _answered(rows, kind, mode) for mode in MODES}
        prompts = set.intersection(*({prompt for prompt, _ in answers} for answers in by_mode.values()))
        for mode, answers in by_mode.items():
            seen = {run: row for run, row in answers.items() if run in by_mode[OFF] and run[0] in prompts}
            if seen:
                found.append(_summary(kind, mode, seen, {run: by_mode[OFF][run] for run in seen}))
    return found


def _summary(kind: str, mode: str, seen: dict[_Run, SpeculationRow], plain: dict[_Run, SpeculationRow]) -> Summary:
    ms, plain_ms = (_mean(runs, lambda row: row.ms_per_token) for runs in (seen, plain))
    ratios = [(plain[run].ms_per_token or 0.0) / (row.ms_per_token or 1.0) for run, row in seen.items()]
    return Summary(
        kind=kind,
        mode=mode,
        tokens_per_pass=1 / _mean(seen, lambda row: 1 / row.tokens_per_pass if row.tokens_per_pass else None),
        drafted=sum(row.drafted for row in seen.values()),
        accepted=sum(row.accepted for row in seen.values()),
        ms_per_token=ms,
        limit_ms_per_token=_mean(plain, lambda row: row.limit_ms_per_token),
        ratio=plain_ms / ms,
        pair_ratio=statistics.median(ratios),
        n_pairs=len(ratios),
        equal=all(row.tokens_hash == plain[run].tokens_hash for run, row in seen.items()),
    )


def _answered(rows: Sequence[SpeculationRow], kind: str, mode: str) -> dict[_Run, SpeculationRow]:
    return {(row.prompt, row.repeat): row for row in rows if (row.kind, row.mode) == (kind, mode) and row.ms_per_token}


def _mean(rows: dict[_Run, SpeculationRow], quantity: Callable[[SpeculationRow], float | None]) -> float:
    """The mean over tokens; the first token of an answer comes with its prompt and is not counted."""
    weights = {run: row.n_tokens - 1 for run, row in rows.items()}
    return sum(weights[run] * (quantity(row) or 0.0) for run, row in rows.items()) / sum(weights.values())


# --- report ----------------------------------------------------------------------------------------------------------

HEADER = ("text", "drafts", "tokens/pass", "accepted", "ms/token", "limit", "speed", "pairs", "tokens")
_LEFT = (0, 1, 8)  # columns of words
_COLUMNS = (
    "Greedy answers. **limit**: ms per token that no schedule beats with one token per pass (of runs without drafts). "
    "**speed**: against the runs without drafts, by their means. **pairs**: the median over pairs of runs made in "
    "turn, and how many there were. **tokens**: `=`, the same as without drafts."
)


def table_rows(rows: Sequence[SpeculationRow]) -> list[tuple[str, ...]]:
    """The summaries as text, the header first."""
    lines: list[tuple[str, ...]] = [HEADER]
    for line in summaries(rows):
        accepted = f"{line.accepted} of {line.drafted}" if line.drafted else NONE
        times = (number(line.ms_per_token), number(line.limit_ms_per_token), f"{line.ratio:.2f}x")
        pairs = NONE if line.mode == OFF else f"{line.pair_ratio:.3f}x of {line.n_pairs}"
        equal = "=" if line.equal else "differ"
        lines.append((line.kind, line.mode, number(line.tokens_per_pass, 2), accepted, *times, pairs, equal))
    return lines


def report(rows: Sequence[SpeculationRow], _pictures: Sequence[str] = ()) -> str:
    """The summaries as Markdown."""
    rate = max((row.read_bytes_per_s for row in rows), default=0)
    models = ", ".join(distinct(row.model for row in rows))
    parts = [machines(rows), _COLUMNS, started_by(rows), markdown_table(table_rows(rows), _LEFT)]
    title = f"Speculation: {models}, disk at {rate / 1e6:.0f} MB/s, smallest budgets"
    return document(title, [*parts, commands(rows, _name)])


def told(row: SpeculationRow) -> str:
    """A finished run in one line."""
    if row.status != "ok":
        return f"{_name(row)}: {row.status} ({row.note})"
    tokens, ms = number(row.tokens_per_pass or 1, 2), number(row.ms_per_token or 0)
    return f"{_name(row)}: {tokens} tokens per pass, {ms} ms per token"


def _name(row: SpeculationRow) -> str:
    return f"{row.kind} {row.prompt + 1}, {row.mode}"


def _shown(rows: Sequence[SpeculationRow]) -> str:
    return table(table_rows(rows), right=[i for i in range(len(HEADER)) if i not in _LEFT])


SPECULATION = Kind(SpeculationRow, report, _shown, told, rows="speculation.jsonl", report="speculation.md")
