"""Many commands in processes of their own, quickly: they are forked from one that has loaded llama.cpp already.

`python tests/children.py run` reads a JSON list of argument lists and prints one of [exit code, stdout, stderr].
`python tests/children.py open` answers every path on its standard input with "ok" or the error of ModelFile.open.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HERE = [sys.executable, str(Path(__file__))]
AT_ONCE = 2
LONGEST_S = 120


def commands(cases):
    """Run `h2o ...` for every list of arguments; (exit code, stdout, stderr) of each, -9 where it did not end."""
    data = json.dumps([[str(argument) for argument in case] for case in cases])
    done = subprocess.run([*HERE, "run"], input=data, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return [tuple(answer) for answer in json.loads(done.stdout)]


class Opener:
    """Opens model files in a child that may die of it."""

    def __init__(self):
        self._child = subprocess.Popen(
            [*HERE, "open"], cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def open(self, path):
        """What ModelFile.open says of a file: "ok" or its error. Fails when the child died."""
        self._child.stdin.write(f"{path}\n")
        self._child.stdin.flush()
        answer = self._child.stdout.readline().strip()
        assert answer, f"the child died with {self._child.wait(10)}: {self._child.stderr.read()}"
        return answer

    def close(self):
        self._child.communicate()


def _run_all():
    sys.path[:0] = [str(ROOT)]
    from h2o_cli import cmd_inspect, cmd_plan, cmd_profile, cmd_run, main  # noqa: F401
    from h2o_cli.session import model

    cases = json.load(sys.stdin)
    answers, running = [None] * len(cases), {}
    with tempfile.TemporaryDirectory() as folder:
        for module in (model, cmd_plan):  # not the plan file of the user who runs the tests
            module.default_plan_path = lambda: Path(folder) / "plan.bin"
        for number, arguments in enumerate(cases):
            while len(running) >= AT_ONCE:
                _collect(running, answers)
            files = [Path(folder) / f"{number}.{name}" for name in ("out", "err")]
            running[_start(main, arguments, files)] = (number, files, time.monotonic())
        while running:
            _collect(running, answers)
    json.dump(answers, sys.stdout)


def _start(main, arguments, files):
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for fd, path in enumerate(files, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), fd)
        sys.stdout, sys.stderr = os.fdopen(1, "w", errors="replace"), os.fdopen(2, "w", errors="replace")
        code = main.run_command(arguments)
        sys.stdout.flush()
        os._exit(code)
    finally:
        os._exit(99)


def _collect(running, answers):
    """Take the answers of the children that have ended; kill those that do not."""
    for child, (number, files, start) in list(running.items()):
        if time.monotonic() - start > LONGEST_S:
            os.kill(child, signal.SIGKILL)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            texts = [path.read_text(errors="replace") if path.exists() else "" for path in files]
            answers[number] = [os.waitstatus_to_exitcode(status), *texts]
            del running[child]
    time.sleep(0.003)


def _open_all():
    sys.path[:0] = [str(ROOT)]
    from runtime.errors import ModelError
    from runtime.llama.model_file import ModelFile

    for line in sys.stdin:
        try:
            ModelFile.open(line.rstrip("\n"))
            answer = "ok"
        except ModelError as error:
            answer = f"ModelError: {error}"
        print(" ".join(answer.split()), flush=True)


if __name__ == "__main__":
    {"run": _run_all, "open": _open_all}[sys.argv[1]]()


def without_progress(err):
    """Lines of standard error that are not about the time of work that takes longer than two seconds."""
    return [line for line in err.strip().splitlines() if not re.search(r"% after |takes about |sample prompt", line)]
