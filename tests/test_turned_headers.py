"""Headers of models that somebody turned over."""

import struct

import broken_models
import children
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

HEADER = b"".join(broken_models.valid_model().parts()[:3])
DATA = broken_models.valid_model().parts()[3]
PLACES = st.integers(0, len(HEADER) - 9) | st.integers(0, 600) | st.integers(len(HEADER) - 1500, len(HEADER) - 9)
EDGES = [struct.pack("<Q", n) for n in (0, 1, 2**31 - 1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1)]
VALUES = st.binary(min_size=1, max_size=8) | st.sampled_from(EDGES)


@pytest.fixture(scope="module")
def opener(tmp_path_factory):
    made = children.Opener()
    yield made, tmp_path_factory.mktemp("turned") / "m.gguf"
    made.close()


@given(st.lists(st.tuples(PLACES, VALUES), max_size=3), st.just(len(HEADER)) | st.integers(0, len(HEADER)))
@settings(max_examples=300, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_turned_bytes_never_crash_the_indexer(opener, changes, cut):
    child, path = opener
    header = bytearray(HEADER)
    for place, value in changes:
        header[place : place + len(value)] = value
    path.write_bytes(bytes(header[:cut]) + (DATA if cut == len(HEADER) else b""))
    answer = child.open(path)
    assert answer == "ok" or answer.startswith("ModelError: "), answer
    assert changes or answer == "ok" or cut < len(HEADER)
