"""Scripts that complete commands, flags and model files at the Tab key. They hold all names: no Tab starts h2o."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h2o_cli.session.models import user_folder
from runtime.errors import UsageError

MODELS, FILES, NOTHING = "models", "files", ""
_MODEL_NAMES = ("MODEL", "FILE.gguf", "MODEL|auto")
_FILE_NAMES = ("FILE", "PLANFILE", "FOLDER", "PROFILE")


@dataclass(frozen=True)
class Flag:
    """An option: its names, what it is for, and what its value is (None: it takes none)."""

    names: tuple[str, ...]
    help: str
    value: str | None


@dataclass(frozen=True)
class Place:
    """A command ("" or "run" or "kv analyze"): its flags, commands below it, and what its argument is."""

    path: str
    flags: tuple[Flag, ...]
    commands: dict[str, str]
    argument: str


def places(command: Any, path: str = "") -> Iterator[Place]:
    """All commands, from the top."""
    below = {}
    if hasattr(command, "list_commands"):
        below = {name: command.get_command(None, name) for name in command.list_commands(None)}
    flags = [Flag(("-h", "--help"), "Show the help.", None)]
    argument = NOTHING
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        if parameter.param_type_name == "argument":
            argument = argument or _kind(parameter.metavar or "")
        else:
            flags.append(Flag(tuple(parameter.opts), parameter.help or "", _value(parameter)))
    yield Place(path, tuple(flags), {name: one.get_short_help_str(60) for name, one in below.items()}, argument)
    for name, one in below.items():
        yield from places(one, f"{path} {name}".strip())


def _value(option: Any) -> str | None:
    return None if option.is_flag else _kind(option.metavar or "")


def _kind(metavar: str) -> str:
    """What a value with this name is: models, files, words between blanks, or nothing that is known."""
    if metavar in _MODEL_NAMES:
        return MODELS
    if metavar in _FILE_NAMES:
        return FILES
    words = metavar.split("|")
    return " ".join(words) if len(words) > 1 and metavar == metavar.lower() else NOTHING


# --- bash -----------------------------------------------------------------------------------------------------------

_BASH = """# Completion of h2o for bash.
_h2o() {
  local cur="${COMP_WORDS[COMP_CWORD]}" prev="${COMP_WORDS[COMP_CWORD-1]}" at="" word kind="" flags="" words=""
  for word in "${COMP_WORDS[@]:1:COMP_CWORD-1}"; do
    case "$at/$word" in %(paths)s) at="${at:+$at }$word";; esac
  done
  case "$at" in
%(places)s
  esac
  case "$at/$prev" in
%(values)s
    *) if [[ $cur == -* ]]; then kind=""; words="$flags"; fi;;
  esac
  COMPREPLY=()
  case "$kind" in
    models) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -d -- "$cur"; compgen -f -X '!*.gguf' -- "$cur");;
    files) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -f -- "$cur");;
    *) mapfile -t COMPREPLY < <(compgen -W "$words" -- "$cur");;
  esac
}
complete -F _h2o h2o
"""


def bash(found: list[Place]) -> str:
    """The script for bash."""
    paths = "|".join(f'"{_split(place.path)}"' for place in found if place.path)
    lines, values = [], []
    for place in found:
        flags = " ".join(name for flag in place.flags for name in flag.names)
        kind = "words" if place.commands else place.argument
        lines.append(f'    "{place.path}") flags="{flags}"; kind="{kind}"; words="{" ".join(place.commands)}";;')
        for flag in place.flags:
            if flag.value is not None:
                names = "|".join(f'"{place.path}/{name}"' for name in flag.names)
                known = flag.value if flag.value in (MODELS, FILES) else "words"
                values.append(f'    {names}) kind="{known}"; words="{"" if known == flag.value else flag.value}";;')
    return _BASH % {"paths": paths, "places": "\n".join(lines), "values": "\n".join(values)}


def _split(path: str) -> str:
    """ "kv analyze" as "kv/analyze": where it is, and its last word."""
    before, _, last = path.rpartition(" ")
    return f"{before}/{last}"


# --- zsh ------------------------------------------------------------------------------------------------------------

_ZSH = """#compdef h2o
# Completion of h2o for zsh.
_h2o() {
  local at="" word
  integer n=1
  for word in "${(@)words[2,CURRENT-1]}"; do
    case "$at/$word" in %(paths)s) at="${at:+$at }$word"; (( n++ ));; *) break;; esac
  done
  shift $(( n - 1 )) words
  (( CURRENT -= n - 1 ))
  case "$at" in
