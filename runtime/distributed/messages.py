"""What a root and a worker say to each other: one message, one block of bytes.

A message is a msgpack map with its kind under "kind"; the limits below are checked while it is decoded. Tokens and
hidden states are raw bytes inside: int32, and float32 or float16, little-endian, row by row. What their lengths have to
be is known to both sides, and both compare.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec

PROTOCOL = 5
MOST_LAYERS = 4096
MOST_TOKENS = 65536  # of one step
MOST_CONTEXT = 2**24
MOST_HIDDEN_BYTES = 60 * 2**20
MOST_MESSAGE_BYTES = 64 * 2**20
TOKEN_BYTES = 4
BLOCK = 16  # positions of a snapshot of keys and values

Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**62)]
Number = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
Rate = Annotated[float, msgspec.Meta(ge=0)]
Word = Annotated[str, msgspec.Meta(max_length=64)]
Text = Annotated[str, msgspec.Meta(max_length=2000)]
Context = Annotated[int, msgspec.Meta(ge=1, le=MOST_CONTEXT)]
Position = Annotated[int, msgspec.Meta(ge=0, le=MOST_CONTEXT)]
PerStep = Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]
Part = Annotated[int, msgspec.Meta(ge=0, lt=MOST_LAYERS)]
LayerNumber = Annotated[int, msgspec.Meta(ge=0, le=MOST_LAYERS)]
Tokens = Annotated[bytes, msgspec.Meta(max_length=TOKEN_BYTES * MOST_TOKENS)]
Hidden = Annotated[bytes, msgspec.Meta(max_length=MOST_HIDDEN_BYTES)]
CellBytes = Annotated[int, msgspec.Meta(ge=0, le=MOST_HIDDEN_BYTES // BLOCK)]
Range = tuple[LayerNumber, LayerNumber]
Ranges = Annotated[list[Range], msgspec.Meta(min_length=1, max_length=MOST_LAYERS)]


class Message(msgspec.Struct, frozen=True, tag_field="kind", tag=str.lower, forbid_unknown_fields=True):
    """The base of all messages."""


class Hello(Message, frozen=True):
    """The first message of both sides: what has to be the same for answers to be the same.

    protocol: of this table. build: of llama.cpp. model: the file's hash (0: the worker has none yet). cpu: what the
    library may use of the processor. What follows is what a worker offers (see offer.py).
    """

    protocol: Count
    build: Word
    model: Number
    cpu: Text
    budget_bytes: Count = 0
    n_threads: Count = 0
    weights_bytes: Count = 0
    disk_bytes_per_s: Rate = 0.0
    compute_s_per_byte: Rate = 0.0
    streaming_s_per_byte: Rate = 0.0
    wake_s: Rate = 0.0


class Probe(Message, frozen=True):
    """Root: how fast is the link? Worker: the same bytes back."""

    data: Annotated[bytes, msgspec.Meta(max_length=2**20)]


class Setup(Message, frozen=True):
    """Root: the worker computes these ranges of layers, each [first, last), in passes like the root's own.

    window_bytes: for streamed weights, 0: the worker's choice. hidden: how hidden states travel, both ways.
    """

    ranges: Ranges
    n_ctx: Context
    n_ubatch: PerStep
    n_logits: PerStep
    kv_type: Word
    window_bytes: Count = 0
    hidden: Word = "f32"


class Ready(Message, frozen=True):
    """Worker: the layers are planned. n_tokens: the longest pass it can take. cell_bytes: of the keys and values of a
    position, for each of its layers in their order; none where they cannot be saved."""

    n_tokens: PerStep
    width: PerStep
    budget_bytes: Count
    resident_bytes: Count
    streamed_bytes: Count
    cell_bytes: Annotated[list[CellBytes], msgspec.Meta(max_length=MOST_LAYERS)] = []


class Step(Message, frozen=True):
    """Root: compute one range (`part`) of one pass.

    number: of the pass, one more than that of the pass before; the same step sent twice is answered with the same
    bytes. n_past: positions in the cache before it. n_logits: rows of the last layer that are wanted. tokens: of the
    pass, int32. hidden: what the layer before the range gave; empty for a range that begins the model.
    """

    number: Positive
    part: Part
    n_past: Position
    n_logits: Annotated[int, msgspec.Meta(ge=0, le=MOST_TOKENS)]
    tokens: Tokens
    hidden: Hidden

    @property
    def n_tokens(self) -> int:
        """Tokens of the pass."""
        return len(self.tokens) // TOKEN_BYTES


class Result(Message, frozen=True):
    """Worker: what the last layer of the range gave.

    bytes_read: by its process; peak_bytes: of its memory; compute_s: seconds from the step to this, waits for reads
    included, hand-overs not.
    """

    number: Positive
    part: Part
    hidden: Hidden
    bytes_read: Count = 0
    peak_bytes: Count = 0
    compute_s: Rate = 0.0


class Progress(Message, frozen=True):
    """Worker: the step takes a while, and this share of the worker's layers is done."""

    number: Positive
    share: Annotated[float, msgspec.Meta(ge=0, le=1)]


class Truncate(Message, frozen=True):
    """Root: forget all positions from n_past on; a pass that is not finished is forgotten, too."""

    n_past: Position


class Truncated(Message, frozen=True):
    """Worker: it is done. n_past: the positions that are left; fewer where the model's state cannot be shortened."""

    n_past: Position


class Save(Message, frozen=True):
    """Root: give the keys and values of the BLOCK positions from `first` on, of the worker's layers [begin, end)."""

    first: Position
    begin: LayerNumber
    end: LayerNumber


class Saved(Message, frozen=True):
    """Worker: the keys and values of a Save, as they are in its cache. It comes before the result of a later step."""

    first: Position
    begin: LayerNumber
    data: Hidden


class Adopt(Message, frozen=True):
    """Root, after a Setup: have n_past positions; their keys and values come with Load."""

    n_past: Position


class Load(Message, frozen=True):
    """Root: the keys and values of the BLOCK positions from `first` on, of the worker's layers [begin, end)."""

    first: Position
    begin: LayerNumber
    end: LayerNumber
    data: Hidden


class Taken(Message, frozen=True):
    """Worker: an Adopt or a Load is done."""


class Error(Message, frozen=True):
    """Either side: why it does not go on. final: the conversation is over, and the sender closes."""

    reason: Text
    next_step: Text = ""
    final: bool = True


class Bye(Message, frozen=True):
    """Either side: it leaves. The worker keeps its weights for the next root."""


Conversation = Hello | Probe | Setup | Ready | Step | Result | Progress | Truncate | Truncated | Error | Bye
Any = Conversation | Save | Saved | Adopt | Load | Taken
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Any)
# What comes from the other side in the words of msgspec: it could be anything, and another one each time.
_THEIRS = re.compile(r"(?<=unknown field) `.*|(?<=Invalid value) '.*|(?<=invalid opcode) '.*| \(byte \d+\)$", re.DOTALL)


class MalformedError(Exception):
    """Bytes that are no message."""


def encode(message: Message) -> bytes:
    """The bytes of a message."""
    return _encoder.encode(message)


def decode(data: bytes) -> Any:
    """The message of some bytes. Raises MalformedError, with one line that says what is wrong, and nothing else."""
    if len(data) > MOST_MESSAGE_BYTES:
        raise MalformedError(f"a message of {len(data)} bytes; {MOST_MESSAGE_BYTES} are allowed")
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError, MemoryError, OverflowError, ValueError) as error:
        raise MalformedError(_THEIRS.sub("", str(error))[:200] or type(error).__name__) from None
