import mmap
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.errors import PlanError
from runtime.plans.file import RECORD, default_plan_path, read_plan, write_plan, write_source_plan
from runtime.plans.plan import Layout, Plan

PLAN = Plan(3, 2, Layout.BALANCED, 10**9, 5 * 10**8, 2 * 10**9, 2**62 + 1)
ROOT = Path(__file__).parents[1]
WRITER = """
import sys, time
from runtime.plans.plan import Layout, Plan
from runtime.plans.file import write_plan
path, seconds = sys.argv[1], float(sys.argv[2])
end, i = time.monotonic() + seconds, 0
while time.monotonic() < end:
    i += 1
    write_plan(path, Plan(i, i + 1, Layout(i % 3), i * 7, i * 11, i * 13, i * 17))
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.bin"


def test_what_is_written_is_read(path):
    written = write_plan(path, PLAN)
    assert written.generation == 1
    assert read_plan(path) == written
    assert write_plan(path, PLAN).generation == 2
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert path.stat().st_size == RECORD.size == 88


def test_written_in_place(path):
    write_plan(path, Plan(1, 2))
    inode = path.stat().st_ino
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 8) as mapped:
        write_plan(path, Plan(5, 6))
        assert struct.unpack("=ii", mapped[:8]) == (5, 6)
    assert path.stat().st_ino == inode


def test_source_system_reads_k_and_w(path):
    write_plan(path, Plan(7, 4))
    assert struct.unpack("ii", path.read_bytes()[:8]) == (7, 4)


def test_source_file_is_read_and_upgraded(path):
    write_source_plan(path, 5, 3)
    assert path.read_bytes() == struct.pack("ii", 5, 3)
    assert read_plan(path) == Plan(5, 3)
    write_source_plan(path, 6, 1)
    assert read_plan(path) == Plan(6, 1)
    assert read_plan(path) == Plan(6, 1)
    inode = path.stat().st_ino
    assert write_plan(path, PLAN).generation == 1
    assert read_plan(path).pinned_bytes == 10**9
    assert path.stat().st_ino == inode
    with pytest.raises(PlanError, match="not an 8-byte plan file"):
        write_source_plan(path, 1, 1)


@pytest.mark.parametrize(("k", "w"), [(-1, 1), (0, 0), (2**31, 1), (0, 2**31)])
def test_impossible_numbers_are_not_written(path, k, w):
    with pytest.raises(PlanError):
        write_source_plan(path, k, w)
    with pytest.raises(PlanError):
        write_plan(path, Plan(k, w))


def test_missing(path):
    with pytest.raises(PlanError, match="there is no plan file") as caught:
        read_plan(path)
    assert "h2o plan" in caught.value.next_step
    with pytest.raises(PlanError, match="folder"):
        write_plan(path / "x", PLAN)


@pytest.mark.parametrize(
    "use", [read_plan, lambda path: write_plan(path, PLAN), lambda path: write_source_plan(path, 1, 1)]
)
class TestUnsafeFiles:
    def test_symlink(self, path, tmp_path, use):
        target = tmp_path / "target"
        write_plan(target, PLAN)
        before = target.read_bytes()
        path.symlink_to(target)
        with pytest.raises(PlanError, match="symbolic link"):
            use(path)
        assert target.read_bytes() == before

    def test_dangling_symlink(self, path, tmp_path, use):
        path.symlink_to(tmp_path / "nothing")
        with pytest.raises(PlanError):
            use(path)
        assert not (tmp_path / "nothing").exists()

    def test_folder(self, path, use):
        path.mkdir()
        with pytest.raises(PlanError):
            use(path)

    def test_fifo(self, path, use):
        os.mkfifo(path, 0o600)
        with pytest.raises(PlanError, match="not a regular file"):
            use(path)

    @pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
    def test_writable_by_others(self, path, use, mode):
        write_plan(path, PLAN)
        path.chmod(mode)
        with pytest.raises(PlanError, match="other users"):
            use(path)

    @pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
    def test_other_owner(self, path, use):
        write_plan(path, PLAN)
        os.chown(path, 12345, -1)
        with pytest.raises(PlanError, match=r"another user \(uid 12345\)"):
            use(path)

    @pytest.mark.parametrize("content", [b"x", b"hello, world", b"\0" * 88, b"\x7fELF" + b"\1" * 200])
    def test_foreign_file(self, path, use, content):
        path.write_bytes(content)
        path.chmod(0o600)
        with pytest.raises(PlanError) as caught:
            use(path)
        assert path.read_bytes() == content
        assert "\n" not in str(caught.value)
        assert caught.value.next_step


@pytest.mark.parametrize("size", [0, 16, 30, 87])
def test_truncated(path, size):
    write_plan(path, PLAN)
    os.truncate(path, size)
    with pytest.raises(PlanError, match="cut short"):
        read_plan(path)
    assert write_plan(path, PLAN).pinned_bytes == read_plan(path).pinned_bytes


@pytest.mark.parametrize("offset", [0, 4, 20, 24, 32, 50, 80, 87])
def test_damaged_anywhere(path, offset):
    write_plan(path, PLAN)
    data = bytearray(path.read_bytes())
    data[offset] ^= 2
    path.write_bytes(data)
    with pytest.raises(PlanError, match="half a plan"):
        read_plan(path)


def test_writer_that_died_half_way(path):
    generation = write_plan(path, PLAN).generation
    data = bytearray(path.read_bytes())
    data[24] |= 1  # the sequence stayed odd
    path.write_bytes(data)
    with pytest.raises(PlanError, match="half a plan"):
        read_plan(path)
    after = write_plan(path, PLAN)
    assert after.generation == generation + 1
    assert read_plan(path) == after


def test_unknown_version_or_layout(path):
    import zlib

    write_plan(path, PLAN)
    for offset in (16, 20):
        data = bytearray(path.read_bytes())
        data[offset] = 9
        data[-4:] = struct.pack("=I", zlib.crc32(data[:-4]))
        path.write_bytes(data)
        with pytest.raises(PlanError, match="unknown here"):
            read_plan(path)


def test_reader_never_sees_half_a_plan(path):
    write_plan(path, Plan(1, 2, Layout(1), 7, 11, 13, 17))
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path), "1.5"], cwd=ROOT)
    n_reads, generations = 0, set()
    with path.open("rb") as file, mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ) as mapped:
        words = memoryview(mapped).cast("q")
        while writer.poll() is None:
            plan = read_plan(path)
            k, w = struct.unpack("=ii", struct.pack("=q", words[0]))
            assert w == k + 1
            k = plan.k
            assert plan == Plan(k, k + 1, Layout(k % 3), k * 7, k * 11, k * 13, k * 17, plan.generation)
            n_reads += 1
            generations.add(plan.generation)
        words.release()
    assert writer.returncode == 0
    assert n_reads > 100
    assert len(generations) > 20


def test_two_writers_lose_no_generation(path):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(path), "0.5"], cwd=ROOT) for _ in range(2)]
    assert [writer.wait() for writer in writers] == [0, 0]
    plan = read_plan(path)
    assert plan.generation > plan.k  # the other one's writes are counted too


def test_locked_by_somebody(path, monkeypatch):
    import fcntl

    monkeypatch.setattr("runtime.plans.file.LOCK_WAIT_S", 0.01)
    write_plan(path, PLAN)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(PlanError, match="locked"):
            write_plan(path, PLAN)
        assert read_plan(path).k == 3


def test_default_path(monkeypatch, tmp_path):
    assert default_plan_path().name == f"h2o-plan-{os.geteuid()}.bin"
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) != "/dev/shm")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_plan_path().parent == tmp_path
    monkeypatch.setenv("XDG_RUNTIME_DIR", "")
    assert default_plan_path().parent.is_dir()


def test_a_budget_of_a_whole_limit_is_no_absurd_one():
    """The kernel rounds a limit of 122 MB down to whole pages."""
    Plan(0, 1, budget_bytes=122_000_000).check(4, 121_999_360)
    with pytest.raises(PlanError, match="is more than the"):
        Plan(0, 1, budget_bytes=122_004_096).check(4, 121_999_360)
