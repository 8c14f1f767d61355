"""`h2o run`: answer one prompt, or hold a conversation."""

from __future__ import annotations

import os
import sys
import time
from array import array
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from h2o_cli import device_flags as devices
from h2o_cli import kv_flags as kv
from h2o_cli.closing import closing_line, figures
from h2o_cli.console import CONSOLE, first_with_progress
from h2o_cli.interrupts import interrupts
from h2o_cli.output import emit, note, print_json, styled, tell
from h2o_cli.run_options import RunOptions
from h2o_cli.session.defaults import N_PREDICT
from h2o_cli.session.kv_filter import KvFlags, choose_filter, cut_middle, read_kv_config
from h2o_cli.session.model import OpenModel, context_for
from h2o_cli.session.models import DEFAULT_MODEL, read_text, resolve_model
from h2o_cli.session.opening import Session, open_session
from h2o_cli.session.options import SessionOptions
from h2o_cli.session.smallest import CHAT, CONVERSATION, PROMPT
from h2o_cli.session.team import Flags
from runtime.answer.generate import LENGTH, Request, check_prompt
from runtime.answer.meter import Meter
from runtime.answer.sampler import Sampling
from runtime.errors import DiskError, EngineError, PromptError, UsageError, WorkerError
from runtime.plans.budget import Budget
from runtime.settings import KV_TYPES

PROMPT_LEAST_BYTES, PROMPT_MOST_BYTES = 2**18, 2**24
PROMPT_SHARE = 32  # of the budget, at most: a token has about 4 bytes of text, and a thousand of keys and values

