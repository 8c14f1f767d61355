"""The two files of `h2o batch`: prompts in, answers out, one line each.

A line of prompts is one of OpenAI's batch requests (custom_id, method, url, body), or `{"prompt": ...}`, or
`{"messages": ...}`, or plain text. A line of answers is one of OpenAI's batch results. Answers are appended and synced
one by one, so what is in the file was finished; a run that is started again skips it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import msgspec

from runtime.answer.sampler import Sampling
from runtime.errors import LIMITS, H2OError, UsageError
from runtime.llama.chat import Message
from runtime.sizes import MIB

MOST_LINE_BYTES = 16 * MIB
_CHUNK = 2**20
_BEGINNING = b'{"custom_id": '  # of every line of answers
_URLS = ("/v1/completions", "/v1/chat/completions")
_STOPS = 16

Text = Annotated[str, msgspec.Meta(max_length=MOST_LINE_BYTES)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class _Turn(msgspec.Struct):
    role: Annotated[str, msgspec.Meta(min_length=1, max_length=64)]
    content: Text


class _Body(msgspec.Struct):
    """What counts of a request's body; other fields are not looked at."""

    prompt: Text | None = None
    messages: Annotated[list[_Turn], msgspec.Meta(min_length=1, max_length=4096)] | None = None
    max_tokens: Positive | None = None
    max_completion_tokens: Positive | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=_STOPS)] | None = None
    n: int | None = None
    stream: bool | None = None


class _Line(_Body):
    """A line: a whole request, or what would be its body."""

    custom_id: str | int | None = None
    method: str = "POST"
    url: str = ""
    body: _Body | None = None


@dataclass(frozen=True)
class BatchRequest:
    """One line of prompts. prompt "" with messages: a conversation. n_predict 0: not said."""

    number: int
    custom_id: str
    prompt: str
    messages: tuple[Message, ...]
    n_predict: int
    sampling: Sampling
    stop: tuple[str, ...]


@dataclass(frozen=True)
class BadLine:
    """A line that is no request, and why."""

    number: int
    custom_id: str
    problem: str


def read_requests(path: Path, sampling: Sampling) -> Iterator[BatchRequest | BadLine]:
    """The lines of a file, each read when it is asked for; sampling: of lines that do not say theirs.

    Raises H2OError where the file cannot be read; a line of another kind is a BadLine.
    """
    seen: set[str] = set()
    try:
        with path.open("rb") as file:
            for number, line in enumerate(_lines(file), 1):
                if line is not None and not line.strip():
                    continue
                request = _request(number, line, sampling)
                if request.custom_id in seen:
                    request = BadLine(number, f"line-{number}", f"custom_id {request.custom_id!r} came before")
                seen.add(request.custom_id)
                yield request
    except OSError as error:
        raise H2OError(f"the prompts {path} cannot be read: {error.strerror}", "give another file with -f") from None


def _lines(file: Any) -> Iterator[bytes | None]:
    """The lines of a file; None for one that is too long."""
    while line := file.readline(MOST_LINE_BYTES + 1):
        if len(line) <= MOST_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(_CHUNK)
        yield None


def _request(number: int, line: bytes | None, sampling: Sampling) -> BatchRequest | BadLine:
    if line is None:
        return BadLine(number, f"line-{number}", f"it is longer than {MOST_LINE_BYTES // MIB} MiB")
    custom_id = f"line-{number}"
    try:
        text = line.decode().strip()
        if not text.startswith("{"):
            return BatchRequest(number, custom_id, text, (), 0, sampling, ())
        found = msgspec.json.decode(text, type=_Line)
        custom_id = custom_id if found.custom_id is None else str(found.custom_id)
        return _checked(number, custom_id, found, sampling)
    except UnicodeDecodeError as error:
        return BadLine(number, custom_id, f"it is not UTF-8 (byte {error.start})")
    except (msgspec.MsgspecError, RecursionError) as error:
        return BadLine(number, custom_id, " ".join(str(error).split()) or "it is nested too deeply")
    except H2OError as error:
        return BadLine(number, custom_id, error.message)


