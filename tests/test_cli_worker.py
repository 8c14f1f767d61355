"""`h2o worker` and `h2o run --workers`, as processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from cgroups import memory_limit

from h2o_cli.main import run_command as h2o
from runtime.distributed.keys import Keys, make_keys
from runtime.distributed.wire import Wire
from runtime.errors import WorkerError
from runtime.llama.model_file import ModelFile
from runtime.plans.file import write_plan
from runtime.plans.plan import Plan
from runtime.sizes import MB

ROOT = Path(__file__).resolve().parent.parent
H2O = [sys.executable, "-m", "h2o_cli.start"]


@contextmanager
def worker(*arguments):
    """A worker on a free port: (process, what it says with --json)."""
    command = [*H2O, "worker", *map(str, arguments), "--json", "-t", "1"]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def run(*arguments):
    """(exit code, stdout, stderr) of a command."""
    done = subprocess.run(
        [*H2O, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_answer_is_that_of_one_machine(bundled_model):
    prompt = ["run", bundled_model, "-p", "Once upon a time", "-n", "24", "--temp", "0", "--ctx", "256", "-t", "1"]
    code, text, _ = run(*prompt, "--repack", "off")
    assert code == 0
    arguments = (bundled_model, "--listen", "127.0.0.1:0", "-m", "100")
    with worker(*arguments) as (first, one), worker(*arguments) as (_, two):
        addresses = f"{one['listening']},local,{two['listening']}"
        assert one["pid"] == first.pid
        shared = [*prompt, "--workers", addresses, "--split", "3,2,3", "-m", "100", "--json"]
        found = json.loads(run(*shared)[1])
        assert found["hidden"] == {"type": "f32", "exact": True}
        assert found["ledger"]["snapshot_bytes"] == 2 * 3 * 2**18  # keys and values of two workers, on their way
        assert found["text"] + "\n" == text
        local, *others = found["devices"]
        assert (local["layers"], others[0]["layers"], others[1]["layers"]) == ([[3, 5]], [[0, 3]], [[5, 8]])
        assert [d["address"] for d in found["devices"]] == ["local", one["listening"], two["listening"]]
        assert all(0 < device["peak_memory_bytes"] < 110e6 for device in found["devices"])
        code, answer, said = run(*shared, "--hidden", "f16")
        assert (code, json.loads(answer)["hidden"]) == (0, {"type": "f16", "exact": False})
        assert said.count("h2o: hidden states travel rounded to 16 bits: the answer is not exact\n") == 1
        code, again, said = run(*prompt, "--workers", one["listening"], "--spare", two["listening"])
        assert (code, again) == (0, text)
        assert f"{one['listening']}: layers 0-7, " in said
        first.send_signal(signal.SIGTERM)
        assert first.wait(3) == 143
        code, again, said = run(*prompt, "--workers", one["listening"])
        assert (code, again) == (1, "")
        assert said.splitlines() == [
            f"h2o: the worker {one['listening']} is gone: nothing listens there",
            "  next: start it, and run again",
        ]


def test_a_worker_follows_its_plan_file_up_to_its_budget(bundled_model, tmp_path):
    path, model_hash = tmp_path / "plan", ModelFile.open(bundled_model).hash
    prompt = ["run", bundled_model, "-p", "Once upon a time", "-n", "24", "--temp", "0", "-t", "1", "--json"]
    arguments = (bundled_model, "--listen", "127.0.0.1:0", "-m", "100", "-s", path)
    with worker(*arguments) as (process, said):
        command = [*prompt, "--workers", f"local,{said['listening']}", "--split", "4,4", "--speculate", "off"]
        found = []
        for plan in (
            None,
            Plan(2, 1, model_hash=model_hash),
            Plan(8, 1, budget_bytes=1000 * MB),
            Plan(2, 1, model_hash=1),
        ):
            if plan:
                write_plan(path, plan)
            found.append(json.loads(run(*command)[1]))
        process.terminate()
        log = process.communicate(timeout=5)[1].decode()
    streams = [facts["devices"][1]["bytes_read_per_token"] > MB for facts in found]
    assert streams == [False, True, False, False]
    assert len({facts["text"] for facts in found}) == 1
    assert "h2o: the plan is for 1.00 GB: it is followed inside the 100.0 MB of -m\n" in log
    assert log.count("is for another model; the plan before it stays in force") == 1


@pytest.mark.parametrize(("above", "given"), [("1", True), ("50", False)])
def test_an_idle_worker_gives_memory_back(bundled_model, above, given):
    prompt = ["run", bundled_model, "-p", "Once upon a time", "-n", "8", "--temp", "0", "-t", "1"]
    arguments = (bundled_model, "--listen", "127.0.0.1:0", "-m", "100", "--idle", "0.5", "--idle-above", above)
    with worker(*arguments) as (process, said):
        command = [*prompt, "--workers", said["listening"]]
        texts = [run(*command)[1]]
        held = anonymous_bytes(process.pid)
        time.sleep(1.5)
        left = anonymous_bytes(process.pid)
        texts.append(run(*command)[1])
        process.terminate()
        log = process.communicate(timeout=5)[1].decode()
    assert texts[0] == texts[1] != ""
    assert (held - left > 5 * MB) == given
    assert ("h2o: idle for 0.5 s: 6.1 MB of layers given back" in log) == given


def anonymous_bytes(pid):
    fields = dict(line.split(":") for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def test_this_machine_alone_is_said(bundled_model):
    code, _, said = run("run", bundled_model, "-p", "a", "-n", "1", "--workers", "local")
    assert (code, "no other device is named: this machine computes alone" in said) == (0, True)


def test_ctrl_c_ends_a_worker(bundled_model):
    with worker(bundled_model, "--listen", "127.0.0.1:0") as (process, _):
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        assert process.wait(3) == 130
        assert time.monotonic() - start < 2
        assert b"Traceback" not in process.stderr.read()


def test_a_stranger_is_refused_and_said_once(bundled_model, tmp_path):
    make_keys(tmp_path / "a", ["me", "worker,127.0.0.1"])
    make_keys(tmp_path / "b", ["stranger"])
    me, stranger = Keys.load(tmp_path / "a" / "me"), Keys.load(tmp_path / "b" / "stranger")
    arguments = (bundled_model, "--listen", "127.0.0.1:0", "--tls", tmp_path / "a" / "worker")
    with worker(*arguments) as (process, said):
        for keys in (None, Keys(me.authority, stranger.certificate, stranger.key), None):
            wire = Wire(said["listening"], keys)
            wire.send(b"?")
            with pytest.raises(WorkerError):
                wire.receive(timeout_s=5)
            wire.close()
        prompt = ("run", bundled_model, "-p", "a", "-n", "2", "--workers", said["listening"])
        assert run(*prompt, "--tls", tmp_path / "a" / "me")[0] == 0
        code, _, error = run(*prompt)
        assert (code, "does it want a certificate?" in error) == (1, True)
        process.terminate()
        log = process.communicate(timeout=5)[1].decode()
    refusals = [line for line in log.splitlines() if "refused" in line]
    assert sorted(refusals) == [
        "h2o: refused a connection: it does not speak TLS",
        "h2o: refused a connection: its certificate is not of this authority",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["worker", "--listen", "0.0.0.0:0"], "can be reached from other machines, so it needs certificates"),
        (["worker", "--listen", "nowhere"], "'nowhere' is no address"),
        (["worker", "--tls", "/nonexistent"], "authority.pem cannot be read"),
        (["worker", "--idle", "0"], "--idle 0 is not possible"),
        (["worker", "-t", "0"], "--threads 0 is not possible"),
        (["run", "-p", "a", "--workers", ""], "--workers names no worker"),
        (["run", "-p", "a", "--workers", "a:1,a:1"], "a:1 cannot be named here"),
        (["run", "-p", "a", "--workers", "192.168.1.7:9999"], "needs certificates"),
        (["run", "-p", "a", "--workers", "x"], "'x' is no address"),
        (["run", "-p", "a", "--tls", "x"], "--tls is for --workers"),
        (["run", "-p", "a", "--split", "1"], "--split is for --workers"),
        (["run", "-p", "a", "--refresh"], "--refresh is for --workers"),
        (["run", "-p", "a", "--hidden", "f16"], "--hidden is for --workers"),
        (["run", "-p", "a", "--workers", "a:1", "--hidden", "f8"], "--hidden f8 is not possible"),
        (["run", "-p", "a", "--workers", "a:1", "--devices", "x"], "the devices were named twice"),
        (["run", "-p", "a", "--priority", "x"], "an order of devices is for --devices"),
        (["run", "-p", "a", "--workers", "127.0.0.1:1", "--draft", "auto"], "--workers does not work with"),
        (["keys", "somewhere", "--host", "a b"], "'a b' is no name of a machine"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_wrong_usage_is_one_line(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert h2o(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.cgroup
def test_every_process_stays_inside_its_own_group(bundled_model):
    prompt = ["run", bundled_model, "-p", "Once upon a time", "-n", "8", "--temp", "0", "--ctx", "256", "-t", "1"]
    with memory_limit(80 * MB) as first, memory_limit(80 * MB) as second, memory_limit(80 * MB) as root:
        found = []
        for group in (first, second):
            command = [*H2O, "worker", str(bundled_model), "--listen", "127.0.0.1:0", "-m", "80", "-t", "1", "--json"]
            found.append(group.popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
        try:
            lines = [process.stdout.readline() or process.stderr.read() for process in found]
            assert all(line.startswith("{") for line in lines), lines
            addresses = ",".join(json.loads(line)["listening"] for line in lines)
            command = [*H2O, *map(str, prompt), "-m", "80", "--workers", addresses, "--split", "5,3"]
            done = root.run(command, cwd=ROOT, timeout=60)
            assert done.returncode == 0, done.stderr
        finally:
            for process in found:
                process.terminate()
            for process in found:
                try:
                    process.communicate(timeout=60)  # with both cores taken it is more than five seconds
                finally:
                    process.kill()
        assert [process.returncode for process in found] == [143, 143]
        assert [group.kills for group in (first, second, root)] == [0, 0, 0]
        assert all(20 * MB < group.peak_bytes <= 80 * MB for group in (first, second, root))


@pytest.mark.parametrize(("given", "spins"), [(None, "2000"), ("7", "7")])
def test_threads_of_a_worker_leave_the_cores_to_others_between_its_turns(given, spins):
    script = "import os; from h2o_cli.main import LazyGroup; LazyGroup().get_command(None, 'worker'); "
    env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    env |= {"GOMP_SPINCOUNT": given} if given else {}
    command = [sys.executable, "-c", script + "print(os.environ['GOMP_SPINCOUNT'])"]
    assert subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout == f"{spins}\n"
