"""The plan file: a small file in shared memory through which a planner tells a running process its plan.

Bytes 0-7 are int32 k and int32 w, as the H2O source system writes them; the rest of the record makes the plan safe
to use: magic, version, a sequence number that is odd while a write is going on (a seqlock), a generation, the model's
hash and a CRC-32 over all of it. docs/plan-file.md has the table. Files are written in place: the inode stays, so
readers that keep the file open see every plan.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from runtime.errors import PlanError
from runtime.plans.plan import Layout, Plan
from runtime.plans.shared_record import MOVE_AWAY, is_whole, open_shared, with_crc

MAGIC = b"H2OPLAN\0"
VERSION = 1
# k, w, magic, version, layout, sequence, generation, model_hash, budget, pinned, window, written_s, pid, crc32
RECORD = struct.Struct("=ii8siiQQqqqqdiI")
SOURCE_RECORD = struct.Struct("=ii")
I_SEQUENCE_FIELD = 5
I_SEQUENCE_WORD = 3  # which 8-byte word of the record the sequence is
MAX_GENERATION = 2**62
READ_WAIT_S = 0.05
LOCK_WAIT_S = 2.0
NEXT_STEP = "write a plan with `h2o plan -m SIZE`"


def default_plan_path() -> Path:
    """This user's plan file: /dev/shm, else the run-time directory, else the directory for temporary files."""
    for folder in ("/dev/shm", os.environ.get("XDG_RUNTIME_DIR", "")):
        if folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK):
            break
    else:
        import tempfile  # here: it brings random numbers and hashes, and most machines have /dev/shm

        folder = tempfile.gettempdir()
    return Path(folder) / f"h2o-plan-{os.geteuid()}.bin"


def encode_record(plan: Plan, sequence: int) -> bytes:
    """The whole record of a plan, written now by this process."""
    fields = (plan.k, plan.w, MAGIC, VERSION, int(plan.layout), sequence, plan.generation, plan.model_hash)
    sizes = (plan.budget_bytes, plan.pinned_bytes, plan.window_bytes)
    try:
        record = RECORD.pack(*fields, *sizes, time.time(), os.getpid(), 0)
    except struct.error:
        raise PlanError(f"k={plan.k}, w={plan.w} or a size does not fit a plan file", NEXT_STEP) from None
    return with_crc(record)


def is_torn(data: bytes) -> bool:
    """Whether a whole record was caught in the middle of a write, or was damaged."""
    return not is_whole(data, RECORD.unpack(data)[I_SEQUENCE_FIELD])


def decode_record(data: bytes, path: str | os.PathLike[str]) -> Plan:
    """The plan in a file's first bytes; an 8-byte file of the source system gives k and w only. Raises PlanError."""
    if len(data) == SOURCE_RECORD.size:
        k, w = SOURCE_RECORD.unpack(data)
        return Plan(k, w)
    if data[8:16] != MAGIC[: len(data[8:16])] or 0 < len(data) < SOURCE_RECORD.size:
        raise PlanError(f"{path} is not a plan file", MOVE_AWAY)
    if len(data) < RECORD.size:
        raise PlanError(f"the plan file {path} is cut short ({len(data)} of {RECORD.size} bytes)", NEXT_STEP)
    if is_torn(data):
        raise PlanError(f"the plan file {path} holds half a plan: its writer died or the file is damaged", NEXT_STEP)
    k, w, _, version, layout, _, generation, model_hash, budget, pinned, window, _, _, _ = RECORD.unpack(data)
    if version != VERSION or layout not in tuple(Layout):
        raise PlanError(f"the plan file {path} has version {version}, layout {layout}, unknown here", NEXT_STEP)
    return Plan(k, w, Layout(layout), pinned, window, budget, model_hash, generation)


def read_plan(path: str | os.PathLike[str]) -> Plan:
    """The plan in the file. Waits up to 50 ms for a write in progress to end. Raises PlanError."""
    try:
        fd = open_shared(path)
    except FileNotFoundError:
        raise PlanError(f"there is no plan file {path}", NEXT_STEP) from None
    try:
        give_up = time.monotonic() + READ_WAIT_S
        while True:
            data = os.pread(fd, RECORD.size, 0)
            try:
                return decode_record(data, path)
            except PlanError:
                if time.monotonic() > give_up or len(data) < RECORD.size or not is_torn(data):
                    raise
            time.sleep(0.0002)
    finally:
        os.close(fd)


def write_plan(path: str | os.PathLike[str], plan: Plan) -> Plan:
    """Put the plan in the file, with the next generation, and return it so. Raises PlanError.

    A file that holds anything but a plan is never written to; a source system's 8-byte file is upgraded.
    """
    with _locked(path) as fd:
        old = os.pread(fd, RECORD.size, 0)
        sequence, generation = _next_numbers(old, path)
        plan = replace(plan, generation=generation)
        record = encode_record(plan, sequence + 1)
        if len(old) < RECORD.size:
            # Grow in one write that already carries the magic and an odd sequence: a death here leaves a torn plan.
            os.pwrite(fd, encode_record(plan, sequence)[len(old) :], len(old))
        with mmap.mmap(fd, RECORD.size) as mapped, memoryview(mapped) as view, view.cast("Q") as words:
            words[I_SEQUENCE_WORD] = sequence
            for i, (word,) in enumerate(struct.iter_unpack("=Q", record)):
                if i != I_SEQUENCE_WORD:
                    words[i] = word  # whole 8-byte words: a source system's reader never sees half of (k, w)
            words[I_SEQUENCE_WORD] = sequence + 1
    return plan


def write_source_plan(path: str | os.PathLike[str], k: int, w: int) -> None:
    """Write the source system's 8-byte file. Raises PlanError, also for a file that holds something else."""
    plan = Plan(k, w)
    with _locked(path) as fd:
        size = os.fstat(fd).st_size
        if size not in (0, SOURCE_RECORD.size):
            raise PlanError(f"{path} is not an 8-byte plan file", "a full plan file already starts with k and w")
        try:
            os.pwrite(fd, SOURCE_RECORD.pack(plan.k, plan.w), 0)
        except struct.error:
            raise PlanError(f"k={k}, w={w} does not fit a plan file", NEXT_STEP) from None


def _next_numbers(old: bytes, path: str | os.PathLike[str]) -> tuple[int, int]:
    """(odd sequence for the write, generation of the new plan) after the old contents. Raises PlanError."""
    if len(old) in (0, SOURCE_RECORD.size):
        return 1, 1
    if old[8:16] != MAGIC:
        raise PlanError(f"{path} holds something that is not a plan; it was left alone", MOVE_AWAY)
    _, _, _, _, _, sequence, generation, *_ = RECORD.unpack(old.ljust(RECORD.size, b"\0"))
    # Also after a torn plan the generation grows, so that readers who saw the one before take the new one.
    return (sequence + 1) % 2**62 | 1, generation + 1 if generation < MAX_GENERATION else 1


@contextmanager
def _locked(path: str | os.PathLike[str]) -> Iterator[int]:
    """A descriptor of the file, made if missing, under an exclusive lock. Raises PlanError."""
    try:
        fd = open_shared(path, os.O_RDWR | os.O_CREAT)
    except FileNotFoundError:
        raise PlanError(f"the folder of the plan file {path} does not exist", "name another with -s") from None
    try:
        give_up = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > give_up:
                    raise PlanError(f"another process keeps the plan file {path} locked", "try again") from None
                time.sleep(0.002)
        yield fd
    except OSError as error:
        raise PlanError(f"cannot write the plan file {path}: {error.strerror}", "name another with -s") from None
    finally:
        os.close(fd)
