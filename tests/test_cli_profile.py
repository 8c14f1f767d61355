import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from h2o_cli.main import run_command
from h2o_cli.session import models
from planner.source.profile import load_foreign
from profiler import disk
from profiler.model_profile import load_profile

ROOT = Path(__file__).resolve().parent.parent
SOURCE = {"io_speed": 600, "layer_sizes": [28, 28], "t_compute": [36, 35], "t_release": [10, 9]}
LOG = """noise
prefetch index:blk.0, prefetch time:40.0 ms, layer size:28.5 MB, IO Speed:700.0 MB/s
compute index:blk.0 compute time:36.1 ms
release index:blk.0, release time:9.5 ms
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Profiles go to a folder of the test, and the search for the best way to read is short."""
    folder = tmp_path / "profiles"
    monkeypatch.setenv("H2O_PROFILES", str(folder))
    monkeypatch.setattr(disk, "SAMPLE_S", 0.02)
    return folder


def run(*arguments):
    return run_command(["profile", *map(str, arguments)])


def test_profile_is_kept_where_other_commands_find_it(tiny_model, elsewhere, capsys):
    path = tiny_model("llama")
    assert run(path, "--repeats", 1) == 0
    target = elsewhere / f"{path.stem}.json"
    profile = load_profile(target)
    assert models.find_profile(profile.model.hash) == target
    assert models.resolve_model(None) == path
    out, err = capsys.readouterr()
    for words in ("llama, 4 layers", "layer (mean)", "smallest budget: -m", "compute", "sets the pace"):
        assert words in out
    assert str(target) in err


def test_json_is_the_profile(tiny_model, tmp_path, capsys):
    assert run(tiny_model("llama"), "--repeats", 1, "-o", tmp_path / "p.json", "--json") == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out) == json.loads((tmp_path / "p.json").read_text())
    assert {"schema", "model", "device", "disk", "layers", "head", "embedding", "floor_bytes"} <= set(json.loads(out))


def test_four_key_profile_comes_in_and_goes_out_unchanged(tmp_path):
    (tmp_path / "in.json").write_text(json.dumps(SOURCE))
    assert run("--import", tmp_path / "in.json", "-o", tmp_path / "p.json") == 0
    assert run("--import", tmp_path / "p.json", "-o", tmp_path / "p.json", "--export", tmp_path / "out.json") == 0
    assert json.loads((tmp_path / "out.json").read_text()) == SOURCE


def test_log_comes_in(tmp_path, elsewhere):
    (tmp_path / "old.log").write_text(LOG)
    assert run("--import", tmp_path / "old.log") == 0
    assert load_profile(elsewhere / "old.json").layers[0].decode_compute_s.mean == pytest.approx(0.0361)


def test_export_after_measuring(tiny_model, tmp_path):
    shape = "llama:layers=2,dim=512,ffn=2048,heads=4,kv_heads=4,vocab=512,ctx=256"
    assert run(tiny_model(shape), "--repeats", 1, "-o", tmp_path / "p.json", "--export", tmp_path / "s.json") == 0
    assert len(load_foreign(tmp_path / "s.json").layers) == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere.gguf"], 1, "nowhere.gguf: No such file"),
        (["x.gguf", "-o", "/nowhere/p.json"], 2, "/nowhere/p.json cannot be written"),
        (["x.gguf", "--import", "y"], 2, "--import measures nothing"),
        (["--import", "nowhere.log"], 1, "cannot read nowhere.log"),
        (["x.gguf", "-m", "lots"], 2, "is not a size"),
        (["--repeats", "0"], 2, "--repeats"),
    ],
)
def test_wrong_use_is_one_line_and_a_next_step(tmp_path, monkeypatch, capsys, arguments, code, words):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == code
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_broken_import_is_refused(tmp_path, capsys):
    for text in ("{}", '{"schema": 9}', "nothing"):
        (tmp_path / "in").write_text(text)
        assert run("--import", tmp_path / "in", "-o", tmp_path / "p.json") == 1
        assert "next:" in capsys.readouterr().err
    assert not (tmp_path / "p.json").exists()


def test_too_small_a_budget_names_the_smallest(tiny_model, tmp_path, capsys):
    assert run(tiny_model("llama"), "-m", 20, "-o", tmp_path / "p.json") == 1
    assert "give at least -m" in capsys.readouterr().err


def test_ctrl_c_leaves_no_half_file(tiny_model, tmp_path):
    path, target = tiny_model("llama"), tmp_path / "out" / "p.json"
    target.parent.mkdir()
    command = [sys.executable, "-m", "h2o_cli.main", "profile", path, "--repeats", "100000", "-o", target]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env={**os.environ})
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    assert "Traceback" not in err
    assert list(target.parent.iterdir()) == []


def test_summary_of_an_imported_profile_has_no_empty_memory_lines(tmp_path, capsys):
    (tmp_path / "in.json").write_text(json.dumps(SOURCE))
    assert run("--import", tmp_path / "in.json", "-o", tmp_path / "p.json") == 0
    out = capsys.readouterr().out
    assert "smallest budget" not in out
    assert "disk 93.3 ms, compute 71.0 ms; the disk sets the pace" in out
