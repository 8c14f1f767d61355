"""A worker for tests: `python worker_process.py BUDGET LISTEN MODEL...` serves any of these models and says where."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "0")
sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from runtime.distributed.offer import Offer  # noqa: E402
from runtime.distributed.wire import Listener  # noqa: E402
from runtime.distributed.worker import Worker  # noqa: E402
from runtime.llama.model_file import ModelFile  # noqa: E402


def main(budget_bytes, listen, paths):
    files = {file.hash: file for file in map(ModelFile.open, paths)}
    worker = Worker(
        files.get,
        Offer(budget_bytes, 1, budget_bytes, 1e9, 1e-9),
        lambda text: print(text, file=sys.stderr, flush=True),
    )
    listener = Listener(listen, None, worker.begin)
    signal.signal(signal.SIGTERM, lambda number, _: worker.stop(number))
    print(listener.address, flush=True)
    worker.work()
    listener.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
