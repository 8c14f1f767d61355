"""The package's own functions in C, where it was built with a compiler. Else Python or llama.cpp does the same."""

from __future__ import annotations

import ctypes
import importlib.machinery
from pathlib import Path

_VERSION = 1  # of the functions and structs, as node_filter.c says it


def _library() -> ctypes.CDLL | None:
    here = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = here / f"_compiled{suffix}"
        if path.exists():
            try:
                library = ctypes.CDLL(str(path))
            except OSError:  # built for another system
                return None
            return library if hasattr(library, "h2o_version") and library.h2o_version() == _VERSION else None
    return None


LIBRARY = _library()
