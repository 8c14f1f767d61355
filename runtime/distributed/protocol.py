"""Both ends of a conversation between a root and a worker, without any input or output: bytes in, events out.

    worker   greeting -> choosing -> ready <-> planning, computing, loading          closed, from anywhere
    root     greeting -> choosing -> ready <-> probing, planning, waiting, loading   closed, from anywhere

An event is the message itself, when it is one that may come now and fits all that was said before. Whatever else comes
is a `Refusal`: one line for the log, the bytes of an Error for the other side, and the conversation is over. Nothing
here raises for what was received; what this side sends out of turn is a ValueError, a mistake of this program.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from runtime.distributed.messages import (
    BLOCK,
    MOST_HIDDEN_BYTES,
    PROTOCOL,
    TOKEN_BYTES,
    Adopt,
    Bye,
    Error,
    Hello,
    Load,
    MalformedError,
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
    Truncate,
    Truncated,
    decode,
    encode,
)

GREETING, CHOOSING, PROBING, PLANNING, READY, COMPUTING, WAITING, LOADING, CLOSED = (
    "greeting",
    "choosing",
    "probing",
    "planning",
    "ready",
    "computing",
    "waiting",
    "loading",
    "closed",
)


@dataclass(frozen=True)
class Refusal:
    """Something that was not to come: why, and the bytes to send before closing."""

    reason: str
    answer: bytes


@dataclass(frozen=True)
class Again:
    """A step that came before: send the same answer (empty: it is still being computed and will come)."""

    answer: bytes


@dataclass(frozen=True)
class Stale:
    """An answer to a step that the root has given up: nothing to do."""


@dataclass(frozen=True)
class Shape:
    """What a worker was set up with and what it can take; sizes of all that follows."""

    ranges: tuple[tuple[int, int], ...]
    n_layers: int
    n_ctx: int
    n_tokens: int
    n_logits: int
    n_vocab: int
    width: int
    number_bytes: int = 4  # of a hidden state's numbers
    cell_bytes: tuple[int, ...] = ()  # of a position in each layer's keys and values

    def hidden_in(self, step: Step) -> int:
        """Bytes of hidden state that a step brings."""
        return step.n_tokens * self.width * self.number_bytes if self.ranges[step.part][0] else 0

    def hidden_out(self, step: Step) -> int:
        """Bytes of hidden state that its result brings."""
        rows = step.n_logits if self.ranges[step.part][1] == self.n_layers else step.n_tokens
        return rows * self.width * self.number_bytes

    def wrong_step(self, step: Step) -> str:
        """What does not fit in a step, or an empty text."""
        if len(step.tokens) % TOKEN_BYTES or not 1 <= step.n_tokens <= self.n_tokens:
            return f"{len(step.tokens)} bytes of tokens; 1 to {self.n_tokens} tokens are possible"
        if step.part >= len(self.ranges):
            return f"part {step.part} of {len(self.ranges)}"
        if step.n_past + step.n_tokens > self.n_ctx:
            return f"position {step.n_past + step.n_tokens} in a context of {self.n_ctx}"
        if step.n_logits > min(step.n_tokens, self.n_logits):
            return f"{step.n_logits} rows of logits for {step.n_tokens} tokens"
        tokens = array("i", step.tokens)
        if min(tokens) < 0 or max(tokens) >= self.n_vocab:
            return f"a token outside the vocabulary of {self.n_vocab}"
        if len(step.hidden) != self.hidden_in(step):
            return f"a hidden state of {len(step.hidden)} bytes instead of {self.hidden_in(step)}"
        return ""

    def wrong_block(self, block: Save | Load) -> str:
        """What does not fit in a Save or a Load, or an empty text. Its positions are another question."""
        if block.first % BLOCK or not block.begin < block.end <= len(self.cell_bytes):
            return f"no block of layers: {block.begin} to {block.end} of {len(self.cell_bytes)} from {block.first} on"
        n_bytes = BLOCK * sum(self.cell_bytes[block.begin : block.end])
        if isinstance(block, Load) and len(block.data) != n_bytes:
            return f"{len(block.data)} bytes of keys and values instead of {n_bytes}"
        return ""


class _Side:
    """What both ends have in common. `state` says what may come and what may be sent."""

    def __init__(self) -> None:
        self.state = GREETING

    def error(self, reason: str, next_step: str = "") -> bytes:
        """Say why this side does not go on, and close."""
        self.state = CLOSED
        return encode(Error(reason[:2000], next_step[:2000]))

    def bye(self) -> bytes:
        """Leave."""
        self.state = CLOSED
        return encode(Bye())

    def _refuse(self, reason: str) -> Refusal:
        return Refusal(reason, self.error(reason))

    def _decode(self, data: bytes) -> Message | Refusal:
        if self.state == CLOSED:
            return Refusal("a message behind the end", b"")
        try:
            message = decode(data)
        except MalformedError as error:
            return self._refuse(f"no message: {error}")
        if isinstance(message, Error | Bye):
            self.state = CLOSED
        return message

    def _send(self, message: Message, state: str, *allowed: str) -> bytes:
        if self.state not in allowed:
            raise ValueError(f"{type(message).__name__} cannot be sent while {self.state}")
        self.state = state
        return encode(message)


class WorkerSide(_Side):
    """A worker's end. Events: Hello, Probe, Setup, Step, Truncate, Save, Adopt, Load, Bye, Error, Again, Refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.shape: Shape | None = None
        self.n_past = 0
        self._step: Step | None = None  # the last one
        self._answers: dict[int, tuple[int, bytes]] = {}  # of this pass: part -> hash of the step, bytes of the result
        self.is_shortening = False  # a Truncate came and is not answered
        self._save: Save | None = None  # it came and is not answered
        self._adopt: Adopt | None = None  # so did this

    def receive(self, data: bytes) -> Message | Again | Refusal:
        """What a message of the root means."""
        message = self._decode(data)
        if isinstance(message, Refusal | Error | Bye):
            return message
        if isinstance(message, Hello) and self.state == GREETING:
            if message.protocol != PROTOCOL:
                return self._refuse(f"protocol {message.protocol} was asked for, this is {PROTOCOL}")
            self.state = CHOOSING
            return message
        if isinstance(message, Probe) and self.state == READY:
            return message
        if isinstance(message, Setup) and self.state == READY and not self.is_shortening:
            self.state = PLANNING
            return message
        if self.shape and self.state in (READY, COMPUTING) and not self.is_shortening:
            return self._on_work(message, self.shape, hash(data))
        return self._refuse(f"{type(message).__name__} while {self.state}")

    def _on_work(self, message: Message, shape: Shape, digest: int) -> Message | Again | Refusal:
        if isinstance(message, Step):
            return self._on_step(message, digest)
        if isinstance(message, Truncate):
            self.is_shortening = True
            return message
        if isinstance(message, Save | Adopt | Load) and self.state == READY:
            return self._on_block(message, shape)
        return self._refuse(f"{type(message).__name__} while {self.state}")

    def _on_block(self, message: Save | Adopt | Load, shape: Shape) -> Message | Refusal:
        what = type(message).__name__
        if self._save or (self._step and self._step.part < len(shape.ranges) - 1):
            return self._refuse(f"{what} in the middle of something else")
        if isinstance(message, Adopt):
            if self.n_past or not shape.cell_bytes or not 0 < message.n_past <= shape.n_ctx:
                return self._refuse(f"Adopt: {message.n_past} positions after {self.n_past}")
            self._adopt, self.state = message, LOADING
            return message
        last = message.first + (BLOCK if isinstance(message, Save) else 1)
        wrong = shape.wrong_block(message) or (f"position {last} of {self.n_past}" if last > self.n_past else "")
        if wrong:
            return self._refuse(f"{what}: {wrong}")
        if isinstance(message, Save):
            self._save = message
        else:
            self.state = LOADING
        return message

    def _on_step(self, step: Step, digest: int) -> Step | Again | Refusal:
        assert self.shape
        last = self._step
        if last and step.number == last.number and step.part in self._answers:
            known, answer = self._answers[step.part]
            return Again(answer) if known == digest else self._refuse(f"step {step.number} again, with other contents")
        if self.state == COMPUTING:
            return self._refuse(f"step {step.number} while step {last.number if last else 0} is computed")
        wrong = self._out_of_order(step) or self.shape.wrong_step(step)
        if wrong:
            return self._refuse(f"step {step.number}: {wrong}")
        if step.part == 0:
            self._answers.clear()
        self._answers[step.part] = (digest, b"")
        self._step, self.state = step, COMPUTING
        return step

    def _out_of_order(self, step: Step) -> str:
        last = self._step
        number, part = (last.number, last.part + 1) if last else (1, 0)
        if self.shape and last and part == len(self.shape.ranges):
            number, part = number + 1, 0
        if last is None:
            number = step.number
        if (step.number, step.part) != (number, part):
            return f"part {step.part} came instead of step {number}, part {part}"
        if part and last and (step.tokens, step.n_past, step.n_logits) != (last.tokens, last.n_past, last.n_logits):
            return "another pass than that of its first part"
        if step.n_past != self.n_past:
            return f"{step.n_past} positions are expected in the cache, there are {self.n_past}"
        return ""

    def hello(self, hello: Hello) -> bytes:
        """Answer a Hello."""
        return self._send(hello, READY, CHOOSING)

    def probe(self, probe: Probe) -> bytes:
        """Answer a Probe."""
        return self._send(probe, READY, READY)

    def ready(self, ready: Ready, shape: Shape) -> bytes:
        """Answer a Setup; the shape is what steps are checked against."""
        self.shape, self.n_past, self._step, self._save = shape, 0, None, None
        self._answers.clear()
        return self._send(ready, READY, PLANNING)

    def progress(self, share: float) -> bytes:
        """The step at hand takes a while."""
        assert self._step
        return self._send(Progress(self._step.number, min(max(share, 0.0), 1.0)), COMPUTING, COMPUTING)

    def result(self, hidden: bytes, **facts: float) -> bytes:
        """Answer the step at hand."""
        step, shape = self._step, self.shape
        if step is None or shape is None or len(hidden) != shape.hidden_out(step):
            raise ValueError("a result that fits no step")
        answer = self._send(Result(step.number, step.part, hidden, **facts), READY, COMPUTING)  # type: ignore[arg-type]
        self._answers[step.part] = (self._answers[step.part][0], answer)
        if step.part == len(shape.ranges) - 1:
            self.n_past += step.n_tokens
        return answer

    def saved(self, data: bytes) -> bytes:
        """Answer a Save; steps may have come meanwhile."""
        save, shape, self._save = self._save, self.shape, None
        if save is None or shape is None or len(data) != BLOCK * sum(shape.cell_bytes[save.begin : save.end]):
            raise ValueError("keys and values that fit no Save")
        return self._send(Saved(save.first, save.begin, data), self.state, READY, COMPUTING, PLANNING)

    def taken(self) -> bytes:
        """Answer an Adopt or a Load."""
        if self._adopt:
            self.n_past, self._adopt, self._step = self._adopt.n_past, None, None
        return self._send(Taken(), READY, LOADING)

    def truncated(self, n_past: int) -> bytes:
        """Answer a Truncate: the next pass begins with its first part, behind n_past positions."""
        self.n_past, self._step, self.is_shortening = n_past, None, False
        self._answers.clear()
        return self._send(Truncated(n_past), READY, READY, COMPUTING)


