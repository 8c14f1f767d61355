import json
import os
import subprocess
import sys
from pathlib import Path

import broken_models
import pytest

from h2o_cli import main as cli
from h2o_cli.session import models
from runtime.errors import Cancelled, H2OError

ROOT = Path(__file__).resolve().parent.parent
H2O = [sys.executable, "-m", "h2o_cli.main"]


@pytest.fixture(autouse=True)
def own_plan_file(tmp_path, monkeypatch):
    """No test meets the plan file of the user who runs it."""
    path = tmp_path / "default-plan.bin"
    monkeypatch.setattr("h2o_cli.session.model.default_plan_path", lambda: path)
    return path


def h2o(*arguments):
    """Run a command in this process; returns its exit code."""
    return cli.run_command([str(argument) for argument in arguments])


def one_line(capsys, *parts):
    """The error told on standard error: one line and at most one `next:` line; nothing on standard output."""
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert len(lines) <= 2, err
    assert lines[0].startswith("h2o: ")
    assert all(line.startswith("  next: ") for line in lines[1:])
    for part in parts:
        assert part in err
    return err


# --- bad models -----------------------------------------------------------------------------------------------------


def test_missing_model(tmp_path, capsys):
    assert h2o("run", tmp_path / "no.gguf", "-p", "x") == 1
    one_line(capsys, "No such file", "next: ")


def test_folder_as_model(tmp_path, capsys):
    assert h2o("run", tmp_path, "-p", "x") == 1
    one_line(capsys, "is a directory")


@pytest.mark.parametrize(
    "name", ["zero_length", "random_bytes", "cut_in_data", "no_tokenizer_model", "missing_layer_tensor"]
)
def test_broken_model(name, tmp_path, capsys):
    path = broken_models.BROKEN[name](tmp_path)
    assert h2o("run", path, "-p", "x") == 1
    one_line(capsys, path.name)


def test_not_a_number(tmp_path, capsys):
    assert h2o("run", broken_models.BROKEN["weights_not_numbers"](tmp_path), "-p", "the") == 1
    one_line(capsys, "NaN")


def test_character_outside_the_vocabulary(tmp_path, capsys):
    assert h2o("run", broken_models.BROKEN["no_byte_tokens"](tmp_path), "-p", "the Tree") == 1
    one_line(capsys, "'T' (latin capital letter t)")


# --- prompts and flags ----------------------------------------------------------------------------------------------


def test_prompt_longer_than_the_context(tiny_model, capsys):
    assert h2o("run", tiny_model("qwen2"), "-p", "word " * 200, "--ctx", 64) == 1
    one_line(capsys, "tokens and the context takes 64", "--ctx")


def test_prompt_longer_than_the_model(tiny_model, capsys):
    assert h2o("run", tiny_model("qwen2"), "-p", "word " * 600) == 1
    one_line(capsys, "the context takes 512")


def test_more_positions_than_the_model_has(tiny_model, capsys):
    assert h2o("run", tiny_model("gpt2"), "-p", "a", "--ctx", 600) == 2
    one_line(capsys, "knows 512 positions")


def test_prompt_file_that_is_not_there(tmp_path, tiny_model, capsys):
    assert h2o("run", tiny_model("qwen2"), "-f", tmp_path / "no.txt") == 1
    one_line(capsys, "no.txt: No such file")
    assert h2o("run", tiny_model("qwen2"), "-f", tmp_path) == 1
    one_line(capsys, "Is a directory")


def test_empty_standard_input(tiny_model, capsys):
    assert h2o("run", tiny_model("qwen2")) == 1
    one_line(capsys, "standard input is empty")


def test_prompt_that_is_not_utf8(tmp_path, tiny_model, capsys):
    path = tmp_path / "p.txt"
    path.write_bytes(b"abc\xff\xfe def")
    assert h2o("run", tiny_model("qwen2"), "-f", path, "-n", 1, "--json") == 0
    out, err = capsys.readouterr()
    assert "not UTF-8 (byte 3)" in err
    assert len(err.splitlines()) == 1
    assert json.loads(out)["finish"] == "length"


@pytest.mark.parametrize(
    "flags",
    [
        ("-p", "a", "-f", "b"),
        ("-p", "a", "--temp", "-1"),
        ("-p", "a", "--top-p", "2"),
        ("-p", "a", "-m", "lots"),
        ("-p", "a", "-m", "0"),
        ("-p", "a", "-n", "-2"),
        ("-p", "a", "--ctx", "0"),
        ("-p", "a", "-t", "0"),
        ("-p", "a", "--layout", "round"),
        ("-p", "a", "--kv-type", "q1"),
        ("surplus", "-p", "a"),
    ],
    ids=" ".join,
)
def test_impossible_values(flags, tiny_model, capsys):
    assert h2o("run", tiny_model("qwen2"), *flags) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "next: " in err


