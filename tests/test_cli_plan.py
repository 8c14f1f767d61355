import json
import re
import struct
import sys
from dataclasses import replace

import msgspec
import pytest
from source_profiles import SOURCE_PROFILES
from test_model_profile import make_profile
from test_source_format import log_text

from h2o_cli import main as cli
from h2o_cli.session import models
from planner.source.profile import save_source
from profiler.model_profile import KvLayer, KvProfile, load_profile, save_profile
from runtime.llama.model_file import ModelFile
from runtime.plans.file import read_plan, write_plan
from runtime.plans.plan import Layout, Plan
from runtime.plans.residency import layer_bytes
from runtime.sizes import PAGE, page_up

KEYS = {
    "k",
    "w",
    "layout",
    "predicted_ms_per_token",
    "predicted_ttft_s",
    "limit_ms_per_token",
    "budget_bytes",
    "floor_bytes",
    "ledger",
    "model",
    "plan_file",
    "generation",
}
MB = 10**6
FIXED = 100 * MB


@pytest.fixture(autouse=True)
def plan_file(tmp_path, monkeypatch):
    """The default plan file of these tests."""
    path = tmp_path / "default-plan.bin"
    for module in ("session.model", "cmd_plan"):
        monkeypatch.setattr(f"h2o_cli.{module}.default_plan_path", lambda: path)
    return path


@pytest.fixture
def profiles(tmp_path, monkeypatch):
    """Where the profiles of these tests are kept."""
    folder = tmp_path / "profiles"
    folder.mkdir()
    monkeypatch.setattr(models, "profiles_folder", lambda: folder)
    return folder


@pytest.fixture
def profile(profiles):
    """A profile of ten layers of 30 MB and a head of 60 MB, model hash 77."""
    path = profiles / "m.json"
    made = make_profile(
        [30 * MB] * 10, [0.001] * 10, disk=1e9, head=60 * MB, head_s=0.002, noise=0.05, fixed=FIXED, min_window=8 * MB
    )
    save_profile(made, path)
    return path