EPILOG = """Examples:

\b
  h2o run model.gguf -p "Once upon a time" -n 100
  h2o run model.gguf -m 400 -p "Hello"          at most 400 MB of memory
  h2o run model.gguf -f letter.txt --temp 0     prompt from a file, always the likeliest token
  echo "2 + 2 =" | h2o run model.gguf -n 8      prompt from standard input
  h2o run model.gguf                            a conversation; /help lists its commands
  h2o run model.gguf -p "Hi" --json | jq .text
"""

Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help=f"Path of a GGUF file. {DEFAULT_MODEL}")
]
Dash = Annotated[str | None, typer.Argument(metavar="-", show_default=False, help="Read the prompt from stdin.")]
Prompt = Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="The prompt.")]
PromptFile = Annotated[str | None, typer.Option("-f", "--file", metavar="FILE", help="Read the prompt from a file.")]
Predict = Annotated[
    int | None,
    typer.Option(
        "-n",
        "--predict",
        metavar="N",
        help=f"Most tokens to generate; -1: until the model ends or the context is full. [default: {N_PREDICT}]",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option("-m", "--memory", metavar="SIZE", help="Memory of the whole process: 400 (MB), 1.5GB, 512MiB."),
]
PlanFile = Annotated[
    Path | None, typer.Option("-s", "--plan-file", metavar="PLANFILE", help="Follow the plans in this file.")
]
Ctx = Annotated[int | None, typer.Option("--ctx", metavar="N", help="Context in tokens. [default: what is needed]")]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", metavar="N", help="Computing threads. [default: physical cores]")
]
Ubatch = Annotated[
    int | None,
    typer.Option("--ubatch", metavar="N", help="Prompt tokens per pass. [default: 512, or what the budget allows]"),
]
Temp = Annotated[float, typer.Option("--temp", help="Temperature; 0: always the likeliest token.")]
TopK = Annotated[int, typer.Option("--top-k", help="Choose among the K likeliest tokens; 0: off.")]
TopP = Annotated[float, typer.Option("--top-p", help="Choose among tokens that make up this probability; 1: off.")]
MinP = Annotated[float, typer.Option("--min-p", help="Drop tokens below this share of the likeliest one; 0: off.")]
Repeat = Annotated[float, typer.Option("--repeat-penalty", help="Make the last 64 tokens less likely; 1: off.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="S", help="Same seed, same answer. [default: random]")]
Stop = Annotated[list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; repeatable.")]
ChatFlag = Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]
LayoutName = Annotated[
    str,
    typer.Option("--layout", metavar="auto|prefix|even|balanced", help="What stays in memory (even: whole layers)."),
]
PrefetchInput = Annotated[
    bool, typer.Option("--prefetch-input", help="Keep the input embedding in memory instead of reading rows of it.")
]
Repack = Annotated[
    str,
    typer.Option(
        "--repack",
        metavar="auto|off",
        help="auto: a model that fits computes with llama.cpp's rearranged weights; off: with plain ones.",
    ),
]
KvType = Annotated[
    str,
    typer.Option(
        "--kv-type",
        metavar="|".join(KV_TYPES),
        help="Precision of keys and values; f32: twice the memory of f16, q8_0: half of it, q4_0: a quarter.",
    ),
]

Speculate = Annotated[
    str, typer.Option("--speculate", metavar="auto|off", help="Guess tokens ahead from the text so far where it pays.")
]

Draft = Annotated[
    str | None,
    typer.Option(
        "--draft",
        metavar="MODEL|auto",
        show_default=False,
        help="A small model that guesses tokens ahead; auto: a copy of it with fewer bits per weight, made once.",
    ),
]


def run(  # noqa: PLR0913, PLR0917 - one parameter per flag
    model: Model = None,
    dash: Dash = None,
    prompt: Prompt = None,
    file: PromptFile = None,
    n_predict: Predict = None,
    memory: Memory = None,
    plan_file: PlanFile = None,
    ctx: Ctx = None,
    threads: Threads = None,
    ubatch: Ubatch = None,
    temp: Temp = Sampling.temp,
    top_k: TopK = Sampling.top_k,
    top_p: TopP = Sampling.top_p,
    min_p: MinP = Sampling.min_p,
    repeat_penalty: Repeat = Sampling.repeat_penalty,
    seed: Seed = None,
    stop: Stop = None,
    chat: ChatFlag = False,
    json: Json = False,
    layout: LayoutName = "auto",
    kv_type: KvType = "f16",
    speculate: Speculate = "auto",
    draft: Draft = None,
    prefetch_input: PrefetchInput = False,
    repack: Repack = "auto",
    workers: devices.Workers = None,
    device_file: devices.File = None,
    cluster: devices.Cluster = None,
    priority: devices.Priority = None,
    prioritize_by_memory: devices.ByMemory = False,
    spare: devices.Spare = None,
    split: devices.Split = None,
    tls: devices.Tls = None,
    refresh: devices.Refresh = False,
    hidden: devices.Hidden = "f32",
    kv_filter: kv.Switch = False,
    kv_layers: kv.Layers = None,
    kv_wait: kv.Wait = None,
    kv_keep: kv.Keep = None,
    kv_select: kv.Select = None,
    kv_store: kv.Store = None,
    kv_sinks: kv.Sinks = None,
    kv_recent: kv.Recent = None,
    kv_block: kv.Block = None,
    kv_strategy: kv.Strategy = None,
    kv_method: kv.Method = None,
    kv_config: kv.Config = None,
) -> None:
    """Run a model inside a memory budget: one prompt, or a conversation when no prompt is given.

    The text goes to standard output as it comes, everything else to standard error.
    """
    raise typer.Exit(_run(locals()))


def _run(given: dict[str, Any]) -> int:
    """Run with the flags as given; the exit code."""
    model, dash = given["model"], given["dash"]
    model, dash = (None, "-") if model == "-" and dash is None else (model, dash)
    budget = Budget.parse(given["memory"])
    text = _prompt_text(given["prompt"], given["file"], dash, _most_prompt_bytes(budget))
    config = read_kv_config(given["kv_config"])
    named, chat = model or (config.model if config else None), given["chat"] or bool(config and config.chat)
    session = SessionOptions.of(
        given,
        sequences=1,
        swap_bytes=0,
        overlap=True,
        resident=None,
        model=resolve_model(named),
        is_named=named is not None,
        budget=budget,
        kind=CONVERSATION if text is None else CHAT if chat else PROMPT,
        sampling=Sampling(**{field.name: given[field.name] for field in fields(Sampling)}),
        kv=choose_filter(KvFlags.of(given), config),
        devices=Flags.of(given),
    )
    stop, max_context = tuple(given["stop"] or ()), config.max_context if config else 0
    options = RunOptions(session, given["n_predict"], stop, chat, given["json"], max_context)
    _check(options)
    return _reply(options, text)


def _reply(options: RunOptions, text: str | None) -> int:
    """Answer a prompt, or hold a conversation without one; the exit code."""
    if text is None:
        from h2o_cli.conversation import converse

        return converse(options)
    return answer(options, text)


def _check(options: RunOptions) -> None:
    """Raise UsageError for values that can be judged without the model."""
    _ = options.session.fixed_layout


def _most_prompt_bytes(budget: Budget) -> int:
    """The longest prompt that is read at all."""
    return min(max(PROMPT_LEAST_BYTES, budget.n_bytes // PROMPT_SHARE), PROMPT_MOST_BYTES)


def _prompt_text(prompt: str | None, file: str | None, dash: str | None, most_bytes: int) -> str | None:
    """The prompt, from wherever it comes; None for a conversation. Raises UsageError and PromptError."""
    if dash not in (None, "-"):
        raise UsageError(f"unexpected argument {dash!r}", "give the prompt with -p")
    if sum(source is not None for source in (prompt, file, dash)) > 1:
        raise UsageError("the prompt was given twice", "give one of -p, -f and -")
    if prompt is not None:
        return _utf8(prompt.encode(errors="surrogateescape"))
    if file is None and dash is None and sys.stdin is not None and sys.stdin.isatty():
        return None
    source = file or "-"
    text = _utf8(read_text(source, "the prompt", most_bytes, "shorten it, or raise -m")).removesuffix("\n")
    if not text and file is None:
        raise PromptError("there is no prompt: standard input is empty", "give one with -p")
    return text


def _utf8(data: bytes) -> str:
    """Text of bytes; what is not UTF-8 is replaced, and said."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        note(f"the prompt is not UTF-8 (byte {error.start}): what cannot be read was replaced")
        return data.decode(errors="replace")


def answer(options: RunOptions, text: str) -> int:
    """Answer one prompt; returns the exit code."""
    wanted = options.session
    model = OpenModel(wanted, CONSOLE)
    try:
        prompt, stop = _encode(model, options, text)
        n_predict = N_PREDICT if options.n_predict is None else options.n_predict
        n_tokens = len(prompt) + n_predict if n_predict >= 0 else model.context_length
        n_ctx = context_for(model, wanted.ctx, n_tokens)
        check_prompt(len(prompt), n_ctx)
        session = open_session(model, wanted.for_answers_of(n_predict), n_ctx, len(prompt))
        try:
            request = Request(tuple(prompt), n_predict, stop)
            return _answer(session, options, request)
        finally:
            session.close()
    finally:
        model.close()


def _encode(model: OpenModel, options: RunOptions, text: str) -> tuple[Sequence[int], tuple[str, ...]]:
    """Tokens of the prompt, no more of them than are needed to see that they are too many; texts that end the answer.

    Where a configuration file allows fewer tokens, the middle is left out.
    """
    most, stop = options.session.ctx or min(model.context_length, model.n_positions), options.stop
    if options.chat:
        from runtime.llama.chat import Chat, Message

        chat = Chat(model.tokenizer, note)
        text, stop = chat.text([Message("user", text)], most), stop + chat.stop
    if not options.max_context:
        return model.tokenizer.encode(text, parse_special=options.chat, most=most), stop
    tokens = array("i")
    for part in model.tokenizer.encode_parts(text, parse_special=options.chat):
        tokens.extend(part)
    if len(tokens) > options.max_context:
        note(
            f"the middle of the prompt was left out: {len(tokens)} tokens, max_context_len allows {options.max_context}"
        )
    return cut_middle(tokens, options.max_context), stop


def _answer(session: Session, options: RunOptions, request: Request) -> int:
    meter, meter_start_s = Meter(session.engine, session.machine), process_age_s()
    parts, tokens, finish = [], [], ""
    with interrupts.ending(session.engine.cancel):
        steps = session.answer(request)
        try:
            for step in first_with_progress(session, steps, request.prompt):
                meter.see(step)
                parts.append(step.text)
                tokens += [step.token] if step.token is not None else []
                finish = step.finish
                if not options.json:
                    emit(step.text)
        except (DiskError, EngineError, WorkerError):
            if parts and not options.json:
                emit("\n")  # the error gets a line of its own
            raise
    statistics = meter.statistics()
    if options.json:
        facts = {"text": "".join(parts), "tokens": tokens, "prompt_tokens": list(request.prompt), "finish": finish}
        print_json(facts | figures(session, statistics, meter_start_s))
    else:
        emit("\n")
        cut = finish == LENGTH and 0 < request.n_predict <= len(tokens)
        tell(styled(closing_line(session, statistics, cut=cut, last=True), "dim"))
    signal_number = interrupts.take()
    return 128 + signal_number if signal_number else 0


def process_age_s() -> float:
    """Seconds since the kernel started this process, in steps of a clock tick (0.01 s); see proc(5), starttime."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
