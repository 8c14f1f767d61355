"""What a stage costs beside its computing: a step to a worker and its result back, and a TCP echo of the same bytes.

Root, worker and echo are three processes on this machine, the links its loopback. Step and echo take turns, and are
compared pair by pair: the machine drifts by more than they differ.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Literal

import msgspec

from h2o_cli.bench.commands import environment, h2o, last_words, python, shown_command
from h2o_cli.bench.distributed.echo_run import MOST_BYTES
from h2o_cli.bench.report import document, machines, started_by
from h2o_cli.bench.results import Kind
from h2o_cli.bench.rows import Row, circumstances
from h2o_cli.bench.tables import markdown_table, number
from h2o_cli.output import table
from h2o_cli.session.placing import hidden_bytes
from runtime.distributed.keys import Keys, make_keys
from runtime.distributed.link import Link
from runtime.distributed.messages import PROTOCOL, Hello, Setup, Step
from runtime.distributed.worker import build, cpu_class
from runtime.errors import UsageError, WorkerError
from runtime.llama.model_file import ModelFile

TOKENS = (1, 16, 128)
"""Of a step: an answer's, and those of prompts."""
CONTEXT = 512
_WARM = 30  # pairs that are not looked at
_BETWEEN_S = 0.001  # the root computes something else between two stages
_LAYER = 1  # hidden states come in and go out
_TIMEOUT_S = 30.0


class HopRow(Row, frozen=True, kw_only=True, omit_defaults=True):
    """Steps of n_tokens, n_bytes of hidden state each way. Times in ms, medians over the pairs.

    stage_ms: from the step to its result at the root, without the worker's computing (compute_ms); over_ms: that minus
    the echo's time, with its quartiles.
    """

    suite: Literal["hops"]
    tls: bool
    n_tokens: int
    n_bytes: int
    pairs: int
    compute_ms: float
    stage_ms: float
    echo_ms: float
    over_ms: float
    quartiles: tuple[float, float]


def measure(model: Path, n_pairs: int, tokens: Sequence[int] = TOKENS) -> Iterator[HopRow]:
    """A row for each number of tokens, without and with TLS. Raises H2OError."""
    file = ModelFile.open(model)
    if file.n_layers <= _LAYER + 1:
        raise UsageError(f"{model} has {file.n_layers} layers, three are needed", "give another model")
    with tempfile.TemporaryDirectory(prefix="h2o-bench-") as work:
        worker_keys, root_keys = make_keys(Path(work), ["worker,127.0.0.1", "root"])
        for tls in (False, True):
            started = [*h2o("worker", model, "--listen", "127.0.0.1:0", "-t", 1, "--json")]
            with _child([*started, "--tls", str(worker_keys)] if tls else started) as said, _echo() as echo:
                address = str(msgspec.json.decode(said)["listening"])
                hello = Hello(PROTOCOL, build(), file.hash, cpu_class())
                with closing(Link(address, Keys.load(root_keys) if tls else None, hello)) as link:
                    stage = Stage(link, hidden_bytes(file), max(tokens))
                    for n_tokens in tokens:
                        pairs = list(_pairs(stage, echo, n_tokens, n_pairs))
                        yield _row(model, tls, n_tokens, stage.width, pairs)


class Stage:
    """A worker with one layer. width: bytes of a token's hidden state."""

    def __init__(self, link: Link, width: int, most_tokens: int) -> None:
        self.width = width
        self._link, self._number, self._n_past = link, 0, 0
        link.set_up(Setup([(_LAYER, _LAYER + 1)], CONTEXT, most_tokens, 1, "f16"))
        link.wait_ready(lambda: None)

    def step(self, n_tokens: int) -> tuple[float, float]:
        """Seconds until a step's result is here, computing left out, and of computing. Raises WorkerError."""
        link, n_bytes = self._link, n_tokens * self.width
        if self._n_past + n_tokens > CONTEXT:
            self._n_past = 0
            link.be_at(0, lambda: None)
        self._number += 1
        tokens = array("i", [1] * n_tokens).tobytes()
        _compute_something()
        start = time.perf_counter()
        link.send(Step(self._number, 0, self._n_past, 1, tokens, bytes(n_bytes)), n_bytes)
        link.result(lambda: None)
        seconds = time.perf_counter() - start
        self._n_past += n_tokens
        return seconds - link.compute_s, link.compute_s


