"""A root's conversation with one worker."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence

from runtime.distributed.keys import Keys
from runtime.distributed.messages import (
    BLOCK,
    Error,
    Hello,
    Load,
    Message,
    Probe,
    Progress,
    Ready,
    Result,
    Save,
    Saved,
    Setup,
    Step,
    Taken,
    Truncated,
)
from runtime.distributed.protocol import CLOSED, LOADING, PLANNING, READY, WAITING, Refusal, RootSide, Stale
from runtime.distributed.wire import Wire
from runtime.errors import WorkerError

CONNECT_S = 5.0  # for the answer to a greeting
SILENCE_S = 12.0  # without any message of a worker that computes: it says every second that it is there
LATENCIES = 256
AGAIN = "start it, and run again"
_SAVE_BYTES = 2**18  # of keys and values in one message, if that is a layer or more
_SAVE_COPIES = 3  # of it at once: as gRPC has it, as the message it gives, and decoded


class Link:
    """The conversation with one worker. Every call may raise WorkerError."""

    def __init__(self, address: str, keys: Keys | None, hello: Hello) -> None:
        """Connect and greet."""
        self.address, self._keys, self._mine = address, keys, hello
        self.ranges: list[tuple[int, int]] = []
        self.layers: list[int] = []  # all of its layers, in order
        self.cell_bytes: dict[int, int] = {}  # layer -> of the keys and values of a position; empty: not given out
        self.groups: list[tuple[int, int]] = []  # which of its layers travel in one message: [begin, end)
        self.bytes_read = self.peak_bytes = self._first_number = 0
        self.compute_s = 0.0  # of the last step
        self.latencies: deque[float] = deque(maxlen=LATENCIES)  # seconds of its own for a token, of this placement
        self._token_s = 0.0  # of the parts so far of the token at hand
        self._first_bytes: int | None = None  # read until the first pass that reads what every pass does
        self.ready: Ready | None = None
        self.number = 0
        self.is_lost = False
        self._is_taking = False  # keys and values: some of its positions have none yet
        self.saved: Callable[[Link, Saved], None] = lambda _link, _saved: None
        self.replacements = 0  # how often it took over layers of another
        self._side = RootSide()
        self._wire = Wire(address, keys)
        try:
            self._wire.send(self._side.hello(hello))
            answer = self.receive(timeout_s=CONNECT_S)
            if not isinstance(answer, Hello):
                raise WorkerError(f"the worker {address} does not greet", AGAIN)
        except BaseException:
            self._wire.close()
            raise
        self.hello = answer

    def again(self, address: str = "") -> Link:
        """A new conversation with the same worker, which may be at another address now."""
        return Link(address or self.address, self._keys, self._mine)

    def round_trip_s(self, n_bytes: int) -> float:
        """Seconds until n_bytes were there and back."""
        start = time.perf_counter()
        self._wire.send(self._side.probe(Probe(bytes(n_bytes))))
        self.receive(timeout_s=CONNECT_S)
        return time.perf_counter() - start

    def set_up(self, setup: Setup) -> None:
        """Give it its layers; `wait_ready` waits until it has planned them."""
        self.ranges, self._is_taking = setup.ranges, False
        self.layers = [layer for first, last in setup.ranges for layer in range(first, last)]
        self._wire.send(self._side.setup(setup))

    def wait_ready(self, check: Callable[[], object]) -> Ready:
        """How it took its layers."""
        answer = self.receive(check)
        if not isinstance(answer, Ready):
            raise WorkerError(f"the worker {self.address} does not say how it took its layers", AGAIN)
        self.ready = answer
        self.cell_bytes = dict(zip(self.layers, answer.cell_bytes, strict=True)) if answer.cell_bytes else {}
        self.groups = _groups(answer.cell_bytes)
        return answer

    # --- keys and values ----------------------------------------------------------------------------------------

    def save(self, known: Callable[[int, int], int]) -> None:
        """Ask for some more keys and values, which come with a later answer. known: positions of a layer that are
        there already. Between two passes, once in each at most.
        """
        sizes, layers = self.cell_bytes, self.layers
        if self._side.is_saving or not sizes:
            return
        first, begin, end = min((known(layers[b], sizes[layers[b]]), b, e) for b, e in self.groups)
        if first + BLOCK <= self._side.n_past:
            n_bytes = BLOCK * sum(sizes[layer] for layer in layers[begin:end])
            self._wire.send(self._side.save(Save(first, begin, end), n_bytes))

    def take(self, n_past: int, get: Callable[[int, int], bytes], check: Callable[[], object]) -> None:
        """Give it n_past positions that were computed elsewhere. get(layer, first): their keys and values."""
        self._is_taking = True
        self._wire.send(self._side.adopt(n_past))
        self._wait_taken(check)
        layers = self.layers
        for first in range(0, n_past, BLOCK):
            for begin, end in self.groups:
                data = b"".join(get(layer, first) for layer in layers[begin:end])
                self._wire.send(self._side.load(Load(first, begin, end, data)))
                self._wait_taken(check)
        self._is_taking = False

    def _wait_taken(self, check: Callable[[], object]) -> None:
        if not isinstance(self.receive(check, SILENCE_S), Taken):
            raise WorkerError(f"the worker {self.address} does not take keys and values", AGAIN)

    # --- passes -------------------------------------------------------------------------------------------------

    def send(self, step: Step, hidden_bytes: int) -> None:
        """Have a step computed; `result` waits for it."""
        if self._side.state != READY:
            raise WorkerError(f"the worker {self.address} is {self._side.state}", AGAIN)
        self._wire.send(self._side.step(step, hidden_bytes))

    def result(self, check: Callable[[], object]) -> bytes:
        """What the step gave."""
        while True:
            answer = self.receive(check, SILENCE_S)
            if isinstance(answer, Result):
                self.peak_bytes = max(answer.peak_bytes, self.peak_bytes)
                if answer.number > self._first_number + 1 and self._first_bytes is None:
                    self._first_number, self._first_bytes = answer.number, answer.bytes_read
                self.bytes_read, self.compute_s = answer.bytes_read, answer.compute_s
                return answer.hidden

    def note_latency(self, part: int) -> None:
        """One of its ranges is computed for a token."""
        self._token_s = self.compute_s + (self._token_s if part else 0.0)
        if part == len(self.ranges) - 1:
            self.latencies.append(self._token_s)

    @property
    def bytes_per_pass(self) -> float:
        """Read for a pass, those of the prompt's beginning left out."""
        passes = self.number - self._first_number
        return (self.bytes_read - self._first_bytes) / passes if passes and self._first_bytes is not None else 0.0

    def be_at(self, n_past: int, check: Callable[[], object]) -> bool:
        """Have the worker forget what is behind n_past positions, or under way. False: it has fewer."""
        side = self._side
        if side.state == CLOSED:
            self.is_lost = True
            raise WorkerError(f"the worker {self.address} has left", AGAIN)
        if side.state == PLANNING:  # an interrupt came before it was ready
            self.wait_ready(check)
        if side.state == LOADING:
            self._wait_taken(check)
        if self._is_taking:  # an interrupt came before all of them were there
            self._is_taking = False
            self.be_at(0, check)
        if side.n_past > n_past or side.state == WAITING:
            if not side.is_shortening:
                self._wire.send(side.truncate(n_past))
            while not isinstance(self.receive(check, SILENCE_S), Truncated):
                pass
            if side.n_past > n_past:  # an earlier one, interrupted, was for more
                return self.be_at(n_past, check)
        return side.n_past == n_past

    def receive(self, check: Callable[[], object] = lambda: None, timeout_s: float = 0.0) -> Message:
        """The next message that is one of the conversation, and an answer to what was asked last."""
        while True:
            event = self._receive(check, timeout_s)
            if isinstance(event, Saved):
                self.saved(self, event)
            elif not isinstance(event, Stale):
                return event

    def _receive(self, check: Callable[[], object], timeout_s: float) -> Message | Stale:
        try:
            data = self._wire.receive(check, timeout_s)
        except WorkerError:
            self.is_lost = True
            raise
        event = self._side.receive(data)
        self.is_lost = self._side.state == CLOSED
        if isinstance(event, Error):
            raise WorkerError(f"the worker {self.address}: {event.reason}", event.next_step)
        if isinstance(event, Refusal):
            raise WorkerError(f"the worker {self.address} talks nonsense: {event.reason}", AGAIN)
        if not isinstance(event, Hello | Probe | Ready | Result | Progress | Truncated | Saved | Taken | Stale):
            raise WorkerError(f"the worker {self.address} has left", AGAIN)
        return event

    def say_goodbye(self) -> None:
        """Nothing more comes."""
        if self._side.state != CLOSED:
            self._wire.send(self._side.bye())
        self._wire.end()

    def close(self) -> None:
        """Say goodbye, and wait a moment until the worker has heard it."""
        self.say_goodbye()
        self._wire.close()


