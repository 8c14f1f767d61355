"""Bad input of every kind ends in one clear line and a non-zero exit: no traceback, crash, hang or wrong token."""

import json
import os
import pty
import random
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import broken_models
import children
import pytest
from broken_models import INT32, UINT16, Tensor
from one_line import h2o, is_one_line
from terminals import ROOT

from runtime.errors import ModelError
from runtime.llama.model_file import ModelFile
from runtime.plans.file import encode_record, write_plan
from runtime.plans.plan import Plan

SHORT = ["-n", "3", "--temp", "0", "-t", "1"]
DECODES = {name for name, does in broken_models.LLAMA_CPP.items() if does == "decodes"} | {"no_byte_tokens"}
SAME_WEIGHTS = ("trailing_bytes", "key_not_utf8", "zero_context_length", "bos_out_of_range", "endless_chat_template")


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    return broken_models.valid_model().write(tmp_path_factory.mktemp("valid") / "valid.gguf")


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    """Every broken model: name -> path."""
    folder = tmp_path_factory.mktemp("broken")
    return {name: make(folder) for name, make in broken_models.BROKEN.items()}


# --- broken models --------------------------------------------------------------------------------------------------


def test_run_of_every_broken_model(broken):
    answers = children.commands(["run", path, "-p", "the cat", *SHORT] for path in broken.values())
    for name, answer in zip(broken, answers, strict=True):
        if name in DECODES:
            assert answer[0] == 0, (name, answer)
        else:
            assert is_one_line(answer), name


def test_inspect_and_plan_of_broken_models(broken):
    """inspect shows what the header says even where llama.cpp cannot open the model."""
    names = [*list(broken)[::4], "double_weights", "zero_layers", "split_file", "weights_not_numbers"]
    answers = children.commands(["inspect", broken[name]] for name in names)
    for name, (code, _, err) in zip(names, answers, strict=True):
        usable = name in DECODES or name in ("weights_not_numbers", "rope_base_not_a_number")
        assert (code, err) == (0, "") if usable else is_one_line((code, "", err)), (name, code, err)
    names = ("cut_in_data", "double_weights", "large_string", "five_dims", "no_architecture", "zero_layers")
    for answer in children.commands(["plan", broken[name], "-m", "500"] for name in names):
        assert is_one_line(answer)


def test_profile_of_broken_models(broken, tmp_path):
    names = ("cut_in_data", "double_weights", "half_norm", "zero_layers", "unsupported_architecture", "split_file")
    for answer in children.commands(["profile", broken[name], "-o", tmp_path / "p.json"] for name in names):
        assert is_one_line(answer)
    assert not (tmp_path / "p.json").exists()