def _compute_something() -> None:
    end = time.perf_counter() + _BETWEEN_S
    while time.perf_counter() < end:
        pass


Echo = Callable[[int], float]
Pair = tuple[tuple[float, float], float]


def _pairs(stage: Stage, echo: Echo, n_tokens: int, n: int) -> Iterator[Pair]:
    """n pairs of step and echo; which comes first changes."""
    n_bytes = n_tokens * stage.width
    for i in range(-_WARM, n):
        if i % 2 == 0:
            found = stage.step(n_tokens), echo(n_bytes)
        else:
            echo_s = echo(n_bytes)
            found = stage.step(n_tokens), echo_s
        if i >= 0:
            yield found


def _row(model: Path, tls: bool, n_tokens: int, width: int, pairs: Sequence[Pair]) -> HopRow:
    over = [1000 * (stage_s - echo_s) for (stage_s, _), echo_s in pairs]
    low, middle, high = statistics.quantiles(over, n=4, method="inclusive")
    return HopRow(
        suite="hops",
        model=model.name,
        tls=tls,
        n_tokens=n_tokens,
        n_bytes=n_tokens * width,
        pairs=len(pairs),
        compute_ms=1000 * statistics.median(compute_s for (_, compute_s), _ in pairs),
        stage_ms=1000 * statistics.median(stage_s for (stage_s, _), _ in pairs),
        echo_ms=1000 * statistics.median(echo_s for _, echo_s in pairs),
        over_ms=middle,
        quartiles=(low, high),
        **circumstances(model),
    )


# --- other processes -------------------------------------------------------------------------------------------------


@contextmanager
def _child(started: Sequence[str]) -> Iterator[str]:
    """A process, and the first line it says. Raises WorkerError."""
    pipe = subprocess.PIPE
    with subprocess.Popen(started, env=environment(), stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout and process.stderr
        try:
            line = process.stdout.readline()
            if not line:
                reason = last_words(process.stderr.read(), process.wait(_TIMEOUT_S))
                raise WorkerError(f"`{shown_command(started)}` failed: {reason}", "run it by hand to see more")
            yield line
        finally:
            process.terminate()


@contextmanager
def _echo() -> Iterator[Echo]:
    """Seconds for so many bytes there and back over plain TCP."""
    with (
        _child(python("h2o_cli.bench.distributed.echo_run")) as port,
        socket.create_connection(("127.0.0.1", int(port)), _TIMEOUT_S) as connection,
    ):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def echo(n_bytes: int) -> float:
            data = bytes(n_bytes)
            _compute_something()
            start, n_back = time.perf_counter(), 0
            connection.sendall(data)
            while n_back < n_bytes:
                n_back += len(connection.recv(MOST_BYTES))
            return time.perf_counter() - start

        yield echo


# --- report ----------------------------------------------------------------------------------------------------------

_HEADER = ("wire", "tokens", "bytes", "computing, ms", "stage, ms", "TCP echo, ms", "on top, ms", "quartiles")
_COLUMNS = (
    "One layer at a worker on this machine. **stage**: from the step to its result at the root, the worker's computing "
    "left out. **TCP echo**: the same bytes to another process and back. **on top**: the median over pairs in turns."
)


def table_rows(rows: Sequence[HopRow]) -> list[tuple[str, ...]]:
    """The rows as text, the header first."""
    return [_HEADER, *(_cells(row) for row in rows)]


def _cells(row: HopRow) -> tuple[str, ...]:
    low, high = (number(value, 2) for value in row.quartiles)
    times = (number(value, 2) for value in (row.compute_ms, row.stage_ms, row.echo_ms, row.over_ms))
    return ("TLS" if row.tls else "plain", str(row.n_tokens), str(row.n_bytes), *times, f"{low} to {high}")


def report(rows: Sequence[HopRow], _pictures: Sequence[str] = ()) -> str:
    """The rows as Markdown."""
    return document("A stage", [machines(rows), _COLUMNS, started_by(rows), markdown_table(table_rows(rows))])


def told(row: HopRow) -> str:
    """A row in one line."""
    return f"{'TLS, ' if row.tls else ''}{row.n_tokens} tokens: {number(row.over_ms, 2)} ms on top of a TCP echo"


def _shown(rows: Sequence[HopRow]) -> str:
    return table(table_rows(rows), right=range(1, len(_HEADER)))


HOPS = Kind(HopRow, report, _shown, told, rows="hops.jsonl", report="hops.md")
