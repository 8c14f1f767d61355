"""Which workers take part, and with which layers."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from cluster import MB, workers
from stores import bytes_in_memory

from h2o_cli.main import run_command as h2o
from h2o_cli.session import members, placing, ray_workers
from h2o_cli.session.members import Devices, survey
from h2o_cli.session.placing import given, place, split_model
from h2o_cli.session.smallest import of_worker
from planner.placement import Device
from runtime.distributed import head_time, offer
from runtime.distributed.head_time import measure_head
from runtime.distributed.offer import measure
from runtime.engine.engine import Engine
from runtime.errors import UsageError
from runtime.llama import abi
from runtime.llama.model_file import ModelFile
from runtime.llama.own_graph import OwnGraph
from runtime.plans.residency import layer_bytes
from runtime.sizes import page_down
from runtime.weights.files import WeightFiles


@pytest.fixture
def file(tiny_model):
    return ModelFile.open(tiny_model("qwen2"))


def test_devices_that_hold_half_each_get_half_each(file):
    half = sum(layer_bytes(layer) for layer in file.layers) // 2
    found = place(split_model(file), [Device("a:1", half, 1e6, 1e-9, 1e-5), Device("b:1", half, 1e6, 1e-9, 1e-5)])
    assert found.stages == ((0, 2, "a:1"), (2, 4, "b:1"))
    assert (found.layers_of("b:1"), found.left_out) == ([2, 3], ())


def test_a_device_behind_a_slow_link_is_left_out_with_both_numbers(file):
    found = place(
        split_model(file), [Device("a:1", 100 * MB, 1e9, 1e-9, 1e-5), Device("b:1", 100 * MB, 1e9, 1e-9, 0.5)]
    )
    ((address, with_s, without_s),) = found.left_out
    assert (address, found.layers_of("b:1")) == ("b:1", [])
    assert without_s == found.token_s < 0.5 < with_s


def test_hidden_states_in_16_bits_are_half_as_long(file):
    assert 2 * split_model(file, "f16").hidden_bytes == split_model(file).hidden_bytes > 0
    slow = [Device(name, 100 * MB, 1e6, 1e-9, 1e-5, 1e4) for name in ("a:1", "b:1")]
    (short,), (long,) = (place(split_model(file, kind), slow).left_out for kind in ("f16", "f32"))
    assert short[1] < long[1]  # seconds with the device that is left out


def test_links_are_measured_and_layers_placed_for_hidden_states_as_they_travel(file, monkeypatch):
    asked = []
    monkeypatch.setattr(members, "device_of", lambda _link, n_bytes, **_: asked.append(n_bytes))
    monkeypatch.setattr(members, "head_s", lambda *_, **__: 0.0)
    for kind in ("f32", "f16"):
        model, _ = members._measured(file, Devices("a:1", hidden=kind), {"a:1": None}, 0, 1)
        asked.append(model.hidden_bytes)
    n = split_model(file).hidden_bytes
    assert asked == [n, n, n // 2, n // 2]


@pytest.mark.parametrize(
    ("command", "named"), [("devices", "--workers"), ("plan", "--workers"), ("devices", "--cluster")]
)
def test_devices_are_shown_for_hidden_states_as_they_travel(file, command, named, monkeypatch):
    seen, nodes = [], SimpleNamespace(addresses=["a:1"], keys=None, close=lambda: None)
    monkeypatch.setattr(ray_workers, "RayWorkers", lambda *_: nodes)
    monkeypatch.setattr(members, "survey", lambda _file, devices, *_: seen.append(devices.hidden) or {})
    for flags in ([], ["--hidden", "f16"]):
        assert h2o([command, str(file.path), named, "a:1", "--json", *flags]) == 0
    assert seen == ["f32", "f16"]


def test_the_head_is_in_what_is_expected_of_this_machine(file, monkeypatch):
    """Else it would look slow, and a worker that is slow would look like it."""
    half, model = sum(layer_bytes(layer) for layer in file.layers) // 2, split_model(file, root_s=1.0)
    found = place(model, [Device(name, half, 1e6, 1e-9, 1e-5) for name in ("local", "a:1")])
    own_s, other_s = found.placement.turns_s
    link = SimpleNamespace(address="a:1", latencies=[2 * other_s] * 20)
    stages = [SimpleNamespace(first=first, last=last, link=link) for first, last, name in found.stages if name == "a:1"]
    cluster = SimpleNamespace(stages=stages, links=[link], own_latencies=[own_s + 1.0] * 20)
    monkeypatch.setattr(members, "moved", lambda *_: True)
    assert members.Team(file, found, cluster, model).slower({}) == {"a:1": pytest.approx(2)}


def test_layers_by_hand():
    assert given(["a", "b", "c"], [3, 1, 4]).stages == ((0, 3, "a"), (3, 4, "b"), (4, 8, "c"))
    assert Devices("a:1,b:1", split="3,1").counts(4) == [3, 1]
    for split in ("4", "2,3", "4,0", "x,1", ""):
        with pytest.raises(UsageError, match="not possible"):
            Devices("a:1,b:1", split=split).counts(4)


def test_what_a_worker_offers_is_measured(file):
    offer = measure(file, 2000 * MB, 1, of_worker)
    assert (offer.budget_bytes, offer.n_threads) == (2000 * MB, 1)
    assert 500 * MB < offer.weights_bytes < 2000 * MB
    assert offer.disk_bytes_per_s > 1e6
    assert 1e-13 < offer.compute_s_per_byte < 1e-6
    assert 0 <= offer.streaming_s_per_byte < 1e-6
    assert 0 <= offer.wake_s < 1


def test_measuring_ends_on_a_machine_that_has_no_time(file, monkeypatch):
    passes, forward = [], Engine.forward

    def counted(engine, tokens):
        passes.append(tokens)
        forward(engine, tokens)

    monkeypatch.setattr(Engine, "forward", counted)
    monkeypatch.setattr(offer, "_MOST_S", -1.0)
    assert measure(file, 2000 * MB, 1, of_worker).disk_bytes_per_s > 1e6
    assert len(passes) == 3  # with weights in memory, after a rest, with none in memory


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
def test_the_head_is_measured_without_a_read(tiny_model, kind, monkeypatch):
    file = ModelFile.open(tiny_model("qwen2", kind))
    monkeypatch.setattr(WeightFiles, "read", None)
    for budget_bytes in (1000 * MB, 2 * layer_bytes(file.head)):  # with all of it, and with half
        assert 0 < measure_head(file, budget_bytes, 1) < 0.1
    assert measure_head(file.owned([0], head=False, embedding=True), 1000 * MB, 1) == 0


def test_what_the_head_takes_grows_with_its_bytes(tiny_model, monkeypatch):
    """On a machine that takes a second for a byte: whatever part of the head was measured with."""
    file, clock, sizes = ModelFile.open(tiny_model("qwen2", "q8_0")), [0], []

    class Graph(OwnGraph):
        def compute(self, *what):
            weights = abi.Tensor.from_address(self.nodes[0].src[0])
            sizes.append(weights.ne[1] * weights.nb[1])
            end = page_down(sizes[-1])
            assert bytes_in_memory([(weights.data, weights.data + end)]) == end  # pages that were written to
            super().compute(*what)
            clock[0] += sizes[-1]

        def __init__(self, n_threads, nodes):
            self.nodes, self.n_threads = nodes, n_threads
            super().__init__(n_threads, nodes)

    monkeypatch.setattr(head_time, "OwnGraph", Graph)
    monkeypatch.setattr(head_time, "time", SimpleNamespace(perf_counter=lambda: clock[0], sleep=lambda _: None))
    n = layer_bytes(file.head)
    found = [measure_head(file, budget_bytes, 1) for budget_bytes in (1000 * MB, 2 * n)]
    assert found == [pytest.approx(n), pytest.approx(n)]
    assert (max(sizes), min(sizes)) == (pytest.approx(n, rel=0.05), pytest.approx(n / 2, rel=0.05))


def test_the_head_is_in_what_is_predicted(file, monkeypatch):
    with workers(1, [file.path]) as (worker,):
        devices = Devices(worker.address)
        for seconds in (0.0, 5.0):
            monkeypatch.setattr(placing, "measure_head", lambda *_, s=seconds: s)
            found = survey(file, replace(devices, refresh=True), 300 * MB, 1, print)
            assert found["predicted_ms_per_token"] // 1000 == seconds


def test_devices_are_shown(file, capsys):
    with workers(2, [file.path]) as found:
        addresses = [worker.address for worker in found]
        assert h2o(["devices", str(file.path), "--workers", ",".join(addresses)]) == 0
        out = capsys.readouterr().out
        assert all(address in out for address in addresses)
        assert "a token: " in out
        facts = survey(file, Devices(f"local,{addresses[0]}"), 300 * MB, 1, print)
        local, other = facts["devices"]
        assert (local["address"], local["link_ms"], other["address"]) == ("local", None, addresses[0])
        assert 0 < other["link_ms"] < 100
        assert sorted(local["layers"] + other["layers"])[0][0] == 0
        assert h2o(["plan", str(file.path), "--workers", ",".join(addresses), "--json"]) == 0
        planned = json.loads(capsys.readouterr().out)
        assert [[0, 4]] in planned["placement"].values()
        assert planned["predicted_ms_per_token"] > 0
    assert h2o(["devices", str(file.path)]) == 2
    assert "no devices were named" in capsys.readouterr().err
