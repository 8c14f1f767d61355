"""`h2o batch --cluster`: an engine on every node of a Ray cluster, under its own budget, answers some of the prompts.

Ray restarts an actor that died and repeats what it was asked. What waits for such an actor is asked of another one,
too, once nothing else is left to do. The answer that comes first is written, here, by its custom_id.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from h2o_cli.batch_node import Setup
from h2o_cli.batch_work import Totals
from h2o_cli.interrupts import interrupts
from h2o_cli.output import Progress, note, print_json
from h2o_cli.session.batch_files import Answers, BadLine, BatchRequest, refused
from h2o_cli.session.ray_workers import actor_on, asked_of_nodes, connected, end_with_parent, signals_raise
from runtime.errors import WorkerError
from runtime.plans.budget import Budget

_POLL_S = 0.2


class NodeBatch:
    """The actor: an engine in a child process, which has no memory of Ray's."""

    def __init__(self, setup: Setup) -> None:
        """Raises RuntimeError where there is no engine to be had."""
        pipe = subprocess.PIPE
        command = [sys.executable, "-m", "h2o_cli.batch_node"]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}  # Ray adds the root's
        self._child = subprocess.Popen(
            command,
            stdin=pipe,
            stdout=pipe,
            env=environment,
            preexec_fn=end_with_parent,  # noqa: PLW1509 - this actor has no threads of its own yet
        )
        problem = self._ask(setup)
        if problem:
            raise RuntimeError(problem)

    def answer(self, requests: list[BatchRequest]) -> list[Mapping[str, Any]]:
        """Their answers."""
        found: list[Mapping[str, Any]] = self._ask(requests)
        return found

    def _ask(self, what: object) -> Any:
        """What the child says to something; without it the actor ends, and Ray starts it again."""
        assert self._child.stdin and self._child.stdout
        try:
            pickle.dump(what, self._child.stdin)
            self._child.stdin.flush()
            return pickle.load(self._child.stdout)
        except (OSError, EOFError):
            os._exit(1)


@dataclass(frozen=True)
class _Chunk:
    """Requests that an actor answers together. number: of the actor."""

    requests: tuple[BatchRequest, ...]
    actor: int


class ClusterBatch:
    """A batch on a cluster, while it lasts."""

    def __init__(self, address: str, setup: Setup) -> None:
        """Start an engine on every node that has memory. Raises UsageError, WorkerError."""
        self._actors: list[Any] = []
        self.totals, self.n_tokens, self.n_prompt_tokens = Totals(), 0, 0
        with signals_raise():
            self._ray = connected(address)
            try:
                self._start(setup)
            except BaseException:
                self.close()
                raise

    def _start(self, setup: Setup) -> None:
        wanted = setup.options.budget
        for node, n_bytes, disk in asked_of_nodes(self._ray, wanted.n_bytes if wanted.is_given else None):
            options = replace(setup.options, budget=Budget.parse(f"{n_bytes}B"))
            actor = actor_on(self._ray, NodeBatch, node, n_bytes, disk)
            self._actors.append(actor.remote(replace(setup, options=options)))

    @property
    def n_nodes(self) -> int:
        """Nodes that answer, or shall again."""
        return len(self._actors)

    def answer(self, items: Iterator[BatchRequest | BadLine], answers: Answers, size: int) -> int:
        """Answer all that is not answered yet, `size` at a time on each node; the signal that ended it, or 0."""
        todo, stopped = self._todo(items, answers), list[int]()
        idle, asked = set(range(len(self._actors))), dict[Any, _Chunk]()
        with interrupts.ending(stopped.append), signals_raise():
            while not stopped:
                while idle and (requests := self._next(todo, asked, answers, size)):
                    actor = idle.pop()
                    asked[self._actors[actor].answer.remote(list(requests))] = _Chunk(requests, actor)
                if not asked or all(self._is_written(chunk, answers) for chunk in asked.values()):
                    break
                for ref in self._ray.wait(list(asked), timeout=_POLL_S)[0]:
                    chunk = asked.pop(ref)
                    self._take(ref, answers)
                    idle.add(chunk.actor)
        return interrupts.take()

    def _todo(self, items: Iterator[BatchRequest | BadLine], answers: Answers) -> Iterator[BatchRequest]:
        for item in items:
            if item.custom_id in answers.done:
                self.totals.skipped += 1
            elif isinstance(item, BadLine):
                self.totals.errors += 1
                answers.add(refused(item.custom_id, f"line {item.number}: {item.problem}"))
            else:
                yield item

    def _next(
        self, todo: Iterator[BatchRequest], asked: Mapping[Any, _Chunk], answers: Answers, size: int
    ) -> tuple[BatchRequest, ...]:
        """What an idle node answers next: new requests, else those that only one other node was asked."""
        if new := tuple(islice(todo, size)):
            return new
        times = [chunk.requests for chunk in asked.values()]
        for chunk in asked.values():
            if times.count(chunk.requests) == 1 and not self._is_written(chunk, answers):
                return chunk.requests
        return ()

    @staticmethod
    def _is_written(chunk: _Chunk, answers: Answers) -> bool:
        return all(request.custom_id in answers.done for request in chunk.requests)

    def _take(self, ref: Any, answers: Answers) -> None:
        """Write what a node answered and nobody before it. Raises WorkerError where it has no engine."""
        try:
            found = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise WorkerError(f"a node cannot answer: {reason}", "see `ray status`; -m is the memory of each") from None
        for answer in found:
            if answer["custom_id"] in answers.done:
                continue
            answers.add(answer)
            self.totals.answers += answer["error"] is None
            self.totals.errors += answer["error"] is not None
            usage = answer["response"]["body"]["usage"] if answer["response"] else {}
            self.n_tokens += usage.get("completion_tokens", 0)
            self.n_prompt_tokens += usage.get("prompt_tokens", 0)

    def close(self) -> None:
        """End the engines, and leave the cluster."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._ray.shutdown()


def batch_on_cluster(
    address: str, setup: Setup, items: Iterator[BatchRequest | BadLine], answers: Answers, *, n_lines: int, json: bool
) -> int:
    """Answer on a cluster and say how that went; the exit code. Raises H2OError."""
    start = time.perf_counter()
    batch = ClusterBatch(address, setup)
    try:
        with Progress(f"answering {n_lines} prompts", lambda: batch.totals.n_done / max(1, n_lines)):
            signal_number = batch.answer(items, answers, setup.options.sequences)
    finally:
        batch.close()
    seconds, totals = time.perf_counter() - start, batch.totals
    figures = {
        "answers": totals.answers,
        "errors": totals.errors,
        "skipped": totals.skipped,
        "generated_tokens": batch.n_tokens,
        "prompt_tokens": batch.n_prompt_tokens,
        "seconds": seconds,
        "tokens_per_s": batch.n_tokens / seconds,
        "nodes": batch.n_nodes,
    }
    if json:
        print_json(figures)
    else:
        skipped = f", {totals.skipped} were there already" if totals.skipped else ""
        note(
            f"{totals.answers} answers, {totals.errors} with an error{skipped}; {batch.n_tokens} tokens,"
            f" {figures['tokens_per_s']:.1f} tokens/s on {batch.n_nodes} nodes"
        )
    return 128 + signal_number if signal_number else 0
