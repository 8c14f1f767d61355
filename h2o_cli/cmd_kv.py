"""`h2o kv`: find the filter layers of a model for `h2o run --kv-filter`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from h2o_cli.cmd_profile import check_writable
from h2o_cli.interrupts import interrupts
from h2o_cli.output import Progress, duration, emit, note, table, versions
from h2o_cli.session.defaults import MOST_THREADS, default_threads
from h2o_cli.session.models import DEFAULT_MODEL, profiles_folder, read_text, resolve_model
from runtime.errors import Cancelled, ProfileError, PromptError, UsageError
from runtime.kv.options import SELECTORS, parse_keep
from runtime.plans.budget import Budget

if TYPE_CHECKING:
    from profiler.kv_eval.analyze import Search
    from profiler.kv_eval.layers_file import LayerChoice

EPILOG = """Examples:

\b
  h2o kv analyze --quick model.gguf          find the layers, keep them for `h2o run --kv-filter`
  h2o kv analyze model.gguf                  the same with more samples and more choices
  h2o kv analyze model.gguf --plot curves.png
  h2o kv analyze model.gguf --length 4000 --prompts 4 --checks 8
  h2o kv analyze model.gguf --text book.txt  sample prompts from a text of your own
"""
_MOST_TEXT = 64 * 2**20
_SHOWN = 8
QUICK_S = 80.0  # two minutes with what is slower than estimated
LEAST_HALVED = 256  # tokens of a prompt: half of fewer has no room for facts in a text

app = typer.Typer(rich_markup_mode=None, add_completion=False, no_args_is_help=True, help="Filter layers of a model.")


@app.callback()
def kv() -> None:
    """Find out which layers of a model can choose the positions that others attend to."""


Quick = Annotated[
    bool, typer.Option("--quick", help="As many samples and choices as fit into about a minute and a half.")
]
Model = Annotated[
    str | None, typer.Argument(metavar="MODEL", show_default=False, help=f"Path of a GGUF file. {DEFAULT_MODEL}")
]
Keep = Annotated[str, typer.Option("--keep", metavar="F", help="Share of the prompt that is kept.")]
Length = Annotated[
    int, typer.Option("--length", metavar="N", min=64, help="Tokens of a sample prompt; every other one has half.")
]
Prompts = Annotated[int, typer.Option("--prompts", metavar="N", min=1, help="Sample prompts.")]
TextFile = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Cut sample prompts from this text; default: needles.")
]
Dense = Annotated[
    float,
    typer.Option("--dense", metavar="F", min=0, max=1, help="Largest part of the layers that stays dense, rounded."),
]
Filters = Annotated[int, typer.Option("--filters", metavar="N", min=1, help="Most filter layers.")]
Checks = Annotated[int, typer.Option("--checks", metavar="N", min=1, help="Choices that are measured per selector.")]
MostKl = Annotated[
    float,
    typer.Option("--kl", metavar="NATS", min=0, help="Good enough: divergence per token from full attention."),
]
Select = Annotated[
    list[str] | None,
    typer.Option("--select", metavar="NAME", help="A selector to try; repeatable. [default: softmax and last]"),
]
Memory = Annotated[
    str | None,
    typer.Option("-m", "--memory", metavar="SIZE", help="Memory budget. [default: 60 % of what is free]"),
]
Threads = Annotated[
    int | None, typer.Option("-t", "--threads", metavar="N", min=1, max=MOST_THREADS, help="Computing threads.")
]
Plot = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the curves into a PNG file.")]
Output = Annotated[
    Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write the result to this file only.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


@app.command("analyze", epilog=EPILOG)
def analyze(  # noqa: PLR0913, PLR0917 - one parameter per flag
    model: Model = None,
    quick: Quick = False,
    keep: Keep = "0.1",
    length: Length = 1024,
    prompts: Prompts = 60,
    text: TextFile = None,
    dense: Dense = 0.6,
    filters: Filters = 3,
    checks: Checks = 20,
    most_kl: MostKl = 0.01,
    select: Select = None,
    memory: Memory = None,
    threads: Threads = None,
    plot: Plot = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Record attention scores, propose filter layers by similarity, measure them, and keep the best for `h2o run`."""
    from profiler.kv_eval.analyze import SELECTS, Search

    share = parse_keep(keep)
    if isinstance(share, int):
        raise UsageError(f"--keep {keep} is not a share", "give a fraction such as 0.1")
    selects = tuple(dict.fromkeys(select)) if select else SELECTS
    for name in selects:
        if name not in SELECTORS:
            raise UsageError(f"--select {name} is not possible", f"choose one of {', '.join(SELECTORS)}")
    path = resolve_model(model)
    for file in (output, plot):
        check_writable(file, make_folder=False)
    search = Search(
        lengths=(length, length // 2) if length >= LEAST_HALVED else (length,),
        n_prompts=prompts,
        keep=share,
        selects=selects,
        most_dense=dense,
        most_filters=filters,
        checks=checks,
        limit_s=QUICK_S if quick else 0.0,
        most_kl=most_kl,
        texts=_texts(text, length, prompts) if text else (),
        versions=tuple(versions().items()),
    )
    found, stopped = _analyze(path, search, memory, threads)
    target = _save(found, output)
    if stopped:
        raise Cancelled(stopped)
    if plot:
        _draw(found, plot)
    if as_json:
        import msgspec

        emit(msgspec.json.encode(found).decode() + "\n")
    else:
        emit(summary(found) + "\n")
        note(f"the filter layers are in {target}")


def _texts(path: Path, length: int, n_prompts: int) -> tuple[str, ...]:
    """Pieces of a text, evenly spread, each long enough for a sample prompt."""
    content = read_text(path, "the text", _MOST_TEXT).decode(errors="replace")
    n_characters = 8 * length  # more than a token has in any common text; what is too long is cut after tokenizing
    if len(content) < length:
        raise PromptError(f"{path} holds {len(content)} characters, too few for a prompt", "give a longer text")
    last = max(0, len(content) - n_characters)
    starts = sorted({i * last // max(1, n_prompts - 1) for i in range(n_prompts)})
    return tuple(content[start : start + n_characters] for start in starts)


def _analyze(path: Path, search: Search, memory: str | None, threads: int | None) -> tuple[LayerChoice, int]:
    """What was found, and the signal that ended the search early (0: none did)."""
    from profiler.kv_eval.analyze import Analysis
    from profiler.kv_eval.model import EvalModel

    budget_bytes = Budget.parse(memory).n_bytes
    model = EvalModel(path, n_threads=threads or default_threads(), budget_bytes=budget_bytes)
    try:
        analysis = Analysis(model, search)
        with interrupts.ending(model.cancel, patient=True):
            with Progress("computing a sample prompt, to see how long it takes", lambda: 0.0):
                left_s = analysis.begin()
            work = analysis.work
            note(
                f"this takes about {duration(left_s)} ({work.n_prompts} sample prompts, {work.candidates} choices);"
                " what is measured by then is kept when you end it with Ctrl-C"
            )
            with Progress(f"analyzing {path.name}", lambda: analysis.share):
                found = analysis.run()
    except Cancelled:
        note("nothing was measured yet, so nothing is kept")
        raise
    finally:
        model.close()
        stopped = interrupts.take()
    return found, stopped


def _save(found: LayerChoice, output: Path | None) -> Path:
    """Write the result; one that was ended early does not replace a whole one. Where it is, or would have been."""
    from profiler.kv_eval.layers_file import layers_path, save_choice

    target = output or layers_path(profiles_folder(), found.model_hash)
    if output is None:
        check_writable(target, make_folder=True)
    if not found.complete and _is_whole(target):
        note(f"{target} holds a whole analysis, it stays as it is")
        return target
    save_choice(found, target)
    if not found.complete:
        layers = ",".join(map(str, found.layers))
        note(f"ended early: the best of {len(found.candidates)} choices, layers {layers}, is kept in {target}")
    return target


def _is_whole(path: Path) -> bool:
    from profiler.kv_eval.layers_file import load_choice

    try:
        return load_choice(path).complete
    except ProfileError:
        return False


def _draw(found: LayerChoice, path: Path) -> None:
    from h2o_cli.bench.kv.plots import draw_choice

    draw_choice(found, path)
    note(f"the curves are in {path}")


def summary(found: LayerChoice) -> str:
    """The choice, and the best of what was measured."""
    layers = ",".join(map(str, found.layers))
    rows = [["layers", "wait", "selector", "dense", "similarity", "same answers", "KL, nats/token"]]
    for way in found.candidates[:_SHOWN]:
        is_chosen = (way.layers, way.wait, way.select) == (found.layers, found.wait, found.select)
        names = ",".join(map(str, way.layers)) + (" *" if is_chosen else "")
        figures = [f"{way.dense_share:.0%}", f"{way.similarity:.3f}", f"{way.same:.0%}", f"{way.kl:.4f}"]
        rows.append([names, str(way.wait), way.select, *figures])
    return "\n".join(
        [
            f"{found.model}: filter layers {layers}, wait {found.wait}, selector {found.select}"
            f" ({found.keep:.0%} kept, {found.n_prompts} prompts, {found.n_steps} steps)",
            "",
            table(rows, right=(1, 3, 4, 5, 6)),
            f"measured: {len(found.candidates)}; *: chosen, {_why(found)}",
        ]
    )


def _why(found: LayerChoice) -> str:
    """How the choice was made, and what to expect of it."""
    chosen = found.chosen
    if chosen is None or chosen.kl <= found.most_kl:
        return f"the smallest dense part with at most {found.most_kl:g} nats per token"
    return (
        f"the smallest divergence: none is good enough, at most {found.most_kl:g} nats per token,"
        f" so answers will differ ({chosen.same:.0%} of the sample answers stayed the same)"
    )
