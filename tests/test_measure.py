import math
import signal
import time

import pytest
from engines import engine

from h2o_cli.run_memory import measure_run_memory
from profiler import compute, disk, measure
from profiler.awake import Waker
from profiler.batches import MORE_POSITIONS, POSITIONS_EACH, measure_batch, untouched_bytes
from profiler.compute import ComputeTimes, layer_trace, measure_compute
from profiler.device import device_info
from profiler.measure import Measurement, default_settings, measure_memory
from profiler.model_profile import DiskProfile, Spread, decode_profile, save_profile
from profiler.release import resident_release, slot_release
from runtime.engine.trace import LayerTrace
from runtime.errors import BudgetError, Cancelled
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.residency import layer_bytes, smallest_window, streamable_bytes
from runtime.sizes import MB

DISK = DiskProfile(Spread(1e9, 0.0, 1, 1e9, 1e9), "direct", 2**21, 4, ())
TIMES = ComputeTimes([], [], Spread(1.0, 0.0, 1, 1.0, 1.0), 1, steady=True)


@pytest.fixture(autouse=True)
def short_search(monkeypatch):
    monkeypatch.setattr(disk, "SAMPLE_S", 0.02)


@pytest.fixture
def opened(tiny_model):
    def open_(arch):
        return ModelFile.open(tiny_model(arch))

    return open_


@pytest.mark.parametrize("arch", ["qwen2", "llama"])
def test_profile_of_a_small_model(tiny_model, tmp_path, arch):
    path = tiny_model(arch)
    file = ModelFile.open(path)
    shares = []
    profile = Measurement(path, 3, shares.append, n_threads=1).run()
    assert profile.model.hash == file.hash
    assert profile.model.tied_head == file.tied_head
    assert [layer.bytes for layer in profile.layers] == [layer_bytes(layer) for layer in file.layers]
    assert profile.head.bytes == layer_bytes(file.head)
    for unit in (*profile.layers, profile.head):
        for spread in (unit.io_s, unit.decode_compute_s, unit.prefill_compute_s, unit.release_s):
            assert spread.n == 3
            assert math.isfinite(spread.mean)
        assert unit.decode_compute_s.mean > 0
        assert unit.prefill_compute_s.mean > 0
    layers = profile.layers
    assert sum(x.prefill_compute_s.minimum for x in layers) > sum(x.decode_compute_s.minimum for x in layers)
    assert [batch.n_texts for batch in profile.batches] == [2, 16]
    two, sixteen = profile.batches
    assert two.pass_bytes < sixteen.pass_bytes and two.resident_s and sixteen.resident_s
    assert all(x.streamed_s.minimum > 0 and x.resident_s.minimum > 0 for x in (two, sixteen))
    assert profile.disk.bytes_per_s.n == 3
    assert profile.memory.min_window_bytes == smallest_window(file)
    assert shares[-1] == 1.0 and min(shares) >= 0
    save_profile(profile, tmp_path / "p.json")
    assert decode_profile((tmp_path / "p.json").read_bytes()) == profile


def test_head_is_timed_apart_from_the_layers_when_it_is_the_embedding(opened):
    file = opened("qwen2")
    assert file.tied_head
    with engine(file.path, n_threads=1) as e:
        trace = layer_trace(e, e._model, LayerTrace)
        with e.guests.joined_by(trace):
            for token in (1, 2, 3):
                e.forward([token])
    assert len(trace.seconds) == 2
    assert all(seconds > 0 for row in trace.seconds for seconds in row)


@pytest.mark.parametrize("spare_bytes", [0, 10 * MB])
def test_texts_that_are_measured_have_copies_of_their_own_where_there_is_room(opened, spare_bytes):
    texts = {"n_sequences": 3, "n_logits": 3, "n_ctx": 3 * POSITIONS_EACH, "n_ubatch": 128}
    with engine(opened("llama").path, n_threads=1, **texts) as e:
        measure_batch(e, 1, lambda: None, room_bytes=0, spare_bytes=spare_bytes)
        one, *others = (cells[:MORE_POSITIONS] for cells in e.attention.cells.values())
        assert len(one) == MORE_POSITIONS
        for cells in others:
            assert set(cells).isdisjoint(one) if spare_bytes else cells == one
            assert [e.attention.check_of(cell) for cell in cells] == [e.attention.check_of(cell) for cell in one]


def test_quiet_passes_compute_the_same(opened):
    file = opened("qwen2")
    with engine(file.path, n_threads=1) as e:
        e.forward([1, 2, 3])
        plain = e.logits().copy()
        e.truncate(0)
        waker = Waker(1)
        e.weights.quiet = waker.wake
        e.forward([1, 2, 3])
        waker.close()
        assert (e.logits() == plain).all()


