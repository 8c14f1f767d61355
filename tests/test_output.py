"""Progress and notes on standard error."""

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import time

import pytest

from h2o_cli import main as cli
from h2o_cli import output


def test_progress_of_long_work_only(monkeypatch, capsys):
    with output.Progress("quick", lambda: 0.5):
        pass
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(output, "PROGRESS_AFTER_S", 0.01)
    with output.Progress("slow", lambda: 0.5):
        time.sleep(0.2)
    assert capsys.readouterr().err == "h2o: slow: 50% after 0 s, about 0 s left\n"


class Terminal:
    """A stream to a terminal of some columns."""

    def __init__(self, columns):
        self.master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.stream = os.fdopen(slave, "w")

    def text(self):
        self.stream.close()
        found = b""
        with contextlib.suppress(OSError):  # the end of a terminal, whose text comes in pieces
            while more := os.read(self.master, 65536):
                found += more
        return found.decode()


@pytest.mark.parametrize("columns", [20, 40, 200])
def test_progress_never_wraps(columns, monkeypatch):
    terminal = Terminal(columns)
    monkeypatch.setattr(sys, "stderr", terminal.stream)
    monkeypatch.setattr(output, "PROGRESS_AFTER_S", 0.01)
    monkeypatch.setattr(output, "_REDRAW_S", 0.01)
    with output.Progress("reading the prompt (123456 tokens)", lambda: 0.5):
        time.sleep(0.1)
    shown = terminal.text()
    assert "\n" not in shown
    lines = shown.replace("\x1b[K", "").split("\r")
    assert max(map(len, lines)) < columns
    assert ("left" in shown) == (columns == 200)


def test_long_work_says_beforehand_how_long_it_takes(monkeypatch, capsys):
    monkeypatch.setattr(output, "PROGRESS_AFTER_S", 0.1)
    monkeypatch.setattr(output, "_LOG_S", 0.01)
    shares = iter([0.0, 0.0001])
    with output.Progress("measuring m", lambda: next(shares, 0.5), ahead=True):
        time.sleep(0.3)
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert first.startswith("h2o: measuring m: 0%")
    assert re.fullmatch(r"h2o: measuring m takes about (1[0-9]|2[0-9]|[3-9][0-9]) (s|min)", second)
    with output.Progress("quick", lambda: 1.0, ahead=True):
        pass
    assert capsys.readouterr().err == ""


def test_a_profile_says_beforehand_how_long_it_takes(tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(output, "PROGRESS_AFTER_S", 0.05)
    monkeypatch.setattr(output, "_LOG_S", 0.05)
    arguments = ["profile", str(tiny_model("qwen2")), "--repeats", "1", "-o", str(tmp_path / "p.json")]
    assert cli.run_command(arguments) == 0
    assert re.search(r"h2o: measuring \S+ takes about \d+ (s|min)\n", capsys.readouterr().err)


@pytest.mark.parametrize("is_one", [True, False])
def test_a_note_begins_on_a_line_of_its_own(is_one, monkeypatch):
    """Where answers and notes come on the same terminal."""
    terminal, other = Terminal(80), Terminal(80)
    notes = terminal if is_one else other
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(notes.stream.fileno()), "w"))
    monkeypatch.setenv("NO_COLOR", "1")
    for text in ("Once", ""):
        output.emit(text)
    for text in ("one", "two"):
        output.note(text)
    output.emit(" upon a\n")
    output.note("three")
    output.emit("time")
    output.warn("four", "five")
    output.emit("\n")
    sys.stderr.close()
    said, told = terminal.text(), other.text()
    four = "h2o: warning: four\r\n  next: five\r\n"
    if is_one:
        assert said == f"Once\r\nh2o: one\r\nh2o: two\r\n upon a\r\nh2o: three\r\ntime\r\n{four}\r\n"
    else:
        assert (said, told) == ("Once upon a\r\ntime\r\n", f"h2o: one\r\nh2o: two\r\nh2o: three\r\n{four}")


def test_colour_on_terminals_only(monkeypatch):
    class Screen:
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert output.styled("x", "red", Screen()) == "\x1b[31mx\x1b[0m"
    monkeypatch.setenv("NO_COLOR", "1")
    assert output.styled("x", "red", Screen()) == "x"
