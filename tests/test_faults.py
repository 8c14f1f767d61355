"""Disks that fail, files that change and signals that come while the model runs."""

import ctypes
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import broken_models
import numpy as np
import pytest
from broken_models import Tensor
from one_line import h2o, is_one_line

from runtime.errors import DiskError
from runtime.llama.model_file import ModelFile
from runtime.plans.file import write_plan
from runtime.plans.plan import Plan
from runtime.sizes import PAGE
from runtime.weights.files import BUFFERED, DIRECT, WeightFiles

ROOT = Path(__file__).resolve().parent.parent
FAULTY = [sys.executable, str(ROOT / "tests" / "faulty.py")]
SHAPE = "llama:layers=6,dim=256,ffn=512,heads=4,kv_heads=2,vocab=512,ctx=4096,tied=0"
LONG = ["-p", "Once upon a time", "-n", "4000", "--temp", "0", "-t", "1", "--ctx", "4096"]
SOON_S = 4  # two seconds, and as much again for a machine that is busy


@pytest.fixture(scope="module")
def model(tiny_model):
    return tiny_model(SHAPE)


@pytest.fixture
def streaming(model, tmp_path):
    """Arguments of a long run that streams all layers through a window of one."""
    plan = tmp_path / "plan.bin"
    write_plan(plan, Plan(0, 1, model_hash=ModelFile.open(model).hash))
    return ["run", str(model), *LONG, "-s", str(plan)]


@pytest.fixture
def start():
    """start(faults, *arguments): the command on a faulty disk."""
    started = []

    def call(faults, *arguments):
        command = [*FAULTY, faults, *map(str, arguments)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(command, cwd=ROOT, **pipes))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.communicate()


