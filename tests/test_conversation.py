"""A conversation on a terminal: what is pasted, typed ahead, set, saved and loaded."""

from __future__ import annotations

import json
import os
import signal
import time
from types import SimpleNamespace as Some

import pytest
from terminals import H2O, Terminal

from h2o_cli import conversation
from runtime.errors import Cancelled

PASTE, PASTED = "\x1b[200~", "\x1b[201~"


@pytest.fixture
def talk(tiny_model, tmp_path):
    """talk(*flags): `h2o run` on a terminal, at its first prompt; its folder is tmp_path."""

    def open_terminal(*flags):
        command = [*H2O, "run", str(tiny_model("qwen2")), "--temp", "0", "-t", "1", *map(str, flags)]
        terminal = Terminal([*command, "-s", str(tmp_path / "plan.bin")])
        terminal.wait_for("> ")
        return terminal

    return open_terminal


def messages_in(terminal, path):
    """The user's messages so far."""
    terminal.send(f"/save {path}\n")
    terminal.wait_for("the conversation is in")
    return [turn["content"] for turn in json.loads(path.read_text())["messages"] if turn["role"] == "user"]


def test_a_paste_of_several_lines_is_one_message(talk, tmp_path):
    terminal = talk("-n", 2)
    assert "\x1b[?2004h" in terminal.seen, "the terminal was not asked to mark what is pasted"
    terminal.send(f"{PASTE}first line\nsecond line\n/exit{PASTED}")
    time.sleep(0.3)
    terminal.send("\r")
    terminal.wait_for("tokens/s)")
    assert messages_in(terminal, tmp_path / "talk.json") == ["first line\nsecond line\n/exit"]
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0


def test_lines_between_triple_quotes_are_one_message(talk, tmp_path):
    terminal = talk("-n", 2)
    for line in ('"""first', "", "/clear", 'last"""'):
        terminal.send(f"{line}\n")
    terminal.wait_for("tokens/s)")
    terminal.send('"""one line"""\n')
    terminal.wait_for("tokens/s)")
    assert messages_in(terminal, tmp_path / "talk.json") == ["first\n\n/clear\nlast", "one line"]
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0


def test_what_was_typed_ahead_is_dropped_on_ctrl_c(talk, tmp_path):
    terminal = talk("-n", -1, "--ctx", 2048, "--speculate", "off")
    terminal.send("hello\n")
    terminal.wait_for("hello\r\n")
    terminal.send("a ghost\n")
    time.sleep(0.05)
    os.kill(terminal.pid, signal.SIGINT)
    terminal.wait_for("stopped")
    terminal.wait_for("> ")
    time.sleep(0.3)
    assert "a ghost" not in messages_in(terminal, tmp_path / "talk.json")
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0


def test_what_was_typed_ahead_is_dropped_wherever_ctrl_c_comes(monkeypatch):
    """In a line that was begun, in an answer, and while a message is made ready for the model."""
    dropped, lines = [], iter(["hello", None])
    monkeypatch.setattr(conversation, "_drop_typed_ahead", lambda: dropped.append(1))
    talk = conversation.Conversation(Some(session=None, chat=None), None, Some(get_line_buffer=lambda: "half a li"))
    inputs = iter([lambda: conversation.interrupts._act(signal.SIGINT), lambda: "another one"])
    monkeypatch.setattr(talk, "_input", lambda _: next(inputs)())
    assert (talk._read_line("> "), len(dropped)) == ("another one", 1)
    talk._tell_end(conversation.CANCELLED)
    assert len(dropped) == 2

    def cancelled(_):
        raise Cancelled(signal.SIGINT)

    monkeypatch.setattr(talk, "_read", lambda: next(lines))
    monkeypatch.setattr(talk, "_take", cancelled)
    assert (talk.run(), len(dropped)) == (0, 3)


def test_an_answer_cut_by_n_says_so(talk, capsys, tiny_model):
    terminal = talk("-n", 3)
    terminal.send("hello\n")
    terminal.wait_for("cut after 3 tokens (/set n N allows more")
    terminal.send("/set n 5\n")
    terminal.wait_for("n 5")
    terminal.send("hello\n")
    terminal.wait_for("cut after 5 tokens")
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0
    from h2o_cli import main as cli

    assert cli.run_command(["run", str(tiny_model("qwen2")), "-p", "a", "-n", "2", "--temp", "0"]) == 0
    assert capsys.readouterr().err.startswith("h2o: 2 tokens, cut by -n, first ")


def test_settings(talk):
    terminal = talk("-n", 2)
    for line, answer in (
        ("/set", "temp 0.0, top-k 40"),
        ("/set temp 0.2", "temp 0.2, top-k 40"),
        ("/set top-k 7", "temp 0.2, top-k 7"),
        ("/set seed 3", "seed 3, n 2"),  # of the sampler
        ("/set temp", "'' is not a number"),
        ("/set temp -1", "--temp -1.0 is not possible"),
        ("/set heat 1", "there is no setting heat"),
        ("/set n -5", "-n -5 is not possible"),
        ("hello", "tokens/s)"),
    ):
        terminal.send(f"{line}\n")
        terminal.wait_for(answer)
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0


def test_system_message_save_and_load(talk, tmp_path):
    path, other = tmp_path / "talk.json", tmp_path / "other.txt"
    other.write_text("not a conversation")
    terminal = talk("-n", 4)
    terminal.send("/system Be short.\n")
    terminal.wait_for("holds from the next message on")
    terminal.send("hello\n")
    terminal.wait_for("tokens/s)")
    terminal.send(f"/save {path}\n")
    terminal.wait_for("the conversation is in")
    for line, answer in (
        (f"/save {other}", "holds no conversation"),
        (f"/load {other}", "holds no conversation"),
        (f"/load {tmp_path / 'no.json'}", "No such file"),
        ("/save", "/save needs a file"),
        (f"/save {tmp_path / 'no' / 'folder.json'}", "cannot be written"),
        ("/clear", "forgotten"),
        (f"/load {path}", "2 messages from"),
        ("and then?", "tokens/s)"),
        (f"/save {path}", "the conversation is in"),
    ):
        terminal.send(f"{line}\n")
        terminal.wait_for(answer)
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0
    assert other.read_text() == "not a conversation"
    found = json.loads(path.read_text())
    assert found["system"] == "Be short."
    assert [turn["role"] for turn in found["messages"]] == ["user", "assistant"] * 2


def test_the_system_message_is_in_the_prompt():
    seen = []
    chat = Some(
        encode=lambda messages, _most: seen.append([turn.role for turn in messages]) or [0] * 60 * len(messages)
    )
    talk = conversation.Conversation(Some(session=Some(engine=Some(settings=Some(n_ctx=320))), chat=chat), None)
    talk._set_system("Be short.")
    assert len(talk._chat_prompt("hello")) == 120
    talk._messages += [Some(role="assistant", content="")]
    talk._chat_prompt("more")
    assert seen[0] == ["system", "user"]
    assert seen[-1][0] == "system", "the oldest turns go, the system message stays"
