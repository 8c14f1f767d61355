"""docs/seam.md names files, functions and tests that exist, and says of every entry what would notice a change. README
names commands and flags that exist."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import typer

from h2o_cli.main import app

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "seam.md").read_text()
OURS = r"`((?:runtime|tests|docs|profiler|planner|h2o_cli)/[\w./-]+)(?:::(\w+))?`"


def names_of(path):
    """Every function, class and constant of a Python file, methods included."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            yield from (name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name))


def exists(file, name):
    path = ROOT / file
    return path.exists() and (not name or name in set(names_of(path)))


def test_files_functions_and_tests_in_the_page_exist():
    named = sorted(set(re.findall(OURS, PAGE)))
    assert len(named) > 150
    assert [entry for entry in named if not exists(*entry)] == []


def test_every_entry_of_the_page_is_complete():
    """Each says where the code leans on it, where llama.cpp does it, and what would notice a change."""
    entries = re.split(r"^\*\*\d+\.\d+ ", PAGE, flags=re.MULTILINE)[1:]
    assert len(entries) > 60
    for entry in entries:
        kinds = re.findall(r"^- (ours|llama\.cpp|test|no test): ", entry, flags=re.MULTILINE)
        assert kinds[:2] == ["ours", "llama.cpp"] and kinds[2:] in (["test"], ["no test"]), entry.splitlines()[0]


def test_tests_in_the_page_are_named_with_their_function():
    for line in re.findall(r"^- test: .*", PAGE, flags=re.MULTILINE):
        assert re.fullmatch(r"- test: `tests/test_\w+\.py::test_\w+`(, `tests/test_\w+\.py::test_\w+`)*", line), line


def parse(words):
    """Have the parser of the command line look at a command, and do nothing."""
    command = typer.main.get_command(app)
    command, words = command.get_command(command.make_context("h2o", [], resilient_parsing=True), words[0]), words[1:]
    while words and words[0] in getattr(command, "commands", {}):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)


def test_commands_in_the_readme_can_be_typed():
    readme = (ROOT / "README.md").read_text()
    lines = re.findall(r"^(?:\$ | {4}|)h2o (\w.*?)(?: {2,}.*| [#|>&].*|)$", readme, flags=re.MULTILINE)
    for line in lines:
        parse(shlex.split(line))
    assert len(lines) >= 10
    assert any(line.startswith("kv analyze --quick ") for line in lines), "how to find the layers that filter"
    assert any(line.startswith("run SmolLM2-") for line in lines), "a real model, from download to answer"
