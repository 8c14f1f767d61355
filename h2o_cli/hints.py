"""Answers to what users of other programs type, and to what is misspelt: the right name, or the nearest one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

_NO_DOWNLOAD = "h2o downloads nothing: download a GGUF file, then `h2o run FILE.gguf`"
_MODEL = "the model is an argument: `h2o run FILE.gguf`"
_CONVERSATION = "`h2o run MODEL` without a prompt is a conversation"
_FILES = "models are files: `h2o inspect FILE.gguf` shows one, `h2o run FILE.gguf` runs it"
_LEAVE = "leave it out: "
_NO_COMMAND = re.compile(r"No such command '(.*?)'")
_ALIKE = 0.65  # share of a name that has to be right: "rnu" is "run", "--wrong" is not "--json"

COMMANDS = {
    **dict.fromkeys(("chat", "interactive"), _CONVERSATION),
    **dict.fromkeys(("list", "ls", "models", "ps"), _FILES),
    **dict.fromkeys(("pull", "download", "create"), _NO_DOWNLOAD),
    **dict.fromkeys(("generate", "complete", "cli", "llama-cli"), "use `h2o run MODEL -p PROMPT`"),
    "show": "use `h2o inspect MODEL`",
    "serve": "there is no server: `h2o run MODEL -p PROMPT` answers a prompt",
    "analyze": "use `h2o kv analyze MODEL`",
    "version": "use `h2o --version`",
}
OPTIONS = {
    **dict.fromkeys(("--model", "--model-path"), f"{_MODEL} (-m is the memory)"),
    **dict.fromkeys(("-hf", "-hfr", "-mu", "--hf-repo", "--hf-file", "--model-url"), _NO_DOWNLOAD),
    **dict.fromkeys(("-c", "--ctx-size", "--context", "--num-ctx", "--n-ctx", "--num_ctx"), "use --ctx N"),
    **dict.fromkeys(
        ("--max-tokens", "--n-predict", "--num-predict", "--max-new-tokens", "--max_tokens", "--num_predict"),
        "use -n N: the most tokens of an answer",
    ),
    **dict.fromkeys(("-ngl", "--n-gpu-layers", "--gpu-layers"), f"{_LEAVE}h2o computes on the processor"),
    **dict.fromkeys(("-cnv", "-ins", "-i", "--conversation", "--interactive"), f"{_LEAVE}{_CONVERSATION}"),
    **dict.fromkeys(("--mmap", "--no-mmap", "--mlock"), f"{_LEAVE}h2o reads weights itself, inside -m"),
    **dict.fromkeys(("-sys", "--system", "--system-prompt"), "use /system TEXT in a conversation (`h2o run MODEL`)"),
    **dict.fromkeys(("-b", "-ub", "--batch-size", "--ubatch-size"), "use --ubatch N"),
    **dict.fromkeys(("-ctk", "-ctv", "--cache-type-k", "--cache-type-v"), "use --kv-type f16, q8_0 or q4_0"),
    **dict.fromkeys(("-md", "--model-draft"), "use --draft MODEL"),
    **dict.fromkeys(("--n-threads", "--num-threads"), "use -t N"),
    "--temperature": "use --temp T",
    "--kv-filter": "keys and values are filtered for one text: `h2o run MODEL --kv-filter`",
    "--cpu-cache-compute": f"{_LEAVE}all keys and values of a pass are in memory (docs/batch.md, section 5)",
    "--compress-cache": "use --kv-type q8_0 or q4_0",
    "--compress-weight": "give a GGUF file of a smaller type, such as q4_k_m",
    "--attn-sparsity": "`h2o run MODEL --kv-filter` attends to some of the positions of one text",
}


def for_command(name: str, known: Iterable[str]) -> tuple[str, str]:
    """What is wrong with a command's name, and what to do."""
    message = f"there is no command {name!r}"
    if name in COMMANDS:
        return message, COMMANDS[name]
    if name.endswith(".gguf"):
        return message, f"did you mean `h2o run {name}`?"
    return message, _near(name, known) or "`h2o --help` lists the commands"


def for_option(name: str, known: Iterable[str], command: str) -> tuple[str, str]:
    """The same of an option; command: "h2o run"."""
    return f"there is no option {name}", OPTIONS.get(name) or _near(name, known) or _all_of(command)


def for_usage(error: Any) -> tuple[str, str]:
    """Any wrong usage that the parser of the command line found, as a line and a next step."""
    context = error.ctx if getattr(error, "ctx", None) else None
    command = context.command_path if context else "h2o"
    if hasattr(error, "possibilities"):
        options = context.command.get_params(context) if context else []  # --help is among these only
        known = [name for option in options for name in option.opts]
        return for_option(error.option_name, known, command)
    message = error.format_message().rstrip(".")
    name = _NO_COMMAND.match(message)
    if name and context:
        known = list(getattr(context.command, "commands", ()))
        return f"there is no `{command} {name[1]}`", _near(name[1], known) or f"choose one of {', '.join(known)}"
    return message[:1].lower() + message[1:], _all_of(command if context else "h2o COMMAND")


def _all_of(command: str) -> str:
    return f"`{command} --help` lists the options"


def _near(name: str, known: Iterable[str]) -> str:
    from difflib import get_close_matches

    found = get_close_matches(
        name, [one for one in known if one.startswith("--") or not name.startswith("-")], 1, _ALIKE
    )
    return f"did you mean {found[0]}?" if found else ""
