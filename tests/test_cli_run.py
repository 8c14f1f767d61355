"""`h2o run`: an answer, plans, signals."""

import json
import os
import signal
import subprocess
import time

import msgspec
import pytest
import reference
from terminals import H2O, ROOT, Terminal
from test_model_profile import make_profile

from h2o_cli import main as cli
from h2o_cli.session.models import remember_model
from profiler.model_profile import save_profile
from runtime.llama.model_file import ModelFile
from runtime.plans.file import write_plan, write_source_plan
from runtime.plans.plan import Layout, Plan

KEYS = {
    "text",
    "tokens",
    "prompt_tokens",
    "finish",
    "ttft_s",
    "ttft_process_s",
    "prefill_tokens_per_s",
    "decode_ms_per_token",
    "tokens_per_s",
    "bytes_read_per_token",
    "bytes_asked_per_token",
    "streamed_bytes",
    "disk_wait_ms_per_token",
    "peak_memory_bytes",
    "budget_bytes",
    "limit_ms_per_token",
    "yield",
    "plan",
    "plan_changes",
    "model",
    "threads",
    "versions",
}
PROMPT = "the old man and the sea"


@pytest.fixture(autouse=True)
def plan_file(tmp_path, monkeypatch):
    """The default plan file of these tests."""
    path = tmp_path / "default-plan.bin"
    monkeypatch.setattr("h2o_cli.session.model.default_plan_path", lambda: path)
    return path


