"""Fixtures every test may use."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hypothesis import settings

# Threads that spin while they wait take the cores of whatever runs beside the tests.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import tiny_models  # noqa: E402

settings.register_profile("same every time", derandomize=True, deadline=None)
settings.load_profile("same every time")

USER_FOLDERS = {
    "HOME": "home",
    "XDG_DATA_HOME": "data",
    "XDG_CACHE_HOME": "cache",
    "XDG_CONFIG_HOME": "config",
    "XDG_STATE_HOME": "state",
    "XDG_RUNTIME_DIR": "run",
}


@pytest.fixture(autouse=True)
def user_folders(tmp_path, monkeypatch):
    """No test reads or writes the folders of the user who runs it."""
    for variable, name in USER_FOLDERS.items():
        folder = tmp_path / ".user" / name
        folder.mkdir(parents=True, mode=0o700)
        monkeypatch.setenv(variable, str(folder))
    monkeypatch.delenv("H2O_MODEL", raising=False)


@pytest.fixture(autouse=True)
def no_prompt_is_short(request, monkeypatch):
    """Dense layers of a filter attend by products behind the short prompts of tests, too; `usual_rows` undoes that."""
    if "usual_rows" not in request.fixturenames:
        monkeypatch.setattr("runtime.kv.dense.LEAST_ROWS", 0)


@pytest.fixture(autouse=True)
def pages_of_files_stay(request, monkeypatch):
    """An engine gives no pages of this process back, so that the next one finds as many; `usual_pages` undoes that."""
    if "usual_pages" not in request.fixturenames:
        monkeypatch.setattr("runtime.engine.code_pages.drop_file_pages", lambda: None)


@pytest.fixture
def usual_pages():
    """An engine gives pages of libraries back as it does outside of tests."""


@pytest.fixture
def usual_rows():
    """Dense layers attend as they do outside of tests."""


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """Where the models of this test session are kept."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny_model(model_folder):
    """tiny_model(arch, file_type="f16"): path of a small random model; arch may be a whole SHAPE."""

    def make(arch: str, file_type: str = "f16") -> Path:
        return tiny_models.tiny_model(model_folder, arch, file_type)

    return make


@pytest.fixture(scope="module")
def tokenizer_of():
    """tokenizer_of(path): a Tokenizer whose model lives as long as the module."""
    from runtime.llama.hollow import HollowModel
    from runtime.llama.model_file import ModelFile
    from runtime.llama.tokenizer import Tokenizer

    models = {}

    def make(path):
        if path not in models:
            file = ModelFile.open(path)
            models[path] = (HollowModel(file), file)
        return Tokenizer(*models[path])

    yield make
    for model, _ in models.values():
        model.free()


@pytest.fixture(scope="session")
def bundled_model():
    """The model that comes with the project."""
    if not tiny_models.BUNDLED.exists():
        pytest.skip("the bundled model is not there")
    return tiny_models.BUNDLED


@pytest.fixture(scope="session")
def bundled_variant(bundled_model, model_folder):
    """bundled_variant(file_type): path of the bundled model in another file type."""
    return lambda file_type: tiny_models.bundled_variant(model_folder, file_type)


@pytest.fixture(scope="session")
def stories():
    """stories(file_type="q8_0"): path of a small trained model kept beside the checkout; skips where it is not."""

    def find(file_type: str = "q8_0") -> Path:
        path = tiny_models.STORIES / f"stories260K-{file_type}.gguf"
        if not path.exists():
            pytest.skip(f"no {path.name} beside the checkout")
        return path

    return find
