import os
import threading

import pytest

from profiler import disk
from profiler.disk import Arrival, ChunkReader, Way
from profiler.model_profile import Spread
from runtime.aligned_io import BUFFERED, DIRECT, WeightFiles
from runtime.errors import DiskError
from runtime.memory import Region, view
from runtime.model_file import ModelFile
from runtime.sizes import MIB, PAGE

BIG = "llama:layers=6,dim=512,ffn=1024,heads=4,kv_heads=2,vocab=2048,ctx=512"


@pytest.fixture(scope="module")
def model(tiny_model):
    return ModelFile.open(tiny_model(BIG))


@pytest.fixture
def buffer():
    region = Region(4 * MIB)
    yield region
    region.free()


class FakeFiles:
    """Records what is read; fails at one offset."""

    def __init__(self, fail_at=-1):
        self.reads, self.threads, self.fail_at = [], set(), fail_at

    def read(self, file, offset, address, n_bytes):
        if offset == self.fail_at:
            raise DiskError("the disk is gone")
        self.threads.add(threading.get_ident())
        self.reads.append((file, offset, address, n_bytes))


def spans(model):
    return [(p.tensor.file, *p.span) for p in model.pieces]


# --- requests


def test_chunks_cover_every_piece_once_in_the_engines_order(model):
    for request in (MIB // 4, MIB, 64 * MIB):
        chunks = list(disk.weight_chunks(model, request))
        assert sum(c.n_bytes for c in chunks) == sum(end - start for _, start, end in spans(model))
        assert max(c.n_bytes for c in chunks) <= request
        assert [c.group for c in chunks] == sorted(c.group for c in chunks)
        assert all(c.offset % PAGE == 0 and c.n_bytes % PAGE == 0 for c in chunks)


def test_chunks_from_the_middle_go_around(model):
    whole = list(disk.weight_chunks(model, MIB))
    turned = list(disk.weight_chunks(model, MIB, first_piece=5))
    assert sorted(turned) == sorted(whole)
    assert turned != whole


def test_one_sample_of_a_large_file_reads_nothing_twice(model, monkeypatch):
    monkeypatch.setattr(disk, "ENOUGH_BYTES", 1)
    assert disk.cycles(model) == 1
    chunks = list(disk.weight_chunks(model, MIB)) * disk.cycles(model)
    assert len(set(chunks)) == len(chunks)


def test_small_models_are_read_several_times(model):
    n_bytes = sum(end - start for _, start, end in spans(model))
    assert disk.ENOUGH_BYTES <= disk.cycles(model) * n_bytes < disk.ENOUGH_BYTES + n_bytes


# --- reading


@pytest.mark.parametrize("depth", [1, 4])
def test_reader_reads_all_chunks_each_thread_into_its_own_part(model, buffer, depth):
    files = FakeFiles()
    chunks = list(disk.weight_chunks(model, MIB))
    arrivals = ChunkReader(files, buffer).read(chunks, depth)
    assert sorted((f, o, n) for f, o, _, n in files.reads) == sorted((c.file, c.offset, c.n_bytes) for c in chunks)
    assert sum(a.n_bytes for a in arrivals) == sum(c.n_bytes for c in chunks)
    assert {address for _, _, address, _ in files.reads} <= {buffer.address + i * MIB for i in range(4)}


def test_reader_stops_at_the_time_limit(model, buffer):
    assert ChunkReader(FakeFiles(), buffer).read(disk.weight_chunks(model, MIB), 2, limit_s=-1.0) == []


def test_reader_hands_over_a_failure(model, buffer):
    chunks = list(disk.weight_chunks(model, MIB))
    with pytest.raises(DiskError, match="gone"):
        ChunkReader(FakeFiles(fail_at=chunks[3].offset), buffer).read(chunks, 2)


def test_reader_brings_the_files_bytes(model, buffer):
    files = WeightFiles(model.paths, DIRECT)
    chunk = list(disk.weight_chunks(model, MIB // 4))[4]
    ChunkReader(files, buffer).read([chunk], 1)
    files.close()
    with open(model.paths[0], "rb") as file:
        file.seek(chunk.offset)
        assert bytes(view(buffer.address, chunk.n_bytes)) == file.read(chunk.n_bytes)


def test_group_seconds_add_up_and_belong_to_the_groups(model):
    files = WeightFiles(model.paths, DIRECT)
    seconds = disk.group_seconds(model, files, Way("direct", MIB // 4, 2))
    files.close()
    assert len(seconds) == model.n_layers + 1
    assert all(s >= 0 for s in seconds)
    assert sum(seconds) > 0


def test_group_seconds_end_when_told(model):
    files = FakeFiles()
    disk.group_seconds(model, files, Way("direct", MIB // 4, 2), lambda: False)
    assert files.reads == []


def test_row_seconds_read_whole_pages_inside_the_table(model):
    files = FakeFiles()
    assert len(disk.row_seconds(model, files, 8)) == 8
    table = model.row_tables[0]
    for _, offset, _, n_bytes in files.reads:
        assert offset % PAGE == 0 and n_bytes % PAGE == 0
        assert table.offset - PAGE < offset < table.offset + table.n_bytes


# --- rates


def test_rate_leaves_the_ramp_out():
    burst = [Arrival(0.01, 100, 0)] + [Arrival(0.1 * i, 10, 0) for i in range(1, 11)]
    assert disk.rate_of(burst, 0.0, ramp_s=0.05) == pytest.approx(100 / 0.99)


def test_rate_of_one_arrival():
    assert disk.rate_of([Arrival(2.0, 100, 0)], 1.0) == pytest.approx(100)


# --- the page cache


def test_cold_is_seen_and_made(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(MIB))
    fd = os.open(path, os.O_RDONLY)
    assert disk.cached_bytes(fd, 0, MIB) == MIB
    disk.make_cold(fd)
    after = disk.cached_bytes(fd, 0, MIB)
    os.close(fd)
    if after == MIB:
        pytest.skip("this file system keeps its files in memory")
    assert after == 0


def test_both_ways_to_look_agree(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(bytes(MIB))
    fd = os.open(path, os.O_RDWR)
    by_call = disk._cachestat(fd, 0, MIB)
    assert disk._mincore(fd, 0, MIB) == MIB
    assert by_call in (None, MIB)
    os.close(fd)


def test_model_becomes_cold(model):
    model.paths[0].read_bytes()
    if not disk.is_cold(model):
        pytest.skip("this file system keeps its files in memory")
    fd = os.open(model.paths[0], os.O_RDONLY)
    assert disk.cached_bytes(fd, 0, model.n_bytes) == 0
    os.close(fd)


# --- the search


def rates(**by_way):
    run = disk._Search.__new__(disk._Search)
    run.rates = {
        Way(name.split("_")[0], int(name.split("_")[1]), int(name.split("_")[2])): r for name, r in by_way.items()
    }
    return run


def test_best_prefers_less_in_flight_when_rates_are_the_same():
    run = rates(direct_4096_8=[100.0], direct_1024_2=[98.0], direct_1024_1=[90.0])
    assert run.best() == Way("direct", 1024, 2)


def test_best_prefers_direct_to_buffered():
    assert rates(buffered_1024_2=[100.0], direct_1024_2=[99.0]).best().mode == "direct"


def test_best_takes_the_median_of_the_ways_measured_most():
    run = rates(direct_1024_1=[500.0], direct_1024_2=[90.0, 91.0, 400.0], direct_1024_4=[100.0, 101.0, 99.0])
    assert run.best() == Way("direct", 1024, 4)


def test_search_reads_within_its_buffer_and_time(model):
    shares = []
    found = disk.search(model, 2, buffer_bytes=2 * MIB, limit_s=2.0, progress=shares.append)
    assert found.best in [disk.way_of(point) for point in found.points]
    assert max(p.request_bytes * p.depth for p in found.points) <= 2 * MIB
    best = next(p for p in found.points if disk.way_of(p) == found.best)
    assert best.bytes_per_s.n == 2
    assert isinstance(best.bytes_per_s, Spread)
    assert best.bytes_per_s.minimum > 0
    assert shares == sorted(shares)


def test_search_without_direct_reads_says_so(model, monkeypatch):
    monkeypatch.setattr(disk, "WeightFiles", lambda paths, _mode: WeightFiles(paths, BUFFERED))
    found = disk.search(model, 1, limit_s=1.0)
    assert {point.mode for point in found.points} == {"buffered"}
    assert "no direct reads" in found.notes[0]


def test_search_skips_buffered_reads_of_a_file_that_stays_in_memory(model, monkeypatch):
    monkeypatch.setattr(disk, "is_cold", lambda _model: False)
    found = disk.search(model, 1, limit_s=1.0)
    if any(point.mode == "direct" for point in found.points):
        assert {point.mode for point in found.points} == {"direct"}
        assert "buffered reads were not measured" in found.notes[0]


def test_search_measures_something_however_little_time_there_is(model):
    assert disk.search(model, 1, limit_s=1e-6).points
