"""Workers on the nodes of a Ray cluster, for one run: Ray places them by memory, watches them and restarts them.

An actor on each node starts `h2o worker` as its child and lives as long as that does; Ray starts an actor that died
again, on another node where its own is gone. Root and workers talk as always, over gRPC with certificates, which are
made for the run.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock, Thread
from typing import TYPE_CHECKING, Any

from runtime.distributed.keys import AUTHORITY, make_keys
from runtime.distributed.wire import parse_address
from runtime.errors import UsageError, WorkerError
from runtime.llama.model_file import ModelFile
from runtime.sizes import MB, format_size

if TYPE_CHECKING:
    from h2o_cli.session.members import Team

AUTO = "auto"
INSTALL = "in the project's folder: pip install '.[cluster]'"
_ROOM_BYTES = 256 * MB  # of a worker beside the weights, at most
_LEAST_BYTES = 64 * MB
DISK = "h2o_disk_mbps"  # a resource of a node: MB per second of its disk
_ACTORS_PER_DISK = 2  # one more than its own: that of a node that is gone
_POLL_S = 0.1
_CONNECT_S = 5.0
_START_S, _AGAIN_S = 120.0, 60.0  # for all workers; for one that Ray starts again
_LAST_WORDS = 500
_PR_SET_PDEATHSIG = 1


class NodeWorker:
    """The actor: a worker on the node it is on."""

    def __init__(self, model: str, budget_bytes: int, n_threads: int, authority: tuple[bytes, bytes]) -> None:
        """authority: certificate and key that sign the worker's own. Raises RuntimeError where it does not start."""
        import ray

        host = ray.util.get_node_ip_address()
        with tempfile.TemporaryDirectory(prefix="h2o-") as name:
            folder = Path(name)
            for file, data in zip((f"{AUTHORITY}.pem", f"{AUTHORITY}.key"), authority, strict=True):
                (folder / file).write_bytes(data)
            (keys,) = make_keys(folder, [host])
            listen = f"[{host}]:0" if ":" in host else f"{host}:0"
            limits = ["-m", f"{budget_bytes}B", "-t", str(n_threads), "--listen", listen, "--tls", str(keys), "--json"]
            log = folder / "log"
            with log.open("wb") as stderr:
                self._child = subprocess.Popen(
                    [sys.executable, "-m", "h2o_cli.start", "worker", model, *limits],
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                    stdin=subprocess.DEVNULL,
                    preexec_fn=end_with_parent,  # noqa: PLW1509 - this actor has no threads of its own yet
                )
            assert self._child.stdout
            line = self._child.stdout.readline()
            if not line:
                raise RuntimeError(" ".join(log.read_text(errors="replace").split())[-_LAST_WORDS:])
        self._address = str(json.loads(line)["listening"])
        Thread(target=self._end_with_child, daemon=True).start()

    def _end_with_child(self) -> None:
        """What a worker does not survive, its actor does not either: Ray sees that, and starts it again."""
        self._child.wait()
        os._exit(1)

    def address(self) -> str:
        """Where it listens."""
        return self._address


def end_with_parent() -> None:
    """In a child, before it begins: end when the process that started it does."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def actor_on(ray: Any, kind: type, node: str, memory: int, disk: int = 0) -> Any:
    """A class of actors for a node, with what Ray is to know: restarted there, or elsewhere when that node is gone.

    disk: what is asked of the resource DISK.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return ray.remote(kind).options(
        memory=memory,
        resources={DISK: disk} if disk else {},
        num_cpus=0,
        max_restarts=-1,
        max_task_retries=-1,
        scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=True),
    )