%(places)s
  esac
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit }
compdef _h2o h2o
"""
_ZSH_KINDS = {MODELS: "model:_files -g '*.gguf'", FILES: "file:_files", NOTHING: "value: "}


def zsh(found: list[Place]) -> str:
    """The script for zsh."""
    lines = []
    for place in found:
        lines.append(f'    "{place.path}") _arguments -s')
        for flag in place.flags:
            names = f"({' '.join(flag.names)})"
            value = "" if flag.value is None else f":{_ZSH_KINDS.get(flag.value) or f'value:({flag.value})'}"
            texts = [_quoted(f"{names}{name}[{_bare(flag.help)}]{value}") for name in flag.names]
            lines[-1] += "".join(f" \\\n      {text}" for text in texts)
        below = f"command:({' '.join(place.commands)})" if place.commands else _ZSH_KINDS[place.argument]
        if place.commands or place.argument:
            lines[-1] += f" \\\n      {_quoted(f'1:{below}')}"
        lines[-1] += ";;"
    paths = "|".join(f'"{_split(place.path)}"' for place in found if place.path)
    return _ZSH % {"paths": paths, "places": "\n".join(lines)}


def _bare(text: str) -> str:
    """A help text without what zsh reads as its own marks."""
    return " ".join(text.replace("[", "(").replace("]", ")").replace(":", ",").split())


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# --- fish -----------------------------------------------------------------------------------------------------------

_FISH = """# Completion of h2o for fish.
function __h2o_at
  set -l at
  for word in (commandline -opc)[2..]
    if contains -- (string join / -- "$at" $word) %(paths)s
      set at (string trim -- "$at $word")
    end
  end
  test "$at" = "$argv[1]"
end
function __h2o_models
  set -l typed (commandline -ct)
  for name in $typed*.gguf $typed*/
    echo $name
  end
end
complete -c h2o -f
"""


def fish(found: list[Place]) -> str:
    """The script for fish."""
    lines = []
    for place in found:
        at = f"complete -c h2o -n '__h2o_at \"{place.path}\"'"
        lines += [f"{at} -a {name} -d {_fish_quoted(text)}" for name, text in place.commands.items()]
        if place.argument:
            lines.append(f"{at} {_fish_value(place.argument)}")
        for flag in place.flags:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in flag.names)
            value = "" if flag.value is None else f" -r {_fish_value(flag.value)}"
            lines.append(f"{at} {names}{value} -d {_fish_quoted(' '.join(flag.help.split()))}")
    paths = " ".join(f'"{_split(place.path)}"' for place in found if place.path)
    return _FISH % {"paths": paths} + "\n".join(lines) + "\n"


def _fish_value(kind: str) -> str:
    if kind == FILES:
        return "-F"
    return f"-f -a {_fish_quoted('(__h2o_models)' if kind == MODELS else kind)}"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- where they go --------------------------------------------------------------------------------------------------

SHELLS = {"bash": bash, "zsh": zsh, "fish": fish}


def install(command: Any) -> str:
    """Write the script for the user's shell and make the shell read it; what was done. Raises UsageError."""
    shell = _shell()
    script = SHELLS[shell](list(places(command)))
    home = Path.home()
    if shell == "fish":
        target = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config") / "fish" / "completions" / "h2o.fish"
        _write(target, script)
        return f"completion for fish is in {target}; new shells have it"
    target = user_folder() / f"completion.{shell}"
    _write(target, script)
    start = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc" if shell == "zsh" else home / ".bashrc"
    line = f"[ -r {_quoted(str(target))} ] && . {_quoted(str(target))}"
    try:
        known = start.read_text(errors="surrogateescape") if start.exists() else ""
        if line not in known.splitlines():
            with start.open("a") as file:
                file.write(f"{'' if known.endswith(chr(10)) or not known else chr(10)}{line}\n")
    except OSError as error:
        raise UsageError(f"{start} cannot be written: {error.strerror}", f"put this line into it: {line}") from None
    return f"completion for {shell} is in {target}, and {start} reads it; new shells have it"


def _shell() -> str:
    """The shell that started us, else the user's own. Raises UsageError."""
    try:
        parent = Path(f"/proc/{os.getppid()}/comm").read_text().strip()
    except OSError:
        parent = ""
    for name in (parent, Path(os.environ.get("SHELL", "")).name):
        if name in SHELLS:
            return name
    raise UsageError("this shell is not known", f"set SHELL to one of {', '.join(SHELLS)}")


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}", "make its folder writable") from None