def end(process, timeout=120):
    """(exit code, stdout, stderr) of a process."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out.decode(errors="replace"), err.decode(errors="replace")


def text_of(process, n_bytes=8):
    """The first bytes of the answer, when they are there."""
    deadline, data = time.monotonic() + 60, b""
    while len(data) < n_bytes and time.monotonic() < deadline:
        if select.select([process.stdout], [], [], 1)[0]:
            part = os.read(process.stdout.fileno(), n_bytes)
            if not part:
                break
            data += part
    return data


def is_disk_error(answer, *parts):
    """Whether a run ended with one line about the disk; returns the text before it."""
    code, out, err = answer
    assert is_one_line((code, "", err), *parts)
    return out


# --- reads that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reads", "fault", "words"),
    [(0, "error", "Input/output error"), (3, "short", "became shorter"), (20, "error", "Input/output error")],
)
def test_a_disk_that_fails_before_the_answer(reads, fault, words, streaming, start):
    answer = end(start(f"after={reads},fault={fault}", *streaming))
    assert is_disk_error(answer, words, "next: ") == ""


@pytest.mark.parametrize(("fault", "words"), [("error", "Input/output error"), ("short", "became shorter")])
def test_text_so_far_stays_when_the_disk_fails(fault, words, streaming, start):
    short = [*streaming[:4], "-n", "8", *streaming[6:]]
    whole = end(start("", *short))
    assert whole[0] == 0
    text = is_disk_error(end(start(f"after=500,fault={fault}", *streaming)), words)
    assert len(text) > 1
    assert text.endswith("\n")
    n = min(len(text), len(whole[1])) - 1
    assert text[:n] == whole[1][:n]


def test_json_of_a_run_that_failed_is_no_object(streaming, start):
    code, out, err = end(start("after=500", *streaming, "--json"))
    assert is_one_line((code, out, err), "Input/output error")


@pytest.mark.parametrize("command", ["profile", "inspect"])
def test_other_commands_on_a_disk_that_fails(command, model, tmp_path, start):
    more = ["-o", tmp_path / "p.json"] if command == "profile" else []
    assert is_one_line(end(start("after=0", command, model, *more)), "Input/output error")
    assert not (tmp_path / "p.json").exists()


# --- files that change ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_model(model, tmp_path):
    """A copy of the model that a test may change."""
    path = tmp_path / "own.gguf"
    shutil.copy(model, path)
    return path


def test_a_file_that_becomes_shorter_while_it_is_read(own_model, streaming, start):
    process = start("slow=0.001", "run", own_model, *streaming[2:])
    assert text_of(process)
    os.truncate(own_model, own_model.stat().st_size // 3)
    is_disk_error(end(process), "while it was", own_model)


def test_a_file_that_is_replaced_or_removed_is_read_to_the_end(own_model, tmp_path, streaming, start):
    arguments = ["run", own_model, *streaming[2:4], "-n", "40", *streaming[6:], "--json"]
    expected = json.loads(end(start("", *arguments))[1])["tokens"]
    process = start("slow=0.002", *arguments)
    time.sleep(1.5)
    (tmp_path / "other.gguf").write_bytes(b"GGUF" + bytes(10**6))
    os.replace(tmp_path / "other.gguf", own_model)
    code, out, err = end(process)
    if code == 0:
        assert json.loads(out)["tokens"] == expected
    else:  # it was not open yet
        assert is_one_line((code, out, err))


def test_a_file_that_is_written_over_while_it_is_read(own_model, streaming, start):
    process = start("slow=0.001", "run", own_model, *streaming[2:])
    assert text_of(process)
    with own_model.open("r+b") as file:
        file.seek(own_model.stat().st_size // 2)
        file.write(bytes(4096))
    is_disk_error(end(process), "was changed while it was in use", own_model)


@pytest.mark.parametrize("mode", [DIRECT, BUFFERED])
def test_a_file_that_changes_between_index_and_reading(mode, own_model):
    file = ModelFile.open(own_model)
    with own_model.open("ab") as more:
        more.write(b"x")
    with pytest.raises(DiskError, match="changed while it was opened"):
        WeightFiles(file.paths, mode, file.file_sizes)
    os.truncate(own_model, file.file_sizes[0])
    WeightFiles(file.paths, mode, file.file_sizes).close()


def test_files_of_which_one_is_missing_leave_none_open(own_model):
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(DiskError, match="No such file"):
        WeightFiles([own_model, own_model.with_name("missing")])
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("mode", [DIRECT, BUFFERED])
def test_reading_behind_a_new_end(mode, own_model):
    files = WeightFiles([own_model], mode)
    memory = ctypes.create_string_buffer(3 * 4096)
    address = -(-ctypes.addressof(memory) // 4096) * 4096
    for size in (4096, 4096 + 1000):
        os.truncate(own_model, size)
        with pytest.raises(DiskError, match="became shorter"):
            files.read(0, 4096, address, 4096)
    files.close()


@pytest.mark.parametrize("n_bytes", [4096, 5000, 8191, 8193])
def test_a_short_read_goes_on_at_a_page(n_bytes, own_model, monkeypatch):
    """Direct reads take no other offsets and addresses."""
    files, read = WeightFiles([own_model], DIRECT), os.preadv
    memory = ctypes.create_string_buffer(12 * PAGE)
    address = -(-ctypes.addressof(memory) // PAGE) * PAGE

    def odd(fd, parts, offset):
        assert offset % PAGE == 0
        got = read(fd, parts, offset)
        return min(got, max(n_bytes, PAGE))

    monkeypatch.setattr(os, "preadv", odd)
    files.read(0, PAGE, address, 10 * PAGE)
    assert ctypes.string_at(address, 10 * PAGE) == own_model.read_bytes()[PAGE : 11 * PAGE]
    files.close()


def test_numbers_that_end_in_the_middle_of_an_answer(tmp_path):
    """The embedding of a token the model chooses is NaN: the answer ends before the first wrong token."""
    whole = broken_models.valid_model()
    whole.tensors.append(Tensor("output.weight", (broken_models.DIM, broken_models.VOCAB)))
    arguments = ["-p", "a", "-n", "6", "--temp", "0", "-t", "1"]
    facts = json.loads(h2o("run", whole.write(tmp_path / "whole.gguf"), *arguments, "--json")[1])
    new = [token for token in facts["tokens"] if token not in facts["prompt_tokens"]]
    table = np.frombuffer(whole.tensor("token_embd.weight").content(), "<f4").reshape(broken_models.VOCAB, -1).copy()
    table[new[0]] = np.nan
    whole.change("token_embd.weight", data=table.tobytes())
    code, out, err = h2o("run", whole.write(tmp_path / "nan.gguf"), *arguments)
    assert is_one_line((code, "", err), "NaN")
    assert 0 < len(out) < len(facts["text"])
    assert out.endswith("\n")


# --- signals --------------------------------------------------------------------------------------------------------


def ends_soon(process, number):
    """Send a signal; (exit code, stdout, stderr) of the process, which has to end soon."""
    process.send_signal(number)
    start_s = time.monotonic()
    answer = end(process, timeout=30)
    assert time.monotonic() - start_s < SOON_S, answer
    assert answer[0] in (128 + number, -number), answer  # the latter before our handlers are there
    assert "Traceback" not in answer[2], answer
    return answer


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_an_answer_from_a_slow_disk(number, streaming, start):
    process = start("slow=0.003", *streaming)
    first = text_of(process)
    assert first
    _, _, err = ends_soon(process, number)
    assert " tokens, first " in err


@pytest.mark.parametrize(
    ("faults", "number"),
    [("slow=1", signal.SIGINT), ("after=12,fault=hang", signal.SIGTERM), ("after=0,fault=hang", signal.SIGINT)],
)
def test_a_signal_while_the_disk_keeps_the_run_waiting(faults, number, streaming, start):
    process = start(faults, *streaming)
    time.sleep(2)
    assert ends_soon(process, number)[1].strip() == ""


@pytest.mark.parametrize("command", ["profile", "inspect"])
def test_a_signal_while_the_disk_keeps_other_commands_waiting(command, model, tmp_path, start):
    more = ["-o", tmp_path / "p.json"] if command == "profile" else []
    process = start("after=0,fault=hang", command, model, *more)
    time.sleep(2)
    assert ends_soon(process, signal.SIGTERM)[1] == ""


@pytest.mark.parametrize("after_s", [0.3, 0.5, 0.8])
def test_a_signal_while_everything_is_loaded(after_s, streaming, start):
    process = start("", *streaming)
    time.sleep(after_s)
    ends_soon(process, signal.SIGTERM if after_s == 0.5 else signal.SIGINT)