@pytest.mark.parametrize(
    "arguments",
    [["run", "--no-such-flag"], ["run", "-n", "many"], ["nosuch"], ["plan", "--set"], ["bench", "x"]],
    ids=str,
)
def test_wrong_usage(arguments, capsys):
    assert h2o(*arguments) == 2
    assert "next: " in one_line(capsys)


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        ("rnu m.gguf", "did you mean run?"),
        ("halp", "did you mean help?"),
        ("chat m.gguf", "`h2o run MODEL` without a prompt is a conversation"),
        ("list", "models are files"),
        ("m.gguf -p hi", "did you mean `h2o run m.gguf`?"),
        ("zzz", "`h2o --help` lists the commands"),
        ("run -m m.gguf -p hi", "the model is an argument"),
        ("plan -m m.gguf", "the model is an argument"),
        ("run --model m.gguf", "the model is an argument"),
        ("run m.gguf -c 512", "use --ctx N"),
        ("run m.gguf --max-tokens 4", "use -n N"),
        ("run m.gguf --max-tokens=4", "use -n N"),
        ("run -hf owner/name -p hi", "h2o downloads nothing"),
        ("kv analyze -hf owner/name", "h2o downloads nothing"),
        ("run m.gguf -ngl 99", "h2o computes on the processor"),
        ("run m.gguf -cnv", "without a prompt is a conversation"),
        ("run m.gguf --top_k 4", "did you mean --top-k?"),
        ("run m.gguf --tmp 1", "did you mean --temp?"),
        ("run m.gguf --wrong", "`h2o run --help` lists the options"),
        ("run --hlep", "did you mean --help?"),
        ("plan --set 1,1 --kv-type q1", "choose one of f32, f16, q8_0"),
        ("run m.gguf --no-such", "`h2o run --help` lists the options"),
        ("bench kv --no-such", "`h2o bench kv --help` lists the options"),
        ("run -n many", "`h2o run --help` lists the options"),
    ],
)
def test_what_other_programs_call_it_is_answered(arguments, answer, capsys):
    assert h2o(*arguments.split()) == 2
    assert answer in one_line(capsys, "next: ")


def test_flags_of_other_programs_are_no_help_text_and_may_be_values(tiny_model, capsys):
    """-hf is not -h -f; and what stands behind -p is a prompt."""
    assert h2o("run", "--help") == 0
    assert "-hf" not in capsys.readouterr().out
    assert h2o("run", tiny_model("qwen2"), "-p", "-hf", "-n", 1) == 0


def test_help_is_a_command_too(capsys):
    assert h2o("help") == 0
    assert "Commands:" in capsys.readouterr().out
    assert h2o("help", "run") == 0
    assert "--repeat-penalty" in capsys.readouterr().out


def test_budget_below_the_floor_names_one_that_works(tiny_model):
    command = [*H2O, "run", str(tiny_model("qwen2")), "-p", "a", "-n", "2", "-m"]
    refused = subprocess.run([*command, "1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "1.0 MB is too small for this model" in refused.stderr
    smallest = refused.stderr.split("the smallest budget that works here is -m ")[1].split()[0]
    subprocess.run([*command, smallest], cwd=ROOT, capture_output=True, check=True)


# --- the funnel -----------------------------------------------------------------------------------------------------


def failing(error):
    def fail(_arguments):
        raise error

    return fail


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (H2OError("no luck", "try again"), 1, "h2o: no luck\n  next: try again\n"),
        (Cancelled(15), 143, ""),
        (KeyboardInterrupt(), 130, ""),
        (
            ZeroDivisionError("by\nzero"),
            1,
            "h2o: unexpected ZeroDivisionError: by zero\n  next: report this, with the output",
        ),
    ],
    ids=str,
)
def test_failures_become_a_line_and_a_code(error, code, said, monkeypatch, capsys):
    monkeypatch.delenv("H2O_DEBUG", raising=False)
    monkeypatch.setattr(cli, "_invoke", failing(error))
    assert h2o() == code
    assert capsys.readouterr().err.startswith(said)


