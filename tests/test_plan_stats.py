"""The figures a run publishes beside the plan file, and plans tried on a running process."""

import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from planner import running_process
from planner.running_process import Overtaken, RunningProcess
from runtime.answer import plan_stats
from runtime.answer.plan_stats import StatsWriter
from runtime.errors import PlanError
from runtime.plans import stats as stats_file
from runtime.plans.file import read_plan, write_plan
from runtime.plans.plan import Layout, Plan
from runtime.plans.stats import RECORD, StatsReader, decode_stats, stats_path

ROOT = Path(__file__).parents[1]
MODEL = 42
# A process that follows a plan file; argv: plan file, seconds per pass, passes[, floor, bytes it grows by with a plan].
# A resident layer takes 1/10 off a pass.
PROCESS = """
import sys, time
from types import SimpleNamespace
from runtime.answer.plan_stats import StatsWriter
from runtime.plans.stats import stats_path
from runtime.plans.watcher import PlanWatcher
path, pass_s, n = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
floor, growth = [*map(int, sys.argv[4:]), 0, 0][:2]
engine = SimpleNamespace(
    counters=SimpleNamespace(passes=0, decodes=0, seconds=0.0, bytes_read=0, wait_s=0.0),
    ledger=SimpleNamespace(fixed_bytes=100, window_bytes=20, resident_bytes=30),
    layout=SimpleNamespace(floor_bytes=floor),
    n_past=0,
)
writer, watcher = StatsWriter(stats_path(path), 42, print), PlanWatcher(path, 42)
generation, refused, k, first = 0, 0, 0, False
for i in range(n):
    plan = watcher.poll()
    if plan and plan.k > 9:
        refused = plan.generation
    elif plan:
        generation, k, first = plan.generation, plan.k, True
        engine.ledger.fixed_bytes = 100 + growth
    writer.publish(engine, 1000, generation, refused)
    if i == 0:
        print("ready", flush=True)
    seconds = pass_s * (1 - k / 10) + first * 10 * pass_s  # the first pass loads what is resident
    first = False
    time.sleep(pass_s)
    engine.counters.passes += 1
    engine.counters.decodes += 1
    engine.n_past += 1
    engine.counters.seconds += seconds
    engine.counters.wait_s += seconds / 2
    engine.counters.bytes_read += 1000
writer.close()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "plan.bin"


@pytest.fixture
def engine():
    counters = SimpleNamespace(passes=0, decodes=0, seconds=0.0, bytes_read=0, wait_s=0.0)
    ledger = SimpleNamespace(fixed_bytes=100, window_bytes=20, resident_bytes=30)
    layout = SimpleNamespace(floor_bytes=7_000_000)
    return SimpleNamespace(counters=counters, ledger=ledger, layout=layout, n_past=0)


@pytest.fixture
def writer(path, monkeypatch):
    monkeypatch.setattr(plan_stats, "PUBLISH_EVERY_S", 0.0)
    notes = []
    writer = StatsWriter(stats_path(path), MODEL, notes.append)
    writer.notes = notes
    yield writer
    writer.close()


@pytest.fixture
def process(path):
    """process(pass_s, n_passes): a process that follows the plan file."""
    started = []

    def start(pass_s=0.005, n=100000):
        one = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(path), str(pass_s), str(n)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        started.append(one)
        assert one.stdout.readline() == "ready\n"
        return one

    yield start
    for one in started:
        one.kill()
        one.wait()
        one.stdout.close()


def make_pass(engine, seconds=0.5, tokens=1, decode=True):
    engine.counters.passes += 1
    engine.counters.decodes += decode
    engine.counters.seconds += seconds
    engine.counters.wait_s += seconds / 2
    engine.counters.bytes_read += 1000
    engine.n_past += tokens


# --- the record ---------------------------------------------------------------------------------------------------


def test_what_is_published_is_read(path, writer, engine):
    writer.publish(engine, 1000, 3)
    for _ in range(4):
        make_pass(engine)
        writer.publish(engine, 1000, 3, 2)
    seen = StatsReader(stats_path(path)).read()
    assert (seen.pid, seen.generation, seen.refused_generation, seen.model_hash) == (os.getpid(), 3, 2, MODEL)
    assert (seen.budget_bytes, seen.fixed_bytes, seen.available_bytes) == (1000, 100, 900)
    assert (seen.window_bytes, seen.resident_bytes, seen.floor_bytes) == (20, 30, 7_000_000)
    assert (seen.passes, seen.tokens, seen.pass_s, seen.wait_s, seen.bytes_read) == (4, 4, 2.0, 1.0, 4000)
    assert abs(seen.written_s - time.time()) < 5
    status = stats_path(path).stat()
    assert (stat.S_IMODE(status.st_mode), status.st_size) == (0o600, RECORD.size)
    assert RECORD.size == 144


def test_short_passes_are_published_together(path, writer, engine, monkeypatch):
    monkeypatch.setattr(plan_stats, "PUBLISH_EVERY_S", 60.0)
    reader = StatsReader(stats_path(path))
    seen = []
    for generation in (3, 3, 3, 4):
        writer.publish(engine, 1000, generation)
        make_pass(engine)
        seen.append((reader.read().generation, reader.read().passes))
    writer._next_s = 0.0
    writer.publish(engine, 1000, 4)
    assert seen == [(3, 0), (3, 0), (3, 0), (4, 0)]
    assert reader.read().passes == 1


def test_sums_begin_anew_with_a_plan(path, writer, engine):
    for generation, passes in ((1, 0), (1, 1), (2, 0), (2, 1), (2, 2)):
        writer.publish(engine, 1000, generation)
        seen = StatsReader(stats_path(path)).read()
        assert (seen.generation, seen.passes) == (generation, passes)
        make_pass(engine)


def test_prompts_do_not_count_and_drafts_do(path, writer, engine):
    writer.publish(engine, 1000, 1)
    make_pass(engine, seconds=9.0, tokens=5, decode=False)
    writer.publish(engine, 1000, 1)
    make_pass(engine, tokens=3)
    writer.publish(engine, 1000, 1)
    make_pass(engine, tokens=20)
    writer.publish(engine, 1000, 1)
    seen = StatsReader(stats_path(path)).read()
    assert (seen.passes, seen.tokens, seen.pass_s) == (2, 23, 1.0)


def test_nobody_there(path, writer, engine):
    reader = StatsReader(stats_path(path))
    assert reader.read() is None
    writer.publish(engine, 1000, 1)
    assert reader.read() is not None
    left = stats_path(path).read_bytes()
    writer.close()
    assert not stats_path(path).exists()
    stats_path(path).write_bytes(left)  # as a process that was killed leaves it
    stats_path(path).chmod(0o600)
    assert reader.read() is None


def test_only_one_process_publishes(path, writer, engine, monkeypatch):
    monkeypatch.setattr(stats_file, "LOOK_EVERY_S", 0.0)
    other = StatsWriter(stats_path(path), 7, writer.notes.append)
    writer.publish(engine, 1000, 1)
    other.publish(engine, 1000, 1)
    assert StatsReader(stats_path(path)).read().model_hash == MODEL
    writer.close()
    other.publish(engine, 1000, 1)
    assert StatsReader(stats_path(path)).read().model_hash == 7
    other.close()
    assert writer.notes == []


def test_a_removed_file_comes_back(path, writer, engine, monkeypatch):
    monkeypatch.setattr(stats_file, "LOOK_EVERY_S", 0.0)
    writer.publish(engine, 1000, 1)
    stats_path(path).unlink()
    writer.publish(engine, 1000, 1)
    assert StatsReader(stats_path(path)).read().generation == 1


@pytest.mark.parametrize("unsafe", ["symlink", "folder", "fifo", "mode", "foreign"])
def test_unsafe_files_are_left_alone_and_told_once(path, writer, engine, unsafe, tmp_path, monkeypatch):
    monkeypatch.setattr(stats_file, "LOOK_EVERY_S", 0.0)
    file = stats_path(path)
    target = tmp_path / "target"
    target.write_bytes(b"mine")
    if unsafe == "symlink":
        file.symlink_to(target)
    elif unsafe == "folder":
        file.mkdir()
    elif unsafe == "fifo":
        os.mkfifo(file, 0o600)
    else:
        file.write_bytes(b"hello" * 50 if unsafe == "foreign" else b"")
        file.chmod(0o666 if unsafe == "mode" else 0o600)
    for _ in range(3):
        writer.publish(engine, 1000, 1)
    assert len(writer.notes) == 1
    assert "--live" in writer.notes[0]
    assert target.read_bytes() == b"mine"
    if unsafe == "foreign":
        assert file.read_bytes() == b"hello" * 50
    if unsafe in ("symlink", "folder", "fifo", "mode"):
        with pytest.raises(PlanError):
            StatsReader(file).read()


def test_a_missing_folder_is_told_once(tmp_path, engine):
    notes = []
    writer = StatsWriter(tmp_path / "no" / "plan.bin.stats", MODEL, notes.append)
    writer.publish(engine, 1000, 1)
    writer.publish(engine, 1000, 1)
    assert len(notes) == 1


def test_damaged_records(path, writer, engine):
    writer.publish(engine, 1000, 1)
    data = stats_path(path).read_bytes()
    for i in range(len(data)):
        broken = bytearray(data)
        broken[i] ^= 0x10
        with pytest.raises(PlanError):
            decode_stats(bytes(broken), path)
    with pytest.raises(PlanError, match="cut short"):
        decode_stats(data[:100], path)


def test_publishing_is_cheap(path, writer, engine):
    best = 1.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(500):
            make_pass(engine)
            writer.publish(engine, 1000, 1)
        best = min(best, (time.perf_counter() - start) / 500)
    assert best < 20e-6


def test_records_are_never_mixed(path, process):
    process(pass_s=0.0)
    reader = StatsReader(stats_path(path))
    seen = 0
    end = time.monotonic() + 1.0
    while time.monotonic() < end:
        stats = reader.read()
        assert stats.bytes_read == 1000 * stats.passes
        assert stats.wait_s == pytest.approx(stats.pass_s / 2)
        seen += 1
    assert seen > 100


# --- plans tried on a process ---------------------------------------------------------------------------------------


def test_measuring_a_plan(path, process, monkeypatch):
    """Each plan is measured apart from the one before, without the pass that loads what it keeps resident."""
    monkeypatch.setattr(running_process, "MEASURE_LEAST_S", 0.02)
    process(0.005)
    running = RunningProcess(path, MODEL, print)
    for k in (4, 0, 8):
        measured = running.measure(Plan(k, 1, model_hash=MODEL))
        assert measured.n_passes >= 3
        assert measured.pass_ms == pytest.approx(5 * (1 - k / 10))
        assert measured.wait_ms == pytest.approx(measured.pass_ms / 2)
        assert measured.bytes_read == 1000
    assert running.stats().available_bytes == 900


def test_a_plan_is_kept_without_being_written_twice(path, process):
    process()
    running = RunningProcess(path, MODEL, print)
    wanted = Plan(3, 1, Layout.EVEN, model_hash=MODEL)
    assert running.keep(wanted).generation == 1
    assert running.keep(wanted).generation == 1
    assert running.keep(Plan(4, 1, model_hash=MODEL)).generation == 2
    assert read_plan(path).k == 4


def test_no_process(path):
    with pytest.raises(PlanError, match="no running process follows") as caught:
        RunningProcess(path, MODEL, print)
    assert "h2o run" in caught.value.next_step


def test_another_model(path, process):
    process()
    with pytest.raises(PlanError, match="another model"):
        RunningProcess(path, 7, print)


def test_a_process_that_ends(path, process):
    process(0.005, 60)
    running = RunningProcess(path, MODEL, print)
    with pytest.raises(PlanError, match="has ended"):
        for k in range(9):
            running.measure(Plan(k, 1, model_hash=MODEL))


def test_a_refused_plan(path, process):
    process()
    running = RunningProcess(path, MODEL, print)
    with pytest.raises(PlanError, match="cannot use"):
        running.measure(Plan(10, 1, model_hash=MODEL))


def test_another_writer(path, process):
    process()

    def write_two(where, plan):
        written = write_plan(where, plan)
        write_plan(where, Plan(1, 2, model_hash=MODEL))
        return written

    running = RunningProcess(path, MODEL, print, write=write_two)
    with pytest.raises(Overtaken, match="another plan"):
        running.measure(Plan(3, 1, model_hash=MODEL))


def test_a_process_that_makes_no_tokens(path, writer, engine, monkeypatch):
    monkeypatch.setattr(running_process, "TELL_AFTER_S", 0.05)
    monkeypatch.setattr(running_process, "STALL_S", 0.2)
    writer.publish(engine, 1000, 0)
    notes = []
    running = RunningProcess(path, MODEL, notes.append)
    with pytest.raises(PlanError, match="made no tokens"):
        running.measure(Plan(3, 1, model_hash=MODEL))
    assert len(notes) == 1
    assert "waiting for process" in notes[0]
