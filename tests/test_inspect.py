import json

import pytest
from broken_models import BROKEN

from h2o_cli import cmd_inspect
from h2o_cli.main import run_command
from h2o_cli.session import models
from runtime.errors import ModelError
from runtime.llama import model_file
from runtime.llama.model_file import ModelFile


@pytest.fixture(autouse=True)
def no_profiles(tmp_path, monkeypatch):
    folder = tmp_path / "profiles"
    folder.mkdir()
    monkeypatch.setattr(models, "profiles_folder", lambda: folder)
    return folder


def inspect(capsys, *arguments):
    code = run_command(["inspect", *map(str, arguments)])
    return code, *capsys.readouterr()


def test_text_names_layers_types_context_and_budget(tiny_model, capsys):
    code, out, _ = inspect(capsys, tiny_model("llama"))
    assert code == 0
    for words in ("(llama, ", "4 layers", "context 512", "vocabulary 512", "f16", "per token", "smallest budget: -m "):
        assert words in out


def test_json_adds_up(tiny_model, capsys):
    path = tiny_model("llama")
    code, out, _ = inspect(capsys, path, "--json")
    found = json.loads(out)
    file = ModelFile.open(path)
    assert code == 0
    assert found["architecture"] == "llama"
    assert found["hash"] == file.hash
    assert found["n_layers"] == len(found["layers"]) == 4
    tensors = sum(t.n_bytes for t in file.tensors)
    assert sum(found["types"].values()) == tensors
    assert sum(part["bytes"] for part in found["parts"].values()) == tensors
    assert found["kv_bytes_per_token"] == 2 * 2 * 2 * 64 * 4
    assert 20_000_000 < found["floor_bytes"] < 300_000_000
    assert (found["floor_ctx_tokens"], found["conversation_ctx_tokens"]) == (512, 512)
    assert found["floor_bytes"] % 1_000_000 == 0
    longer = json.loads(inspect(capsys, path, "--ctx", 4096, "--json")[1])
    assert longer["floor_ctx_tokens"] == longer["conversation_ctx_tokens"] == 4096
    assert longer["floor_bytes"] - found["floor_bytes"] >= 3500 * found["kv_bytes_per_token"]


def test_a_tied_head_is_counted_once(tiny_model, capsys):
    path = tiny_model("qwen2")
    found = json.loads(inspect(capsys, path, "--json")[1])
    assert found["tied_head"]
    assert found["parts"]["head"]["bytes"] == 0
    assert sum(p["bytes"] for p in found["parts"].values()) == sum(t.n_bytes for t in ModelFile.open(path).tensors)
    assert "the embedding" in inspect(capsys, path)[1]


def test_a_matrix_in_tiles_is_counted_once(tiny_model, monkeypatch):
    path = tiny_model("llama")
    whole = cmd_inspect.parts_of(ModelFile.open(path))
    monkeypatch.setattr(model_file, "TILED_BYTES", 2**14)
    monkeypatch.setattr(model_file, "TILE_BYTES", 2**14)
    tiled = ModelFile.open(path)
    assert len(tiled.layers[0].pieces) > 8
    assert cmd_inspect.parts_of(tiled) == whole


def test_mixed_quantisation_is_shown(stories, capsys):
    assert "q8_0 160.5 KB, f16 110.1 KB" in inspect(capsys, stories("q8_0"))[1]


def test_a_profile_that_cannot_be_used_is_told(tiny_model, capsys, no_profiles):
    path = tiny_model("llama")
    (no_profiles / "p.json").write_text(json.dumps({"hash": ModelFile.open(path).hash}))
    code, out, err = inspect(capsys, path, "--json")
    assert code == 0
    assert json.loads(out)["kv_bytes_per_token"] == 2 * 2 * 2 * 64 * 4
    assert "was not used" in err


def test_a_model_that_llama_cpp_cannot_open_is_shown_and_refused(tmp_path, capsys):
    code, out, err = inspect(capsys, BROKEN["unsupported_architecture"](tmp_path))
    assert code == 1
    assert "smallest budget: not known" in out
    assert "unknown model architecture: 'notanarch'" in err
    code, out, _ = inspect(capsys, tmp_path / "unsupported_architecture.gguf", "--json")
    assert code == 1
    assert json.loads(out)["floor_bytes"] is None


def test_a_context_too_long_to_measure_has_no_smallest_budget(tiny_model, capsys):
    code, out, err = inspect(capsys, tiny_model("llama"), "--ctx", 3_000_000)
    assert code == 1
    assert "smallest budget: not known" in out
    assert "a context of 3000000 tokens takes more than 144.0 MB" in err


def refused(path):
    """Whether the index already refuses the file (others fail only inside llama.cpp)."""
    try:
        ModelFile.open(path)
    except ModelError:
        return True
    return False


def test_broken_files_are_one_clear_line(tmp_path, capsys):
    paths = [path for name in sorted(BROKEN) if refused(path := BROKEN[name](tmp_path))]
    assert len(paths) > 20
    for path in paths:
        code, out, err = inspect(capsys, path)
        assert (code, out) == (1, "")
        assert len(err.splitlines()) <= 2
        assert "Traceback" not in err


def test_the_bundled_model_is_inspected_by_default(bundled_model, capsys):
    assert "h2o" in inspect(capsys)[1]