def asked_of_nodes(ray: Any, most_bytes: int | None) -> list[tuple[str, int, int]]:
    """The nodes, the memory that is asked of each (None: all there is), and MB/s of its disk. Raises WorkerError.

    Ray takes whole numbers only. A node that declares no disk is asked for none.
    """
    has = [(node["NodeID"], node["Resources"]) for node in ray.nodes() if node["Alive"]]
    rooms = [(node, int(r.get("memory", 0)), int(r.get(DISK, 0) // _ACTORS_PER_DISK)) for node, r in has]
    found = [(node, min(room, most_bytes or room), disk) for node, room, disk in rooms if room >= _LEAST_BYTES]
    if not found:
        raise WorkerError(
            f"no node of the Ray cluster has {format_size(_LEAST_BYTES)} of memory",
            "start one with `ray start --memory BYTES`",
        )
    return found


class RayWorkers:
    """The actors of a run, while it lasts. addresses: of their workers, one for each node; keys: the root's folder."""

    def __init__(self, address: str, model: Path, n_bytes: int, n_threads: int) -> None:
        """Start a worker for a model of n_bytes on every node that has memory. Raises UsageError, WorkerError."""
        self._actors: list[Any] = []
        self._is_closed = False
        self._inside = Lock()  # Ray: it is not left while a thread of ours is in one of its calls
        with signals_raise():
            self._ray = connected(address)
            self._folder = tempfile.TemporaryDirectory(prefix="h2o-")
            try:
                self._start(model, n_bytes, n_threads)
            except BaseException:
                self.close()
                raise

    def _start(self, model: Path, n_bytes: int, n_threads: int) -> None:
        work = Path(self._folder.name)
        (self.keys,) = make_keys(work, ["root"])
        authority = (work / f"{AUTHORITY}.pem").read_bytes(), (work / f"{AUTHORITY}.key").read_bytes()
        for node, memory, disk in asked_of_nodes(self._ray, n_bytes + _ROOM_BYTES):
            options = actor_on(self._ray, NodeWorker, node, memory, disk)
            self._actors.append(options.remote(str(model.resolve()), memory, n_threads, authority))
        self.addresses = [self._address_of(actor, _START_S, lambda: None) for actor in self._actors]

    def _address_of(self, actor: Any, limit_s: float, check: Callable[[], object]) -> str:
        """Where an actor's worker listens, once Ray has (re)started it. Raises WorkerError."""
        asked, end_s = self._call(lambda _: actor.address.remote()), time.monotonic() + limit_s
        while not self._call(lambda ray: ray.wait([asked], timeout=0)[0]):
            time.sleep(_POLL_S)
            check()
            if time.monotonic() > end_s:
                raise WorkerError(f"Ray started no worker in {limit_s:.0f} s", "see `ray status`: is there memory?")
        try:
            return str(self._call(lambda ray: ray.get(asked)))
        except self._ray.exceptions.RayError as error:
            reason = str(getattr(error, "cause", None) or error).strip().splitlines()[-1]
            raise WorkerError(f"a worker did not start on its node: {reason}", "see `ray status`") from None

    def _call(self, do: Callable[[Any], Any]) -> Any:
        """A short call of Ray. Raises WorkerError where the cluster was left meanwhile."""
        with self._inside:
            if self._is_closed:
                raise WorkerError("the cluster was left", "run again")
            return do(self._ray)

    def again(self, address: str, check: Callable[[], object]) -> str:
        """Where the worker that was at an address is now, once Ray has started it again. `check` is called all the
        while, and may raise. Raises WorkerError.
        """
        at = self.addresses.index(address)
        end_s = time.monotonic() + _AGAIN_S
        while True:
            now = self._address_of(self._actors[at], max(_POLL_S, end_s - time.monotonic()), check)
            if now != address:
                self.addresses[at] = now
                return now
            if time.monotonic() > end_s:
                raise WorkerError(f"Ray did not start the worker {address} again", "see `ray status`")
            check()
            time.sleep(_POLL_S)  # Ray has not noticed yet

    def close(self) -> None:
        """End the workers, and leave the cluster."""
        with self._inside:
            self._is_closed = True
            for actor in self._actors:
                self._ray.kill(actor)
            self._ray.shutdown()
        self._folder.cleanup()


@contextmanager
def signals_raise() -> Iterator[None]:
    """What a signal's handler raises inside Ray's C code comes out of it wrapped up."""
    try:
        yield
    except SystemError as error:
        raise error.__cause__ or error from None


def connected(address: str) -> Any:
    """Ray, connected to a cluster; this process's signals stay its own."""
    try:
        import ray
    except ImportError:
        raise UsageError("the package `ray` is not installed, which --cluster needs", INSTALL) from None
    before = signal.getsignal(signal.SIGTERM)
    try:
        if address != AUTO:
            socket.create_connection(parse_address(address), _CONNECT_S).close()  # Ray itself would wait for minutes
        ray.init(address, logging_level=logging.ERROR, log_to_driver=False)
        # Lost nodes would be told on standard output, in the answer. Ray has no public way: the thread that says it is
        # started whatever log_to_driver is, and this is what its own debugger switches off.
        ray._private.worker._worker_logs_enabled = False
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(
            f"there is no Ray cluster at {address}: {reason}", "start one with `ray start --head`"
        ) from None
    finally:
        with suppress(ValueError):  # not the main thread: Ray has left it alone
            signal.signal(signal.SIGTERM, before)
    return ray


def join_cluster(
    address: str,
    split: str | None,
    hidden: str,
    file: ModelFile,
    budget_bytes: int,
    n_threads: int,
    note: Callable[[str], None],
) -> Team | None:
    """A team of workers that Ray runs. Raises UsageError, WorkerError, BudgetError."""
    from h2o_cli.session.members import Devices, Team

    found = RayWorkers(address, file.path, file.n_bytes, n_threads)
    try:
        devices = Devices(",".join(found.addresses), tls=found.keys, split=split, hidden=hidden)
        team = Team.join(file, devices, budget_bytes, n_threads, note)
    except BaseException:
        found.close()
        raise
    if team is None:
        found.close()
        return None
    team.leave = found.close
    team.cluster.restarted = lambda link: link.again(found.again(link.address, team.cluster.check))
    return team