def test_compute_fits_the_context_and_leaves_the_engine_as_it_was(opened):
    file = opened("llama")
    with engine(file.path, n_threads=1, n_ctx=256, n_ubatch=32) as e:
        steps = []
        times = measure_compute(e, e._model, 2, lambda: steps.append(1))
        assert times.prefill_tokens == 32
        assert len(times.decode) == len(times.prefill) == file.n_layers + 1
        assert len(steps) >= 6  # disturbed passes are made again
        assert e.guests._guests == [e.weights] and e.weights.quiet is None
        e.truncate(0)
        e.forward([1])


def test_decode_times_add_up_to_a_token_without_a_clock(bundled_model):
    """In one of some tries: other programs may use the processor."""
    with engine(bundled_model, n_threads=1) as e:
        for _ in range(6):
            times = measure_compute(e, e._model, 3, room_bytes=10**9)
            assert e.streamed_bytes == 0
            measured = sum(spread.mean for spread in times.decode) + times.overhead_s.mean
            plain = []
            for token in range(20):
                before = e.counters.seconds
                e.forward([token])
                plain.append(e.counters.seconds - before)
            if measured < 2 * sorted(plain)[10]:
                return
        raise AssertionError(f"{measured} s beside {plain}")


def test_a_token_is_timed_with_the_weights_that_there_is_room_for(bundled_model, monkeypatch):
    """Streaming costs time of its own: a head of many tiles took three times as long as in memory."""
    with engine(bundled_model, n_threads=1) as opened:
        total = streamable_bytes(opened.file)
        measure_compute(opened, opened._model, 1, room_bytes=total // 2)
        assert 0 < opened.streamed_bytes < total
        rooms, file = [], opened.file
        monkeypatch.setattr(measure, "measure_compute", lambda *_, room_bytes: rooms.append(room_bytes) or TIMES)
        measurement = Measurement(bundled_model, 1, budget_bytes=opened.layout.fixed_bytes + 50 * MB)
        measurement.settings = opened.settings
        measurement._compute(file, opened._model, DISK, MB)
    assert rooms[0] == pytest.approx(49 * MB, abs=8 * MB)


def test_without_a_budget_weights_get_what_is_there_beside_the_engine(bundled_model, monkeypatch):
    """Half of what the system would give was more than that: Gemma 3 270M was killed in a group of 150 MB."""
    rooms, copies = [], []
    monkeypatch.setattr(measure, "measure_compute", lambda *_, room_bytes: rooms.append(room_bytes) or TIMES)
    monkeypatch.setattr(measure, "measure_batch", lambda _engine, *_, room_bytes, **__: copies.append(room_bytes))
    with engine(bundled_model, n_threads=1) as opened:
        measurement, file = Measurement(bundled_model, 1), opened.file
        measurement.settings = opened.settings
        for left in (20 * MB, 400 * MB):
            monkeypatch.setattr(measure, "available_bytes", lambda n=left: opened.layout.fixed_bytes + n)
            measurement._compute(file, opened._model, DISK, MB)
            measurement._batches(file, opened._model, DISK, MB)
        most = (opened.layout.fixed_bytes + 400 * MB) // 2
    assert rooms == [pytest.approx(19 * MB, abs=8 * MB), most]
    assert all(room < 19 * MB for room in copies[:-2]) and copies[-2:] == [most, most]


def test_texts_whose_positions_do_not_fit_share_them(bundled_model, monkeypatch):
    """Without passes of 16 texts a batch of one was chosen where 16 gave five times the tokens."""
    spares = []
    measure_batch_ = measure.measure_batch

    def noting(engine, *arguments, spare_bytes, **memory):
        spares.append(spare_bytes)
        return measure_batch_(engine, *arguments, spare_bytes=spare_bytes, **memory)

    monkeypatch.setattr(measure, "measure_batch", noting)
    several = {"n_sequences": 16, "n_logits": 16, "n_ctx": 16 * POSITIONS_EACH}
    with engine(bundled_model, n_threads=1, **several) as opened:
        needed = opened.layout.fixed_bytes + MB
        least = needed - untouched_bytes(opened, 1)
        assert needed - least > 10 * MB
        for budget in (least - 8 * MB, (needed + least) // 2):
            measurement = Measurement(bundled_model, 1, budget_bytes=budget)
            measurement.settings = opened.settings
            measurement._expect(opened.file, 1e9)
            monkeypatch.setattr(measure, "N_TEXTS", (16,))
            batches = measurement._batches(opened.file, opened._model, DISK, MB)
            assert len(batches) == (budget > least)
    (spare,) = spares
    assert spare < 0


def test_copies_of_texts_may_take_what_the_budget_leaves(bundled_model, monkeypatch):
    spares = []
    monkeypatch.setattr(measure, "measure_batch", lambda _engine, *_, spare_bytes, **__: spares.append(spare_bytes))
    with engine(bundled_model, n_threads=1) as opened:
        measurement = Measurement(bundled_model, 1, budget_bytes=900 * MB)
        measurement.settings = opened.settings
        measurement._batches(opened.file, opened._model, DISK, MB)
    two, sixteen = spares
    assert 900 * MB > two > sixteen > 400 * MB  # keys and values of the texts are not in it


def test_memory_figures_agree_with_the_engines_ledger(opened):
    file = opened("llama")
    hollow = HollowModel(file)
    needs = measure_memory(file, hollow, default_settings(file))
    hollow.free()
    heads, head_dim, layers = 2, 64, 4
    assert needs.kv_bytes_per_token == 2 * 2 * heads * head_dim * layers
    memory = needs.memory
    assert memory.kv_bytes == needs.kv_bytes_per_token * memory.ctx_tokens
    parts = memory.process_bytes + memory.kv_bytes + memory.compute_bytes + memory.margin_bytes
    small = sum(t.n_bytes for layer in file.layers for t in layer.small)
    assert 0 <= needs.need_bytes - parts - small - memory.min_window_bytes <= 2_000_000


def test_a_budget_below_the_floor_is_refused_with_the_floor(tiny_model):
    with pytest.raises(BudgetError) as caught:
        Measurement(tiny_model("llama"), budget_bytes=20_000_000).run()
    assert caught.value.floor_bytes > 20_000_000
    assert f"-m {caught.value.floor_bytes // 10**6}" in caught.value.next_step


def test_a_budget_at_the_floor_works(tiny_model):
    path = tiny_model("llama")
    with pytest.raises(BudgetError) as caught:
        Measurement(path, budget_bytes=1).run()
    Measurement(path, 1, budget_bytes=caught.value.floor_bytes + 3_000_000).run()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.9])
