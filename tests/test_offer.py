"""What a worker's machine has to give."""

from __future__ import annotations

import pytest

from h2o_cli.session import smallest
from h2o_cli.session.smallest import of_worker
from runtime.distributed import offer
from runtime.engine.layout import Layout
from runtime.errors import BudgetError
from runtime.llama.model_file import ModelFile
from runtime.plans.ledger import usable_bytes
from runtime.plans.residency import layer_bytes, streamable_bytes
from runtime.settings import FULL_TILES, Settings
from runtime.sizes import MB


@pytest.fixture
def file(tiny_model, monkeypatch, tmp_path):
    """With more memory more layers are measured, whose keys and values take more: but only where there is room."""
    monkeypatch.setattr(offer, "_seconds_of_tokens", lambda *_: [1.0])
    monkeypatch.setattr(offer, "_disk_rate", lambda _store, _pieces: 1.0)
    monkeypatch.setattr(smallest, "_path", lambda: tmp_path / "smallest.json")
    shape = "llama:layers=12,dim=512,ffn=512,heads=4,kv_heads=4,vocab=512,ctx=512"
    return ModelFile.open(tiny_model(shape, "q8_0"))


def floor_named(file, budget_bytes):
    with pytest.raises(BudgetError) as refused:
        offer.measure(file, budget_bytes, 1, of_worker)
    return refused.value.floor_bytes


def test_the_smallest_budget_that_is_named_works_and_one_mb_less_is_refused(file):
    floor = floor_named(file, MB)
    assert floor // 4 > 2 * file.layers[0].pieces[0].span_bytes  # more layers than one are tried
    for _ in range(3):
        assert offer.measure(file, floor, 1, of_worker).weights_bytes > 0
        assert floor_named(file, floor - MB) == floor
        assert floor_named(file, 2 * MB) == floor


def test_room_for_weights_is_that_of_a_token(file, monkeypatch):
    """The placement is made for tokens; in a prompt weights make room. A root's visit takes something, too."""
    seen = []
    monkeypatch.setattr(Layout, "spared_bytes", property(lambda _: 4 * MB * len(seen)))  # known behind a token
    monkeypatch.setattr(offer, "_seconds_of_tokens", lambda engine, *_: seen or seen.append(engine.layout) or [1.0])
    monkeypatch.setattr(offer, "_s_per_byte", lambda *_: (1.0, 0.0))
    monkeypatch.setattr(offer, "median", lambda _: 1.0)
    monkeypatch.setattr(offer, "min", lambda *found: 1.0 if len(found) == 1 else min(found), raising=False)
    found = offer.measure(file, 1000 * MB, 1, of_worker)
    (layout,) = seen
    in_a_prompt = usable_bytes(1000 * MB) - layout.fixed_bytes
    assert found.weights_bytes - in_a_prompt == layout.prompt_bytes + 4 * MB - offer._VISIT_BYTES > MB


@pytest.mark.parametrize(("part", "share"), [(2, 1.0), (0.55, 0.47), (-1, 0.0)])
def test_a_token_is_timed_with_weights_in_memory_as_far_as_there_is_room_and_without(file, monkeypatch, part, share):
    """With all of them it is timed after rests, too, as threads of a worker rest. The disk is measured at the end."""
    total = sum(layer_bytes(layer) for layer in file.layers)
    seen, budget = [], 1000 * MB
    monkeypatch.setattr(Layout, "fixed_bytes", usable_bytes(budget) - int(part * total))

    def timed(engine, rest_s=0.0):
        """All in memory: 1 s; nothing: 3 s; a rest: 0.5 s."""
        seen.append((_in_memory(engine), rest_s > 0))
        return [3.0 - 2 * seen[-1][0] + 0.5 * (rest_s > 0)] * 3

    monkeypatch.setattr(offer, "_seconds_of_tokens", timed)
    settings = Settings(n_ctx=512, n_ubatch=FULL_TILES, repack=False)
    found = offer._measure(file, range(file.n_layers), budget, settings)
    held = pytest.approx(share, abs=0.08)
    assert seen == [(held, False), (held, True), (0.0, False)]
    each_s, more_s = (1.0, 2.0) if share else (3.0, 0.0)
    assert found.compute_s_per_byte * total == pytest.approx(each_s, rel=0.1)
    assert found.streaming_s_per_byte * total == pytest.approx(more_s, rel=0.1)
    assert found.wake_s == pytest.approx(0.5)


def test_streaming_that_takes_no_longer_than_memory_is_no_negative_time():
    assert offer._s_per_byte(100, 100, 2.0, 1.0) == (0.01, 0.0)
    assert offer._s_per_byte(100, 0, 2.0, 4.0) == (0.04, 0.0)
    assert offer._s_per_byte(100, 50, 1.0, 9.0) == (0.0, 0.09)  # no less than nothing where it is in memory


def _in_memory(engine):
    """The share of an engine's weights."""
    return engine.ledger.resident_bytes / streamable_bytes(engine.file)


@pytest.mark.parametrize("off", [-MB, 3 * MB])
def test_it_holds_where_the_next_process_takes_some_mb_more_or_less(file, monkeypatch, off):
    """Less: the number stays. More: a new one, for every start from then on."""
    floor, agreed = floor_named(file, MB), smallest.agreed
    monkeypatch.setattr(smallest, "agreed", lambda *key: agreed(*key[:-1], key[-1] + off))
    if off < 0:
        assert floor_named(file, floor - MB) == floor
        return
    new = floor_named(file, floor - MB)
    assert new > floor
    assert floor_named(file, new - MB) == new


class BurstyStore:
    """A disk that is throttled: it gives `burst` bytes at once, then nothing until 0.1 s are over. It rested before."""

    def __init__(self, burst):
        self.bytes_read, self.busy_s, self._burst, self._saved, self.passes = 0, 0.0, burst, 3 * burst, []

    def need(self, n_bytes):
        """Read n_bytes."""
        self.bytes_read += n_bytes
        self.busy_s += n_bytes / 2e9
        self._saved -= n_bytes
        while self._saved < 0:
            self.busy_s = (self.busy_s // 0.1 + 1) * 0.1
            self._saved += self._burst

    def computed(self):
        """Give them back."""

    def end_pass(self, *, complete):
        """All pieces were read, or not."""
        self.passes.append(complete)


@pytest.mark.parametrize("sizes", [[2 * MB, 1 * MB, 5 * MB], [4 * MB], [100_000, 50_000]])
@pytest.mark.parametrize("burst", [5 * MB, 20 * MB])
def test_the_rate_of_a_disk_that_gives_its_bytes_in_bursts(sizes, burst):
    """Whatever it had saved up, and wherever in a burst measuring ends."""
    store = BurstyStore(burst)
    assert offer._disk_rate(store, sizes) == pytest.approx(10 * burst, rel=0.06)
    assert store.passes == [True] * (len(store.passes) - 1) + [False]
