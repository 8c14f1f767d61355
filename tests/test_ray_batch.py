"""`h2o batch --cluster`: prompts on the nodes of a Ray cluster. Most of it needs the extra `cluster`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("grpc", reason="the extra `workers` is not installed")

from test_cli_worker import H2O, ROOT

from h2o_cli import batch_cluster
from h2o_cli.batch_node import Setup
from h2o_cli.main import run_command as h2o
from h2o_cli.session.options import SessionOptions
from h2o_cli.session.ray_workers import DISK
from runtime.plans.budget import Budget
from runtime.sizes import MB

N_PROMPTS = 100


@pytest.fixture
def cluster():
    """A Ray cluster of two nodes on this machine, beside the one of the head, which has no memory for engines."""
    pytest.importorskip("ray", reason="the extra `cluster` is not installed")
    from ray.cluster_utils import Cluster

    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # of the nodes' processes
    node = {"num_cpus": 1, "memory": 1000 * MB, "object_store_memory": 80 * MB, "resources": {DISK: 400}}
    head = {**node, "memory": 1, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        made.add_node(**node)
    yield made
    made.shutdown()


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"custom_id": f"p{i}", "prompt": f"Tom has {i} cats", "max_tokens": 24} for i in range(N_PROMPTS)]
    path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"n": 2, "prompt": "a"}]))
    return path


def command(model, prompts, answers, *more):
    files = ["-f", prompts, "-o", answers]
    return [str(part) for part in ("batch", model, *files, "-m", 200, "--temp", 0, "-t", 1, "--batch-size", 4, *more)]


def texts(path):
    found = [json.loads(line) for line in path.read_text().splitlines()]
    by_id = {answer["custom_id"]: answer for answer in found}
    assert len(by_id) == len(found), "an answer stands there twice"
    return {
        name: answer["response"]["body"]["choices"][0]["text"] for name, answer in by_id.items() if not answer["error"]
    }


def test_all_prompts_are_answered_when_a_node_is_removed_halfway(cluster, bundled_model, prompts, tmp_path):
    answers, alone = tmp_path / "answers", tmp_path / "alone"
    pipe = subprocess.PIPE
    line = [*H2O, *command(bundled_model, prompts, answers, "--cluster", cluster.address, "--json")]
    with subprocess.Popen(line, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        end = time.monotonic() + 60
        while not answers.exists() or answers.read_bytes().count(b"\n") < N_PROMPTS // 2:
            assert process.poll() is None and time.monotonic() < end, process.stderr.read()
            time.sleep(0.01)
        cluster.remove_node(cluster.worker_nodes.copy().pop(), allow_graceful=False)
        out, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    totals = json.loads(out)
    assert (totals["answers"], totals["errors"], totals["nodes"]) == (N_PROMPTS, 1, 2)
    assert h2o(command(bundled_model, prompts, alone)) == 0
    assert len(texts(answers)) == N_PROMPTS
    assert texts(answers) == texts(alone)
    again = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert json.loads(again.stdout)["skipped"] == N_PROMPTS + 1
    assert len(texts(answers)) == N_PROMPTS


def test_a_budget_that_no_node_can_keep_is_one_line(cluster, bundled_model, prompts, tmp_path, capsys):
    line = command(bundled_model, prompts, tmp_path / "a", "--cluster", cluster.address)
    line[line.index("-m") + 1] = "65"
    line += ["--ctx", "100000"]
    done = subprocess.run([*H2O, *line], cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 1
    assert "a node cannot answer" in done.stderr and "-m" in done.stderr


# --- without a cluster -----------------------------------------------------------------------------------------------


def test_without_ray(bundled_model, prompts, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert h2o(command(bundled_model, prompts, tmp_path / "a", "--cluster", "auto")) == 2
    assert "the package `ray` is not installed" in capsys.readouterr().err


def test_an_actor_asks_for_half_of_the_disks_rate(monkeypatch):
    """As a worker's actor does."""
    asked, remote = [], SimpleNamespace(remote=lambda _: None)
    monkeypatch.setattr(batch_cluster, "actor_on", lambda *what: asked.append(what[2:]) or remote)
    nodes = [{"NodeID": name, "Alive": True, "Resources": {"memory": 1000 * MB, DISK: 400}} for name in "ab"]
    found = batch_cluster.ClusterBatch.__new__(batch_cluster.ClusterBatch)
    found._ray, found._actors = SimpleNamespace(nodes=lambda: nodes), []
    found._start(Setup(SessionOptions(Path("model"), budget=Budget.parse("200")), 1))
    assert asked == [("a", 200 * MB, 200), ("b", 200 * MB, 200)]


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-pool", "10"],
        ["--admission", "none"],
        ["--schedule", "zigzag"],
        ["--trace", "t"],
        ["--percent", "0", "50", "0", "100", "0", "100"],
        ["--batch-size", "auto"],
    ],
)
def test_what_does_not_go_with_a_cluster_is_one_line(bundled_model, prompts, tmp_path, flags, capsys):
    assert h2o(command(bundled_model, prompts, tmp_path / "a", "--cluster", "auto", *flags)) == 2
    assert f"--cluster does not go with {flags[0]}" in capsys.readouterr().err