def test_odd_models_that_can_be_used_give_the_same_tokens(broken, valid):
    paths = [valid, *(broken[name] for name in SAME_WEIGHTS)]
    answers = children.commands(["run", path, "-p", "the cat", *SHORT, "--json"] for path in paths)
    tokens = [json.loads(out)["tokens"] for _, out, _ in answers]
    assert len(tokens[0]) == 3
    assert tokens == [tokens[0]] * len(paths)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("zero_layers", ["llama.cpp cannot go on: llama-model.cpp:", "n_layer"]),
        ("duplicate_tokens", ["llama-vocab.cpp:", "token_to_id"]),
        ("split_file", ["part of a model in 3 files", "-00001-of-00003.gguf"]),
        ("double_weights", ["blk.0.attn_q.weight has type f64"]),
        ("half_norm", ["output_norm.weight has type f16"]),
        ("unsupported_architecture", ["unknown model architecture: 'notanarch'", "does not support it"]),
        ("weights_not_numbers", ["NaN", "download the model again"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_line_says_what_is_wrong(name, parts, broken):
    assert is_one_line(h2o("run", broken[name], "-p", "the", *SHORT), *parts)
    assert is_one_line(h2o("run", broken[name], "-p", "the", *SHORT, "--json"), *parts)


@pytest.mark.parametrize("name", ["zero_layers", "cut_in_data", "integer_weights"])
def test_a_conversation_with_a_broken_model(name, broken):
    terminal, own = pty.openpty()
    try:
        assert is_one_line(h2o("run", broken[name], stdin=own))
    finally:
        os.close(terminal)
        os.close(own)


def test_an_exception_of_the_library_ends_in_one_line(broken):
    """llama_tokenize throws where a vocabulary has no bytes; nothing on the way to it catches C++ exceptions."""
    script = (
        "from runtime.llama import abi; from runtime.llama.hollow import HollowModel;"
        "from runtime.llama.model_file import ModelFile; import ctypes, sys; print('so far');"
        "model = HollowModel(ModelFile.open(sys.argv[1])); out = (ctypes.c_int32 * 64)();"
        "vocab = abi.llama.llama_model_get_vocab(model.pointer);"
        "abi.llama.llama_tokenize(vocab, b'Z\\xc3\\xbcrich', 7, out, 64, True, False); print('never')"
    )
    command = [sys.executable, "-c", script, str(broken["no_byte_tokens"])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert is_one_line((done.returncode, "", done.stderr), "llama.cpp cannot go on")
    assert done.stdout == "so far\n"


@pytest.mark.parametrize(
    ("function", "code"),
    [
        ("ctypes.CDLL('libstdc++.so.6')._ZSt9terminatev", -signal.SIGABRT),
        ("abi.ggml_base.ggml_backend_sched_get_n_backends", -signal.SIGABRT),
        ("abi.ggml_base.gguf_init_from_file", 0),
    ],
    ids=["terminate", "abort", "log"],
)
def test_what_goes_wrong_after_the_end_of_python_calls_nothing_of_it(function, code):
    """An exception, a scheduler that is none, a file that is not there: functions of Python are gone by then."""
    script = (
        "import ctypes; from runtime.llama import abi; libc = ctypes.CDLL(None); print('so far');"
        f"libc.__cxa_atexit(ctypes.cast({function}, ctypes.c_void_p), None, None)"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (code, "so far\n"), done.stderr


# --- weight types ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("type_id", "type_name", "bytes_per_row"), [(24, "i8", 64), (25, "i16", 128), (26, "i32", 256), (27, "i64", 512)]
)
def test_integers_are_no_weights(type_id, type_name, bytes_per_row, tmp_path):
    model = broken_models.valid_model()
    model.change(broken_models.K, kind=type_id, data=bytes(32 * bytes_per_row))
    with pytest.raises(ModelError, match=rf"blk\.1\.attn_k\.weight has type {type_name}"):
        ModelFile.open(model.write(tmp_path / "m.gguf"))


def test_tables_of_integers_are_accepted(tmp_path):
    model = broken_models.valid_model()
    model.tensors.append(Tensor("blk.0.ffn_gate_tid2eid.weight", (4, 8), kind=broken_models.I32))
    model.tensors.append(Tensor("d2t", (8,), kind=27, data=bytes(64)))
    assert ModelFile.open(model.write(tmp_path / "m.gguf")).n_layers == 2


@pytest.mark.parametrize("name", ["blk.0.attn_norm.weight", "blk.1.attn_q.bias", "blk.0.attn_q_norm.weight"])
def test_norms_and_biases_are_f32(name, tmp_path):
    model = broken_models.valid_model()
    model.tensors = [tensor for tensor in model.tensors if tensor.name != name]
    model.tensors.append(Tensor(name, (64,), kind=broken_models.F16))
    with pytest.raises(ModelError, match="has type f16"):
        ModelFile.open(model.write(tmp_path / "m.gguf"))


# --- paths ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def wrong_paths(tmp_path):
    """Paths that are no model, and what is said of them."""
    os.mkfifo(tmp_path / "fifo.gguf")
    (tmp_path / "loop.gguf").symlink_to(tmp_path / "loop.gguf")
    (tmp_path / "a\nb.gguf").write_bytes(b"GGML" * 100)
    return {
        tmp_path / "no.gguf": "No such file",
        tmp_path / "no" / "no.gguf": "No such file",
        tmp_path: "is a directory",
        tmp_path / "fifo.gguf": "not a regular file",
        Path("/dev/zero"): "not a regular file",
        Path("/dev/stdin"): "not a regular file",
        tmp_path / "loop.gguf": "symbolic links",
        tmp_path / "a\nb.gguf": "not a GGUF file",
        Path(__file__): "not a GGUF file",
    }


def test_paths_that_are_no_model(wrong_paths):
    cases = [["run", path, "-p", "x"] for path in wrong_paths]
    for command in ("inspect", "profile", "plan"):
        cases += [[command, path] for path in wrong_paths]
    said = list(wrong_paths.values()) * 4
    for words, answer in zip(said, children.commands(cases), strict=True):
        assert is_one_line(answer, words)
    assert is_one_line(h2o("run", "x" * 300, "-p", "x"), "File name too long")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_model(valid, tmp_path):
    path = tmp_path / "secret.gguf"
    path.write_bytes(valid.read_bytes())
    path.chmod(0)
    assert is_one_line(h2o("run", path, "-p", "x"), "Permission denied")


# --- models in several files ----------------------------------------------------------------------------------------


def write_parts(folder, n_parts=2, *, numbers=(0, 1), told=2):
    """The valid model in two files named as n_parts; returns the first."""
    whole = broken_models.valid_model()
    for i in range(2):
        part = whole if i == 0 else broken_models.Gguf()
        rest, half = whole.tensors[10:], whole.tensors[:10]
        part = broken_models.Gguf(list(whole.keys) if i == 0 else [], half if i == 0 else rest)
        part.set("split.no", UINT16, numbers[i]).set("split.count", UINT16, told)
        part.set("split.tensors.count", INT32, len(whole.tensors))
        part.write(folder / f"m-{i + 1:05d}-of-{n_parts:05d}.gguf")
    return folder / f"m-00001-of-{n_parts:05d}.gguf"


def test_a_model_in_two_files_is_the_same_model(valid, tmp_path):
    first = write_parts(tmp_path)
    second = tmp_path / "m-00002-of-00002.gguf"
    answers = children.commands(["run", path, "-p", "the cat", *SHORT, "--json"] for path in (valid, first, second))
    assert len({tuple(json.loads(out)["tokens"]) for _, out, _ in answers}) == 1


def test_models_whose_parts_do_not_fit(tmp_path):
    folders = [tmp_path / name for name in ("missing", "named", "told", "order", "twice")]
    for folder in folders:
        folder.mkdir()
    missing, named, told, order, twice = folders
    paths = {
        write_parts(missing): "part 2 of 2 is missing",
        write_parts(named, 3): "part 3 of 3 is missing",
        write_parts(told, told=5): "named as one of 2 files, and its header tells of 5",
        write_parts(order, numbers=(0, 0)): "cannot be loaded",
        write_parts(twice): "there twice",
    }
    (missing / "m-00002-of-00002.gguf").unlink()
    (twice / "m-00002-of-00002.gguf").write_bytes((twice / "m-00001-of-00002.gguf").read_bytes())
    answers = children.commands(["run", path, "-p", "x", *SHORT] for path in paths)
    for words, answer in zip(paths.values(), answers, strict=True):
        assert is_one_line(answer, words)


# --- flags and prompts ----------------------------------------------------------------------------------------------


def test_flags_that_are_wrong_usage(tiny_model):
    flags = """-t 0|-t -1|-t 100000000|-m 0|-m -5|-m abc|-m 1TB|--kv-type nonsense|--ctx 0|--ctx -1|--ubatch 0|-n -2
        --seed -1|--temp nan|--top-p nan|--repeat-penalty 0|--min-p 7|--layout round|--ctx 99999999999999999999"""
    wrong = [flag.split() for flag in flags.replace("\n", "|").split("|")] + [["-m", "9" * 400]]
    answers = children.commands(["run", tiny_model("qwen2"), "-p", "a", *flag] for flag in wrong)
    for flag, answer in zip(wrong, answers, strict=True):
        assert is_one_line(answer, flag[1][:9], code=2), flag


def test_values_that_cannot_work(tiny_model):
    model = tiny_model("qwen2")
    assert is_one_line(h2o("run", model, "-p", "a", *SHORT, "-m", 1), "the smallest budget that works here is -m")
    code, out, err = h2o("run", model, "-p", "a", *SHORT, "--ctx", 2**31 - 1)
    assert (code, out) == (1, "")
    assert "a context of 2147483647 tokens takes more than" in err and "lower --ctx" in err


def test_unknown_flags_are_wrong_usage(tiny_model):
    for arguments in (["run", tiny_model("qwen2"), "--nonsense"], ["plan", "--nonsense"], ["nonsense"]):
        code, out, err = h2o(*arguments)
        assert (code, out) == (2, "")
        assert "h2o: there is no " in err and "next: " in err and "Traceback" not in err


def test_extreme_values_that_work(tiny_model):
    model = tiny_model("qwen2")
    odd = [["-n", "0"], ["-n", "99999999999999999999"], ["--ubatch", "1000000"], ["--top-k", "99999999999999"]]
    odd += [["-m", "1000GB"], ["-t", "64"], ["--stop", ""], ["--ctx", "513"]]
    for flag, answer in zip(odd, children.commands(["run", model, "-p", "a", *SHORT, *f] for f in odd), strict=True):
        assert answer[0] == 0, (flag, answer)


def test_prompts(tiny_model):
    model = tiny_model("qwen2")
    noise = random.Random(0).randbytes(60)
    assert h2o("run", model, *SHORT, input=noise)[0] == 0
    assert h2o("run", model, *SHORT, input=b"\x00\x00abc")[0] == 0
    assert h2o("run", model, *SHORT, "-p", "\x01\x1b[2J")[0] == 0
    assert is_one_line(h2o("run", model, *SHORT, input=b""), "standard input is empty")
    assert is_one_line(h2o("run", model, *SHORT, "-p", ""), "prompt is empty")
    assert is_one_line(h2o("run", model, *SHORT, "-p", "w " * 3000), "the context takes 512")
    assert is_one_line(h2o("run", model, *SHORT, "-f", "/dev/zero"), "longer than")


# --- plans ----------------------------------------------------------------------------------------------------------


def plan_files(folder, model_hash):
    """Plan files that cannot be used by a model of 4 layers: path -> what is said."""
    record = encode_record(Plan(1, 1, model_hash=model_hash, generation=1), 2)
    contents = {
        "torn": (record[:40] + b"\xff" * 8 + record[48:], "half a plan"),
        "short": (record[:20], "cut short"),
        "empty": (b"", "cut short"),
        "foreign": (b"a text of somebody's " * 9, "not a plan file"),
        "negative": (struct.pack("=ii", -1, -1), "is not a plan"),
        "deep": (struct.pack("=ii", 5, 1), "no plan for 4 layers"),
        "wide": (struct.pack("=ii", 2**31 - 1, 2**31 - 1), "no plan for 4 layers"),
        "other": (encode_record(Plan(1, 1, model_hash=model_hash ^ 1, generation=1), 2), "for another model"),
    }
    said = {folder: "not a regular file", Path("/dev/zero"): "not a regular file"}
    for name, (data, words) in contents.items():
        path = folder / f"{name}.bin"
        path.write_bytes(data)
        path.chmod(0o600)
        said[path] = words
    good = folder / "good.bin"
    write_plan(good, Plan(1, 1, model_hash=model_hash))
    for name, words in {"link": "symbolic link", "fifo": "not a regular file", "open": "written by other"}.items():
        said[folder / name] = words
    (folder / "link").symlink_to(good)
    os.mkfifo(folder / "fifo")
    (folder / "open").write_bytes(good.read_bytes())
    (folder / "open").chmod(0o666)
    if os.geteuid() == 0:
        (folder / "theirs").write_bytes(good.read_bytes())
        os.chown(folder / "theirs", 12345, 12345)
        said[folder / "theirs"] = "belongs to another user"
    return said


def test_plan_files_that_cannot_be_used(tiny_model, tmp_path):
    model = tiny_model("qwen2")
    said = plan_files(tmp_path, ModelFile.open(model).hash)
    answers = children.commands(["run", model, "-p", "a", *SHORT, "-s", path] for path in said)
    for path, answer in zip(said, answers, strict=True):
        assert is_one_line(answer, said[path]), path
    good = children.commands([["run", model, "-p", "a", *SHORT, "-s", tmp_path / "good.bin"]])
    assert good[0][0] == 0


def test_plans_are_not_written_where_something_else_is(tiny_model, tmp_path):
    profile = tmp_path / "p.json"
    assert h2o("profile", tiny_model("qwen2"), "--repeats", 1, "-o", profile)[0] == 0
    said = plan_files(tmp_path, ModelFile.open(tiny_model("qwen2")).hash)
    kept = {path: words for path, words in said.items() if path.suffix != ".bin" and path != tmp_path}
    kept |= {
        tmp_path: "Is a directory",
        tmp_path / "no" / "plan.bin": "folder",
        tmp_path / "foreign.bin": "left alone",
        Path("/proc/x"): "/proc/x",
    }
    answers = children.commands(["plan", "-c", profile, "-m", "500", "-s", path] for path in kept)
    for words, answer in zip(kept.values(), answers, strict=True):
        assert is_one_line(answer, words)
    for flags, code in (["--set", "99,1"], 2), (["--set", "1,99"], 2), (["--set", "x"], 2), (["-m", "1"], 1):
        assert is_one_line(h2o("plan", "-c", profile, "-s", tmp_path / "new.bin", *flags), code=code)


def test_profiles_that_cannot_be_used(tmp_path):
    texts = [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"schema": 1}', b'{"schema": 99}', b"[" * 100_000, b"{}" * 9]
    paths = [tmp_path / f"{i}.json" for i in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_bytes(text)
    os.mkfifo(tmp_path / "fifo")
    paths += [tmp_path, tmp_path / "no.json", tmp_path / "fifo", Path("/dev/zero")]
    cases = [["plan", "-m", "500", "-c", path] for path in paths]
    cases += [["profile", "--import", path, "-o", tmp_path / "new.json"] for path in paths]
    for answer in children.commands(cases):
        assert is_one_line(answer)


# --- where the output goes ------------------------------------------------------------------------------------------


def test_output_that_cannot_be_written(tiny_model, tmp_path):
    model = tiny_model("qwen2")
    answer = ["run", model, "-p", "a", *SHORT]
    assert is_one_line(h2o(*answer, shell="H2O > /dev/full"), "No space left")
    assert is_one_line(h2o(*answer, "--json", shell="H2O > /dev/full"), "No space left")
    assert is_one_line(h2o("inspect", model, shell="H2O > /dev/full"), "No space left")
    assert h2o(*answer, shell="H2O >&-")[0] == 0
    full = h2o(*answer)
    assert full[0] == 0
    for shell in ("H2O 2>&-", "H2O 2> /dev/full"):
        assert h2o(*answer, shell=shell) == (0, full[1], "")
    for arguments in (["run", model, "-p", "a", "-n", "400", "--temp", "0"], ["inspect", model]):
        assert h2o(*arguments, shell="set -o pipefail; H2O | head -c 1")[::2] == (0, "")
    profile = ["profile", model, "--repeats", 1, "-o"]
    for path in (tmp_path, "/dev/full", "/proc/p.json", tmp_path / "no" / "p.json"):
        assert is_one_line(h2o(*profile, path), code=2)
    assert Path("/dev/full").is_char_device()


@pytest.fixture
def mounted(tmp_path):
    """mounted(options): the folder of a small file system of its own; skips where nothing can be mounted."""
    folders = []

    def mount(options):
        folder = tmp_path / f"disk{len(folders)}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("nothing can be mounted here")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_and_read_only_disks(tiny_model, tmp_path, mounted):
    model, profile = tiny_model("qwen2"), tmp_path / "p.json"
    assert h2o("profile", model, "--repeats", 1, "-o", profile)[0] == 0
    full, fixed = mounted("size=8k"), mounted("ro")
    with (full / "x").open("wb", buffering=0) as file:
        file.write(bytes(8192))
    for folder, words, code in (full, "No space left", 1), (fixed, "Read-only", 2):
        assert is_one_line(h2o("plan", "-c", profile, "-m", 500, "-s", folder / "plan.bin"), words)
        assert is_one_line(h2o("profile", model, "--repeats", 1, "-o", folder / "p.json"), words, code=code)
    assert not (full / "p.json").exists()


def test_little_address_space(tiny_model):
    answer = ["run", tiny_model("qwen2"), "-p", "a", *SHORT]
    for kib in (60_000, 250_000):
        assert is_one_line(h2o(*answer, shell=f"ulimit -v {kib}; H2O"), "address space", "ulimit -v")
    assert h2o(*answer, shell="ulimit -v 1000000; H2O")[0] == 0
