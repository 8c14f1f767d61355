"""`h2o bench distributed`: what its rows hold, and what is made of them."""

from __future__ import annotations

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from h2o_cli.bench.distributed import hops
from h2o_cli.bench.distributed.hops import HOPS, measure, report, table_rows
from h2o_cli.bench.results import Results, make_again
from runtime.errors import UsageError, WorkerError


@pytest.fixture
def few_warm(monkeypatch):
    monkeypatch.setattr(hops, "_WARM", 1)


def test_a_row_for_each_size_without_and_with_tls(bundled_model, few_warm, tmp_path, capsys):
    results = Results(HOPS, tmp_path)
    results.begin()
    results.keep(measure(bundled_model, 3, (1, 300)))
    rows = results.read()
    assert [(row.tls, row.n_tokens, row.pairs) for row in rows] == [
        (tls, n, 3) for tls in (False, True) for n in (1, 300)
    ]
    assert rows[1].n_bytes == 300 * rows[0].n_bytes > 0
    for row in rows:
        assert row.echo_ms < row.stage_ms
        assert row.compute_ms > 0
        assert row.quartiles[0] <= row.over_ms <= row.quartiles[1]
    assert [line[:3] for line in table_rows(rows)[1:]] == [
        (wire, str(row.n_tokens), str(row.n_bytes))
        for wire, row in zip(("plain", "plain", "TLS", "TLS"), rows, strict=True)
    ]
    make_again(tmp_path, [HOPS])
    assert (tmp_path / "hops.md").read_text() == report(rows)
    assert "300 tokens: " in capsys.readouterr().err


def test_pairs_are_compared_one_by_one(bundled_model):
    """A machine that becomes slower in between moves neither the median nor the quartiles of what is on top."""
    pairs = [((0.3e-3 + drift, 1e-3), 0.1e-3 + drift) for drift in (0, 1e-3, 5e-3, 9e-3)]
    row = hops._row(bundled_model, False, 1, 1024, pairs)
    assert (row.over_ms, *row.quartiles) == pytest.approx((0.2, 0.2, 0.2))


def test_what_cannot_be_measured(tiny_model, tmp_path):
    with pytest.raises(UsageError, match="has 2 layers, three are needed"):
        next(measure(tiny_model("llama:layers=2,dim=64,ffn=64,heads=4,vocab=512"), 2))
    with pytest.raises(WorkerError, match="/nothing"), hops._child(hops.h2o("worker", tmp_path / "nothing")):
        pass
