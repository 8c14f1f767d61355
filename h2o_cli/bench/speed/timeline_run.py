"""One token under the clock: when every read, wait and layer of a decode pass began and ended, as one JSON object.

A process of its own (`python -m h2o_cli.bench.speed.timeline_run`), so that it can run in an emulated device.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from h2o_cli.bench.speed.rows import Read, Span, Timeline
from profiler.compute import layer_trace
from runtime.engine.engine import Engine
from runtime.engine.trace import LayerTrace
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.passes import Pass
from runtime.plans.file import read_plan
from runtime.settings import Settings
from runtime.weights.store import LayerStore

_WARM_PASSES = 3


class WallTrace(LayerTrace):
    """A trace that also keeps when each layer of the last pass began and ended."""

    spans: list[Span]

    def begin(self, pass_: Pass) -> None:
        """A pass begins."""
        self.spans = []
        super().begin(pass_)

    def _close(self) -> None:
        group, (begin_s, waited_s) = self._group, self._mark
        super()._close()
        self.spans.append(Span(group, begin_s, self._mark[0], self._mark[1] - waited_s))


def main() -> None:
    """Run some tokens in the plan of a plan file and print the last one's timeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    print(msgspec.json.encode(measure(arguments.model, arguments.plan, arguments.threads)).decode())


def measure(path: Path, plan_file: Path, threads: int) -> Timeline:
    """The timeline of one token. Raises H2OError."""
    reads: list[tuple[int, int, float, float]] = []
    LayerStore.read_observer = lambda chunk, *times: reads.append((chunk.offset, chunk.n_bytes, *times))
    file = ModelFile.open(path)
    hollow = HollowModel(file)
    plan = read_plan(plan_file)
    engine = Engine(file, hollow, plan, Settings(n_ubatch=8, n_threads=threads))
    try:
        trace = layer_trace(engine, hollow, WallTrace)
        engine.forward([1, 2, 3])
        with engine.guests.joined_by(trace):
            for token in range(_WARM_PASSES):
                engine.forward([token])
    finally:
        engine.close()
        hollow.free()
    return _timeline(file, trace, reads, plan.budget_bytes)


def _timeline(
    file: ModelFile, trace: WallTrace, reads: list[tuple[int, int, float, float]], budget_bytes: int
) -> Timeline:
    """Everything in seconds from the beginning of the pass."""
    begin_s, end_s = trace.spans[0].begin_s, trace.spans[-1].end_s
    layer_at = sorted((piece.span[0], piece.layer) for piece in file.pieces)
    seen = [
        Read(_layer_of(layer_at, offset), n_bytes, start_s - begin_s, stop_s - begin_s)
        for offset, n_bytes, start_s, stop_s in reads
        if stop_s > begin_s and start_s < end_s
    ]
    spans = [Span(s.layer, s.begin_s - begin_s, s.end_s - begin_s, s.wait_s) for s in trace.spans if s.layer >= 0]
    return Timeline(file.path.name, budget_bytes, file.n_layers, end_s - begin_s, tuple(spans), tuple(seen))


def _layer_of(layer_at: list[tuple[int, int]], offset: int) -> int:
    """The layer whose pieces hold a file offset."""
    found = 0
    for start, layer in layer_at:
        if start > offset:
            break
        found = layer
    return found


if __name__ == "__main__":
    main()