def test_cancel_ends_the_work_in_every_part(tiny_model, share):
    def stop(done):
        if done >= share:
            run.cancel(signal.SIGINT)

    run = Measurement(tiny_model("llama"), 2, stop, n_threads=1)
    with pytest.raises(Cancelled) as caught:
        run.run()
    assert caught.value.exit_code == 130


def test_disturbed_passes_are_made_again_and_left_out(opened, monkeypatch):
    file = opened("llama")
    factors = iter((1, 1, 9, 1, 1))
    with engine(file.path, n_threads=1) as e:
        trace = layer_trace(e, e._model, LayerTrace)
        steady = type(e).forward

        def forward(tokens, n_logits=1):
            steady(e, tokens, n_logits)
            if trace.seconds:
                trace.seconds[-1] = [0.001 * next(factors)] * (file.n_layers + 1)

        monkeypatch.setattr(e, "forward", forward)
        passes = compute._passes(e, trace, 1, 3, lambda: None)
    assert [p.group_s[0] for p in passes] == [0.001] * 3
    assert list(factors) == [1]


def test_a_disturbance_spoils_only_the_layers_that_it_met():
    """Also where something else disturbed every pass."""
    rows = ([1.0, 2.0, 30.0], [10.0, 2.1, 3.0], [1.1, 20.0, 3.1])
    passes = compute._fastest([compute._Pass(row, rest) for row, rest in zip(rows, (0.3, 5.0, 0.2), strict=True)], 2)
    assert [(p.group_s, p.rest_s) for p in passes] == [([1.0, 2.0, 3.0], 0.2), ([1.1, 2.1, 3.1], 0.3)]


def test_release_times(opened):
    layer = opened("llama").layers[0]
    assert 0 < slot_release(layer, 3).mean < 0.1
    assert 0 < resident_release(layer, 3).mean < 0.1


def test_device_is_the_same_twice_and_names_nobody(tmp_path):
    first, second = device_info(tmp_path), device_info(tmp_path)
    assert first == second
    assert len(first.id) == 16
    assert first.n_cores >= 1 and first.memory_bytes > 0


def test_path_inside_the_checkout_is_relative(bundled_model):
    assert measure.model_info(ModelFile.open(bundled_model)).path.startswith("model_configs/bundled/")


def test_waking_counts_as_a_wait(opened):
    file = opened("qwen2")
    with engine(file.path, n_threads=1) as e:
        calls = []
        e.weights.quiet = lambda: (calls.append(1), time.sleep(0.01))
        before = e.counters.wait_s
        e.forward([1])
        assert len(calls) > file.n_layers
        assert e.counters.wait_s - before >= 0.01 * len(calls)


def test_disturbed_times_through_the_model_are_made_again(opened, monkeypatch):
    rows = iter([[1.0, 2.0], [9.0, 2.0], [1.0, 2.1]])
    run = Measurement("x", 2)
    monkeypatch.setattr(run, "_stream", lambda *_: next(rows))
    assert run._streams(None, None, None) == [[1.0, 2.0], [1.0, 2.1]]
    assert list(rows) == []


def test_a_run_takes_less_memory_than_measuring():
    found = measure_run_memory()
    assert 10_000_000 < found.process_bytes < 60_000_000
    assert 2_000_000 < found.filter_bytes < 40_000_000
    assert found.surplus_bytes > 0  # of this process, the tests
