import pytest

from profiler.timing import columns, seconds_of


def test_seconds_of_times_the_call(monkeypatch):
    clock = iter((10.0, 10.25))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert seconds_of(lambda: None) == 0.25


def test_columns_gives_one_spread_per_column():
    first, second = columns([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    assert (first.mean, first.sd, first.n, first.minimum, first.maximum) == (2.0, 1.0, 3, 1.0, 3.0)
    assert (second.mean, second.sd) == (5.0, 0.0)


def test_columns_takes_times_below_zero_as_zero():
    assert columns([[-1e-6], [1e-6]])[0].minimum == 0.0


def test_columns_refuses_rows_of_unequal_length():
    with pytest.raises(ValueError, match="shorter"):
        columns([[1.0, 2.0], [1.0]])
