"""A worker: computes some layers of a model for one root at a time, inside its own budget.

gRPC's thread takes what comes and answers what needs no model; everything that computes is a job for the main thread,
where signals arrive. Weights stay when a root leaves: the next one that asks for the same layers finds them.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

from runtime.distributed.hidden import F32, converted
from runtime.distributed.messages import (
    BLOCK,
    MOST_MESSAGE_BYTES,
    PROTOCOL,
    Adopt,
    Hello,
    Load,
    Message,
    Probe,
    Save,
    Setup,
    Step,
    Truncate,
)
from runtime.distributed.offer import Offer
from runtime.distributed.own_layers import OwnLayers
from runtime.distributed.protocol import CLOSED, COMPUTING, GREETING, Again, Refusal, WorkerSide
from runtime.engine.engine import Engine
from runtime.errors import Cancelled, EngineError, H2OError, WorkerError
from runtime.llama import abi
from runtime.llama.model_file import ModelFile
from runtime.memory import peak_bytes, trim_heap
from runtime.passes import Pass
from runtime.sizes import format_size

GIVEN_UP = 0  # the number of a Cancelled that no signal brought
_PROGRESS_S = 1.0
_WINDOW_PIECES = 2


def cpu_class() -> str:
    """What llama.cpp uses of this processor: the same text, the same kernels."""
    return str(abi.llama.llama_print_system_info().decode(errors="replace"))[:2000].strip()


def build() -> str:
    """Which llama.cpp computes here."""
    return f"llama-cpp-python {abi.PINNED_VERSION}"


class Talk:
    """One conversation: its protocol, under a lock, and how to send."""

    def __init__(self, send: Callable[[bytes | None], None]) -> None:
        self.side = WorkerSide()
        self.model = 0  # its hash
        self.lock = threading.Lock()
        self.send = send


@dataclass(frozen=True)
class Job:
    """Something for the main thread. event None: the conversation is over; talk None: so is the worker."""

    talk: Talk | None
    event: Message | None


@dataclass(frozen=True)
class Visit:
    """A conversation, as the listener sees it."""

    worker: Worker
    talk: Talk

    def take(self, message: bytes) -> None:
        """A message came."""
        self.worker.take(self.talk, message)

    def leave(self, *, is_cut: bool) -> None:
        """The other side is gone, or all was said."""
        self.worker.leave(self.talk, is_cut=is_cut)


class Follower(Protocol):
    """Adopts new plans of an engine."""

    def __call__(self) -> None:
        """Look for one, between two passes."""

    def close(self) -> None:
        """Look no more."""


@dataclass(frozen=True)
class Idle:
    """When memory of layers is given back: no root for so many seconds, and more than so many bytes held."""

    seconds: float
    above_bytes: int


class Worker:
    """What a worker has and does. `find` gives the model file with a hash, or None; notes go to `log`.

    follow: makes who adopts new plans of an engine for layers of the model with a hash; None: they stay as they are.
    idle None: weights stay for the next root.
    """

    def __init__(
        self,
        find: Callable[[int], ModelFile | None],
        offer: Offer,
        log: Callable[[str], None],
        follow: Callable[[Engine, int], Follower] | None = None,
        idle: Idle | None = None,
    ) -> None:
        self._find, self._offer, self._log, self._follow, self._idle = find, offer, log, follow, idle
        self._follower: Follower | None = None  # of the engine that is open
        self._jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
        self._held: Job | None = None  # a job that was met inside a pass
        self._talk: Talk | None = None  # the conversation that has the engine
        self._seat = threading.Lock()
        self._part: OwnLayers | None = None
        self._step: Step | None = None
        self._began_s = 0.0  # with it
        self._peak_bytes = 0
        self._stopped = 0
        self._told: set[str] = set()
        threading.Thread(target=self._tell_progress, name="progress", daemon=True).start()

    # --- threads of the listener --------------------------------------------------------------------------------

    def begin(self, send: Callable[[bytes | None], None]) -> Visit:
        """A conversation begins."""
        return Visit(self, Talk(send))

    def leave(self, talk: Talk, *, is_cut: bool) -> None:
        """It is over."""
        with talk.lock:
            before, talk.side.state = talk.side.state, CLOSED
        most = f"{MOST_MESSAGE_BYTES >> 20} MiB"  # gRPC itself refuses what is longer, and does not say so here
        if before == GREETING:
            self._log_once(f"refused: a conversation without a message of at most {most}")
        elif is_cut and before != CLOSED and not self._stopped:
            self._log_once(
                f"a root is gone without a goodbye: it was killed, its line is lost, or a message of more than {most}"
                " was refused"
            )
        talk.send(None)
        with self._seat:
            mine = self._talk is talk
        if mine:
            self._cancel()
            self._jobs.put(Job(talk, None))

    def take(self, talk: Talk, data: bytes) -> None:
        """One message of it."""
        with talk.lock:
            if talk.side.state != CLOSED:
                self._take(talk, talk.side.receive(data))
            if talk.side.state == CLOSED:
                talk.send(None)

    def _take(self, talk: Talk, event: Message | Again | Refusal) -> None:
        if isinstance(event, Again):
            if event.answer:
                talk.send(event.answer)
        elif isinstance(event, Hello):
            talk.send(self._welcome(talk, event))
        elif isinstance(event, Probe):
            talk.send(talk.side.probe(event))
        elif isinstance(event, Setup) and not self._take_seat(talk):
            talk.send(talk.side.error("this worker computes for another root", "wait, or take another worker"))
        elif isinstance(event, Refusal):
            self._log_once(f"refused: {event.reason}")
            talk.send(event.answer)
        elif isinstance(event, Setup | Step | Truncate | Save | Adopt | Load):
            if isinstance(event, Truncate) and talk.side.state == COMPUTING:
                self._cancel()  # a pass whose last result was sent is left to end: its positions count
            self._jobs.put(Job(talk, event))

    def _welcome(self, talk: Talk, theirs: Hello) -> bytes:
        mine = Hello(PROTOCOL, build(), theirs.model, cpu_class(), **asdict(self._offer))
        if theirs.build != mine.build:
            return talk.side.error(f"{theirs.build} asks, here is {mine.build}", "install the same version on both")
        if theirs.model and self._find(theirs.model) is None:
            return talk.side.error(
                "this worker does not have that model", "start it with the path of its own copy: h2o worker MODEL"
            )
        talk.model = theirs.model
        return talk.side.hello(mine)

    def _take_seat(self, talk: Talk) -> bool:
        with self._seat:
            if self._talk in (None, talk):
                self._talk = talk
            return self._talk is talk

    def _log_once(self, text: str) -> None:
        if text not in self._told and len(self._told) < 100:
            self._told.add(text)
            self._log(text)

    def _cancel(self) -> None:
        """End the pass that runs, if one does; the job that says why is about to be in the queue."""
        if self._part:
            self._part.cancel(GIVEN_UP)

    def _tell_progress(self) -> None:
        while True:
            time.sleep(_PROGRESS_S)
            self._peak_bytes = peak_bytes()
            talk, part = self._talk, self._part
            if talk and part and self._step:
                with talk.lock:
                    if talk.side.state == COMPUTING:
                        talk.send(talk.side.progress(part.share))

    # --- the main thread ----------------------------------------------------------------------------------------

    def stop(self, signal_number: int) -> None:
        """End work() soon (from a signal handler)."""
        self._stopped = signal_number
        if self._part:
            self._part.cancel(signal_number)
        self._jobs.put(Job(None, None))

    def work(self) -> int:
        """Compute until stop(); returns the signal's number."""
        try:
            while not self._stopped:
                self._do(self._next())
        finally:
            self._close_part()
        return self._stopped

    def _next(self) -> Job:
        job, self._held = self._held, None
        while job is None:
            is_idle = self._idle and self._part and self._talk is None
            try:
                job = self._jobs.get(timeout=self._idle.seconds if self._idle and is_idle else None)
            except queue.Empty:
                self._give_back()
        return job

    def _give_back(self) -> None:
        """No root was there for a while."""
        part, idle = self._part, self._idle
        if part and idle and self._talk is None and part.engine.ledger.resident_bytes > idle.above_bytes:
            n_bytes = part.engine.ledger.resident_bytes
            self._close_part()
            trim_heap()
            self._log(f"idle for {idle.seconds:g} s: {format_size(n_bytes)} of layers given back")

    def _do(self, job: Job) -> None:
        talk, event = job.talk, job.event
        if talk is None or talk is not self._talk:
            return
        if event is None:
            with self._seat:
                self._talk = None
            return
        try:
            if isinstance(event, Setup):
                self._set_up(talk, event)
            elif isinstance(event, Step):
                self._compute(talk, event)
            elif isinstance(event, Truncate):
                self._truncate(talk, event.n_past)
            elif isinstance(event, Save | Adopt | Load):
                self._move_cells(talk, event)
        except Cancelled:
            return  # what comes next says why
        except H2OError as error:
            self._log(str(error))
            with talk.lock:
                if talk.side.state != CLOSED:
                    talk.send(talk.side.error(error.message, error.next_step))
                    talk.send(None)

    def _set_up(self, talk: Talk, setup: Setup) -> None:
        part = self._part
        if part is None or part.model != talk.model or not part.fits(setup):
            self._end_following()
            part = self._open(talk.model, setup)
            self._log(part.summary)
            self._follower = self._follow(part.engine, part.model) if self._follow else None
        part.engine.forget_cancel()
        part.engine.truncate(0)
        if self._follower:
            self._follower()  # now, so that the root is told what is in force
        self._peak_bytes = peak_bytes()
        with talk.lock:
            if talk.side.state != CLOSED:
                talk.send(talk.side.ready(part.ready, part.shape))

    def _open(self, model: int, setup: Setup) -> OwnLayers:
        """The layers of a setup; where they are there already, their weights stay in memory."""
        part = self._part
        if part and part.model == model and part.setup.ranges == setup.ranges:
            try:
                part.open(setup)
                return part
            except H2OError:
                self._close_part()
                raise
        self._close_part()
        file = self._find(model)
        if file is None:
            raise WorkerError("no model is chosen", "say hello first")
        self._part = OwnLayers(file, setup, self._offer, _WorkerHops(self))
        return self._part

    def _close_part(self) -> None:
        self._end_following()
        part, self._part = self._part, None
        if part:
            part.close()

    def _end_following(self) -> None:
        follower, self._follower = self._follower, None
        if follower:
            follower.close()

    def _compute(self, talk: Talk, step: Step) -> None:
        part = self._part
        if part is None or talk.side.is_shortening or talk.side.state != COMPUTING:
            return
        part.engine.forget_cancel()
        if self._follower:
            self._follower()
        self._step, self._began_s = step, time.perf_counter()
        try:
            part.compute(step)
        finally:
            self._step = None

    def _move_cells(self, talk: Talk, event: Save | Adopt | Load) -> None:
        """Keys and values of some positions, out of the cache or into it."""
        part = self._part
        if part is None:
            return
        saved = b""
        if isinstance(event, Save):
            saved = part.rows.read(event.first, BLOCK, event.begin, event.end)
        elif isinstance(event, Load):
            part.rows.write(event.first, BLOCK, event.begin, event.end, event.data)
        else:
            part.engine.forget_cancel()
            part.engine.adopt(event.n_past)
        with talk.lock:
            if talk.side.state != CLOSED:
                talk.send(talk.side.saved(saved) if isinstance(event, Save) else talk.side.taken())

    def _truncate(self, talk: Talk, n_past: int) -> None:
        part = self._part
        if part is None:
            return
        part.engine.forget_cancel()
        if n_past < part.engine.n_past:
            try:
                part.engine.truncate(n_past)
            except EngineError:  # a recurrent state cannot be shortened
                part.engine.truncate(0)
        with talk.lock:
            if talk.side.state != CLOSED:
                talk.send(talk.side.truncated(part.engine.n_past))

    # --- inside a pass ------------------------------------------------------------------------------------------

    def hidden_of(self, layer: int) -> bytes:
        """What goes into a layer: it came with the step at hand, or comes with the next one."""
        step, part = self._step, self._part
        assert step and part
        if part.setup.ranges[step.part][0] != layer:
            step = self._step = self._next_step()
        return converted(step.hidden, part.setup.hidden, F32)

    def _next_step(self) -> Step:
        while True:
            job = self._jobs.get()
            if job.talk is not self._talk and job.talk is not None:
                continue
            if isinstance(job.event, Step):
                self._began_s = time.perf_counter()
                return job.event
            self._held = job
            raise Cancelled(self._stopped)

    def give(self, hidden: memoryview) -> None:
        """The result of the step at hand."""
        talk, part = self._talk, self._part
        assert talk and part
        n_read, seconds = part.engine.counters.bytes_read, time.perf_counter() - self._began_s
        data = converted(hidden, F32, part.setup.hidden)
        with talk.lock:
            if talk.side.state != COMPUTING:
                raise Cancelled(GIVEN_UP)
            talk.send(talk.side.result(data, bytes_read=n_read, peak_bytes=self._peak_bytes, compute_s=seconds))


class _WorkerHops:
    """Hidden states of a worker come with steps and go with results."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def begin(self, pass_: Pass) -> None:
        """Nothing to do: a step has come."""

    def enter(self, layer: int, _n_bytes: int) -> bytes:
        """From the root."""
        return self._worker.hidden_of(layer)

    def leave(self, _layer: int, hidden: memoryview) -> None:
        """To the root."""
        self._worker.give(hidden)
