"""A root's workers: who has which layers, and the way of a hidden state through them in a pass.

The root's own engine computes what is left: the head, and layers of its own if it has any. Between them it gives the
hidden state to the workers of the layers in between, one after the other, and gets it back.
"""

from __future__ import annotations

import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

from runtime.distributed.hidden import F32, NUMBER_BYTES, converted, refuse_too_large
from runtime.distributed.journal import Entry, Journal
from runtime.distributed.link import AGAIN, LATENCIES, Link, close_all
from runtime.distributed.messages import BLOCK, Saved, Setup, Step
from runtime.errors import H2OError, WorkerError
from runtime.passes import Pass

_UNSETTLED = 2  # passes behind a prompt: what makes room for long passes is being read


@dataclass
class Stage:
    """A range of layers at a worker. part: which of the worker's ranges it is, from its set-up on."""

    first: int
    last: int
    link: Link
    part: int = 0


class Cluster:
    """The stages, in the order of their layers: hops of the root's passes.

    check: raises where the pass has to end. When a worker is lost, a spare one takes over its layers, or one of the
    others does. The journal has keys and values of most positions. What is behind them is computed again in the same
    passes, from what went into the layers, so nothing changes.
    """

    def __init__(
        self, stages: Sequence[Stage], n_layers: int, spares: Sequence[Link] = (), folder: Path | None = None
    ) -> None:
        self.stages = list(stages)
        self.n_layers = n_layers
        self.width, self.hidden = 0, F32
        self.check: Callable[[], object] = lambda: None
        self.note: Callable[[str], None] = lambda _: None
        self.restarted: Callable[[Link], Link] | None = None  # who starts workers again, and waits until they are
        self._spares = list(spares)
        self._lost: list[Link] = []
        self._is_closed = False
        self.window_bytes: dict[str, int] = {}  # by address, for streamed weights; others choose their own
        self._shape = (0, 0, 0, "")
        self._journal = Journal(folder)
        self._given: Stage | None = None  # it computes already
        self.own_latencies: deque[float] = deque(
            maxlen=LATENCIES
        )  # seconds of a token in which no worker is waited for
        self._since_prompt, self._is_timed = 0, False
        self._began_s = self._waited_s = 0.0  # of the pass at hand

    @property
    def links(self) -> list[Link]:
        """The workers that have layers, each once."""
        return list(dict.fromkeys(stage.link for stage in self.stages))

    def set_up(self, n_ctx: int, n_ubatch: int, n_logits: int, kv_type: str) -> int:
        """Give the workers their layers; the longest pass that all of them can take."""
        self._shape = (n_ctx, n_ubatch, n_logits, kv_type)
        return self._set_up(self.links)

    def _set_up(self, links: Sequence[Link]) -> int:
        for link in links:
            mine = [stage for stage in self.stages if stage.link is link]
            for part, stage in enumerate(mine):
                stage.part = part
            window = self.window_bytes.get(link.address, 0) if link.replacements == 0 else 0
            link.set_up(Setup([(stage.first, stage.last) for stage in mine], *self._shape, window, self.hidden))
        found = [link.wait_ready(self.check) for link in links]
        for link, ready in zip(links, found, strict=True):
            link.saved = self._keep
            if ready.width != self.width:
                raise WorkerError(f"the worker {link.address} has another model", "give it the same file")
        return min(ready.n_tokens for ready in found)

    # --- hops of a pass -----------------------------------------------------------------------------------------

    def begin(self, pass_: Pass) -> None:
        """A pass comes: the workers have to be where it begins."""
        if self._lost and not pass_.decode:
            Thread(target=self._welcome_back, args=[self._lost.pop()], name="welcome", daemon=True).start()
        self._given = None
        self._count(pass_)
        self._journal.begin(pass_.only)
        while True:
            try:
                self._replay([link for link in self.links if not link.be_at(pass_.only.first, self.check)], 0)
                break
            except WorkerError as error:
                self._replace(error, 0)
        if self.stages[0].first == 0:
            self._give_early(self.stages[0])

    def _count(self, pass_: Pass) -> None:
        """Passes of one token that continue an answer are timed."""
        now_s = time.perf_counter()
        self._since_prompt = self._since_prompt + 1 if pass_.decode else 0
        if self._is_timed and pass_.decode:
            self.own_latencies.append(now_s - self._began_s - self._waited_s)
        self._is_timed = pass_.n_tokens == 1 and self._since_prompt > _UNSETTLED
        self._began_s, self._waited_s = now_s, 0.0

    def leave(self, layer: int, hidden: memoryview) -> None:
        """To the worker that has this layer."""
        data = converted(hidden, F32, self.hidden)
        refuse_too_large(data, self.hidden, layer)
        self._journal.put(layer, data)
        stage = next(stage for stage in self.stages if stage.first == layer)
        self._give_early(stage)

    def _give_early(self, stage: Stage) -> None:
        """The worker begins while this machine goes on to where it needs the result; a loss is met there."""
        if stage.link.is_lost:
            return
        self._give(stage, self._journal.entries[-1], b"" if stage.first == 0 else None)
        self._given = stage

    def enter(self, layer: int, _n_bytes: int) -> bytes:
        """From the worker that has the layer before, through all that come before it without the root."""
        start_s = time.perf_counter()
        at = self._start_of_chain(layer)
        entry = self._journal.entries[-1]
        while True:
            try:
                stage = next(stage for stage in reversed(self.stages) if stage.first <= at)
                if stage is not self._given:
                    self._give(stage, entry)
                self._given = None
                hidden = stage.link.result(self.check)
            except WorkerError as error:
                self._given = None
                self._replace(error, at)
                continue
            if self._is_timed:
                stage.link.note_latency(stage.part)
            if stage.part == len(stage.link.ranges) - 1:
                stage.link.save(self._journal.snapshot.n_positions)
            at = stage.last
            refuse_too_large(hidden, self.hidden, at)
            if at == layer:
                self._waited_s += time.perf_counter() - start_s
                return converted(hidden, self.hidden, F32)
            self._journal.put(at, hidden)

    def _start_of_chain(self, layer: int) -> int:
        at = layer
        for stage in reversed(self.stages):
            if stage.last == at:
                at = stage.first
        return at

    def _give(self, stage: Stage, entry: Entry, hidden: bytes | None = None) -> None:
        """Have a stage computed in a pass; hidden None: what the journal has."""
        part = entry.part
        rows = part.n_outputs if stage.last == self.n_layers else len(part.tokens)
        stage.link.number += stage.part == 0
        hidden = self._journal.get(entry, stage.first) if hidden is None else hidden
        tokens = array("i", part.tokens).tobytes()
        step = Step(stage.link.number, stage.part, part.first, part.n_outputs, tokens, hidden)
        stage.link.send(step, rows * self.width * NUMBER_BYTES[self.hidden])

    def _keep(self, link: Link, saved: Saved) -> None:
        """Keys and values came; where they cannot be written they are computed again if need be."""
        data, sizes = memoryview(saved.data), link.cell_bytes
        with suppress(OSError):
            for layer in link.layers[saved.begin : dict(link.groups)[saved.begin]]:
                n_bytes = BLOCK * sizes[layer]
                self._journal.snapshot.put(layer, saved.first, data[:n_bytes])
                data = data[n_bytes:]

    # --- a worker is lost ---------------------------------------------------------------------------------------

    def _replace(self, error: WorkerError, at: int) -> None:
        """Have others do what lost workers did, up to layer `at` of the pass at hand; raises `error` if nobody can."""
        while True:
            lost = [link for link in self.links if link.is_lost]
            if not lost:
                raise error
            self._spares = [link for link in self._spares if not link.is_lost]
            fresh = [self._successor(link, error) for link in lost]
            close_all(lost)
            fresh = list(dict.fromkeys(fresh))
            try:
                for link in fresh:
                    link.be_at(0, self.check)
                n_tokens = self._set_up(fresh)
                if n_tokens < max(len(entry.part.tokens) for entry in self._journal.entries):
                    raise error
                self._replay(fresh, at, self._restore(fresh))
                for link in fresh:
                    link.replacements += 1
                return
            except WorkerError as another:
                if not any(link.is_lost for link in fresh):
                    raise
                error = another

    def _welcome_back(self, link: Link) -> None:
        """A worker that was lost may be there again: then it is a spare one."""
        try:
            fresh = self.restarted(link) if self.restarted else link.again()
        except H2OError:
            self._lost.append(link)
            return
        self._spares.append(fresh)
        if self._is_closed:  # looked at last: it may be closed at any moment
            fresh.close()

    def _successor(self, lost: Link, error: WorkerError) -> Link:
        """Who takes over a lost worker's layers: a spare one, itself if it is started again, or who has most memory."""
        others = [link for link in self.links if not link.is_lost]
        fresh = None if self._spares else self._started_again(lost)
        if not self._spares and not fresh and not others:
            raise error
        if self._spares:
            link = self._spares.pop(0)
        elif fresh:
            link = fresh
        else:
            link = max(others, key=lambda link: link.hello.weights_bytes / self._n_layers_of(link))
        if link is not fresh:
            self._lost.append(lost)
        ranges = ", ".join(f"{s.first}-{s.last - 1}" for s in self.stages if s.link is lost)
        self.note(f"{error.message}; its layers {ranges} go to {link.address}")
        moved = [replace(s, link=link) if s.link is lost else replace(s) for s in self.stages]
        self.stages = [moved[0]]
        for stage in moved[1:]:
            before = self.stages[-1]
            if stage.link is before.link and stage.first == before.last:
                before.last = stage.last
            else:
                self.stages.append(stage)
        return link

    def _started_again(self, lost: Link) -> Link | None:
        try:
            return self.restarted(lost) if self.restarted else None
        except WorkerError as error:
            self.note(str(error))
            return None

    def _n_layers_of(self, link: Link) -> int:
        return sum(stage.last - stage.first for stage in self.stages if stage.link is link)

    def _restore(self, fresh: Sequence[Link]) -> int:
        """Give workers the keys and values that are there of all of their layers; how many positions they have then."""
        n_past = min(self._journal.positions_of(link.cell_bytes) for link in fresh)
        for link in fresh if n_past else ():
            link.take(n_past, self._journal.snapshot.get, self.check)
        return n_past

    def _replay(self, fresh: Sequence[Link], at: int, n_past: int = 0) -> None:
        """Have workers that have n_past positions compute the others: all passes, and the one at hand up to `at`."""
        if not fresh:
            return
        *done, last = self._journal.entries
        for entry in done:
            if entry.part.first >= n_past:
                self._replay_pass(entry, fresh, self.n_layers)
        self._replay_pass(last, fresh, at)

    def _replay_pass(self, entry: Entry, fresh: Sequence[Link], until: int) -> None:
        for link in fresh:
            if not link.be_at(entry.part.first, self.check):
                raise WorkerError(f"the worker {link.address} forgets what it computed", AGAIN)
        for stage in self.stages:
            if stage.link in fresh and stage.last <= until:
                self._give(stage, entry)
                stage.link.result(self.check)

    def close(self) -> None:
        """Leave all workers."""
        self._is_closed = True
        close_all((*self.links, *self._spares))
        self._journal.close()
