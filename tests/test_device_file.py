"""devices.json, and the order in which its machines are used."""

from __future__ import annotations

import json

import pytest

from h2o_cli.session.device_file import in_order, read_devices
from runtime.errors import H2OError, UsageError

FOUR = [
    {"address": "10.0.0.1", "port": 9999, "total_memory": 16000, "memfree": 14000, "speed": 10},
    {"address": "10.0.0.2", "port": 9999, "total_memory": 4000, "memfree": 3500, "speed": 5, "load": 0.5},
    {"address": "local", "total_memory": 8000, "memfree": 7000, "speed": 4, "note": "mine"},
    {"address": "::1", "port": 9998, "total_memory": 16000},
]


@pytest.fixture
def written(tmp_path):
    def write(value):
        path = tmp_path / "devices.json"
        path.write_text(value if isinstance(value, str) else json.dumps({"devices": value}))
        return path

    return write


def test_addresses_are_those_of_workers(written):
    places = [entry.place for entry in read_devices(written(FOUR))]
    assert places == ["10.0.0.1:9999", "10.0.0.2:9999", "local", "[::1]:9998"]


@pytest.mark.parametrize(
    ("priority", "by_memory", "order"),
    [
        ([], False, "10.0.0.1 ::1 local 10.0.0.2"),
        ([], True, "10.0.0.1 ::1 local 10.0.0.2"),
        (["local", "10.0.0.2:9999"], False, "local 10.0.0.2 10.0.0.1 ::1"),
        (["10.0.0.2"], False, "10.0.0.2 10.0.0.1 ::1 local"),
        (["10.0.0.2"], True, "10.0.0.1 ::1 local 10.0.0.2"),
    ],
)
def test_priority_is_by_memory_or_as_listed_and_others_come_last(written, priority, by_memory, order):
    entries = in_order(read_devices(written(FOUR)), priority, by_memory=by_memory)
    assert [entry.address for entry in entries] == order.split()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("[]", "Expected `object`, got `array`"),
        ("{", "truncated"),
        ([], "length >= 1"),
        ([{"port": 1}], "missing required field `address`"),
        ([{"address": "a", "port": 70000}], "<= 65535"),
        ([{"address": "a", "port": 1, "load": 2}], "<= 1"),
        ([{"address": "a", "port": 1, "memfree": "much"}], r"\$.devices\[0\].memfree"),
    ],
)
def test_a_file_that_cannot_be_used_is_said_where(written, value, reason):
    with pytest.raises(UsageError, match=reason):
        read_devices(written(value))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(H2OError, match="cannot read the devices in"):
        read_devices(tmp_path / "none.json")


def test_priorities_name_devices(written):
    with pytest.raises(UsageError, match=r"10\.0\.0\.9 is no device"):
        in_order(read_devices(written(FOUR)), ["10.0.0.9"], by_memory=False)
