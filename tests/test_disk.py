import os
import threading
import time

import pytest

from profiler import disk
from profiler.awake import Computing
from profiler.disk import Arrival, ChunkReader, Way
from runtime.errors import DiskError
from runtime.llama.model_file import ModelFile
from runtime.memory import Region, view
from runtime.sizes import MIB, PAGE
from runtime.weights import files as aligned_io
from runtime.weights.files import DIRECT, WeightFiles

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

    mode = DIRECT

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
    seconds = disk.group_seconds(model, files, Way(MIB // 4, 2))
    files.close()
    assert len(seconds) == model.n_layers + 1
    assert all(s >= 0 for s in seconds)
    assert sum(seconds) > 0


def test_group_seconds_end_when_told(model):
    files = FakeFiles()
    disk.group_seconds(model, files, Way(MIB // 4, 2), lambda: False)
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


USUAL, OTHER = disk.USUAL, Way(disk.USUAL.request_bytes, 8)


class FakeSearch(disk._Search):
    """A search whose samples come from lists; `computing` are those taken beside a computation."""

    def __init__(self, model, samples, computing=None):
        super().__init__(model, WeightFiles(model.paths), Region(16 * MIB))
        self.samples = {way: iter(rates) for way, rates in samples.items()}
        self.computing = {way: iter(rates) for way, rates in (computing or {}).items()}
        self.beside, self.counts = False, []

    def in_flight(self, way):
        return way.request_bytes * way.depth

    def sample(self, way):
        self.counts.append(way)
        return next((self.computing if self.beside else self.samples).get(way, iter(())), 1.0)

    def close(self):
        self.files.close()
        self.buffer.free()


@pytest.fixture
def best(model, monkeypatch):
    """The way a search with these samples ends with: one of each way first (USUAL twice), then those in turns."""

    def run(samples, computing=None, speeds=None):
        fake = FakeSearch(model, samples, computing)

        class Counted:
            def __init__(self, n_threads):
                fake.beside = True

            def __enter__(self):
                return self

            def __exit__(self, *error):
                fake.beside = False

            def speed(self):
                return (speeds or {}).get(fake.counts[-1], 1)

        monkeypatch.setattr(disk, "Computing", Counted)
        try:
            return fake.best(1)
        finally:
            fake.close()

    return run


MANY = 1e12  # a disk fast enough for every way


def test_the_usual_way_stays_where_nothing_is_better(best):
    assert best({USUAL: [MANY] * 6}) == USUAL


def test_a_way_that_is_better_again_and_again_is_chosen(best):
    assert best({USUAL: [MANY] * 6, OTHER: [2 * MANY] * 6}, {USUAL: [MANY] * 5, OTHER: [2 * MANY] * 5}) == OTHER


def test_a_gain_that_is_lost_in_the_pipeline_is_no_reason(best):
    assert best({USUAL: [MANY] * 6, OTHER: [1.1 * MANY] * 6}, {USUAL: [MANY] * 5, OTHER: [1.1 * MANY] * 5}) == USUAL


def test_a_lucky_sample_is_no_reason(best):
    usual, other = [MANY] * 6, [9 * MANY, MANY, MANY, 9 * MANY, MANY, MANY]
    assert best({USUAL: usual, OTHER: other}) == USUAL


def test_what_is_better_by_less_than_the_noise_is_no_reason(best):
    usual = [MANY, *(MANY * f for f in (0.9, 1.0, 1.4, 0.8, 1.3))]
    other = [2 * MANY, *(MANY * f for f in (1.1, 1.2, 1.5, 0.7, 1.3))]
    assert best({USUAL: usual, OTHER: other}) == USUAL


def test_a_way_that_is_slower_beside_a_computation_is_not_chosen(best):
    samples = {USUAL: [MANY] * 6, OTHER: [2 * MANY] * 6}
    assert best(samples, {USUAL: [MANY] * 5, OTHER: [MANY] * 5}) == USUAL


def test_a_way_that_slows_the_computation_is_not_chosen(best):
    samples = {USUAL: [MANY] * 6, OTHER: [2 * MANY] * 6}
    beside = {USUAL: [MANY] * 5, OTHER: [2 * MANY] * 5}
    assert best(samples, beside, {USUAL: 100, OTHER: 80}) == USUAL


def test_on_a_disk_too_slow_for_samples_nothing_else_is_tried(model):
    fake = FakeSearch(model, {})
    assert fake.best(1) == USUAL
    assert set(fake.counts) == {USUAL}
    fake.close()


def test_ways_are_compared_in_turns(model):
    fake = FakeSearch(model, {})
    assert {len(rates) for rates in fake.turns([USUAL, OTHER]).values()} == {disk.TURNS}
    assert fake.counts[:4] == [USUAL, OTHER, OTHER, USUAL]
    fake.close()


def test_search_reads_within_its_buffer(model, monkeypatch):
    monkeypatch.setattr(disk, "SAMPLE_S", 0.02)
    shares = []
    found = disk.search(model, n_threads=1, buffer_bytes=2 * MIB, progress=shares.append)
    assert found.best in [Way(p.request_bytes, p.depth) for p in found.points]
    assert {p.mode for p in found.points} == {found.mode}
    most = max(piece.span_bytes for piece in model.pieces)
    assert all(min(p.request_bytes, most) * p.depth <= 2 * MIB for p in found.points if p.bytes_per_s.n == 1)
    assert next(p for p in found.points if (p.request_bytes, p.depth) == USUAL).bytes_per_s.n == disk.TURNS
    assert found.bytes_per_s > 0
    assert shares == sorted(shares)


def test_search_without_direct_reads_says_so(model, monkeypatch):
    monkeypatch.setattr(disk, "SAMPLE_S", 0.02)
    monkeypatch.setattr(aligned_io, "_open_direct", lambda *_arguments: None)
    found = disk.search(model, n_threads=1)
    assert found.mode == "buffered" and {point.mode for point in found.points} == {"buffered"}
    assert "no direct reads" in found.notes[0]


def test_computing_goes_on_beside():
    with Computing(1) as computing:
        computing.speed()
        time.sleep(0.05)
        assert computing.speed() > 0
