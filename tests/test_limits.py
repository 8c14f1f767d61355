"""Limits of the system that are met half-way: one line that names the limit, and nothing left behind."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from engines import engine
from one_line import is_one_line
from test_engine import what_is_open

from h2o_cli import main as cli
from runtime.answer.drafters import DraftModel
from runtime.answer.plan_stats import StatsWriter
from runtime.errors import DiskError, EngineError, H2OError, UsageError
from runtime.kv.options import KvFilter
from runtime.llama import hollow
from runtime.llama.hollow import HollowModel
from runtime.llama.model_file import ModelFile
from runtime.plans.plan import Plan
from runtime.plans.stats import stats_path
from runtime.settings import Settings

ROOT = Path(__file__).resolve().parent.parent
RUN = [sys.executable, "-m", "h2o_cli.start", "run"]


def limited(model, kind, most, *before):
    """A run with a limit of the process: (exit code, stdout, stderr)."""
    command = [*before, *RUN, str(model), "-p", "Once", "-n", "3", "-t", "1"]

    def limit():
        resource.setrlimit(kind, (most, most))

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=limit, timeout=60, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("most", [5, 6, 7, 8])
def test_few_open_files(most, bundled_model):
    code, out, err = limited(bundled_model, resource.RLIMIT_NOFILE, most)
    if code:
        whole = out.endswith("\n")  # the answer was there, only its figures could not be read any more
        assert is_one_line((code, "" if whole else out, err), "ulimit -n")


def test_a_file_size_below_the_models(bundled_model):
    assert is_one_line(limited(bundled_model, resource.RLIMIT_FSIZE, 10**6), "ulimit -f")


def test_little_memory_for_data_is_no_damaged_model(bundled_model):
    code, out, err = limited(bundled_model, resource.RLIMIT_DATA, 60_000 * 1024)
    assert is_one_line((code, out, err), "ulimit -d")
    assert "download" not in err


def test_a_system_without_proc_is_no_damaged_model(bundled_model):
    hide = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs none /proc && exec "$@"', "sh"]
    if os.getuid() or subprocess.run([*hide, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespaces here")
    code, out, err = limited(bundled_model, resource.RLIMIT_CORE, 0, *hide)
    assert is_one_line((code, out, err), "/proc")
    assert "download" not in err


def test_a_system_without_threads(monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("h2o_cli.main._invoke", refuse)
    assert cli.run_command([]) == 1
    assert "ulimit -u" in capsys.readouterr().err


def test_counts_that_no_context_has():
    for value in (2**31, 2**62):
        with pytest.raises(UsageError, match="--kv-block"):
            KvFilter(block=value)


# --- opening that fails half-way ------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["memfd_create", "ftruncate", "write"])
def test_a_header_that_cannot_be_copied_leaves_nothing_open(part, bundled_model, monkeypatch):
    file = ModelFile.open(bundled_model)
    before = what_is_open()

    def fail(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(hollow.os, part, fail)
        with pytest.raises(EngineError, match="ulimit -n"):
            HollowModel(file)
    assert what_is_open() == before


def test_a_header_is_copied_whole_where_writes_are_short(bundled_model, monkeypatch):
    file, write = ModelFile.open(bundled_model), os.write
    monkeypatch.setattr(hollow.os, "write", lambda fd, data: write(fd, data[:5000]))
    HollowModel(file).free()


def test_a_header_that_became_shorter(bundled_model, tmp_path):
    path = tmp_path / "cut.gguf"
    path.write_bytes(bundled_model.read_bytes())
    file = ModelFile.open(path)
    os.truncate(path, 5000)
    before = what_is_open()
    with pytest.raises(DiskError, match="became shorter"):
        HollowModel(file)
    assert what_is_open() == before


def test_a_model_that_cannot_be_loaded_gives_its_address_space_back(bundled_model, monkeypatch):
    file = ModelFile.open(bundled_model)
    before = what_is_open()
    error = EngineError("the system gave no address space")
    monkeypatch.setattr(hollow.Region, "forbid", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(EngineError, match="address space"):
        HollowModel(file)
    monkeypatch.setattr(hollow, "Region", lambda _: (_ for _ in ()).throw(error))
    with pytest.raises(EngineError, match="address space"):
        HollowModel(file)
    assert what_is_open() == before


def test_a_context_without_address_space_says_so(tiny_model, monkeypatch):
    model = HollowModel(ModelFile.open(tiny_model("llama")))
    model.free()
    before = what_is_open()
    error = EngineError("the system gave no address space")
    real = hollow.ContextBuffers._alloc_buffer
    region = hollow.Region

    def without(self, buffer_type, n_bytes):
        with monkeypatch.context() as patch:
            patch.setattr(hollow, "Region", lambda _: (_ for _ in ()).throw(error))
            return real(self, buffer_type, n_bytes)

    monkeypatch.setattr(hollow.ContextBuffers, "_alloc_buffer", without)
    with pytest.raises(EngineError, match="address space"), engine(tiny_model("llama"), Plan(0, 1)):
        pass
    assert region is hollow.Region
    assert what_is_open() == before


@pytest.mark.parametrize(
    "broken",
    [
        "runtime.engine.engine.WeightsGuest",
        "runtime.weights.head_start.SmallTensors",
        "runtime.weights.files.WeightFiles.read",
    ],
)
def test_a_draft_model_that_cannot_be_opened_leaves_nothing_behind(broken, tiny_model, monkeypatch):
    file = ModelFile.open(tiny_model("llama"))
    DraftModel(file, Settings()).close()
    before = what_is_open()

    def fail(*_, **__):
        raise DiskError("the disk is gone")

    monkeypatch.setattr(broken, fail)
    with pytest.raises(H2OError):
        DraftModel(file, Settings())
    assert what_is_open() == before


@pytest.mark.parametrize("broken", ["Compact", "PromptSlot", "Jobs", "Buffers"])
def test_a_filter_that_cannot_be_opened_leaves_nothing_behind(broken, tiny_model, tmp_path, monkeypatch):
    kv = KvFilter(layers=(1,), wait=1, store="disk", folder=str(tmp_path))
    path = tiny_model("llama")
    with engine(path, Plan(0, 1), kv=kv):
        pass
    before = what_is_open()

    def fail(*_, **__):
        raise EngineError("no more of that")

    monkeypatch.setattr(f"runtime.kv.sparse.{broken}", fail)
    with pytest.raises(EngineError), engine(path, Plan(0, 1), kv=kv):
        pass
    assert what_is_open() == before


def test_dense_attention_that_cannot_be_opened_leaves_no_threads(tiny_model, monkeypatch):
    kv = KvFilter(layers=(1,), wait=1)
    before = threading.active_count()

    def fail(*_, **__):
        raise EngineError("no more of that")

    monkeypatch.setattr("runtime.kv.filter.DenseAttention", fail)
    # fewer threads than cores: then scores are computed with one more thread
    with pytest.raises(EngineError), engine(tiny_model("llama"), Plan(0, 1), kv=kv, n_threads=1):
        pass
    assert threading.active_count() == before


# --- the end of a run -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", ["folder", "fifo", "symlink", "file of another"])
def test_a_statistics_file_that_was_replaced_is_left_alone(other, tiny_model, tmp_path):
    path = stats_path(tmp_path / "plan.bin")
    with engine(tiny_model("llama"), Plan(0, 1)) as opened:
        writer = StatsWriter(path, opened.file.hash, opened.notes.append)
        writer.publish(opened, 10**9, 1)
        assert path.exists()
        path.unlink()
        if other == "folder":
            path.mkdir()
        elif other == "fifo":
            os.mkfifo(path)
        elif other == "symlink":
            path.symlink_to(tmp_path / "elsewhere")
        else:
            path.write_bytes(b"x")
            path.chmod(0o666)
        writer.close()
        assert path.is_symlink() or path.exists()