def close_all(links: Iterable[Link]) -> None:
    """Close conversations; those whose workers do not answer are waited for together."""
    links = list(links)
    for link in links:
        link.say_goodbye()
    for link in links:
        link.close()


def _groups(cell_bytes: Sequence[int]) -> list[tuple[int, int]]:
    """Which layers travel in one message, [begin, end); cell_bytes: of each of them."""
    found, n_bytes = [[0, 0]], 0
    for size in cell_bytes:
        if n_bytes and n_bytes + BLOCK * size > _SAVE_BYTES:
            found.append([found[-1][1], found[-1][1]])
            n_bytes = 0
        found[-1][1] += 1
        n_bytes += BLOCK * size
    return [(begin, end) for begin, end in found if end > begin]


def saving_bytes(cell_bytes: int) -> int:
    """The most that keys and values take on their way from a worker. cell_bytes: of a position in the largest layer."""
    return _SAVE_COPIES * max(_SAVE_BYTES, BLOCK * cell_bytes)


def greet(addresses: Sequence[str], keys: Callable[[str], Keys | None], mine: Hello) -> list[Link]:
    """Conversations with the workers at these addresses. Raises WorkerError, and leaves none open then."""
    links: list[Link] = []
    try:
        for address in addresses:
            links.append(Link(address, keys(address), mine))
    except BaseException:
        close_all(links)
        raise
    return links
