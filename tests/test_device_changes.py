"""devices.json is looked at between the answers of a conversation."""

from __future__ import annotations

import json
import signal
import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from terminals import H2O, Terminal
from test_cli_worker import worker

from h2o_cli.session.device_changes import DeviceChanges
from h2o_cli.session.team import Flags


def write(path, *addresses):
    devices = [{"address": address, "port": int(port)} for address, port in (a.split(":") for a in addresses)]
    path.write_text(json.dumps({"devices": devices}))


@pytest.fixture
def changes(tmp_path):
    """DeviceChanges for a file, the file, and what was said."""
    path, notes = tmp_path / "devices.json", []
    return DeviceChanges(Flags(devices=path, priority="a,b", spare="s:1"), notes.append), path, notes


def looking(changes):
    return lambda in_force: changes[0].look(in_force, None)


def test_added_removed_and_reordered_devices_are_news(changes):
    look, path = looking(changes), changes[1]
    write(path, "b:1", "a:1")
    found = look(Flags(workers=""))
    assert (found.workers, found.spare, found.devices, found.priority) == ("a:1,b:1", "s:1", None, None)
    assert look(found) is None
    write(path, "c:1", "b:1", "a:1")
    found = look(found)
    assert found.workers == "a:1,b:1,c:1"
    write(path, "c:1", "b:1")  # one that --priority names is gone
    found = look(found)
    assert found.workers == "b:1,c:1"
    assert changes[2] == [f"the devices change: {n}" for n in ("a:1,b:1", "a:1,b:1,c:1", "b:1,c:1")]


def test_a_file_that_cannot_be_used_is_said_once(changes):
    look, path, notes = looking(changes), changes[1], changes[2]
    in_force = Flags(workers="a:1")
    for _ in range(3):
        assert look(in_force) is None
    path.write_text("{")
    for _ in range(3):
        assert look(in_force) is None
    assert ["No such file" in notes[0], "truncated" in notes[1], len(notes)] == [True, True, 2]
    assert all(note.startswith("the devices stay as they are: ") for note in notes)


def test_devices_that_cannot_be_used_are_tried_once(changes):
    look, path = looking(changes), changes[1]
    write(path, "a:1")
    assert look(Flags(workers="b:1")) is not None
    assert look(Flags(workers="b:1")) is None


def text_of(terminal, path, *steps):
    """What is said in several answers. steps: what to do before each but the first, and what to wait for."""
    terminal.wait_for("> ", 20)
    terminal.send("Once upon a time\n")
    terminal.wait_for("> ", 20)
    for do, said in steps:
        do()
        terminal.send("What then?\n")
        if said:
            terminal.wait_for(said, 20)
        terminal.wait_for("> ", 20)
    terminal.send(f"/save {path}\n")
    terminal.wait_for("the conversation is in")
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0
    return json.loads(path.read_text())["messages"]


def test_a_conversation_goes_on_with_other_devices(bundled_model, tmp_path):
    command = [
        *H2O,
        "run",
        str(bundled_model),
        "--temp",
        "0",
        "-t",
        "1",
        "-n",
        "12",
        "--repack",
        "off",
        "--speculate",
        "off",
    ]
    nothing = (lambda: None, "")
    expected = text_of(Terminal(command), tmp_path / "alone.json", *[nothing] * 4)
    file = tmp_path / "devices.json"
    arguments = (bundled_model, "--listen", "127.0.0.1:0", "-m", "100")
    with worker(*arguments) as (_, one), worker(*arguments) as (_, two):
        a, b = one["listening"], two["listening"]
        write(file, a)
        found = text_of(
            Terminal([*command, "--devices", str(file)]),
            tmp_path / "talk.json",
            (lambda: write(file, b, a), f"{b}: layers 0-7"),
            (lambda: file.write_text("nonsense"), "the devices stay as they are"),
            (lambda: write(file, "127.0.0.1:1"), "the devices stay as they are"),
            (lambda: write(file, a), f"{a}: layers 0-7"),
        )
    assert found == expected


@contextmanager
def slowed(process):
    """A process that runs a twentieth of the time."""
    ended = threading.Event()

    def slow_down():
        while not ended.is_set():
            process.send_signal(signal.SIGSTOP)
            time.sleep(0.02)
            process.send_signal(signal.SIGCONT)
            time.sleep(0.001)

    thread = threading.Thread(target=slow_down)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def test_layers_move_off_a_worker_that_has_become_slow(bundled_model, tmp_path):
    command = [
        *H2O,
        "run",
        str(bundled_model),
        "--temp",
        "0",
        "-t",
        "1",
        "-n",
        "12",
        "--repack",
        "off",
        "--speculate",
        "off",
    ]
    arguments = (bundled_model, "--listen", "127.0.0.1:0", "-m", "100")
    with worker(*arguments) as (slow, one), worker(*arguments) as (_, two):
        terminal = Terminal([*command, "--workers", f"{one['listening']},{two['listening']}"])
        terminal.wait_for(f"{one['listening']}: layers 0-7", 20)
        n_answers = 0
        with slowed(slow):
            while "the layers are shared out anew" not in terminal.seen and n_answers < 10:
                terminal.wait_for("> ", 20)
                terminal.send("What then?\n")
                terminal.wait_for("\n", 20)
                n_answers += 1
            terminal.wait_for("> ", 20)
        assert f"{two['listening']}: layers 0-7" in terminal.seen
        terminal.send(f"/save {tmp_path / 'talk.json'}\n")
        terminal.wait_for("the conversation is in")
        terminal.send("/exit\n")
        assert terminal.exit_code() == 0
    found = json.loads((tmp_path / "talk.json").read_text())["messages"]
    terminal = Terminal(command)
    for _ in range(len(found) // 2):
        terminal.wait_for("> ", 20)
        terminal.send("What then?\n")
        terminal.wait_for("\n", 20)
    terminal.wait_for("> ", 20)
    terminal.send(f"/save {tmp_path / 'alone.json'}\n")
    terminal.wait_for("the conversation is in")
    terminal.send("/exit\n")
    assert terminal.exit_code() == 0
    assert found == json.loads((tmp_path / "alone.json").read_text())["messages"]
