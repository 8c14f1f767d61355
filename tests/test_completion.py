"""The Tab key, in real shells."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from terminals import Terminal

ROOT = Path(__file__).resolve().parent.parent
TAB = "\t"
STARTS = {"bash": ["--norc", "-i"], "zsh": ["-f", "-i"]}
CASES = [
    ("h2o insp", "inspect"),
    ("h2o kv ana", "analyze"),
    ("h2o run --repea", "--repeat-penalty"),
    ("h2o run --kv-store di", "disk"),
    ("h2o run --layout bal", "balanced"),
    ("h2o run sma", "one.gguf"),
    ("h2o run models/la", "models/large.gguf"),
    ("h2o run -p hi --draft models/l", "models/large.gguf"),
    ("h2o run -f not", "notes.txt"),
    ("h2o kv analyze models/la", "models/large.gguf"),
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with models. An h2o that is started leaves the file `started` there."""
    folder = tmp_path / "here"
    (folder / "models").mkdir(parents=True)
    for file in ("small one.gguf", "notes.txt", "models/large.gguf"):
        (folder / file).touch()
    stub = tmp_path / "bin" / "h2o"
    stub.parent.mkdir()
    stub.write_text(f"#!/bin/sh\ntouch '{folder}/started'\n")
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{stub.parent}:/usr/bin:/bin")
    return folder


def install(name, monkeypatch):
    """`h2o --install-completion` twice for a shell; its path. Skips where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here")
    monkeypatch.setenv("SHELL", path)
    command = [sys.executable, "-m", "h2o_cli.start", "--install-completion"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for _ in range(2):
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert f"completion for {name} is in " in done.stderr
    return path


@pytest.mark.parametrize("name", list(STARTS))
def test_tab(name, folder, monkeypatch):
    path, home = install(name, monkeypatch), Path(os.environ["HOME"])
    start = home / f".{name}rc"
    assert len(start.read_text().splitlines()) == 1, "one line, however often it is installed"
    terminal = Terminal([path, *STARTS[name]])
    terminal.send(f"cd '{folder}'; . '{start}'; echo rea''dy\n")
    terminal.wait_for("ready")
    for typed, completed in CASES:
        terminal.send(typed + TAB)
        terminal.wait_for(completed[-4:], seconds=20)
        terminal.send("\x15")
    terminal.send("exit\n")
    terminal.exit_code()
    assert not (folder / "started").exists()


def test_tab_in_fish(folder, monkeypatch):
    path = install("fish", monkeypatch)
    for typed, completed in CASES:
        command = [path, "--private", "-c", f"complete -C '{typed}'"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert completed in done.stdout, (typed, done)
    assert not (folder / "started").exists()


def test_an_unknown_shell_is_told(monkeypatch, capsys):
    from h2o_cli import main as cli

    monkeypatch.setenv("SHELL", "/bin/tcsh")
    assert cli.run_command(["--install-completion"]) == 2
    assert "set SHELL to one of bash, zsh, fish" in capsys.readouterr().err