class RootSide(_Side):
    """A root's end for a worker. Events: those a worker sends, Stale, Refusal."""

    def __init__(self) -> None:
        super().__init__()
        self.n_past = 0  # of the worker, as the root knows it
        self._setup: Setup | None = None
        self._step: Step | None = None
        self._hidden_bytes = 0  # of the result that is waited for
        self.is_shortening = False  # a Truncate was sent and not answered
        self._save: Save | None = None  # it was sent and not answered
        self._save_bytes, self._save_holds = 0, False  # whether its positions are still the same
        self._adopted = 0  # positions that the worker is to have

    def hello(self, hello: Hello) -> bytes:
        """Begin."""
        return self._send(hello, CHOOSING, GREETING)

    def probe(self, probe: Probe) -> bytes:
        """Try the link."""
        return self._send(probe, PROBING, READY)

    def setup(self, setup: Setup) -> bytes:
        """Give the worker its layers."""
        self._setup, self._step, self.n_past, self._save_holds = setup, None, 0, False
        return self._send(setup, PLANNING, READY)

    def step(self, step: Step, hidden_bytes: int) -> bytes:
        """Have one range of one pass computed; hidden_bytes: of its result."""
        if len(step.hidden) > MOST_HIDDEN_BYTES:
            raise ValueError("a hidden state too long for one message")
        self._step, self._hidden_bytes = step, hidden_bytes
        return self._send(step, WAITING, READY)

    def truncate(self, n_past: int) -> bytes:
        """Have positions forgotten; a step under way is given up. One at a time."""
        if self.is_shortening:
            raise ValueError("a Truncate is under way")
        self.is_shortening, self._step = True, None
        if self._save and n_past < self._save.first + BLOCK:
            self._save_holds = False
        return self._send(Truncate(n_past), WAITING, READY, WAITING)

    @property
    def is_saving(self) -> bool:
        """Whether a Save is under way. One at a time."""
        return self._save is not None

    def save(self, save: Save, n_bytes: int) -> bytes:
        """Ask for keys and values, between two passes; n_bytes: of the answer, which may come behind the next step."""
        if self._save:
            raise ValueError("a Save is under way")
        data = self._send(save, READY, READY)
        self._save, self._save_bytes, self._save_holds = save, n_bytes, True
        return data

    def adopt(self, n_past: int) -> bytes:
        """Have positions that were computed elsewhere."""
        self._adopted = n_past
        return self._send(Adopt(n_past), LOADING, READY)

    def load(self, load: Load) -> bytes:
        """Give keys and values of such positions."""
        return self._send(load, LOADING, READY)

    def receive(self, data: bytes) -> Message | Stale | Refusal:
        """What a message of the worker means."""
        message = self._decode(data)
        if isinstance(message, Refusal | Error | Bye):
            return message
        if isinstance(message, Hello) and self.state == CHOOSING:
            if message.protocol != PROTOCOL:
                return self._refuse(f"the worker speaks protocol {message.protocol}, this is {PROTOCOL}")
            self.state = READY
            return message
        if isinstance(message, Ready | Probe) and self.state == (PLANNING if isinstance(message, Ready) else PROBING):
            self.state = READY
            return message
        if isinstance(message, Saved) and self._save:
            return self._on_saved(message, self._save)
        if isinstance(message, Taken) and self.state == LOADING:
            self.n_past, self.state = max(self._adopted, self.n_past), READY
            self._adopted = 0
            return message
        if self.state == WAITING and isinstance(message, Result | Progress | Truncated):
            return self._on_answer(message)
        return self._refuse(f"{type(message).__name__} while {self.state}")

    def _on_saved(self, message: Saved, save: Save) -> Message | Stale | Refusal:
        asked = save.first, save.begin, self._save_bytes
        if (message.first, message.begin, len(message.data)) != asked:
            return self._refuse(f"{len(message.data)} bytes of keys and values instead of {self._save_bytes}")
        self._save = None
        return message if self._save_holds else Stale()

    def _on_answer(self, message: Result | Progress | Truncated) -> Message | Stale | Refusal:
        if isinstance(message, Truncated):
            if not self.is_shortening:
                return self._refuse("Truncated, which nobody asked for")
            self.is_shortening, self.n_past, self.state = False, message.n_past, READY
            return message
        if self.is_shortening:
            return Stale()
        step, setup = self._step, self._setup
        if step is None or setup is None or message.number != step.number:
            return self._refuse(f"an answer to step {message.number}, which was not asked for")
        if isinstance(message, Progress):
            return message
        if message.part != step.part or len(message.hidden) != self._hidden_bytes:
            return self._refuse(f"step {step.number}: {len(message.hidden)} bytes instead of {self._hidden_bytes}")
        if step.part == len(setup.ranges) - 1:
            self.n_past = step.n_past + step.n_tokens
        self.state = READY
        return message
