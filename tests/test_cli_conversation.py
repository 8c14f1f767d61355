"""`h2o run` on a terminal: a conversation."""

import os
import signal
import time

import pytest
from terminals import H2O, Terminal


@pytest.fixture
def conversation(tiny_model):
    """conversation(*flags): `h2o run` on a terminal, at its first prompt."""

    def open_terminal(*flags):
        terminal = Terminal([*H2O, "run", str(tiny_model("qwen2")), "--temp", "0", "-t", "1", *map(str, flags)])
        terminal.wait_for("> ")
        return terminal

    return open_terminal


def test_conversation_with_commands(conversation):
    terminal = conversation("-n", 4)
    for line, answer in (
        ("hello", "tokens/s)"),
        ("and\\\nthen", "tokens/s)"),
        ("/stats", "peak "),
        ("/help", "goes on in the next one"),
        ("/nonsense", "there is no command /nonsense"),
        ("/clear", "forgotten"),
    ):
        terminal.send(f"{line}\n")
        terminal.wait_for(answer)
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0
    assert "Traceback" not in terminal.seen


def test_interrupt_stops_the_answer_and_then_the_conversation(conversation):
    terminal = conversation("-n", -1, "--ctx", 2048, "--speculate", "off")
    terminal.send("hello\n")
    terminal.wait_for("hello\r\n")
    time.sleep(0.1)
    terminal.send("\x03")
    terminal.wait_for("stopped")
    terminal.wait_for("> ")
    terminal.send("half a line")
    terminal.wait_for("half a line")
    time.sleep(0.3)
    terminal.send("\x03")  # the line is thrown away
    terminal.wait_for("> ")
    time.sleep(0.3)
    assert terminal.exit_code(lambda: terminal.send("\x03")) == 130
    assert "Traceback" not in terminal.seen


def test_an_interrupt_at_any_moment_of_an_answer_leaves_the_conversation_open(conversation):
    terminal = conversation("-n", -1, "--ctx", 512, "--speculate", "off")
    for wait_ms in (0, 1, 2, 3, 5, 10, 20):
        terminal.send("hello\n")
        terminal.wait_for("hello\r\n")
        time.sleep(wait_ms / 1000)
        terminal.send("\x03")
        terminal.wait_for("> ")
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0


def test_end_of_input_and_sigterm_end_a_conversation(conversation):
    terminal = conversation()
    assert terminal.exit_code(lambda: terminal.send("\x04")) == 0
    terminal = conversation()
    assert terminal.exit_code(lambda: os.kill(terminal.pid, signal.SIGTERM)) == 143


def test_conversation_longer_than_the_context_forgets_its_beginning(conversation):
    terminal = conversation("-n", 2, "--ctx", 128)
    for _ in range(3):
        terminal.send("one two three four five six seven eight nine ten eleven\n")
        terminal.wait_for("tokens/s)")
    assert "oldest turns are left out" in terminal.seen
    terminal.send("word " * 60 + "\n")
    terminal.wait_for("do not fit a context")
    assert terminal.exit_code(lambda: terminal.send("\x04")) == 0


def test_text_model_goes_on_at_an_empty_line(stories):
    terminal = Terminal([*H2O, "run", str(stories()), "--temp", "0", "-n", "6", "-t", "1"])
    terminal.wait_for("> ")
    terminal.send("Once upon a time\n")
    terminal.wait_for(", there was a little")
    terminal.wait_for("> ")
    terminal.send("\n")
    terminal.wait_for("irl named Lily")
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0
