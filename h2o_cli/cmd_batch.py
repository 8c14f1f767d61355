"""`h2o batch`: answer many prompts from a file, several at once, on one stream of weights."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from h2o_cli.batch_work import Work
from h2o_cli.console import CONSOLE
from h2o_cli.interrupts import interrupts
from h2o_cli.output import Progress, note, print_json
from h2o_cli.session.batch_files import Answers, read_requests
from h2o_cli.session.batch_pool import PoolChoice, open_batch
from h2o_cli.session.batch_schedule import CONTINUOUS, MOST_SEQUENCES, ZIGZAG, Schedule, timeline_in
from h2o_cli.session.batch_size import AUTO, parse_batch_size, with_best_size
from h2o_cli.session.defaults import N_PREDICT
from h2o_cli.session.model import OpenModel
from h2o_cli.session.models import DEFAULT_MODEL, resolve_model
from h2o_cli.session.opening import open_session
from h2o_cli.session.options import SessionOptions
from h2o_cli.session.percent import Placement
from h2o_cli.session.smallest import CONVERSATION
from runtime.answer.drafters import can_take_back
from runtime.answer.sampler import Sampling
from runtime.errors import Cancelled, ModelError, UsageError
from runtime.memory import peak_bytes
from runtime.plans.budget import Budget
from runtime.settings import KV_TYPES
from runtime.sizes import MB

if TYPE_CHECKING:
    from runtime.engine.timeline import Timeline

EPILOG = """Examples:

\b
  h2o batch model.gguf -f prompts.jsonl -o answers.jsonl -m 400
  h2o batch model.gguf -f questions.txt -o answers.jsonl -n 64 --temp 0
  h2o batch model.gguf -f prompts.jsonl -o answers.jsonl -m 400 --batch-size auto
  h2o batch model.gguf -f prompts.jsonl -o answers.jsonl -m 400 --percent 0 40 0 100 0 100
  h2o batch model.gguf -f prompts.jsonl -o answers.jsonl -m 400 --cluster auto
  h2o batch model.gguf -f prompts.jsonl -o answers.jsonl --kv-pool 50 --admission reserve:1 --trace trace.jsonl