def _checked(number: int, custom_id: str, line: _Line, sampling: Sampling) -> BatchRequest:
    """A line as a request. Raises UsageError."""
    body: _Body = line.body or line
    if line.body and line.url and line.url not in _URLS:
        raise UsageError(f"there is no {line.url[:64]!r}; {' and '.join(_URLS)} are possible")
    if (body.prompt is None) == (body.messages is None):
        raise UsageError("it needs either prompt or messages")
    if body.n not in (None, 1) or body.stream:
        raise UsageError("n above 1 and stream are not possible")
    if len(custom_id) > 512:
        raise UsageError("its custom_id is longer than 512 characters")
    said = {
        "temp": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "seed": body.seed,
    }
    changes: dict[str, Any] = {name: value for name, value in said.items() if value is not None}
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    messages = tuple(Message(turn.role, turn.content) for turn in body.messages or ())
    n_predict = body.max_completion_tokens or body.max_tokens or 0
    return BatchRequest(number, custom_id, body.prompt or "", messages, n_predict, replace(sampling, **changes), stop)


class Answers:
    """The file of answers. `done` has the custom_id of each that is finished, from earlier runs too.

    A file that was made here and holds nothing when an error ends its block is removed.
    """

    def __init__(self, path: Path) -> None:
        """Open it, or make it; a last line that was not finished is cut off. Raises H2OError."""
        self.path = path
        self.done: set[str] = set()
        self._made = not path.exists()
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_APPEND, 0o644)
        except OSError as error:
            raise H2OError(f"the answers {path} cannot be opened: {error.strerror}", "give another -o") from None
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.fstat(self._fd).st_nlink:  # another run has just removed it
                raise OSError(errno.EWOULDBLOCK, "")
            self._size = self._read_done()
        except OSError as error:
            os.close(self._fd)
            busy = error.errno in (errno.EWOULDBLOCK, errno.EACCES)
            why = "another run writes to it" if busy else error.strerror
            raise H2OError(f"the answers {path} cannot be used: {why}", "wait for it, or give another -o") from None
        except H2OError:
            os.close(self._fd)
            raise

    def __enter__(self) -> Answers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error and self._made and not self._size:
            self.path.unlink(missing_ok=True)
        os.close(self._fd)

    def _read_done(self) -> int:
        """Note what is finished; the size of that. Raises H2OError for a file that holds something else."""
        size = 0
        with os.fdopen(os.dup(self._fd), "rb") as file:
            file.seek(0)
            for line in file:
                if not line.endswith(b"\n") and (line.startswith(_BEGINNING) or _BEGINNING.startswith(line)):
                    break  # an answer that was torn, and no text of anybody else's
                try:
                    self.done.add(str(json.loads(line)["custom_id"]))
                except (ValueError, LookupError, TypeError, RecursionError):
                    raise H2OError(
                        f"{self.path} holds something else than answers", "give another -o, or move it away"
                    ) from None
                size += len(line)
        os.ftruncate(self._fd, size)
        return size

    def add(self, answer: Mapping[str, Any]) -> None:
        """Append one answer and wait until it is on the disk. Raises H2OError; the file is as it was then."""
        data = json.dumps(answer, ensure_ascii=False).encode(errors="replace") + b"\n"
        try:
            left = data
            while left:
                left = left[os.write(self._fd, left) :]
            os.fdatasync(self._fd)
        except OSError as error:
            os.ftruncate(self._fd, self._size)
            step = f"{LIMITS.get(error.errno or 0, 'give another -o')}, and run again: what is finished is kept"
            raise H2OError(f"the answers {self.path} cannot be written: {error.strerror}", step) from None
        self._size += len(data)
        self.done.add(str(answer["custom_id"]))


def answered(request: BatchRequest, text: str, finish: str, n_prompt: int, n_tokens: int, model: str) -> dict[str, Any]:
    """The line of a finished answer. finish: "stop" or "length"."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": finish}
    choice |= {"message": {"role": "assistant", "content": text}} if request.messages else {"text": text}
    usage = {"prompt_tokens": n_prompt, "completion_tokens": n_tokens, "total_tokens": n_prompt + n_tokens}
    kind = "chat.completion" if request.messages else "text_completion"
    body = {"object": kind, "model": model, "choices": [choice], "usage": usage}
    return {"custom_id": request.custom_id, "response": {"status_code": 200, "body": body}, "error": None}


def refused(custom_id: str, problem: str) -> dict[str, Any]:
    """The line of a request that cannot be answered."""
    return {"custom_id": custom_id, "response": None, "error": {"message": problem}}
