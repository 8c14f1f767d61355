"""What gRPC's library says on standard error, in one line of ours for each reason: a refused connection, above all."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_LINE = re.compile(rb"^[IWEF]\d{4} [\d:.]+\s+\d+ \S+:\d+\] (.*)")
_HANDSHAKE = re.compile(r"SSL routines:OPENSSL_internal:(\w+)(?:: (certificate \w+ \w+|unable to [\w ]+))?")
_REASONS = {
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "it showed no certificate",
    "WRONG_VERSION_NUMBER": "it does not speak TLS",
    "HTTP_REQUEST": "it does not speak TLS",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not of this authority",
}
_VERBOSITY = "GRPC_VERBOSITY"
_EXPIRED = "certificate has expired"


@contextmanager
def one_line_each(log: Callable[[str], None]) -> Iterator[None]:
    """Standard error of the C side goes through here inside the block; Python's own goes out as it is.

    gRPC says why it refuses a connection where it is loaded inside the block.
    """
    sys.stderr.flush()
    outside, python, before = os.dup(2), sys.stderr, os.environ.get(_VERBOSITY)
    os.environ[_VERBOSITY] = "INFO"
    reader, writer = os.pipe()
    os.dup2(writer, 2)
    os.close(writer)
    thread = threading.Thread(target=_pump, args=(reader, outside, log), daemon=True, name="log")
    with os.fdopen(os.dup(outside), "w", buffering=1, errors="replace") as ours:
        sys.stderr = ours
        thread.start()
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(outside, 2)  # the pipe's last writer is gone: the thread ends
            thread.join(1)
            os.close(outside)
            sys.stderr = python
            del os.environ[_VERBOSITY]
            if before is not None:
                os.environ[_VERBOSITY] = before


def _pump(reader: int, outside: int, log: Callable[[str], None]) -> None:
    told: set[str] = set()
    with os.fdopen(reader, "rb") as lines:
        for line in lines:
            match = _LINE.match(line)
            if not match:
                os.write(outside, line)
                continue
            text = explained(match.group(1).decode(errors="replace"))
            if text and text not in told and len(told) < 100:
                told.add(text)
                log(text)


def explained(text: str) -> str:
    """A line of the library in words, or an empty text where it says nothing about a refused connection."""
    match = _HANDSHAKE.search(text)
    if "Handshake failed" not in text or not match:
        return ""
    reason = _REASONS.get(match.group(1), match.group(1).lower().replace("_", " "))
    if match.group(2) == _EXPIRED:
        reason = f"its {_EXPIRED}"
    return f"refused a connection: {reason}"
