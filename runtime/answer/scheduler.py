"""Which sequences run, and what the next pass computes: pure functions of what is running, waiting and free.

llama.cpp computes attention by one kernel for up to 63 tokens and by another for more, and they round differently. So
that every sequence gets the bits that it gets alone, its tokens go through the same kernel: prompts are cut into
blocks as they are alone. Where the attention of each sequence is computed apart, a pass has blocks of any length, and
one token of every sequence that is being answered. Where it is not, blocks of 64 tokens and more go together into
long passes, and everything else into short ones.

Prompts come first, in the order of their admission, and how they come does not depend on who is being answered. So the
cells of the cache that are taken at any later time can be said beforehand, or more, as answers may end early. What is
admitted is never thrown out.

Continuous: a sequence joins whenever there is room. Zig-zag, in blocks: those that begin together read their prompts,
then each pass computes a token of all of them, and nothing joins before the last one has ended.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

LONG = 64  # tokens of a pass, from which on the other kernel computes


@dataclass(frozen=True)
class Limits:
    """Cells of the cache; sequences at once, at most LONG - 2; tokens of a long pass, at least 2 LONG, of a block.

    apart: the attention of each sequence is computed apart. n_unit: a sequence takes cells in units of so many.
    in_blocks: zig-zag.
    """

    n_cells: int
    n_sequences: int
    n_long: int
    n_block: int
    apart: bool = False
    n_unit: int = 1
    in_blocks: bool = False

    def taken(self, jobs: Iterable[Job], more: int = 0) -> int:
        """Cells that jobs take alone with `more` tokens each."""
        if self.n_unit == 1:
            return sum(job.n_cells + more for job in jobs)
        return sum(-(-(job.n_cells + more) // self.n_unit) * self.n_unit for job in jobs)

    @property
    def n_short(self) -> int:
        """Prompt tokens of a short pass: what a token of each other sequence leaves. One alone has its block whole."""
        return LONG - self.n_sequences


@dataclass(frozen=True)
class Job:
    """A sequence: tokens of its prompt, tokens (of prompt and answer) in the cache, and how many may still be chosen.

    The token chosen last is computed in the next pass; the very last one is not computed. n_shared: tokens whose cells
    are others' too, and counted elsewhere.
    """

    n_prompt: int
    n_cached: int
    n_left: int
    n_shared: int = 0

    @property
    def n_cells(self) -> int:
        """Cells that it has alone."""
        return self.n_cached - self.n_shared

    @property
    def n_unread(self) -> int:
        """Tokens of the prompt that are not computed yet."""
        return max(0, self.n_prompt - self.n_cached)

    @property
    def most_cells(self) -> int:
        """Cells that it takes alone at its end."""
        return (self.n_prompt + self.n_left - 1 if self.n_unread else self.n_cached + self.n_left) - self.n_shared

    def block(self, n_block: int) -> tuple[int, bool]:
        """What is left of the block of the prompt that comes next, and whether that is a block for a long pass."""
        end = min((self.n_cached // n_block + 1) * n_block, self.n_prompt)
        return end - self.n_cached, end - self.n_cached // n_block * n_block >= LONG

    def after(self, n_tokens: int) -> Job:
        """The job when n_tokens more are computed."""
        job = replace(self, n_cached=self.n_cached + n_tokens)
        return replace(job, n_left=job.n_left - 1) if n_tokens and not job.n_unread else job


def next_pass(jobs: Sequence[Job], limits: Limits) -> list[int]:
    """How many tokens of each job, in the order of their admission, the next pass computes."""
    blocks = [job.block(limits.n_block) if job.n_unread else (0, False) for job in jobs]
    first, is_long = next(((n, long) for n, long in blocks if n), (0, False))
    left = limits.n_long - limits.n_sequences if limits.apart else limits.n_short
    prompts_only = is_long and not (limits.apart and _part(first, left))
    if prompts_only:
        left = limits.n_long
    answers_wait = prompts_only or (limits.in_blocks and first > 0)
    counts = []
    for job, (block, long) in zip(jobs, blocks, strict=True):
        if not job.n_unread:
            counts.append(0 if answers_wait else 1)
            continue
        n = _part(block, left) if long else min(block, left)
        if limits.apart and n < block and not long:
            n = 0  # one token of several would be computed as one alone
        elif not limits.apart and (long != is_long or (long and n < block and left < limits.n_long)):
            n = 0
        left -= n
        counts.append(n)
    return counts


def _part(block: int, left: int) -> int:
    """How much of a long block fits: all, or a long part that leaves a long one, or nothing."""
    n = min(left, block - LONG)
    return block if block <= left else n if n >= LONG else 0


def peak_cells(jobs: Sequence[Job], limits: Limits) -> int:
    """The most cells that these jobs take together, if each runs to its end."""
    peak, jobs = 0, list(jobs)
    while any(job.n_unread for job in jobs):
        jobs = [job.after(n) for job, n in zip(jobs, next_pass(jobs, limits), strict=True)]
        peak = max(peak, limits.taken(jobs))
        jobs = [job for job in jobs if job.n_left]
    ends = sorted({job.n_left for job in jobs})
    return max([peak, *(limits.taken((job for job in jobs if job.n_left >= end), end) for end in ends)])


def may_join(jobs: Sequence[Job], new: Job, limits: Limits) -> bool:
    """Whether a job can be admitted beside those that run: it will find the cells it needs, and so will they."""
    if len(jobs) >= limits.n_sequences or new.most_cells > limits.n_cells:
        return False
    if limits.in_blocks and any(job.n_cells for job in jobs):
        return False  # the block has begun
    return peak_cells([*jobs, new], limits) <= limits.n_cells
