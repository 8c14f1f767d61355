"""The package's functions in C are those of this version of the package, or none."""

from __future__ import annotations

import ctypes

import pytest

from runtime.llama import compiled


@pytest.fixture
def loaded(monkeypatch):
    """What is loaded where a file has these functions."""

    def load(library):
        monkeypatch.setattr(compiled.Path, "exists", lambda _path: True)
        monkeypatch.setattr(ctypes, "CDLL", lambda _path: library)
        return compiled._library()

    return load


class Library:
    def __init__(self, version):
        self.h2o_version = lambda: version


def test_functions_of_another_version_are_not_used(loaded):
    right = Library(compiled._VERSION)
    assert loaded(right) is right
    assert loaded(Library(compiled._VERSION + 1)) is None
    assert loaded(object()) is None  # from before there were versions


def test_functions_of_another_system_are_not_used(monkeypatch):
    def fails(_path):
        raise OSError("invalid ELF header")

    monkeypatch.setattr(compiled.Path, "exists", lambda _path: True)
    monkeypatch.setattr(ctypes, "CDLL", fails)
    assert compiled._library() is None


@pytest.mark.skipif(compiled.LIBRARY is None, reason="built without a compiler")
def test_both_halves_name_the_same_version():
    assert compiled.LIBRARY.h2o_version() == compiled._VERSION
