"""Homes of resident pieces: huge pages when everything is resident, and memory given back as a whole."""

import sys

import pytest
from cgroups import memory_limit
from stores import bytes_in_memory
from test_memory import flags_of

from runtime.llama.model_file import Piece, TensorInfo
from runtime.memory import HUGE_PAGE, view
from runtime.sizes import MB, PAGE
from runtime.weights.homes import Homes, home_bytes

ROW = 1024
N_ROWS = 3 * HUGE_PAGE // ROW + 8  # three huge pages, and a bit more
INFOS = [
    TensorInfo(f"t{i}", 0, PAGE // 2 + 8 * i * HUGE_PAGE, N_ROWS * ROW, "F32", (ROW // 4, N_ROWS), ROW)
    for i in range(3)
]
WHOLE = [Piece(2 * i, 0, info, 0, N_ROWS) for i, info in enumerate(INFOS)]

HALF_GIVEN_BACK = """
import ctypes, sys
from runtime.memory import HUGE_PAGE, Region, drop_pages, huge_pages
def used():
    return int(open(sys.argv[1]).read())
region = Region(50 * HUGE_PAGE)
huge_pages(*region.range, wanted=True)
before = used()
ctypes.memset(region.address, 1, region.n_bytes)
full = used()
for start in range(region.address, region.range[1], HUGE_PAGE):
    drop_pages(start + HUGE_PAGE // 4, start + HUGE_PAGE // 2)
    drop_pages(start + HUGE_PAGE // 2 + 1, start + HUGE_PAGE * 3 // 4 + 1)
print(full - before, used() - before)
"""


@pytest.fixture
def homes():
    homes = Homes()
    yield homes
    homes.free()


def flags_in(homes, info):
    """What the kernel is asked for at the first and the last page of a home."""
    start = homes[info.name].data // PAGE * PAGE
    places = (start, start + home_bytes(info) - PAGE)
    return ["huge" if "hg" in flags else "small" if "nh" in flags else "" for flags in map(flags_of, places)]


def test_huge_pages_when_everything_is_resident_and_only_then(homes):
    homes.expect(WHOLE, everything=True)
    if flags_in(homes, INFOS[0]) == ["", ""]:
        pytest.skip("this kernel has no huge pages to ask for")
    assert [flags_in(homes, info) for info in INFOS] == [["huge", "huge"]] * 3
    homes.expect(WHOLE[:2], everything=False)
    assert [flags_in(homes, info) for info in INFOS] == [["small", "small"]] * 3


def test_homes_lie_one_behind_the_other_and_keep_their_places(homes):
    homes.expect(WHOLE[:2], everything=False)
    first, second = (homes[info.name].data for info in INFOS[:2])
    assert second - first == home_bytes(INFOS[0])
    homes.expect(WHOLE, everything=True)
    assert [homes[info.name].data for info in INFOS[:2]] == [first, second]
    assert len(homes.ranges) == 2


def test_writing_a_wanted_tensor_takes_no_memory_of_one_that_is_not(homes):
    homes.expect(WHOLE, everything=True)
    homes.expect([WHOLE[0], WHOLE[2]], everything=False)
    for piece in (WHOLE[0], WHOLE[2]):
        view(homes[piece.tensor.name].span_address(piece), piece.span_bytes)[:] = b"x" * piece.span_bytes
    start = homes["t1"].span_address(WHOLE[1])
    assert bytes_in_memory([(start, start + WHOLE[1].span_bytes)]) == 0
    assert bytes_in_memory(homes.ranges) == WHOLE[0].span_bytes + WHOLE[2].span_bytes


def test_dropping_one_leaves_its_neighbours_alone(homes):
    homes.expect(WHOLE, everything=True)
    for i, piece in enumerate(WHOLE):
        view(homes[piece.tensor.name].span_address(piece), piece.span_bytes)[:] = bytes([i + 1]) * piece.span_bytes
    homes["t1"].drop(WHOLE[1], ())
    assert bytes_in_memory(homes.ranges) == WHOLE[0].span_bytes + WHOLE[2].span_bytes
    for i, piece in enumerate(WHOLE):
        held = bytes(view(homes[piece.tensor.name].span_address(piece), piece.span_bytes))
        assert held == bytes([0 if i == 1 else i + 1]) * piece.span_bytes


@pytest.mark.cgroup
def test_parts_of_huge_pages_count_no_longer_once_they_are_given_back():
    with memory_limit(400 * MB) as group:
        usage = group.folder / ("memory.usage_in_bytes" if group.v1 else "memory.current")
        done = group.run([sys.executable, "-c", HALF_GIVEN_BACK, str(usage)], timeout=60)
    assert done.returncode == 0, done.stderr
    full, left = map(int, done.stdout.split())
    assert full == pytest.approx(50 * HUGE_PAGE, rel=0.05)
    assert left == pytest.approx(full / 2, rel=0.1)
