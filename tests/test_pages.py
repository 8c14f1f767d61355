"""A system with pages of 16 KiB (some ARM machines): the same tests under a library that makes this one look so."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

START = "from h2o_cli.start import main; main()"
FOLDER = Path(__file__).resolve().parent
TESTS = [
    "test_memory.py::test_drop_gives_whole_pages_inside_back_and_only_those",
    "test_layer_store.py::test_need_always_returns_the_pieces_bytes_and_memory_is_kept",
    "test_store_ends.py::test_pieces_that_are_no_longer_wanted_give_all_their_memory_back",
    "test_homes.py",
    "test_embedding.py",
    "test_parity.py::test_plans_change_between_any_two_tokens",
    "test_kv_store.py::test_memory_falls_by_the_rows_that_are_not_kept",
    "test_kv_store.py::test_rows_of_any_size_come_back_from_the_file",
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Path of the compiled library."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path_factory.mktemp("pages") / "pages16k.so"
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", path, FOLDER / "pages16k.c", "-ldl"], check=True)
    return path


def under(library, *command):
    """(exit code, output) of a command that sees large pages."""
    environment = {**os.environ, "LD_PRELOAD": str(library)}
    done = subprocess.run(
        command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    return done.returncode, done.stdout + done.stderr


def test_the_library_is_seen(library):
    code, output = under(library, sys.executable, "-c", "from runtime.sizes import PAGE; print(PAGE)")
    assert (code, output) == (0, "16384\n")


@pytest.mark.parametrize("test", TESTS)
def test_with_large_pages(test, library):
    code, output = under(library, sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", test)
    assert code == 0, output[-4000:]
    assert "pages16k" not in output


def test_a_run_with_large_pages(library, bundled_model):
    """The same answer, inside the same budget. Pages of files stay: /proc/self/pagemap has those of the real kernel."""
    start = "from runtime.engine import code_pages; code_pages.drop_file_pages = lambda: None; " + START
    command = [sys.executable, "-c", start, "run", str(bundled_model), "-m", "60", "-p", "Once", "-n", "20"]
    plain = subprocess.run([*command, "--temp", "0"], cwd=FOLDER.parent, capture_output=True, text=True, check=True)
    code, output = under(library, *command, "--temp", "0")
    assert code == 0, output
    assert output.startswith(plain.stdout)
    assert "pages16k" not in output
