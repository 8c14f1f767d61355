"""What was measured of devices is kept for an hour."""

from __future__ import annotations

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from cluster import MB, workers

from h2o_cli.session import device_profiles, placing
from h2o_cli.session.device_profiles import KEPT_S, kept
from h2o_cli.session.members import Devices, survey
from runtime.distributed.link import Link
from runtime.distributed.offer import Offer
from runtime.llama.model_file import ModelFile


@pytest.fixture(autouse=True)
def path(tmp_path, monkeypatch):
    """A file of its own."""
    found = tmp_path / "kept" / "profiles.json"
    monkeypatch.setattr(device_profiles, "_path", lambda: found)
    return found


def test_what_was_measured_holds_for_an_hour(monkeypatch):
    answers = iter(range(10))

    def measure():
        return (float(next(answers)), 0.5)

    assert kept("a", measure) == kept("a", measure) == (0.0, 0.5)
    assert kept("b", measure) == (1.0, 0.5)
    assert kept("a", measure, refresh=True) == kept("a", measure) == (2.0, 0.5)
    assert kept("a", measure, holds=lambda numbers: numbers[0] > 2) == (3.0, 0.5)
    time_s = device_profiles.time.time()
    monkeypatch.setattr(device_profiles.time, "time", lambda: time_s + KEPT_S + 1)
    assert kept("a", measure) == (4.0, 0.5)


@pytest.mark.parametrize("data", [b"", b"[]", b'{"a": 1}', b"\xff", b'{"a": {"measured_s": "x", "numbers": []}}'])
def test_a_file_that_is_none_is_made_anew(data, path):
    path.parent.mkdir()
    path.write_bytes(data)
    assert kept("a", lambda: (1.0,)) == (1.0,)
    assert kept("a", lambda: (2.0,)) == (1.0,)


def test_the_file_does_not_grow_without_end(path):
    for i in range(device_profiles._MOST_KEPT + 50):
        kept(str(i), lambda: (1.0,))
    assert len(device_profiles._read()) <= device_profiles._MOST_KEPT + 1


def test_devices_are_measured_once_and_with_refresh(tiny_model, monkeypatch):
    measured, probes, delay = [], [], [0.0]
    round_trip = Link.round_trip_s

    def measure(_file, budget_bytes, n_threads, _least):
        measured.append(budget_bytes)
        return Offer(budget_bytes, n_threads, budget_bytes, 1e9, 1e-9)

    def counted(link, n_bytes):
        probes.append(n_bytes)
        round_trip(link, n_bytes)
        return delay[0] + n_bytes / 1e9

    monkeypatch.setattr(placing, "measure", measure)
    monkeypatch.setattr(Link, "round_trip_s", counted)
    file = ModelFile.open(tiny_model("qwen2"))
    with workers(1, [file.path]) as (worker,):
        facts = []
        for delay[0], refresh in ((0.001, False), (0.001, False), (0.001, True), (0.02, False)):
            devices = Devices(f"local,{worker.address}", refresh=refresh)
            facts.append(survey(file, devices, 300 * MB, 1, print)["devices"])
    assert len(measured) == 2
    assert facts[0] == facts[1]
    long = [n_bytes for n_bytes in probes if n_bytes > 10**6]
    assert len(long) == 2 * 3  # the first time, with refresh, and when the link had become slow
    assert facts[3][1]["link_ms"] > 15
