"""`--cluster`: workers that Ray places, watches and restarts. Most of it needs the extra `cluster`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from test_cli_worker import H2O, ROOT, run

from h2o_cli.main import run_command as h2o
from h2o_cli.session import members, ray_workers
from h2o_cli.session.ray_workers import DISK, RayWorkers, actor_on, asked_of_nodes, join_cluster
from runtime.errors import WorkerError
from runtime.sizes import MB

NODES = 3
NODE = {"num_cpus": 1, "memory": 1000 * MB, "object_store_memory": 80 * MB, "resources": {DISK: 400}}
PROMPT = ("-p", "Once upon a time", "-n", "64", "--temp", "0", "--ctx", "256", "-t", "1", "--speculate", "off")


@pytest.fixture(scope="module")
def cluster():
    """A Ray cluster of three nodes on this machine."""
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = str(ROOT)  # of the nodes' processes
    made = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    for _ in range(NODES - 1):
        made.add_node(**NODE)
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def text(bundled_model):
    """The answer of one machine."""
    code, found, _ = run("run", bundled_model, *PROMPT, "--repack", "off")
    assert code == 0
    return found


def workers_of(cluster):
    """Processes of workers that listen on an address of this cluster's nodes."""
    found = subprocess.run(["ps", "-ewwo", "args"], capture_output=True, text=True, check=True).stdout
    return [line for line in found.splitlines() if "h2o_cli.start worker" in line and "--tls /tmp/h2o-" in line]


def test_one_command_gives_the_same_tokens(cluster, bundled_model, text):
    command = ["run", bundled_model, *PROMPT, "--cluster", cluster.address, "--split", "3,3,2", "--json"]
    code, found, said = run(*command)
    assert code == 0, said
    found = json.loads(found)
    assert found["text"] + "\n" == text
    local, *others = found["devices"]
    assert (local["address"], local["layers"]) == ("local", [])
    assert [device["layers"] for device in others] == [[[0, 3]], [[3, 6]], [[6, 8]]]
    assert gone(lambda: workers_of(cluster))


def gone(what, limit_s=5):
    """Whether something is no longer so soon."""
    end = time.monotonic() + limit_s
    while what() and time.monotonic() < end:
        time.sleep(0.1)
    return not what()


def test_devices_shows_the_nodes(cluster, bundled_model):
    code, found, said = run("devices", bundled_model, "--cluster", cluster.address, "-t", "1", "--json")
    assert code == 0, said
    assert len(json.loads(found)["devices"]) == NODES


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_node_that_is_removed_is_replaced_and_the_text_goes_on(is_killed, cluster, bundled_model, text):
    command = ["run", bundled_model, *PROMPT, "--cluster", cluster.address, "--split", "3,3,2"]
    pipe = subprocess.PIPE
    with subprocess.Popen([*H2O, *map(str, command)], cwd=ROOT, stdout=pipe, stderr=pipe, bufsize=0) as process:
        begun = process.stdout.read(1)
        process.send_signal(signal.SIGSTOP)  # not to be at the end before the node is gone
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=not is_killed)
        assert gone(lambda: len(workers_of(cluster)) == NODES)
        process.send_signal(signal.SIGCONT)
        rest, said = process.communicate(timeout=90)
    said = said.decode()
    cluster.add_node(**NODE)

    assert process.returncode == 0, said
    assert (begun + rest).decode() == text
    (line,) = [line for line in said.splitlines() if " go to " in line]
    gone_at, now_at = line.split("worker ")[1].split(" is gone")[0], line.rsplit(" ", 1)[1]
    assert gone_at != now_at
    assert said.count(f"h2o: {now_at}: layers") == 0  # no other one of the three


# --- without a cluster -----------------------------------------------------------------------------------------------


