"""How much memory keys and values of a batch get, and who gets it: what --kv-pool, --admission, --swap, --trace say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from h2o_cli.session.batch_schedule import Schedule
from h2o_cli.session.opening import Session
from h2o_cli.session.options import SessionOptions
from runtime.answer.admission import Admission
from runtime.answer.batch import Batch
from runtime.answer.pool import BLOCK_TOKENS, Pool
from runtime.errors import UsageError
from runtime.kv.cache_memory import cell_bytes
from runtime.llama.model_file import ModelFile
from runtime.sizes import format_size, parse_size
from runtime.weights.head_start import guessed_room

if TYPE_CHECKING:
    from runtime.engine.timeline import Timeline

RAM, DISK = "ram", "disk"
TOKENS_EACH = 256  # positions for each answer, where --ctx does not say how many there are for all
LEAST_POSITIONS, POSITIONS_STEP = 512, 256
KV_SHARE = 4  # keys and values take at most such a part of what is left for weights then
RAM_SHARE = 2  # the slow tier in memory, in pools


@dataclass(frozen=True)
class PoolChoice:
    """kv_pool: bytes, None as --ctx says. folder: for a slow tier on disk."""

    admission: Admission
    folder: Path
    kv_pool: int | None = None
    swap: str = DISK
    trace: Path | None = None

    @classmethod
    def parse(
        cls, admission: str, kv_pool: str | None, swap: str | None, trace: Path | None, folder: Path
    ) -> PoolChoice:
        """From the flags as given. Raises UsageError."""
        found = Admission.parse(admission)
        if swap not in (None, RAM, DISK):
            raise UsageError(f"there is no --swap {swap}", f"give {RAM} or {DISK}")
        if swap and found.knows_lengths:
            raise UsageError("with --admission simulate nothing is swapped out", "leave --swap out")
        return cls(found, folder, parse_size(kv_pool) if kv_pool else None, swap or DISK, trace)

    @property
    def swaps(self) -> bool:
        """Whether texts may be swapped out."""
        return not self.admission.knows_lengths

    def options_for(self, file: ModelFile, options: SessionOptions) -> SessionOptions:
        """These options with the positions of the pool, and with what swapping takes. Raises UsageError."""
        n_bytes = position_bytes(file, options.kv_type)
        if self.kv_pool is not None:
            if options.ctx is not None:
                raise UsageError("--kv-pool and --ctx both say how many positions there are", "give one of them")
            n_blocks = self.kv_pool // (n_bytes * BLOCK_TOKENS)
            if not n_blocks:
                raise UsageError(
                    f"--kv-pool {format_size(self.kv_pool)} is less than a block of {BLOCK_TOKENS} tokens",
                    f"give {format_size(n_bytes * BLOCK_TOKENS)} or more",
                )
            options = replace(options, ctx=n_blocks * BLOCK_TOKENS)
        options = replace(options, ctx=options.ctx or default_positions(file, options))
        if not self.swaps:
            return options
        from runtime.llama.cell_memory import state_bytes

        block_bytes = state_bytes(n_bytes, BLOCK_TOKENS, file.n_layers)
        n_blocks = 1 + (self.n_slow(options) if self.swap == RAM else 0)
        return replace(options, swap_bytes=n_blocks * block_bytes)

    def n_slow(self, options: SessionOptions) -> int:
        """Blocks of the slow tier: all that can ever wait, but in memory not more than so many pools."""
        waiting, n_fast = options.sequences - 1, (options.ctx or 0) // BLOCK_TOKENS
        return n_fast * (min(waiting, RAM_SHARE) if self.swap == RAM else waiting)


@contextmanager
def open_batch(
    session: Session, choice: PoolChoice, options: SessionOptions, schedule: Schedule, timeline: Timeline | None
) -> Iterator[Batch]:
    """The batch that the flags ask for. options: those that options_for() gave. Raises H2OError."""
    engine, tokenizer, in_blocks = session.engine, session.model.tokenizer, schedule.in_blocks
    if timeline:
        timeline.join(engine, session.model.hollow, schedule.batch_size)
    if not choice.swaps and not choice.trace:
        yield Batch(engine, tokenizer, session.follower, in_blocks=in_blocks)
        return
    from runtime.answer.pool_trace import open_trace
    from runtime.answer.pressed import CountedBatch, Parts, PressedBatch
    from runtime.answer.swapping import Swapping
    from runtime.kv.slow_tier import DiskTier, RamTier
    from runtime.llama.cell_memory import state_bytes

    parts, n_fast = Parts(engine, tokenizer, session.follower), engine.settings.n_ctx // BLOCK_TOKENS
    with ExitStack() as opened:
        writer = opened.enter_context(open_trace(choice.trace)) if choice.trace else None
        n_slow = choice.n_slow(options) if choice.swaps else 0
        pool = Pool(n_fast, n_slow, record=writer)
        if writer:
            writer.begin(pool)
        if not choice.swaps:
            yield CountedBatch(parts, pool, in_blocks=in_blocks)
            return
        file = session.model.file
        block_bytes = state_bytes(position_bytes(file, options.kv_type), BLOCK_TOKENS, file.n_layers)
        slow = RamTier(n_slow, block_bytes) if choice.swap == RAM else DiskTier(choice.folder, block_bytes)
        opened.callback(slow.close)
        swapping = Swapping(engine, timeline.timed(slow) if timeline else slow, block_bytes)
        opened.callback(swapping.close)
        yield PressedBatch(parts, pool, choice.admission, swapping)


def position_bytes(file: ModelFile, kv_type: str) -> int:
    """Keys and values of a position."""
    return file.n_layers * cell_bytes(file, kv_type)


def default_positions(file: ModelFile, options: SessionOptions) -> int:
    """Positions for all answers at once: some for each, as far as they take no more than a share of weights' room."""
    most = guessed_room(file, options.budget.n_bytes) // KV_SHARE // position_bytes(file, options.kv_type)
    return max(LEAST_POSITIONS, min(options.sequences * TOKENS_EACH, most) // POSITIONS_STEP * POSITIONS_STEP)
