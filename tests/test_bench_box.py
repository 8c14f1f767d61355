"""The emulated device: its limits hold, and nothing of it is left."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from emulated import can_emulate, groups_left

from h2o_cli.bench import box as device_module
from h2o_cli.bench.box import Device, check_rights, run_in_device, talk_in_device
from runtime.errors import Cancelled, EngineError, H2OError
from runtime.sizes import MB

needs_device = [pytest.mark.cgroup, pytest.mark.skipif(not can_emulate(), reason="no device can be emulated here")]


class TestDevice:
    pytestmark = needs_device

    def test_a_command_inside_its_limit_runs(self, tmp_path):
        done = run_in_device(["sh", "-c", "echo out; echo err >&2; exit 3"], Device(64 * MB, 0, tmp_path))
        assert (done.rc, done.stdout, done.stderr) == (3, "out\n", "err\n")
        assert 0 < done.peak_bytes <= 64 * MB
        assert 0 < done.output_s <= done.wall_s
        assert not done.oom_killed and not done.timed_out
        assert groups_left() == []

    def test_the_limit_kills_a_hog(self, tmp_path):
        hog = [sys.executable, "-c", "x = bytearray(200_000_000); print(len(x))"]
        done = run_in_device(hog, Device(50 * MB, 0, tmp_path))
        assert done.rc == -9
        assert done.oom_killed
        assert done.peak_bytes <= 50 * MB
        assert groups_left() == []

    @pytest.mark.parametrize("flags", [[], ["iflag=direct"]])
    def test_the_disk_is_slowed_down(self, tmp_path, flags):
        file = tmp_path / "data"
        file.write_bytes(os.urandom(1 << 20) * 40)
        read = ["dd", f"if={file}", "of=/dev/null", "bs=1M", *flags]
        done = run_in_device(read, Device(0, 20 * MB, tmp_path), cold=[file])
        assert done.rc == 0
        assert 1.7 < done.wall_s < 6
        assert done.bytes_read >= 40 << 20

    def test_a_command_that_takes_too_long_is_ended(self, tmp_path):
        done = run_in_device(["sh", "-c", "echo begun; sleep 60"], Device(64 * MB, 0, tmp_path), timeout_s=0.5)
        assert done.timed_out
        assert done.rc == -9
        assert done.stdout == "begun\n"
        assert done.wall_s < 10

    def test_nothing_is_left_after_an_interrupt(self, tmp_path):
        def stop(*_):
            raise Cancelled(2)

        script = f"sleep 61 & echo $! > {tmp_path}/pid; wait"
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, 0.4)
        try:
            with pytest.raises(Cancelled):
                run_in_device(["sh", "-c", script], Device(64 * MB, 0, tmp_path))
        finally:
            signal.signal(signal.SIGALRM, before)
        assert groups_left() == []
        pid = int((tmp_path / "pid").read_text())
        assert not Path(f"/proc/{pid}").exists() or "sleep" not in Path(f"/proc/{pid}/cmdline").read_text()

    def test_a_command_that_is_not_there(self, tmp_path):
        done = run_in_device(["/nonexistent/command"], Device(64 * MB, 0, tmp_path))
        assert done.rc == 127
        assert groups_left() == []


class TestTalk:
    pytestmark = needs_device

    def test_a_command_answers_line_by_line(self, tmp_path):
        with talk_in_device(["sh", "-c", "while read x; do echo got $x; done"], Device(64 * MB, 0, tmp_path)) as talk:
            assert talk.ask("one", 10) == "got one"
            assert talk.ask("two", 10) == "got two"
            assert 0 < talk.peak_bytes <= 64 * MB
        assert groups_left() == []

    def test_a_command_that_ends_says_why(self, tmp_path):
        device = Device(64 * MB, 0, tmp_path)
        ending = "read x; echo 'h2o: no room' >&2; echo '  next: more' >&2; exit 2"
        with talk_in_device(["sh", "-c", ending], device) as talk:
            for _ in range(2):
                with pytest.raises(EngineError, match="no room"):
                    talk.ask("one", 10)
        hog = [sys.executable, "-c", "input(); x = bytearray(200_000_000); print(len(x))"]
        with talk_in_device(hog, device) as talk, pytest.raises(EngineError, match="out of memory"):
            talk.ask("one", 10)
        assert groups_left() == []

    def test_a_command_that_does_not_answer(self, tmp_path):
        sleeping = talk_in_device(["sleep", "60"], Device(64 * MB, 0, tmp_path))
        with sleeping as talk, pytest.raises(EngineError, match="no answer within"):
            talk.ask("one", 0.3)
        assert groups_left() == []


def test_without_control_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(device_module, "ROOT", tmp_path)
    with pytest.raises(H2OError, match="no control groups") as caught:
        check_rights(Device())
    assert "root" in caught.value.next_step


def test_without_the_rights(tmp_path, monkeypatch):
    (tmp_path / "cgroup.controllers").write_text("memory io")
    (tmp_path / "cgroup.subtree_control").mkdir()  # cannot be written, for root either
    monkeypatch.setattr(device_module, "ROOT", tmp_path)
    with pytest.raises(H2OError, match="no device can be emulated") as caught:
        check_rights(Device())
    assert "root" in caught.value.next_step


def test_version_2_limits_are_written(tmp_path, monkeypatch):
    """The files of a version 2 group, in an ordinary folder."""
    (tmp_path / "cgroup.controllers").write_text("memory io")
    (tmp_path / "cgroup.subtree_control").write_text("")
    monkeypatch.setattr(device_module, "ROOT", tmp_path)
    monkeypatch.setattr(device_module, "block_device", lambda _path: "8:0")
    monkeypatch.setattr(device_module, "remove_group", lambda _path: None)
    groups = device_module.make_groups(Device(50 * MB, 20 * MB, tmp_path))
    folder = groups.procs[0].parent
    assert (folder / "memory.max").read_text() == "50000000"
    assert (folder / "io.max").read_text() == "8:0 rbps=20000000"
    with pytest.raises(H2OError, match=r"memory\.peak"):
        groups.peak_bytes()
    (folder / "memory.peak").write_text("123\n")
    (folder / "memory.events").write_text("low 0\noom 2\noom_kill 1\n")
    (folder / "io.stat").write_text("8:0 rbytes=70 wbytes=1 rios=1\n8:16 rbytes=5 wbytes=0\n")
    assert (groups.peak_bytes(), groups.n_oom_kills(), groups.bytes_read()) == (123, 1, 75)


def test_a_file_system_in_memory_cannot_be_slowed():
    if not Path("/dev/shm").is_dir():
        pytest.skip("no memory file system here")
    with pytest.raises(H2OError, match="on no disk") as caught:
        device_module.block_device(Path("/dev/shm"))
    assert "--disk 0" in caught.value.next_step