@pytest.fixture
def plan(capsys):
    """plan(*arguments): exit code, standard output, standard error of `h2o plan`."""

    def call(*arguments):
        code = cli.run_command(["plan", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def plan_json(plan):
    """plan_json(*arguments): the object of `h2o plan --json`."""

    def call(*arguments):
        code, out, err = plan(*arguments, "--json")
        assert (code, err) == (0, "")
        return json.loads(out)

    return call


def test_json_has_every_key_of_the_contract(plan_json, profile, plan_file):
    found = plan_json("-c", profile, "-m", 300)
    assert found.keys() >= KEYS
    assert sum(found["ledger"].values()) == found["budget_bytes"] == 300 * MB
    assert (found["model"], found["plan_file"], found["generation"]) == ("m.gguf", str(plan_file), 1)
    assert FIXED < found["floor_bytes"] < 120 * MB
    assert found["predicted_ms_per_token"] >= found["limit_ms_per_token"] > 0


def test_the_policy_of_the_source_systems_cost_model(plan, plan_json, plan_file, bundled_model):
    command = (bundled_model, "-m", "4GB", "--batch", "--source", "--ctx", 64)
    pytest.importorskip("scipy")
    found = plan_json(*command)
    assert found["gpu_batch_size"] >= 1 and found["num_gpu_batches"] >= 1 and found["tokens_per_s"] > 0
    assert len(found["percent"]) == 6 and sum(found["percent"][4:]) == 100
    code, out, _ = plan(*command)
    assert code == 0 and "--percent " + " ".join(map(str, found["percent"])) in out and "64 tokens of a prompt" in out
    assert not plan_file.exists()
    assert plan(*command, "--compat")[0] == 2


def test_the_policy_search_without_scipy_says_what_is_missing(plan, bundled_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    code, _, err = plan(bundled_model, "-m", "4GB", "--batch", "--source")
    assert code == 2 and "scipy" in err


def test_batch_sizes_are_predicted(plan, plan_json, profile, plan_file):
    found = plan_json("-c", profile, "-m", 300, "--batch", "--ctx", 64)
    sizes = {one["n_texts"]: one for one in found["batch_sizes"]}
    assert list(sizes)[:3] == [1, 2, 3] and list(sizes)[-1] == 32
    assert found["predicted_tokens_per_s"] == sizes[found["batch_size"]]["tokens_per_s"]
    assert sizes[1]["ms_per_token"] == pytest.approx(sizes[1]["read_ms"])
    assert sizes[1]["read_ms"] > sizes[1]["compute_ms"]
    assert not plan_file.exists()
    code, out, _ = plan("-c", profile, "-m", 300, "--batch", "--ctx", 64)
    assert code == 0
    assert out.splitlines()[-1] == f"h2o batch -m 300 --batch-size {found['batch_size']}"
    assert plan("-c", profile, "-m", 300, "--batch", "--show")[0] == 2
    assert plan("-c", profile, "-m", 5, "--batch")[0] == 1


def test_plan_goes_into_the_plan_file(plan, profile, plan_file, tmp_path):
    code, out, err = plan("-c", profile, "-m", 300)
    assert code == 0
    written = read_plan(plan_file)
    assert (written.budget_bytes, written.model_hash, written.generation) == (300 * MB, 77, 1)
    assert f"plan: k={written.k} layers resident, window w={written.w}, layout {written.layout.label}" in out
    for part in ("predicted: ", "limit: ", "memory:", "resident", "what would help:"):
        assert part in out
    assert err == f"h2o: plan 1 written to {plan_file}\n"
    assert plan("-c", profile, "-s", tmp_path / "other.bin", "-m", 300)[0] == 0
    assert read_plan(tmp_path / "other.bin").k == written.k
    assert read_plan(plan_file).generation == 1


def test_more_memory_keeps_more_layers(plan_json, profile):
    found = [plan_json("-c", profile, "-m", size) for size in (150, 250, 350, 800)]
    assert [one["k"] for one in found] == sorted(one["k"] for one in found)
    assert found[-1]["k"] == 10
    times = [one["predicted_ms_per_token"] for one in found]
    assert times == sorted(times, reverse=True)


def test_budget_of_the_plan_in_force_is_kept(plan_json, profile, plan_file):
    write_plan(plan_file, Plan(0, 1, budget_bytes=250 * MB, model_hash=77))
    assert plan_json("-c", profile)["budget_bytes"] == 250 * MB
    write_plan(plan_file, Plan(0, 1, budget_bytes=250 * MB, model_hash=78))
    assert plan_json("-c", profile)["budget_bytes"] > 350 * MB  # 60 % of what is free here


@pytest.mark.parametrize("layout", ["prefix", "even", "balanced"])
def test_layout_asked_for(layout, plan_json, profile):
    assert plan_json("-c", profile, "-m", 300, "--layout", layout)["layout"] == layout


def test_longer_context_leaves_less_for_weights(plan_json, profile):
    short, long = (plan_json("-c", profile, "-m", 300, "--ctx", n)["ledger"] for n in (1000, 1_000_000))
    assert long["kv_bytes"] > short["kv_bytes"]
    assert long["resident_bytes"] < short["resident_bytes"]


@pytest.fixture
def kv_profile(profile):
    """The same profile with four heads and 1 KB of keys and values per layer and position."""
    layers = tuple(KvLayer(n, 512, 512, all_positions=True) for n in range(10))
    found = msgspec.structs.replace(load_profile(profile), kv=KvProfile(4, layers), kv_bytes_per_token=10240)
    save_profile(found, profile)
    return profile


def test_kv_type_and_filter(plan, plan_json, kv_profile, plan_file):
    flags = ("-c", kv_profile, "-m", 400, "--ctx", 16384)
    plain, half = plan_json(*flags), plan_json(*flags, "--kv-type", "q8_0")
    assert (plain["kv_type"], plain["kv_filter"]) == ("f16", None)
    assert plain["ledger"]["kv_bytes"] == 64 * 10240 + 20 * PAGE  # of the first positions, in whole pages
    assert half["ledger"]["kv_bytes"] == 20 * (page_up(64 * 512 * 34 // 64) + PAGE)
    assert plain["floor_bytes"] - half["floor_bytes"] == pytest.approx(16384 * 10240 * 30 / 64, abs=MB)
    filtered = plan_json(*flags, "--kv-filter", "--kv-store", "disk", "--kv-keep", "0.05", "--kv-layers", "1", "-n", 10)
    wanted = {"method": "omnikv", "layers": [1], "wait": 1, "keep": 0.05, "select": "last", "store": "disk"}
    assert filtered["kv_filter"] == wanted
    assert sum(filtered["ledger"].values()) == 400 * MB
    assert filtered["floor_bytes"] < plain["floor_bytes"] - 90 * MB
    assert "keys and values read from the disk" in plan(*flags, "--kv-filter", "--kv-store", "disk")[1]
    assert "read from the disk" not in plan(*flags, "--kv-filter")[1]
    shown = plan_json("--show", "-c", kv_profile, "--kv-type", "q8_0", "--ctx", 16384)
    assert shown["ledger"]["kv_bytes"] == half["ledger"]["kv_bytes"]


def test_a_longer_answer_keeps_more_rows(plan_json, kv_profile):
    flags = ("-c", kv_profile, "-m", 600, "--ctx", 16384, "--kv-filter")
    sizes = [plan_json(*flags, "-n", n)["ledger"]["filter_bytes"] for n in (10, 256, 4000, -1)]
    assert sizes == sorted(set(sizes))
    assert sizes[1] == plan_json(*flags)["ledger"]["filter_bytes"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--kv-keep", "0.1"), "--kv-keep does nothing without --kv-filter"),
        (("--kv-filter", "--kv-layers", "10"), "there is no layer 10"),
        (("--kv-filter", "--kv-wait", "9"), "leave no layer to filter"),
        (("--kv-filter", "--kv-type", "f32"), "--kv-type f32"),
        (("--kv-type", "q4_1"), "--kv-type q4_1 is not possible"),
        (("--live", "--kv-filter"), "--live takes the running process as it is"),
    ],
    ids=str,
)
def test_impossible_filters(flags, said, plan, kv_profile, plan_file):
    code, out, err = plan("-c", kv_profile, *(() if "--live" in flags else ("-m", 300)), *flags)
    assert (code, out) == (2, "")
    assert said in err and "next:" in err
    assert not plan_file.exists()


def test_a_profile_without_layers_to_filter(plan, profile):
    code, _, err = plan("-c", profile, "-m", 300, "--kv-filter")
    assert code == 1
    assert "m has no keys and values that can be filtered" in err


def test_explain_shows_the_arms(plan, profile):
    out = plan("-c", profile, "-m", 300, "--explain")[1]
    assert "compared by the bandit" in out
    assert re.search(r"exact search: k=\d+ w=\d+ \w+, window .*: predicted [0-9.]+ ms per token", out)
    header = next(line for line in out.splitlines() if "ms/token" in line)
    assert header.split() == ["k", "w", "layout", "resident", "window", "ms/token", "+-", "plays"]


def test_it_is_said_who_found_the_plan(plan, plan_json, profile, monkeypatch):
    assert "found by: the bandit (" in plan("-c", profile, "-m", 300)[1]
    assert plan_json("-c", profile, "-m", 300)["method"].startswith("the bandit")
    monkeypatch.setattr("planner.choose.decide", lambda profile, bandit, exact: (exact, "the exact search"))
    assert "found by: the exact search\n" in plan("-c", profile, "-m", 300)[1]
    assert "found by" not in plan("-c", profile, "--set", "3,2")[1]


def test_plan_by_hand(plan_json, profile, plan_file):
    found = plan_json("-c", profile, "--set", "3,2", "-m", 400, "--layout", "even")
    assert (found["k"], found["w"], found["layout"], found["budget_bytes"]) == (3, 2, "even", 400 * MB)
    assert found["ledger"]["resident_bytes"] == 90 * MB
    assert found["ledger"]["window_bytes"] == 60 * MB
    assert read_plan(plan_file) == Plan(3, 2, Layout.EVEN, model_hash=77, generation=1)


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--set", "9,2", "-m", "200"), 1, "k=9, w=2 needs"),
        (("--set", "11,1"), 2, "the model has 10 layers"),
        (("--set", "2,0"), 2, "W from 1"),
        (("--set", "2"), 2, "two numbers"),
        (("--set", "a,b"), 2, "two numbers"),
        (("-m", "101"), 1, "the smallest budget that works here is -m"),
        (("-m", "much"), 2, "is not a size"),
        (("--ctx", "0"), 2, "--ctx 0"),
        (("--show", "-m", "300"), 2, "--show writes no plan"),
        (("--layout", "round"), 2, "there is no layout"),
        (("--show", "--explain"), 2, "--explain shows what the planner compared"),
        (("--set", "2,1", "--explain"), 2, "--explain shows what the planner compared"),
        (("-n", "-2"), 2, "-n -2 is not possible"),
    ],
    ids=str,
)
def test_impossible_plans(flags, code, said, plan, profile, plan_file):
    found = plan("-c", profile, *flags)
    assert found[:2] == (code, "")
    assert said in found[2]
    assert not plan_file.exists()


# --- for users of the source system ----------------------------------------------------------------------------------


@pytest.fixture
def four_keys(tmp_path):
    """four_keys(name): the JSON file of a profile of the source system."""

    def make(name):
        save_source(SOURCE_PROFILES[name], tmp_path / f"{name}.json")
        return tmp_path / f"{name}.json"

    return make


@pytest.mark.parametrize("name", SOURCE_PROFILES)
def test_a_four_key_profile_is_taken_as_it_is(name, plan, plan_json, four_keys, plan_file):
    """What it cannot know is not claimed: no smallest budget, no parts of the process, no time to the first token."""
    path, source = four_keys(name), SOURCE_PROFILES[name]
    budget = sum(source.layer_sizes) * 2**20 // 2
    found = plan_json("-c", path, "-m", f"{budget}B")
    assert (found["floor_bytes"], found["predicted_ttft_s"]) == (None, None)
    assert found["ledger"].keys() == {"resident_bytes", "window_bytes"}
    assert 0.9 * budget < sum(found["ledger"].values()) <= budget
    assert found["predicted_ms_per_token"] >= found["limit_ms_per_token"] * (1 - 1e-9) > 0
    assert read_plan(plan_file).model_hash == 0
    out = plan("-c", path, "-m", f"{budget}B")[1]
    assert "not in this profile: process, KV cache" in out
    assert "smallest budget" not in out and "first token" not in out
    code, _, err = plan("-c", path, "-m", 20)
    assert code == 1 and "does not hold one layer" in err


def test_a_log_is_taken_too(plan_json, tmp_path):
    (tmp_path / "run.log").write_text(log_text())
    assert plan_json("-c", tmp_path / "run.log", "-m", 50)["k"] == 1


def test_by_hand_without_a_profile(plan, plan_json, profiles, tiny_model, plan_file):
    model = tiny_model("qwen2")
    found = plan_json(model, "--set", "3,2")
    assert (found["k"], found["w"], found["layout"], found["predicted_ms_per_token"]) == (3, 2, "prefix", None)
    assert read_plan(plan_file) == Plan(3, 2, model_hash=ModelFile.open(model).hash, generation=1)
    code, _, err = plan(model, "--set", "5,1")
    assert code == 2 and "the model has 4 layers" in err
    assert plan(model, "-m", 300)[0] == 1


def test_compat_writes_eight_bytes(plan, plan_json, profile, four_keys, tmp_path, plan_file):
    path = tmp_path / "kw.bin"
    assert plan("--set", "30,4", "-s", path, "--compat")[0] == 0
    assert path.read_bytes() == struct.pack("=ii", 30, 4)
    found = plan_json("-c", profile, "-m", 300, "-s", path, "--compat")
    assert path.read_bytes() == struct.pack("=ii", found["k"], found["w"])
    assert found["layout"] == "prefix"
    assert not plan_file.exists()
    write_plan(tmp_path / "full.bin", Plan(1, 1))
    code, _, err = plan("--set", "3,4", "-s", tmp_path / "full.bin", "--compat")
    assert code == 1 and "is not an 8-byte plan file" in err


@pytest.mark.parametrize(
    ("name", "memory", "k", "w", "token_ms"),
    [
        ("qwen2.5-1.5b-f16", 0.25, 5, 2, 1895),
        ("qwen2.5-1.5b-f16", 0.5, 11, 3, 1405),
        ("qwen2.5-1.5b-f16", 0.75, 17, 4, 930),
        ("qwen2.5-0.5b-f16", 0.5, 8, 4, 843),
    ],
)
def test_the_source_systems_plan(name, memory, k, w, token_ms, plan, plan_json, four_keys, tmp_path):
    size = int(memory * sum(SOURCE_PROFILES[name].layer_sizes))
    flags = ("--source", "-c", four_keys(name), "-s", tmp_path / "kw.bin", "--compat")
    found = plan_json(*flags, "-m", size)
    assert (found["k"], found["w"], round(found["predicted_ms_per_token"])) == (k, w, token_ms)
    assert (tmp_path / "kw.bin").read_bytes() == struct.pack("=ii", k, w)
    assert plan_json(*flags, "-m", f"{size}MiB")["k"] == k
    few = plan_json(*flags, "-m", size, "--episodes", 5)
    assert (few["arms_played"], few["k"]) == (5, 0)
    assert few["optimum"]["k"] == k
    assert f"not played: k={k} w={w}" in plan(*flags, "-m", size, "--episodes", 5)[1]
    drawn = [plan_json(*flags, "-m", size, "--episodes", 5, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    often, seldom = (plan_json(*flags, "-m", size, "--c", c)["plays_of_best"] for c in (1, 100_000))
    assert often > seldom


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (("--source", "-c", "P"), 2, "--source finds a plan for -m"),
        (("--source", "-c", "P", "-m", "9", "--explain"), 2, "--source finds a plan for -m"),
        (("--source", "-c", "P", "-m", "9"), 1, "less than the first layer"),
        (("--source", "-c", "P", "-m", "900", "--episodes", "0"), 2, "--episodes 0"),
        (("--source", "-c", "P", "-m", "900", "--c", "-1"), 2, "--c -1"),
        (("--compat", "-c", "P", "-m", "900"), 2, "name it with -s"),
        (("--compat", "-c", "P", "-m", "900", "-s", "F", "--layout", "even"), 2, "no layout but prefix"),
        (("-c", "P", "--set", "3,2", "-m", "100"), 1, "k=3, w=2 needs"),
    ],
    ids=str,
)
def test_impossible_in_the_source_systems_way(flags, code, said, plan, four_keys, tmp_path):
    paths = {"P": four_keys("qwen2.5-1.5b-f16"), "F": tmp_path / "kw.bin"}
    found = plan(*(paths.get(flag, flag) for flag in flags))
    assert found[:2] == (code, "")
    assert said in found[2] and "next:" in found[2]


def test_show(plan, plan_json, profile, plan_file):
    assert plan("--show", "-c", profile)[0] == 1
    write_plan(plan_file, Plan(4, 2, Layout.EVEN, budget_bytes=300 * MB, model_hash=77))
    found = plan_json("--show", "-c", profile)
    assert (found["k"], found["w"], found["layout"], found["generation"]) == (4, 2, "even", 1)
    assert found["predicted_ms_per_token"] > 0
    assert "plan: k=4 layers resident, window w=2, layout even" in plan("--show", "-c", profile)[1]
    write_plan(plan_file, Plan(4, 2, model_hash=78))
    code, out, err = plan("--show", "-c", profile)
    assert code == 0
    assert "predicted" not in out
    assert "another model" in err


def test_missing_and_broken_profiles(plan, profiles, tmp_path, tiny_model):
    code, _, err = plan(tiny_model("qwen2"), "-m", 300)
    assert code == 1
    assert "run `h2o profile" in err
    code, _, err = plan("-c", tmp_path / "no.json", "-m", 300)
    assert code == 1
    assert "no.json" in err
    (tmp_path / "bad.json").write_text("{}")
    code, _, err = plan("-c", tmp_path / "bad.json", "-m", 300)
    assert code == 1
    assert "Traceback" not in err


def test_profile_of_a_model_is_found_and_used_by_run(plan_json, profiles, profile, tiny_model, capsys, plan_file):
    model = tiny_model("qwen2")
    file = ModelFile.open(model)
    found = make_profile(
        [layer_bytes(layer) for layer in file.layers], [1e-3] * 4, head=layer_bytes(file.head), fixed=80 * MB
    )
    info = msgspec.structs.replace(found.model, path=str(model), hash=file.hash)
    save_profile(msgspec.structs.replace(found, model=info), profiles / "tiny.json")
    assert plan_json(model, "-m", 400)["model"] == str(model)
    plan_file.unlink()
    flags = ["run", str(model), "-p", "x", "-n", "3", "-m", "400", "--json", "-t", "1"]
    assert cli.run_command(flags) == 0
    assert json.loads(capsys.readouterr().out)["plan_origin"] == "profile"
    (profiles / "tiny.json").write_text(f'{{"schema": 9, "model": {{"hash": {file.hash}}}}}')
    assert cli.run_command(flags) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["plan_origin"] == "default"
    assert "the profile tiny.json was not used" in err


def test_plan_reaches_a_run(plan_json, profiles, tiny_model, capsys, plan_file):
    model = tiny_model("qwen2")
    written = write_plan(plan_file, Plan(2, 1, Layout.EVEN, model_hash=ModelFile.open(model).hash))
    assert cli.run_command(["run", str(model), "-p", "x", "-n", "2", "--json", "-t", "1"]) == 0
    shown = json.loads(capsys.readouterr().out)["plan"]
    assert replace(written, k=shown["k"], w=shown["w"], generation=shown["generation"]) == written
