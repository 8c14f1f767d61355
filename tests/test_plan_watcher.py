import os
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runtime.plans import watcher as plan_watcher
from runtime.plans.file import write_plan, write_source_plan
from runtime.plans.plan import Layout, Plan
from runtime.plans.watcher import PlanWatcher

MODEL = 42
ROOT = Path(__file__).parents[1]


def plan(k, model_hash=MODEL):
    return Plan(k, 2, Layout.EVEN, model_hash=model_hash)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.bin"


@pytest.fixture
def watcher(path, monkeypatch):
    monkeypatch.setattr(plan_watcher, "LOOK_EVERY_S", 0.0)
    watcher = PlanWatcher(path, MODEL)
    yield watcher
    watcher.close()


def test_a_plan_is_reported_once(path, watcher):
    written = write_plan(path, plan(1))
    assert watcher.poll() == written
    assert watcher.poll() is None
    written = write_plan(path, plan(2))
    assert watcher.poll() == written
    assert watcher.poll() is None
    assert watcher.take_problem() is None


def test_a_file_that_appears_later(path, watcher):
    assert watcher.poll() is None
    assert watcher.problem is None
    write_plan(path, plan(1))
    assert watcher.poll().k == 1


def test_the_plan_already_in_use_is_no_news(path, monkeypatch):
    monkeypatch.setattr(plan_watcher, "LOOK_EVERY_S", 0.0)
    used = write_plan(path, plan(1))
    watcher = PlanWatcher(path, MODEL, used.generation)
    assert watcher.poll() is None
    write_plan(path, plan(2))
    assert watcher.poll().k == 2
    watcher.close()


def test_a_replaced_file(path, watcher, tmp_path):
    for _ in range(3):
        write_plan(path, plan(1))
    assert watcher.poll().generation == 3
    write_plan(tmp_path / "new", plan(5))
    os.replace(tmp_path / "new", path)
    assert watcher.poll().k == 5
    assert watcher.poll() is None


def test_a_deleted_and_recreated_file(path, watcher):
    for _ in range(3):
        write_plan(path, plan(1))
    assert watcher.poll().generation == 3
    path.unlink()
    assert watcher.poll() is None
    write_plan(path, plan(6))
    assert watcher.poll().k == 6


def test_the_same_plan_in_a_recreated_file_is_no_news(path, watcher):
    write_plan(path, plan(1))
    assert watcher.poll().k == 1
    path.unlink()
    assert watcher.poll() is None
    write_plan(path, plan(1))
    assert watcher.poll() is None


def test_a_plan_for_another_model_is_told_once(path, watcher):
    write_plan(path, plan(1))
    assert watcher.poll().k == 1
    write_plan(path, plan(2, model_hash=7))
    assert watcher.poll() is None
    assert "another model" in watcher.take_problem()
    assert watcher.take_problem() is None
    write_plan(path, plan(3, model_hash=7))
    assert watcher.poll() is None
    assert watcher.take_problem() is None
    write_plan(path, plan(4))
    assert watcher.poll().k == 4


def test_plans_for_any_model(path, watcher):
    write_plan(path, plan(1, model_hash=0))
    assert watcher.poll().k == 1
    anything = PlanWatcher(path, 0)
    write_plan(path, plan(2, model_hash=7))
    assert anything.poll().k == 2
    anything.close()


def test_a_torn_plan_is_told_when_it_stays_so(path, watcher, monkeypatch):
    write_plan(path, plan(1))
    assert watcher.poll().k == 1
    monkeypatch.setattr(plan_watcher, "LOOK_EVERY_S", 0.05)
    write_plan(path, plan(2))
    data = bytearray(path.read_bytes())
    data[24] |= 1
    path.write_bytes(data)
    assert watcher.poll() is None
    assert watcher.problem is None
    time.sleep(0.06)
    assert watcher.poll() is None
    assert "half a plan" in watcher.take_problem()
    assert watcher.poll() is None
    assert watcher.take_problem() is None
    write_plan(path, plan(3))
    assert watcher.poll().k == 3


def test_a_file_cut_short_does_not_hurt(path, watcher):
    write_plan(path, plan(1))
    assert watcher.poll().k == 1
    os.truncate(path, 0)
    assert watcher.poll() is None
    assert "cut short" in watcher.take_problem()
    write_plan(path, plan(2))
    assert watcher.poll().k == 2


def test_a_source_file(path, watcher):
    write_source_plan(path, 4, 3)
    assert watcher.poll() == Plan(4, 3)
    assert watcher.poll() is None
    write_source_plan(path, 5, 3)
    assert watcher.poll() == Plan(5, 3)
    path.write_bytes(struct.pack("=ii", -3, 0))
    assert watcher.poll() is None
    assert "not a plan" in watcher.take_problem()
    write_plan(path, plan(6))
    assert watcher.poll().k == 6


def test_a_source_writer_that_truncates_first(path, watcher):
    for k in (1, 2, 3):
        write_plan(path, plan(k))
    assert watcher.poll().k == 3
    path.write_bytes(struct.pack("=ii", 9, 1))
    assert watcher.poll() == Plan(9, 1)


def test_symlink_and_foreign_file(path, watcher, tmp_path):
    path.symlink_to(tmp_path / "x")
    assert watcher.poll() is None
    assert "symbolic link" in watcher.take_problem()
    assert watcher.poll() is None
    assert watcher.take_problem() is None
    path.unlink()
    path.write_bytes(b"something else entirely, longer than eight bytes" * 3)
    path.chmod(0o600)
    assert watcher.poll() is None
    assert "not a plan file" in watcher.take_problem()
    path.unlink()
    write_plan(path, plan(1))
    assert watcher.poll().k == 1


def test_mode_changed_while_open(path, watcher):
    write_plan(path, plan(1))
    assert watcher.poll().k == 1
    path.chmod(0o666)
    assert watcher.poll() is None
    assert "other users" in watcher.take_problem()
    write_time = path.stat().st_mtime_ns
    assert watcher.poll() is None
    path.chmod(0o600)
    write_plan(path, plan(2))
    assert watcher.poll().k == 2
    assert path.stat().st_mtime_ns >= write_time


def test_the_folder_is_looked_at_only_now_and_then(path, monkeypatch):
    looks = []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *args, **kwargs: looks.append(1) or real(*args, **kwargs))
    watcher = PlanWatcher(path, MODEL)
    for _ in range(1000):
        assert watcher.poll() is None
    assert len(looks) <= 3
    watcher.close()


def test_polling_is_cheap(path):
    write_plan(path, plan(1))
    watcher = PlanWatcher(path, MODEL)
    assert watcher.poll().k == 1
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            watcher.poll()
        best = min(best, (time.perf_counter() - start) / 500)
    assert best < 10e-6
    watcher.close()


def test_against_a_busy_writer(path, watcher):
    code = (
        "import sys\nfrom runtime.plans.plan import Plan\nfrom runtime.plans.file import write_plan\n"
        f"for i in range(20000): write_plan(sys.argv[1], Plan(i, i + 1, pinned_bytes=i * 7, model_hash={MODEL}))"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT)
    seen = []
    while writer.poll() is None:
        new = watcher.poll()
        if new:
            assert (new.w, new.pinned_bytes) == (new.k + 1, new.k * 7)
            seen.append(new.generation)
    last = watcher.poll()
    seen += [last.generation] if last else []
    assert writer.returncode == 0
    assert seen == sorted(set(seen))
    assert seen[-1] == 20000
    assert len(seen) > 20