def test_traceback_on_demand(monkeypatch):
    monkeypatch.setenv("H2O_DEBUG", "1")
    monkeypatch.setattr(cli, "_invoke", failing(ZeroDivisionError()))
    with pytest.raises(ZeroDivisionError):
        h2o()


def test_reader_that_goes_away(tiny_model):
    command = [*H2O, "run", str(tiny_model("qwen2")), "-p", "a", "-n", "400", "--temp", "0", "--ctx", "512"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.read(3)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(60) == 0
    assert "Traceback" not in err
    assert "Broken" not in err


def test_output_that_cannot_be_written(tiny_model):
    command = [*H2O, "run", str(tiny_model("qwen2")), "-p", "a", "-n", "2"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "h2o: cannot write the answer: No space left on device"
    assert len(done.stderr.splitlines()) == 2


# --- help and start-up ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["--help"], ["run ", "plan ", "Examples:", "h2o run model.gguf"]),
        (["run", "--help"], ["--repeat-penalty", "-m, --memory SIZE", "Examples:", "/help lists its commands"]),
        (["run", "-h"], ["H2O_MODEL"]),
        (["plan", "-h"], ["--set K,W", "--explain", "Examples:"]),
        (["bench", "make-model", "--help"], ["SHAPE", "Examples:", "h2o bench make-model llama-7b"]),
    ],
    ids=str,
)
def test_help(arguments, parts, capsys):
    assert h2o(*arguments) == 0
    out = capsys.readouterr().out
    for part in parts:
        assert part in out


def test_version(capsys):
    assert h2o("--version") == 0
    assert "llama_cpp_python 0.3.36" in capsys.readouterr().out


def imported_by(code):
    script = f"import sys; {code}; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_help_imports_no_model_code():
    code = "from h2o_cli.main import run_command; run_command(['--help'])"
    assert not {"llama_cpp", "numpy", "rich", "msgspec"} & imported_by(code)


def test_run_imports_no_planner():
    loaded = imported_by("import h2o_cli.cmd_run")
    assert not {"rich", "msgspec", "planner.choose", "profiler.model_profile", "platformdirs", "psutil"} & loaded


# --- which model ----------------------------------------------------------------------------------------------------


def test_which_model_is_meant(tmp_path, monkeypatch):
    assert models.resolve_model("a.gguf") == Path("a.gguf")
    monkeypatch.setenv("H2O_MODEL", "b.gguf")
    assert models.resolve_model(None) == Path("b.gguf")
    monkeypatch.delenv("H2O_MODEL")
    monkeypatch.setattr(models, "BUNDLED_MODEL", tmp_path / "bundled.gguf")
    with pytest.raises(H2OError, match="no model was named"):
        models.resolve_model(None)
    (tmp_path / "bundled.gguf").touch()
    assert models.resolve_model(None) == tmp_path / "bundled.gguf"
    last = tmp_path / "last \udcff.gguf"
    last.touch()
    models.remember_model(last)
    assert models.resolve_model(None) == last
    last.unlink()
    assert models.resolve_model(None) == tmp_path / "bundled.gguf"


def test_profiles_are_found_by_model(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "profiles_folder", lambda: tmp_path)
    for i, name in enumerate(("old", "new")):
        path = tmp_path / f"{name}.json"
        path.write_text('{"schema": 1, "model": {"path": "m", "hash": 77}}')
        os.utime(path, (i, i))
    (tmp_path / "other.json").write_text("{}")
    assert models.find_profile(77) == tmp_path / "new.json"
    assert models.find_profile(78) is None
    with pytest.raises(H2OError, match="there is no profile of m"):
        models.need_profile(78, "m")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["bench", "foo"], "there is no `h2o bench foo`"),
        (["bench", "--suite", "foo"], "there is no suite 'foo'"),
        (["kv", "analyze", "--select", "foo"], "--select foo is not possible"),
    ],
)
def test_what_is_wrong_is_named_as_it_was_typed(arguments, said, capsys):
    assert cli.run_command(arguments) == 2
    err = capsys.readouterr().err
    assert said in err and "choose one of " in err


def test_only_commands_that_have_a_flag_name_it(bundled_model, capsys, tmp_path):
    assert cli.run_command(["run", str(bundled_model), "-p", "a", "-m", "5", "-s", str(tmp_path / "plan")]) == 1
    assert "(a smaller --ctx or --ubatch lowers it)" in capsys.readouterr().err
    assert cli.run_command(["kv", "analyze", str(bundled_model), "-m", "5"]) == 1
    assert "lowers it" not in capsys.readouterr().err
