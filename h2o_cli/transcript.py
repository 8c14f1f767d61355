"""A conversation in a file: `/save FILE` and `/load FILE`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from h2o_cli.session.models import read_text, replace_file
from runtime.errors import H2OError
from runtime.llama.chat import Message

KIND = "h2o conversation"
ROLES = ("user", "assistant")
MOST_BYTES = 64 * 2**20


@dataclass
class Transcript:
    """What was said. system: "" for none; text: of a model without a chat template."""

    system: str = ""
    messages: list[Message] = field(default_factory=list)
    text: str = ""


def save(transcript: Transcript, path: Path) -> None:
    """Write a conversation, whole or not at all. Raises H2OError, also for a file that holds anything else."""
    if path.exists():
        load(path)
    text = json.dumps({"kind": KIND, **asdict(transcript)}, ensure_ascii=False, indent=1) + "\n"
    try:
        replace_file(path, text.encode(errors="replace"))
    except OSError as error:
        raise H2OError(f"{path} cannot be written: {error.strerror}", "give another file") from None


def load(path: Path) -> Transcript:
    """Read a conversation. Raises H2OError."""
    data = read_text(path, "the conversation", MOST_BYTES)
    try:
        found = json.loads(data)
        messages = [Message(str(turn["role"]), str(turn["content"])) for turn in found["messages"]]
        good = found["kind"] == KIND and all(message.role in ROLES for message in messages)
        transcript = Transcript(str(found["system"]), messages, str(found["text"]))
    except (ValueError, TypeError, LookupError, RecursionError):
        good = False
    if not good:
        raise H2OError(f"{path} holds no conversation", "give a file that /save wrote, or one that is not there yet")
    return transcript
