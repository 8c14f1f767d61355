"""The command `h2o`: commands by name, and the one place where failures become a line, a next step and an exit code."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from typing import Annotated, Any

import typer
from typer.core import TyperGroup, TyperOption

from h2o_cli import hints
from h2o_cli.interrupts import interrupts
from h2o_cli.output import ReaderGone, note, print_error, silence_stdout
from runtime.errors import LIMITS, NO_PROC, NO_THREADS, Cancelled, EngineError, H2OError, UsageError

COMMANDS = {
    "run": "Run a model inside a memory budget: one prompt, or a conversation.",
    "plan": "Choose what stays in memory and what is streamed, for a budget.",
    "profile": "Measure a model on this machine: disk, layers, memory.",
    "kv": "Find the layers of a model that can filter keys and values.",
    "batch": "Answer many prompts from a file on one stream of weights.",
    "worker": "Compute some layers of a model for a run on another machine.",
    "devices": "Show what workers offer, and what a token would take with them.",
    "keys": "Make certificates for the machines of a small cluster.",
    "inspect": "Show a model's layers, bytes, architecture and smallest budget.",
    "bench": "Benchmarks, and models with random weights for them.",
}
EXAMPLES = """Examples:

\b
  h2o run model.gguf -p "Once upon a time" -n 100
  h2o run model.gguf -m 400 -p "Hello"      at most 400 MB of memory
  h2o run                                   a conversation with the default model
  h2o profile model.gguf && h2o plan -m 2GB measure, then plan
"""

# Threads of a worker spin between two nodes, as everywhere (see runtime/llama/abi.py), but not on through the turns of
# other machines: where several workers share cores, these are theirs (three on two cores: a token takes 15 % less).
WORKER_SPIN = "GOMP_SPINCOUNT", "2000"
ADDRESS_SPACE_BYTES = 400 * 2**20
ULIMIT = "raise `ulimit -v`: address space is no memory, -m limits that"

_ClickException: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")


class LazyGroup(TyperGroup):
    """A group that imports a command's module when the command is used, not before."""

    def list_commands(self, _ctx: Any) -> list[str]:
        """The commands that are there."""
        return [name for name in COMMANDS if find_spec(f"h2o_cli.cmd_{name}")]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command of a module h2o_cli/cmd_<name>.py: its `app`, or its function of that name."""
        if cmd_name not in COMMANDS or not find_spec(f"h2o_cli.cmd_{cmd_name}"):
            raise UsageError(*hints.for_command(cmd_name, [*self.list_commands(ctx), "help"]))
        _check_address_space()
        if cmd_name == "worker":
            os.environ.setdefault(*WORKER_SPIN)  # before llama.cpp's libraries are loaded
        module = import_module(f"h2o_cli.cmd_{cmd_name}")
        if not gc.isenabled():  # as the console script begins
            gc.freeze()  # none of it is garbage, ever
            gc.enable()
        group = getattr(module, "app", None)
        if group is None:
            group = typer.Typer(rich_markup_mode=None, add_completion=False)
            group.command(cmd_name, epilog=getattr(module, "EPILOG", None))(getattr(module, cmd_name))
        command = typer.main.get_command(group)
        command.name = cmd_name
        _add_foreign_flags(command)
        return command

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name]) for name in self.list_commands(ctx)])


def _add_foreign_flags(command: Any) -> None:
    """Make a command know flags such as -hf, which it would take for -h -f, well enough to answer them."""

    def answer(_context: Any, option: Any, given: bool) -> None:
        if given:
            raise UsageError(*hints.for_option(option.opts[0], (), ""))

    for sub in getattr(command, "commands", {}).values():
        _add_foreign_flags(sub)
    for i, flag in enumerate(flag for flag in hints.OPTIONS if len(flag) > 2 and flag[1] != "-"):
        command.params.append(
            TyperOption(
                param_decls=[f"foreign_{i}", flag],
                is_flag=True,
                default=False,
                is_eager=True,
                hidden=True,
                expose_value=False,
                callback=answer,
            )
        )


def _check_address_space() -> None:
    """Raise EngineError where `ulimit -v` leaves less than the libraries alone take: they would end in many ways."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY and limit < ADDRESS_SPACE_BYTES:
        raise EngineError(f"`ulimit -v {limit // 1024}` leaves too little address space", ULIMIT)


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        from h2o_cli.output import versions

        print(" ".join(f"{name} {version}" for name, version in reversed(versions().items())))
        raise typer.Exit()


def _install_completion(wanted: bool) -> None:
    if wanted:
        from h2o_cli.completion import install

        note(install(typer.main.get_command(app)))
        raise typer.Exit()


@app.callback(help="Run GGUF models inside the memory you have: layers stream from disk.", epilog=EXAMPLES)
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show versions and exit.")
    ] = False,
    install_completion: Annotated[
        bool,
        typer.Option(
            "--install-completion",
            callback=_install_completion,
            is_eager=True,
            help="Complete commands, flags and models at the Tab key (bash, zsh, fish).",
        ),
    ] = False,
) -> None:
    pass


def run_command(arguments: list[str] | None = None) -> int:
    """Run `h2o` with these arguments; returns the exit code. Every failure is told on standard error."""
    try:
        with interrupts.installed():
            return _invoke(sys.argv[1:] if arguments is None else arguments)
    except Cancelled as error:
        return error.exit_code
    except H2OError as error:
        print_error(error.message, error.next_step)
        return error.exit_code
    except (ReaderGone, BrokenPipeError):
        silence_stdout()
        return 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except MemoryError:
        print_error("the system gives this process no more memory", ULIMIT)
        return 1
    except Exception as error:  # the funnel: nothing passes it as a traceback
        if os.environ.get("H2O_DEBUG"):
            raise
        print_error(*_explained(error))
        return 1


def _explained(error: Exception) -> tuple[str, str]:
    """What happened and what to do: a limit of the system, or nobody knows."""
    if isinstance(error, RuntimeError) and "start new thread" in str(error):
        return NO_THREADS
    if isinstance(error, FileNotFoundError) and str(error.filename).startswith("/proc/"):
        return NO_PROC
    for number, next_step in LIMITS.items():
        if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
            return f"the system says: {os.strerror(number)}", next_step
    what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return f"unexpected {what}", "report this, with the output of the same command under H2O_DEBUG=1"


def _invoke(arguments: list[str]) -> int:
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    try:
        result = app(arguments, prog_name="h2o", standalone_mode=False)
        sys.stdout.flush()
    except _ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            print_error(*hints.for_usage(error))
        return int(getattr(error, "exit_code", 2))
    return result if isinstance(result, int) else 0


def main() -> None:
    """The console script."""
    if sys.stdout is None or sys.stderr is None:  # closed by whoever started us
        nowhere = open(os.devnull, "w")  # noqa: SIM115 - open until the process ends
        sys.stdout, sys.stderr = sys.stdout or nowhere, sys.stderr or nowhere
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")
    sys.exit(run_command())


if __name__ == "__main__":
    main()