A line of prompts is an OpenAI batch request, {"prompt": "..."}, {"messages": [...]}, or plain text. Answers are
appended as they are finished. Run the same command again to go on where it stopped.
"""

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help=f"Path of a GGUF file. {DEFAULT_MODEL}")
]
Prompts = Annotated[Path, typer.Option("-f", "--file", metavar="PROMPTS", help="A file with a prompt on each line.")]
Output = Annotated[Path, typer.Option("-o", "--output", metavar="ANSWERS", help="The file answers are appended to.")]
Memory = Annotated[
    str | None,
    typer.Option("-m", "--memory", metavar="SIZE", help="Memory of the whole process: 400 (MB), 1.5GB, 512MiB."),
]
Predict = Annotated[
    int, typer.Option("-n", "--predict", metavar="N", help="Most tokens of an answer whose line does not say.")
]
BatchSize = Annotated[
    str,
    typer.Option(
        "--batch-size",
        metavar="N|auto",
        help=f"Answers at once (zigzag: in a batch), 1 to {MOST_SEQUENCES}. auto: the fastest by the profile.",
    ),
]
How = Annotated[
    str,
    typer.Option(
        "--schedule",
        metavar="HOW",
        help=f"{CONTINUOUS}: a text joins when another ends. {ZIGZAG}: a block of texts ends before the next begins.",
    ),
]
NumBatches = Annotated[
    int | None,
    typer.Option("--num-batches", metavar="N", help="Batches of a block in zigzag. [default: 1]", show_default=False),
]
Overlap = Annotated[
    str, typer.Option("--overlap", metavar="on|off", help="Read weights while others are computed with, or never.")
]
Ctx = Annotated[
    int | None,
    typer.Option("--ctx", metavar="N", help="Positions for all answers at once. [default: 256 for each, or fewer]"),
]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", metavar="N", help="Computing threads. [default: physical cores]")
]
Temp = Annotated[float, typer.Option("--temp", metavar="T", help="0: always the likeliest token.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="S", show_default=False, help="Of each answer.")]
Kv = Annotated[
    str | None,
    typer.Option("--kv-pool", metavar="SIZE", help="Memory of all keys and values, instead of --ctx: 50 (MB), 64MiB."),
]
KvType = Annotated[
    str,
    typer.Option(
        "--kv-type",
        metavar="|".join(kind for kind in KV_TYPES if kind != "f32"),
        help="Precision of keys and values; q8_0: half the memory of f16, q4_0: a quarter.",
    ),
]
Admit = Annotated[
    str,
    typer.Option(
        "--admission",
        metavar="HOW",
        help="simulate: nothing is ever swapped out. none, reserve:O, average:A, watermark:P: see docs/throughput.md.",
    ),
]
Swap = Annotated[
    str | None,
    typer.Option("--swap", metavar="WHERE", help="Where texts wait meanwhile: ram or disk. [default: disk]"),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace", metavar="FILE", show_default=False, help="Write what happens to blocks of keys and values."
    ),
]
When = Annotated[
    Path | None,
    typer.Option(
        "--timeline", metavar="FILE", show_default=False, help="Write when weights were read and layers computed."
    ),
]
Percents = Annotated[
    tuple[int, int, int, int, int, int] | None,
    typer.Option(
        "--percent",
        metavar="W_GPU W_CPU KV_GPU KV_CPU ACT_GPU ACT_CPU",
        show_default=False,
        help="Percent of weights, keys and values, activations on each; disk has the rest. Here: 0 N 0 100 0 100.",
    ),
]
Rule = Annotated[
    str | None,
    typer.Option(
        "--placement",
        metavar="exact|midpoint",
        help="With --percent: by bytes, or whole tensors by FlexGen's rule. [default: exact]",
    ),
]
Nodes = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="auto|ADDRESS",
        show_default=False,
        help="Spread the prompts over the nodes of a Ray cluster; -m and --batch-size are of each.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the totals as one JSON object.")]


def batch(  # noqa: PLR0913, PLR0917 - one parameter per flag
    prompts: Prompts,
    output: Output,
    model: Model = None,
    memory: Memory = None,
    n_predict: Predict = N_PREDICT,
    batch_size: BatchSize = "16",
    schedule: How = CONTINUOUS,
    num_batches: NumBatches = None,
    overlap: Overlap = "on",
    ctx: Ctx = None,
    threads: Threads = None,
    temp: Temp = Sampling.temp,
    seed: Seed = None,
    kv_pool: Kv = None,
    kv_type: KvType = "f16",
    admission: Admit = "simulate",
    swap: Swap = None,
    trace: Trace = None,
    timeline: When = None,
    percent: Percents = None,
    placement: Rule = None,
    cluster: Nodes = None,
    json: Json = False,
) -> None:
    """Answer the prompts of a file, many at once: each pass over the weights computes a token of all of them.

    Greedy answers of quantised models are those that `h2o run` gives to each prompt.
    """
    if n_predict < 1:
        raise UsageError(f"-n {n_predict} is not possible", "give 1 or more")
    if kv_type == "f32":
        raise UsageError("--kv-type f32 gains nothing: llama.cpp rounds it to f16 where it attends", "leave it out")
    choice = PoolChoice.parse(admission, kv_pool, swap, trace, output.absolute().parent)
    n_texts = parse_batch_size(batch_size)
    order = Schedule.parse(schedule, n_texts or MOST_SEQUENCES, num_batches, overlap, swaps=choice.swaps)
    if order.in_blocks and not n_texts:
        raise UsageError(f"--batch-size {AUTO} is not for --schedule {ZIGZAG}", "give the texts of a batch")
    shares = Placement.parse(percent, placement)
    options = SessionOptions(
        model=resolve_model(model),
        sequences=order.sequences,
        overlap=order.overlap,
        kind=CONVERSATION,
        budget=Budget.parse(memory),
        ctx=ctx,
        threads=threads,
        kv_type=kv_type,
        sampling=Sampling(temp=temp, seed=seed),
        speculate="off",
    )
    if cluster is not None:
        _check_cluster(locals())
        raise typer.Exit(_on_cluster(cluster, options, prompts, output, n_predict, json))
    with Answers(output) as answers, timeline_in(timeline) as times:
        how = _How(choice, order, times, n_texts is None, shares)
        code = _batch(options, how, _Files(prompts, answers), n_predict, json)
    raise typer.Exit(code)


def _check_cluster(given: Mapping[str, Any]) -> None:
    """Raise UsageError for flags that an engine on a node does not have."""
    alone = ("kv_pool", "swap", "trace", "timeline", "percent")
    changed = [name for name in alone if given[name] is not None]
    changed += [name for name, usual in (("schedule", CONTINUOUS), ("admission", "simulate")) if given[name] != usual]
    changed += ["batch_size"] if given["n_texts"] is None else []
    if changed:
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise UsageError(f"--cluster does not go with {flags}", "leave out one or the other")


def _on_cluster(address: str, options: SessionOptions, prompts: Path, output: Path, n_predict: int, json: bool) -> int:
    from h2o_cli.batch_cluster import batch_on_cluster
    from h2o_cli.batch_node import Setup

    options = replace(options, model=options.model.resolve())
    n_lines = sum(1 for _ in read_requests(prompts, options.sampling))
    with Answers(output) as answers:
        items = read_requests(prompts, options.sampling)
        setup = Setup(options, n_predict)
        return batch_on_cluster(address, setup, items, answers, n_lines=n_lines, json=json)


class _Files(NamedTuple):
    prompts: Path
    answers: Answers


class _How(NamedTuple):
    pool: PoolChoice
    schedule: Schedule
    timeline: Timeline | None
    finds_size: bool
    placement: Placement | None


def _batch(options: SessionOptions, how: _How, files: _Files, n_predict: int, json: bool) -> int:
    """Answer what is not answered yet; the exit code."""
    n_lines = sum(1 for _ in read_requests(files.prompts, options.sampling))
    model = OpenModel(options, CONSOLE)
    try:
        if not can_take_back(model.hollow):
            raise ModelError(
                f"{options.model.name} keeps a state without positions, which answers cannot share",
                "answer the prompts one by one with `h2o run`",
            )
        if how.finds_size:
            options = with_best_size(model, options, how.pool)
        options = how.pool.options_for(model.file, options)
        if how.placement:
            options = replace(options, resident=how.placement.pieces(model.file))
        session = open_session(model, options, options.ctx or 0, options.ctx or 0)
        try:
            if how.placement:
                how.placement.check(session)
                note(how.placement.told(session))
            with open_batch(session, how.pool, options, how.schedule, how.timeline) as batch:
                run = _Run(Work(session, batch, files.answers, n_predict), files, options.sampling)
                signal_number = run.run(n_lines)
                run.tell(how, json)
            return 128 + signal_number if signal_number else 0
        finally:
            session.close()
    finally:
        model.close()


class _Run:
    """A run of the command: what it is told while it goes on, and what it says at its end."""

    def __init__(self, work: Work, files: _Files, sampling: Sampling) -> None:
        self._work, self._files, self._sampling = work, files, sampling
        self._seconds = 0.0

    def run(self, n_lines: int) -> int:
        """Answer all that is not answered yet; the signal that ended it, or 0."""
        start = time.perf_counter()
        engine, totals = self._work.session.engine, self._work.totals
        try:
            with (
                interrupts.ending(engine.cancel),
                Progress(f"answering {n_lines} prompts", lambda: totals.n_done / max(1, n_lines)),
            ):
                self._work.answer(read_requests(self._files.prompts, self._sampling))
        except Cancelled:
            engine.forget_cancel()
        finally:
            self._seconds = time.perf_counter() - start
        return interrupts.take()

    def tell(self, how: _How, json: bool) -> None:
        """The totals, for programs or for people."""
        found = self.figures(how)
        if json:
            print_json(found)
            return
        speed = f"{found['generated_tokens']} tokens, {found['tokens_per_s']:.1f} tokens/s"
        skipped = f", {found['skipped']} were there already" if found["skipped"] else ""
        swaps = f", {found['swaps_out']} times swapped out" if found["swaps_out"] else ""
        memory = f"peak {found['peak_memory_bytes'] / MB:.0f} of {found['budget_bytes'] / MB:.0f} MB"
        note(f"{found['answers']} answers, {found['errors']} with an error{skipped}; {speed}{swaps}, {memory}")

    def figures(self, how: _How) -> dict[str, Any]:
        """The figures of --json."""
        batch, session, totals = self._work.batch, self._work.session, self._work.totals
        counts, times, counters = batch.counts, batch.swap_times, session.engine.counters
        return {
            "answers": totals.answers,
            "errors": totals.errors,
            "skipped": totals.skipped,
            "generated_tokens": batch.n_tokens,
            "prompt_tokens": batch.n_prompt_tokens,
            "shared_prompt_tokens": batch.n_shared_tokens,
            "seconds": self._seconds,
            "tokens_per_s": batch.n_tokens / self._seconds if self._seconds else 0.0,
            "passes": counters.passes,
            "bytes_read": counters.bytes_read,
            "peak_memory_bytes": peak_bytes(),
            "budget_bytes": session.budget_bytes,
            "largest_batch": batch.largest,
            "preemptions": counts.swaps_out,
            "swaps_in": counts.swaps_in,
            "swaps_out": counts.swaps_out,
            "blocks_in": counts.blocks_in,
            "blocks_out": counts.blocks_out,
            "swap_in_s": times.in_s,
            "swap_in_read_s": times.read_s,
            "swap_out_s": times.out_s,
            "admission": str(how.pool.admission),
            "schedule": how.schedule.name,
            "num_batches": how.schedule.num_batches,
            "overlap": how.schedule.overlap,
            "ledger": session.engine.ledger.as_dict(),
            **({"placement": how.placement.figures(session)} if how.placement else {}),
        }
