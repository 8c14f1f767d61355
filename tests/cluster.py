"""Workers in processes of their own, and an engine that shares its layers with them."""

from __future__ import annotations

import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from engines import engine, greedy

from runtime.distributed.cluster import Cluster, Stage
from runtime.distributed.link import greet
from runtime.distributed.messages import PROTOCOL, Hello
from runtime.distributed.worker import build, cpu_class
from runtime.engine.borders import Borders, check_cut
from runtime.engine.engine import Engine
from runtime.llama import abi
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.plan import Plan
from runtime.settings import Settings

MB = 10**6
CUTS = {
    "halves": [0, 0, 1, 1],
    "uneven": [0, 1, 1, 1],
    "three": [0, 1, 2, 2],
    "ring": [0, 1, 0, 1],
    "root in front": [None, 0, 0, 1],
    "root between": [None, 0, None, 1],
    "root behind": [0, 1, 1, None],
}
PROMPT = [int(token) for token in np.random.default_rng(1).integers(1, 500, 18)]
LONG = [int(token) for token in np.random.default_rng(2).integers(1, 500, 220)]


class WorkerProcess:
    """One worker; `log` is what it said, once it has ended."""

    def __init__(self, paths, budget_bytes=100 * MB, listen="127.0.0.1:0"):
        command = [sys.executable, str(Path(__file__).with_name("worker_process.py")), str(budget_bytes), listen]
        self.process = subprocess.Popen(
            [*command, *map(str, paths)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self._address = ""

    @property
    def address(self):
        """Where it listens; waits until it does."""
        self._address = self._address or self.process.stdout.readline().strip()
        assert self._address, self.process.stderr.read()
        return self._address

    def close(self):
        """End it as a user would; its exit code."""
        self.process.terminate()
        _, self.log = self.process.communicate(timeout=10)
        return self.process.returncode


@contextmanager
def workers(n, paths, **options):
    """n workers that serve these models."""
    found = [WorkerProcess(paths, **options) for _ in range(n)]
    try:
        yield found
    finally:
        for worker in found:
            worker.process.kill()
            worker.process.communicate()


def one_machine(paths):
    """answer(arch, prompt, n): that of one machine."""
    known = {}

    def answer(arch, prompt, n, **settings):
        key = (arch, tuple(prompt), n, *settings.items())
        if key not in known:
            with engine(paths[arch], repack=False, n_ubatch=64, n_threads=1, **settings) as opened:
                known[key] = greedy(opened, prompt, n)
        return known[key]

    return answer


def stages_of(owners, links):
    """owners: the device of each layer, None for the root."""
    stages = []
    for layer, owner in enumerate(owners):
        if owner is None:
            continue
        if stages and stages[-1].link is links[owner] and stages[-1].last == layer:
            stages[-1].last += 1
        else:
            stages.append(Stage(layer, layer + 1, links[owner]))
    return stages


@contextmanager
def shared_engine(path, owners, addresses, plan=None, spares=(), hidden="f32", **settings):
    """An Engine that computes its own layers and the head, and has the others computed at these addresses."""
    settings = Settings(**{"n_ctx": 512, "n_threads": 1, "repack": False, **settings})
    with ExitStack() as opened:
        whole = ModelFile.open(path)
        links = greet([*addresses, *spares], lambda _: None, Hello(PROTOCOL, build(), whole.hash, cpu_class()))
        cluster = Cluster(stages_of(owners, links), whole.n_layers, links[len(addresses) :])
        opened.callback(cluster.close)
        own = [layer for layer, owner in enumerate(owners) if owner is None]
        part = whole.owned(own, head=True, embedding=True)
        hollow = HollowModel(part)
        opened.callback(hollow.free)
        check_cut(part, hollow, settings)
        engine = Engine(part, hollow, plan or Plan(0, 1), settings)
        opened.callback(engine.close)
        cluster.hidden = hidden
        cluster.width = int(abi.llama.llama_model_n_embd(hollow.pointer))
        engine.most_tokens = cluster.set_up(settings.n_ctx, engine.pass_tokens, settings.n_logits, settings.kv_type)

        def check():
            if engine.guests.stop:
                raise engine.guests.stop

        cluster.check = check
        engine.guests.add(Borders(part, hollow.weights, engine.guests, cluster))
        engine.cluster = cluster
        yield engine
