"""Plans for filtered keys and values: the planner's bytes are the engine's."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import msgspec
import pytest
from cgroups import memory_limit
from test_model_profile import make_profile

from planner.footprint import measure_footprint
from planner.kv import START_POSITIONS, KvUse
from profiler.measure import default_settings, measure_memory
from runtime.engine.engine import Engine
from runtime.engine.pass_memory import PROMPT, TOKEN
from runtime.kv.options import KvFilter
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.plan import Plan
from runtime.plans.residency import layer_bytes
from runtime.settings import Settings

MB = 10**6
WINDOWED = "cohere2:layers=12,dim=256,ffn=512,heads=4,kv_heads=2,vocab=512,ctx=1024"
LONG = "llama:layers=8,dim=512,ffn=256,heads=8,kv_heads=8,vocab=512,ctx=8192"
TAIL = 65


@pytest.fixture(scope="module")
def opened():
    """opened(path): the file, its hollow model, and a profile with its memory figures."""
    models = {}

    def open_(path):
        if path not in models:
            file = ModelFile.open(path)
            hollow = HollowModel(file)
            needs = measure_memory(file, hollow, default_settings(file))
            profile = make_profile([layer_bytes(layer) for layer in file.layers], [0.1] * file.n_layers)
            changes = {"memory": needs.memory, "kv": needs.kv, "kv_bytes_per_token": needs.kv_bytes_per_token}
            models[path] = file, hollow, msgspec.structs.replace(profile, **changes)
        return models[path]

    yield open_
    for _, hollow, _ in models.values():
        hollow.free()


FILTERS = {
    "no filter": None,
    "ram": KvFilter(store="ram", tail=TAIL),
    "disk": KvFilter(store="disk", tail=TAIL),
    "uniform": KvFilter(store="ram", select="uniform", keep=0.5, tail=TAIL),
    "heavy": KvFilter(store="disk", method="heavy", tail=TAIL),
}


@pytest.mark.parametrize("name", ["bundled", WINDOWED])
@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
@pytest.mark.parametrize("kv_type", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("n_ctx", [300, 4096])
def test_the_plan_counts_what_the_engine_counts(opened, bundled_model, tiny_model, name, options, kv_type, n_ctx):
    path = bundled_model if name == "bundled" else tiny_model(name)
    file, hollow, profile = opened(path)
    planned = measure_footprint(profile, n_ctx, 128, KvUse(kv_type, options))
    engine = Engine(file, hollow, Plan(0, 1, budget_bytes=10**9), Settings(n_ctx=n_ctx, kv_type=kv_type, kv=options))
    try:
        prompt, token = map(engine.layout.needs.ledger, (PROMPT, TOKEN))
        full, start = engine.layout._largest_ledger.kv_bytes, engine.layout.needs.kv_bytes(START_POSITIONS)
    finally:
        engine.close()
    assert planned.filter_bytes == token.filter_bytes
    assert planned.compute_bytes == pytest.approx(token.compute_bytes, abs=100_000)
    prompt_bytes = prompt.compute_bytes + prompt.embedding_bytes - token.embedding_bytes
    assert planned.compute_bytes + planned.prompt_bytes == pytest.approx(prompt_bytes, abs=100_000)
    logits = range(4 * file.row_tables[0].n_rows + 1)  # llama.cpp counts them among keys and values
    assert full - planned.kv_bytes in logits
    assert start - planned.kv_bytes + planned.later_bytes in logits


PROFILE = """
import sys
from profiler import disk
disk.SAMPLE_S = 0.02
from h2o_cli.main import run_command
sys.exit(run_command(["profile", *sys.argv[1:]]))
"""


def h2o(*arguments):
    return [sys.executable, "-m", "h2o_cli.main", *map(str, arguments)]


@pytest.fixture(scope="module")
def long_model(tiny_model, tmp_path_factory):
    """A model whose context takes more memory than the rest of it, its profile, and an environment that finds both."""
    model, folder = tiny_model(LONG), tmp_path_factory.mktemp("profiles")
    environment = {**os.environ, "H2O_PROFILES": str(folder), "TMPDIR": str(folder), "XDG_DATA_HOME": str(folder)}
    command = [sys.executable, "-c", PROFILE, str(model), "--repeats", "1", "-t", "1"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=100)
    return model, environment


def planned(model, environment, tmp_path, *flags):
    """Exit code, figures and standard error of `h2o plan` for a context of 8192."""
    command = h2o("plan", model, "-s", tmp_path / "plan", "--ctx", 8192, "--json", *flags)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, json.loads(done.stdout) if done.returncode == 0 else None, done.stderr


FILTER = ("--kv-filter", "--kv-layers", "0", "--kv-store", "disk", "-n", "8")


@pytest.mark.parametrize("flags", [(), ("--kv-type", "q8_0"), FILTER, (*FILTER, "--kv-type", "q8_0")], ids=str)
def test_the_plan_counts_what_a_run_counts(long_model, tmp_path, flags):
    model, environment = long_model
    floor = planned(model, environment, tmp_path, "-m", 330, *flags)[1]["floor_bytes"]
    code, found, err = planned(model, environment, tmp_path, "-m", floor // MB + 2, *flags)
    assert code == 0, err
    command = h2o("run", model, "-p", "the old man " * 7, "-s", tmp_path / "plan", "--ctx", 8192, "--temp", 0)
    command += ["--json", "-t", "1", "--speculate", "off", "--ubatch", "128", *flags]
    command += [] if "-n" in flags else ["-n", "8"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    plan, run = found["ledger"], json.loads(done.stdout)["ledger"]
    assert plan.get("filter_bytes") == run.get("filter_bytes")
    own = run["process_bytes"] + run["embedding_bytes"] + run["sampler_bytes"]
    # A run whose weights fit does not look for pages of libraries that it could do without, up to a megabyte.
    assert plan["process_bytes"] + plan["small_tensor_bytes"] == pytest.approx(
        own, abs=2.5 * MB if plan.get("filter_bytes") is None else 3.5 * MB
    )
    assert plan["kv_bytes"] == pytest.approx(run["kv_bytes"], abs=200_000)
    assert plan["compute_bytes"] <= run["compute_bytes"] + 200_000  # a prompt's stay where all weights fit beside them


@pytest.mark.cgroup
def test_a_context_that_fits_only_with_a_filter_is_planned_and_runs(long_model, tmp_path):
    model, environment = long_model
    code, _, err = planned(model, environment, tmp_path, "-m", 122)
    assert code == 1 and "the smallest budget that works here is -m" in err
    code, found, err = planned(model, environment, tmp_path, "-m", 122, *FILTER)
    assert code == 0, err
    assert found["floor_bytes"] <= 122 * MB
    assert found["kv_filter"]["store"] == "disk"
    (tmp_path / "prompt").write_text("the old man and the sea " * 90)
    command = h2o("run", model, "-f", tmp_path / "prompt", "-s", tmp_path / "plan", "--ctx", 8192, "--temp", 0)
    with memory_limit(122 * MB) as group:
        done = group.run([*command, "--json", "-t", "1", *FILTER], env=environment, timeout=200)
        assert done.returncode == 0, done.stderr
        assert group.kills == 0 and group.peak_bytes <= 122 * MB
    answer = json.loads(done.stdout)
    assert answer["plan_origin"] == "plan file" and len(answer["tokens"]) == 8
