"""Sizes as people write and read them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.errors import UsageError
from runtime.sizes import MB, PAGE, UNITS, format_size, page_down, page_up, parse_size


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("400", 400 * MB),
        ("0.5", 500_000),
        (".5", 500_000),
        ("1.", MB),
        ("1.5GB", 1_500_000_000),
        ("1.5 gb", 1_500_000_000),
        (" 512MiB ", 512 * 2**20),
        ("2gib", 2**31),
        ("7b", 7),
        ("3KB", 3000),
        ("4G", 4 * 10**9),
        ("400m", 400 * MB),
        ("3KiB", 3072),
    ],
)
def test_sizes(text, n_bytes):
    assert parse_size(text) == n_bytes


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "MB",
        "-1",
        "+1",
        "0",
        "0GB",
        "0.1B",
        "1e3",
        "1,5",
        "1.5.5",
        "0x10",
        "1TBs",
        "nan",
        "inf",
        "１００",
        "4 0",
    ],
)
def test_what_is_not_a_size(text):
    with pytest.raises(UsageError, match="size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["9" * 30, "9" * 500, "1000000000000GB"])
def test_sizes_beyond_any_computer(text):
    with pytest.raises(UsageError):
        parse_size(text)


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(sorted(UNITS)))
def test_whole_numbers_are_exact(number, unit):
    assert parse_size(f"{number}{unit}") == number * UNITS[unit]


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KB"),
        (29_849_000, "29.8 MB"),
        (1_234_000_000, "1.23 GB"),
        (-2_500_000, "-2.5 MB"),
        (0.4, "0 B"),
    ],
)
def test_sizes_for_people(n_bytes, text):
    assert format_size(n_bytes) == text


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 10**12))
def test_what_is_written_can_be_read_back(n_bytes):
    assert parse_size(format_size(n_bytes)) == pytest.approx(n_bytes, rel=0.06)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**45))
def test_pages(n):
    assert page_down(n) % PAGE == page_up(n) % PAGE == 0
    assert n - PAGE < page_down(n) <= n <= page_up(n) < n + PAGE