def test_without_ray(bundled_model, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert h2o(["run", str(bundled_model), "-p", "a", "--cluster", "auto"]) == 2
    said = capsys.readouterr().err
    assert "the package `ray` is not installed" in said and "pip install '.[cluster]'" in said


def test_what_is_asked_of_the_nodes():
    """Memory for the model, and half of the disk's rate where the node declares one."""
    has = [("a", True, 4000, {DISK: 401}), ("b", True, 300, {}), ("c", True, 10, {}), ("d", False, 4000, {})]
    nodes = [{"NodeID": n, "Alive": alive, "Resources": {"memory": m * MB, **more}} for n, alive, m, more in has]
    ray = SimpleNamespace(nodes=lambda: nodes)
    assert asked_of_nodes(ray, 1000 * MB) == [("a", 1000 * MB, 200), ("b", 300 * MB, 0)]
    assert asked_of_nodes(ray, None) == [("a", 4000 * MB, 200), ("b", 300 * MB, 0)]
    with pytest.raises(WorkerError, match="no node of the Ray cluster has 64"):
        asked_of_nodes(SimpleNamespace(nodes=lambda: nodes[2:]), None)


def test_ray_is_told_what_an_actor_asks_for(monkeypatch):
    seen, ray = [], SimpleNamespace(remote=lambda _: SimpleNamespace(options=lambda **asked: seen.append(asked)))
    strategies = SimpleNamespace(NodeAffinitySchedulingStrategy=lambda node, soft: (node, soft))
    monkeypatch.setitem(sys.modules, "ray.util.scheduling_strategies", strategies)
    for disk in (200, 0):
        actor_on(ray, object, "a", 1000 * MB, disk)
    assert [(asked["memory"], asked["resources"], asked["scheduling_strategy"]) for asked in seen] == [
        (1000 * MB, {DISK: 200}, ("a", True)),
        (1000 * MB, {}, ("a", True)),
    ]


def test_workers_of_a_cluster_are_told_how_hidden_states_travel(monkeypatch):
    """A cluster that is faster without them is left."""
    left, seen = [], []
    nodes = SimpleNamespace(addresses=["a:1", "b:1"], keys=None, close=lambda: left.append(1))
    monkeypatch.setattr(ray_workers, "RayWorkers", lambda *_: nodes)
    monkeypatch.setattr(members.Team, "join", lambda _file, devices, *_: seen.append(devices) and None)
    for kind in ("f32", "f16"):
        assert join_cluster("auto", None, kind, SimpleNamespace(path="m", n_bytes=1), 0, 1, print) is None
    assert [(one.workers, one.hidden) for one in seen] == [("a:1,b:1", "f32"), ("a:1,b:1", "f16")]
    assert left == [1, 1]


def test_ray_is_not_left_while_a_thread_is_inside_it(tmp_path):
    """It would compute with memory that is gone: a lost worker is waited for in a thread of its own."""
    inside, left = threading.Event(), []

    def wait(_asked, timeout):
        inside.set()
        time.sleep(0.3)
        assert (timeout, left) == (0, [])
        return [], []

    actor = SimpleNamespace(address=SimpleNamespace(remote=object))
    found = RayWorkers.__new__(RayWorkers)
    found._ray = SimpleNamespace(wait=wait, kill=lambda _: None, shutdown=lambda: left.append(True))
    found._actors, found.addresses, found._is_closed, found._inside = [actor], ["a:1"], False, threading.Lock()
    found._folder = SimpleNamespace(cleanup=lambda: None)
    with ThreadPoolExecutor() as pool:
        waits = pool.submit(found.again, "a:1", lambda: None)
        assert inside.wait(5)
        found.close()
        with pytest.raises(WorkerError, match="the cluster was left"):
            waits.result(5)
    assert left == [True]


def test_no_cluster_there(bundled_model, capsys):
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    assert h2o(["run", str(bundled_model), "-p", "a", "--cluster", "127.0.0.1:1"]) == 2
    assert "there is no Ray cluster at 127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workers", "127.0.0.1:1"], "the devices were named twice"),
        (["--spare", "127.0.0.1:1"], "--cluster starts its workers itself"),
        (["--tls", "x"], "--cluster starts its workers itself"),
        (["--refresh"], "--cluster starts its workers itself"),
        (["--draft", "auto"], "does not work with --kv-filter or --draft"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, capsys):
    assert h2o(["run", "-p", "a", "--cluster", "auto", *arguments]) == 2
    assert message in capsys.readouterr().err
