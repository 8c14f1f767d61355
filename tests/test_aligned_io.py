"""How weights are read: directly where that can be trusted, else without filling the page cache."""

from __future__ import annotations

import json
import os
import re
import sys
import time

import pytest
from cgroups import memory_limit
from engines import engine

from profiler.disk import cached_bytes, make_cold
from runtime.memory import Region, device_bytes_read, view
from runtime.plans.plan import Plan
from runtime.sizes import MB, MIB
from runtime.weights import files as aligned_io
from runtime.weights.files import BUFFERED, CACHED_BYTES, DIRECT, WeightFiles, has_direct_reads

SIZE = 8 * MIB


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "weights"
    path.write_bytes(os.urandom(SIZE))
    fd = os.open(path, os.O_RDONLY)
    make_cold(fd)
    if cached_bytes(fd, 0, SIZE) != 0:
        pytest.skip("this file system keeps its files in memory")
    os.close(fd)
    return path


@pytest.fixture
def memory():
    region = Region(SIZE)
    yield region
    region.free()


def test_direct_reads_are_used_where_they_bring_the_files_bytes(data, memory):
    files = WeightFiles([data])
    assert files.mode == DIRECT and has_direct_reads([data])
    assert files.cached_bytes == 0
    files.read(0, 0, memory.address, SIZE)
    files.close()
    assert bytes(view(memory.address, SIZE)) == data.read_bytes()


@pytest.mark.parametrize("lie", ["other bytes", "none", "no such read"])
def test_direct_reads_that_lie_are_not_used(data, memory, monkeypatch, lie):
    """Some file systems take the flag and give other bytes, or refuse the read itself."""
    real = os.preadv

    def preadv(fd, parts, offset):
        if os.get_blocking(fd) and aligned_io.os.O_DIRECT & flags_of(fd):
            if lie == "no such read":
                raise OSError(22, "Invalid argument")
            n = real(fd, parts, offset)
            parts[0][0:1] = bytes([parts[0][0] ^ 1])
            return 0 if lie == "none" else n
        return real(fd, parts, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    files = WeightFiles([data])
    assert files.mode == BUFFERED
    files.read(0, 0, memory.address, SIZE)
    files.close()
    assert bytes(view(memory.address, SIZE)) == data.read_bytes()


def flags_of(fd):
    import fcntl

    return fcntl.fcntl(fd, fcntl.F_GETFL)


def test_buffered_reads_leave_nothing_and_never_hold_much(data, memory, monkeypatch):
    real, held = os.posix_fadvise, []
    fd = os.open(data, os.O_RDONLY)
    make_cold(fd)
    for offset in range(0, 2 * MIB, 4096):  # the kernel reads ahead of this, and marks where it would go on
        os.pread(fd, 4096, offset)
    time.sleep(0.2)
    files = WeightFiles([data], BUFFERED)

    def fadvise(of, offset, n_bytes, advice):
        held.append(cached_bytes(fd, 0, SIZE))
        real(of, offset, n_bytes, advice)

    monkeypatch.setattr(os, "posix_fadvise", fadvise)
    before = device_bytes_read()
    files.read(0, MIB, memory.address, 4 * MIB)
    delivered = device_bytes_read() - before
    assert max(held) <= CACHED_BYTES == files.cached_bytes
    assert delivered <= 4 * MIB
    assert cached_bytes(fd, 0, SIZE) == 0
    os.close(fd)
    files.close()
    assert bytes(view(memory.address, 4 * MIB)) == data.read_bytes()[MIB : 5 * MIB]


def test_read_ahead_that_others_have_begun_does_not_go_on(data, memory):
    """What they leave in the cache says where to go on; reads without read-ahead of their own would do so."""
    fd = os.open(data, os.O_RDONLY)
    make_cold(fd)
    files, held = WeightFiles([data], BUFFERED), []
    for n in range(6):
        os.pread(fd, MIB, 0) if n % 2 == 0 else None
        for offset in range(n * 4096, SIZE - MIB, MIB):
            files.read(0, offset, memory.address, MIB)
            held.append(cached_bytes(fd, offset + 2 * MIB, SIZE))
    assert cached_bytes(fd, 0, SIZE) <= 2 * MIB  # others' own
    assert max(held[-7:]) == 0
    os.close(fd)
    files.close()


def test_pages_of_buffered_reads_are_in_the_ledger(tiny_model, monkeypatch):
    path = tiny_model("llama")
    with engine(path, Plan(0, 1), n_threads=1, depth=3) as direct:
        assert "cache_bytes" not in direct.ledger.as_dict()
    monkeypatch.setattr(aligned_io, "_open_direct", lambda *_arguments: None)
    with engine(path, Plan(0, 1), n_threads=1, depth=3) as buffered:
        assert buffered.ledger.as_dict()["cache_bytes"] == 3 * CACHED_BYTES


RUN_BUFFERED = """
import sys
from runtime.weights import files as aligned_io
aligned_io._open_direct = lambda *_arguments: None
from h2o_cli.main import run_command
sys.exit(run_command(sys.argv[1:]))
"""


@pytest.mark.cgroup
def test_a_run_with_buffered_reads_stays_in_its_budget(tiny_model, tmp_path):
    """The limit of the group is far away, so nothing but the run itself keeps it small."""
    model = tiny_model("llama:layers=12,dim=512,ffn=1024,heads=4,kv_heads=2,vocab=2048,ctx=512")
    words = ["run", model, "-p", "Once upon a time", "-n", 24, "--temp", 0, "-t", 1, "--json", "-s", tmp_path / "plan"]
    command = [sys.executable, "-c", RUN_BUFFERED, *map(str, words), "-m"]

    def run(budget):
        with memory_limit(1000 * MB) as group:
            done = group.run([*command, str(budget)], env={**os.environ, "H2O_PROFILES": str(tmp_path)}, timeout=100)
            return done, group.peak_bytes, group.cached_bytes

    fd = os.open(model, os.O_RDONLY)
    refused, *_ = run(10)
    floor = int(re.search(r"-m (\d+)", refused.stderr).group(1))
    make_cold(fd)
    done, peak, left = run(floor + 2)
    assert done.returncode == 0, done.stderr
    ledger = json.loads(done.stdout)["ledger"]
    assert ledger["cache_bytes"] > 0 and ledger["resident_bytes"] < 20 * MB  # of 56
    of_model = cached_bytes(fd, 0, model.stat().st_size)
    os.close(fd)
    assert of_model < 2 * MB  # the header
    # pages of libraries that another test has dropped meanwhile are charged to whoever reads them first
    assert peak - max(0, left - of_model) <= (floor + 2) * MB