@pytest.fixture
def run(capsys):
    """run(*arguments): exit code, standard output, standard error of `h2o run` in this process."""

    def call(*arguments):
        code = cli.run_command(["run", "-t", "1", *map(str, arguments)])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def run_json(run):
    """run_json(*arguments): the object of `h2o run --json`, and standard error."""

    def call(*arguments):
        code, out, err = run(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        return json.loads(out), err

    return call


# --- one prompt -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "file_type"), [("llama", "q8_0"), ("qwen2", "f16"), ("gemma2", "q4_0")])
def test_greedy_tokens_are_llama_cpps(arch, file_type, tiny_model, run_json):
    model = tiny_model(arch, file_type)
    same_shape = ("--speculate", "off") if file_type == "f16" else ()  # f16 rounds by the shape of a pass
    found, _ = run_json(model, "-p", PROMPT, "-n", 16, "--temp", 0, "--ctx", 256, *same_shape)
    n = len(found["prompt_tokens"])
    _, tokens = reference.reference_in_subprocess(model, PROMPT, 16, n_ctx=256, n_ubatch=n, n_threads=1)
    assert found["tokens"] == tokens
    assert found["finish"] == "length"


def test_trained_model_under_a_budget_tells_the_same_story(stories, run_json):
    model = stories("f32")
    prompt = "Once upon a time, there was a"
    _, tokens = reference.reference_in_subprocess(model, prompt, 40, n_ctx=256, n_ubatch=64, n_threads=1)
    found, _ = run_json(model, "-p", prompt, "-n", 40, "--temp", 0, "--ctx", 256, "--layout", "even")
    assert found["tokens"] == tokens
    assert found["text"].startswith(" little girl named Lily")


def test_json_has_every_key_of_the_contract(tiny_model, run_json):
    model = tiny_model("qwen2")
    found, err = run_json(model, "-p", PROMPT, "-n", 6, "--seed", 1, "-m", "500")
    assert found.keys() >= KEYS
    assert err == ""
    assert found["plan"].keys() == {"k", "w", "layout", "generation"}
    assert found["budget_bytes"] == 500_000_000
    assert found["model"] == str(model)
    assert (len(found["tokens"]), found["finish"]) == (6, "length")
    assert found["versions"]["llama_cpp_python"] == "0.3.36"
    assert 0 < found["yield"] <= 1.1
    assert found["ttft_process_s"] > found["ttft_s"] > 0
    assert found["prefill_tokens_per_s"] >= 0.99 * len(found["prompt_tokens"]) / found["ttft_s"]


def test_text_on_standard_output_figures_on_standard_error(tiny_model, run):
    model = tiny_model("qwen2")
    code, out, err = run(model, "-p", PROMPT, "-n", 5, "--temp", 0)
    same = run(model, "-p", PROMPT, "-n", 5, "--temp", 0, "--json")[1]
    assert code == 0
    assert out == json.loads(same)["text"] + "\n"
    assert err.startswith("h2o: 5 tokens, cut by -n, first ")
    assert len(err.splitlines()) <= 2
    assert "\x1b" not in err


def test_same_seed_same_answer(tiny_model, run_json):
    model = tiny_model("qwen2")
    flags = (model, "-p", PROMPT, "-n", 12, "--temp", 1.5, "--top-k", 0)
    first, second, other = (run_json(*flags, "--seed", seed)[0]["tokens"] for seed in (5, 5, 6))
    assert first == second != other


def test_stop_text_ends_the_answer(tiny_model, run_json):
    flags = (tiny_model("qwen2"), "-p", PROMPT, "-n", 16, "--temp", 0)
    whole = run_json(*flags)[0]["text"]
    found, _ = run_json(*flags, "--stop", "nowhere", "--stop", whole[4:7])
    assert (found["text"], found["finish"]) == (whole[: whole.index(whole[4:7])], "stop")


def test_prompt_from_file_and_standard_input(tiny_model, tmp_path, run_json):
    model = tiny_model("qwen2")
    (tmp_path / "p.txt").write_text(PROMPT + "\n")
    flags = (model, "-n", "4", "--temp", "0")
    wanted = run_json(*flags, "-p", PROMPT)[0]
    assert run_json(*flags, "-f", tmp_path / "p.txt")[0]["tokens"] == wanted["tokens"]
    for dash in ([], ["-"]):
        command = [*H2O, "run", *map(str, (flags[0], *dash, *flags[1:])), "--json"]
        done = subprocess.run(command, cwd=ROOT, input=PROMPT + "\n", capture_output=True, text=True, check=True)
        assert json.loads(done.stdout)["tokens"] == wanted["tokens"]


def test_no_tokens_and_no_limit(tiny_model, run_json):
    model = tiny_model("qwen2")
    found, _ = run_json(model, "-p", PROMPT, "-n", 0)
    assert (found["text"], found["tokens"], found["finish"]) == ("", [], "length")
    assert found["decode_ms_per_token"] is None
    found, _ = run_json(model, "-p", PROMPT, "-n", -1, "--temp", 0, "--ctx", 48)
    assert len(found["tokens"]) > 20 or found["finish"] == "eos"


def test_chat_uses_the_models_template(tiny_model, run_json):
    found, _ = run_json(tiny_model("qwen2"), "-p", "Hi", "-n", 2, "--chat")
    plain, _ = run_json(tiny_model("qwen2"), "-p", "Hi", "-n", 2)
    assert len(found["prompt_tokens"]) > len(plain["prompt_tokens"]) + 5


def test_smaller_precision_of_keys_and_values(tiny_model, run_json):
    found, _ = run_json(tiny_model("qwen2"), "-p", PROMPT, "-n", 4, "--kv-type", "q8_0", "--temp", 0)
    assert len(found["tokens"]) == 4


def test_context_beyond_the_model_is_told(tiny_model, run):
    code, _, err = run(tiny_model("qwen2"), "-p", "a", "-n", 1, "--ctx", 1024)
    assert code == 0
    assert "--ctx 1024 is more than the 512 tokens this model was made for" in err


def test_a_model_that_was_not_named_is_in_the_closing_line(tiny_model, run, monkeypatch):
    """H2O_MODEL comes first, then the model profiled last, then the one that comes with the program."""
    named, other = tiny_model("qwen2"), tiny_model("llama")
    assert "model " not in run(named, "-p", PROMPT, "-n", 2)[2]
    monkeypatch.setattr("h2o_cli.session.models.BUNDLED_MODEL", named)
    assert f"h2o: model {named.name}," in run("-p", PROMPT, "-n", 2)[2]
    remember_model(other)
    assert f"h2o: model {other.name}," in run("-p", PROMPT, "-n", 2)[2]
    monkeypatch.setenv("H2O_MODEL", str(named))
    assert f"h2o: model {named.name}," in run("-p", PROMPT, "-n", 2)[2]
    assert "H2O_MODEL, else the model profiled last" in " ".join(run("-h")[1].split())


# --- plans ----------------------------------------------------------------------------------------------------------


def test_plan_file_decides_when_it_is_for_this_model(tiny_model, run_json, plan_file):
    model = tiny_model("qwen2")
    flags = (model, "-p", PROMPT, "-n", 3, "--temp", 0)
    write_plan(plan_file, Plan(1, 2, Layout.EVEN, model_hash=ModelFile.open(model).hash))
    found, err = run_json(*flags)
    assert found["plan"] == {"k": 1, "w": 2, "layout": "even", "generation": 1}
    assert (found["plan_origin"], found["plan_changes"], err) == ("plan file", 0, "")
    assert run_json(*flags, "--layout", "prefix")[0]["plan"]["layout"] == "prefix"
    write_plan(plan_file, Plan(1, 2, budget_bytes=700_000_000))
    assert run_json(*flags)[0]["budget_bytes"] == 700_000_000
    assert run_json(*flags, "-m", "600")[0]["plan_origin"] == "default"


def test_m_is_a_cap_for_plans(tiny_model, run_json, plan_file):
    """In a named file a plan for less is followed and one for more is cut; the default file's is not for this run."""
    flags = (tiny_model("qwen2"), "-p", PROMPT, "-n", 3, "--temp", 0, "-m", "600")
    for budget, granted, said in ((700, 600, True), (500, 500, False)):
        write_plan(plan_file, Plan(0, 1, budget_bytes=budget * 10**6))
        found, err = run_json(*flags, "-s", plan_file)
        assert (found["budget_bytes"], found["plan_origin"]) == (granted * 10**6, "plan file")
        assert ("followed inside the 600.0 MB of -m" in err) is said
        found, err = run_json(*flags)
        assert (found["budget_bytes"], found["plan_origin"], err) == (600 * 10**6, "default", "")


@pytest.mark.parametrize(
    ("plan", "said"), [(Plan(9, 9), "is no plan for 4 layers"), (Plan(0, 1, budget_bytes=2**62), "is more than the")]
)
def test_absurd_plan_files(tiny_model, run, run_json, plan_file, plan, said):
    write_plan(plan_file, plan)
    flags = (tiny_model("qwen2"), "-p", PROMPT, "-n", 3)
    found, err = run_json(*flags)
    assert found["plan_origin"] == "default"
    assert f"the plan in {plan_file}: " in err and said in err
    code, out, err = run(*flags, "-s", plan_file)
    assert (code, out) == (1, "")
    assert said in err


def test_an_old_profile_with_buffered_reads_is_not_used(tiny_model, run, run_json, tmp_path, monkeypatch):
    from runtime.weights.files import has_direct_reads

    path = tiny_model("qwen2")
    file = ModelFile.open(path)
    if not has_direct_reads(file.paths):
        pytest.skip("this file system has no direct reads")
    old = make_profile([10**6] * file.n_layers, [0.001] * file.n_layers)
    disk = msgspec.structs.replace(old.disk, mode="buffered")
    old = msgspec.structs.replace(old, disk=disk, model=msgspec.structs.replace(old.model, hash=file.hash))
    save_profile(old, tmp_path / "old.json")
    monkeypatch.setenv("H2O_PROFILES", str(tmp_path))
    found, err = run_json(path, "-p", PROMPT, "-n", 3)
    assert found["plan_origin"] == "default"
    assert err.count("\n") == 1 and "old.json was not used: it was measured with buffered reads" in err
    assert cli.run_command(["plan", str(path), "-m", "600"]) == 1


def test_a_forgotten_plan_is_named_and_left_out(tiny_model, run, run_json, plan_file):
    """`h2o plan -m 10` of last week; also one by hand that does not fit what -m says now."""
    flags = (tiny_model("qwen2"), "-p", PROMPT, "-n", 3)
    write_plan(plan_file, Plan(0, 1, budget_bytes=10 * 10**6))
    found, err = run_json(*flags)
    assert (found["plan_origin"], len(found["tokens"])) == ("default", 3)
    assert found["budget_bytes"] > 100 * 10**6
    assert f"the plan in {plan_file} cannot be followed: 10.0 MB is too small" in err
    code, out, err = run(*flags, "-s", plan_file)
    assert (code, out) == (1, "")
    assert f"the plan in {plan_file} cannot be followed: 10.0 MB is too small" in err
    assert "the smallest budget that works" in err


def test_the_budget_is_decided_once(tiny_model, run_json, monkeypatch):
    answers = iter(range(500, 600))
    monkeypatch.setattr("runtime.plans.budget.default_bytes", lambda: next(answers) * 10**6)
    assert run_json(tiny_model("qwen2"), "-p", PROMPT, "-n", 3)[0]["budget_bytes"] == 500 * 10**6
    assert next(answers) == 501


def test_plan_for_another_model_is_left_alone(tiny_model, run_json, run, plan_file):
    flags = (tiny_model("qwen2"), "-p", PROMPT, "-n", 3)
    write_plan(plan_file, Plan(1, 1, model_hash=12345))
    found, err = run_json(*flags)
    assert (found["plan_origin"], found["plan_changes"], err) == ("default", 0, "")
    code, out, err = run(*flags, "-s", plan_file)
    assert (code, out) == (1, "")
    assert "is for another model" in err


def test_source_systems_plan_file(tiny_model, run_json, tmp_path):
    path = tmp_path / "kw.bin"
    write_source_plan(path, 2, 1)
    found, err = run_json(tiny_model("qwen2"), "-p", PROMPT, "-n", 3, "-s", path, "-m", 500)
    assert found["plan"] == {"k": 2, "w": 1, "layout": "prefix", "generation": 0}
    assert (found["plan_changes"], found["budget_bytes"], err) == (0, 500_000_000, "")


def test_plan_file_that_is_not_there_yet(tiny_model, run_json, tmp_path):
    found, err = run_json(tiny_model("qwen2"), "-p", PROMPT, "-n", 2, "-s", tmp_path / "later.bin")
    assert found["plan_origin"] == "default"
    assert "there is no plan file" in err


def test_what_is_said_of_plans_in_an_answer_has_lines_of_its_own(tiny_model, tmp_path):
    """On a terminal that shows both."""
    path = tmp_path / "plan.bin"
    terminal = Terminal(endless(tiny_model("gemma2"), "-s", str(path)))
    for said in ("will be followed\r\n", "was made for\r\n"):
        terminal.wait_for(said)
    terminal.wait_for_more()  # of the answer
    for plan, said in (
        (Plan(1, 1, model_hash=12345), "is for another model"),
        (Plan(9, 9), "is no plan for"),
        (Plan(0, 1, budget_bytes=10**7), "is too small"),
    ):
        write_plan(path, plan)
        terminal.wait_for(said)
    os.kill(terminal.pid, signal.SIGINT)
    assert terminal.exit_code() == 130
    lines = [line for line in terminal.seen.split("\n") if "h2o: " in line]
    assert len(lines) >= 5
    assert [line for line in lines if not line.startswith("h2o: ")] == []


# --- signals --------------------------------------------------------------------------------------------------------


def endless(model, *more):
    """The command of an answer that goes on for a long time."""
    return [*H2O, "run", str(model), "-p", PROMPT, "-n", "-1", "--temp", "0", "--ctx", "30000", "-t", "1", *more]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_in_an_answer_keeps_the_text(number, code, tiny_model):
    with subprocess.Popen(
        endless(tiny_model("gemma2")), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        start = process.stdout.read(5)
        process.send_signal(number)
        rest, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert len(start) == 5
    assert rest.endswith("\n")
    assert "tokens/s" in err
    assert "Traceback" not in err


def test_signal_with_json_prints_the_object(tiny_model):
    with subprocess.Popen(
        endless(tiny_model("gemma2"), "--json"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stderr.readline()  # the context is longer than the model's: said before the model answers
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert json.loads(out)["finish"] == "cancelled"


def test_signal_before_the_answer(tmp_path):
    fifo = tmp_path / "prompt"
    os.mkfifo(fifo)
    command = [*H2O, "run", "-f", str(fifo)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process, open(fifo, "w"):  # it waits for the prompt
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert "Traceback" not in err
