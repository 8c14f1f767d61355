"""Which model and which profile a command means when none is named."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from runtime.errors import H2OError, ModelError, ProfileError
from runtime.sizes import format_size

ROOT = Path(__file__).resolve().parents[2]
BUNDLED_MODEL = ROOT / "model_configs" / "bundled" / "h2o-stories-q8_0.gguf"
LAST_MODEL = "last-model"
_HASH_KEY = re.compile(rb'"hash":\s*(\d+)')
DEFAULT_MODEL = "[default: H2O_MODEL, else the model profiled last, else the one that comes with h2o]"
GIVE_MODEL = "give the path of a GGUF file, or set H2O_MODEL"


def user_folder() -> Path:
    """Where this user's own data is kept between runs."""
    import platformdirs

    return Path(platformdirs.user_data_path("h2o"))


def profiles_folder() -> Path:
    """Where profiles are kept: H2O_PROFILES, else model_configs/ in a checkout, else in the user's data folder."""
    if os.environ.get("H2O_PROFILES"):
        return Path(os.environ["H2O_PROFILES"]).expanduser()
    checkout = ROOT / "model_configs"
    if (ROOT / "pyproject.toml").is_file() and os.access(checkout, os.W_OK):
        return checkout
    return user_folder() / "profiles"


def find_profile(model_hash: int) -> Path | None:
    """The newest profile of the model with this hash, or None."""
    return next(iter(sorted(_profiles_of(model_hash), key=lambda path: -path.stat().st_mtime)), None)


def need_profile(model_hash: int, model: str) -> Path:
    """The newest profile of a model. Raises ProfileError when there is none."""
    found = find_profile(model_hash)
    if found is None:
        import shlex  # for an error only

        raise ProfileError(f"there is no profile of {model}", f"run `h2o profile {shlex.quote(model)}` first")
    return found


def _profiles_of(model_hash: int) -> Iterator[Path]:
    return (path for path in profiles_folder().glob("*.json") if _hash_in(path) == model_hash)


def _hash_in(path: Path) -> int | None:
    """The model hash in a profile, without decoding all of it (the `model` object comes first)."""
    try:
        with path.open("rb") as file:
            match = _HASH_KEY.search(file.read(8192))
    except OSError:
        return None
    return int(match.group(1)) if match else None


def remember_model(path: str | Path) -> None:
    """Make a model the one that commands mean when none is named. Silent where the folder cannot be written."""
    with suppress(OSError):
        folder = user_folder()
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / LAST_MODEL, os.fsencode(Path(path).resolve()))


def replace_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(data)
        os.replace(partial, path)
    except OSError:
        with suppress(OSError):
            partial.unlink()
        raise


def last_model() -> Path | None:
    """The model that was remembered last."""
    try:
        data = (user_folder() / LAST_MODEL).read_bytes()
    except OSError:
        return None
    return Path(os.fsdecode(data)) if data.strip() else None


def resolve_model(argument: str | None) -> Path:
    """The model a command means: the argument, H2O_MODEL, the last profiled one, the bundled one. Raises ModelError."""
    named = argument or os.environ.get("H2O_MODEL")
    if named:
        return Path(named).expanduser()
    remembered = last_model()
    if remembered is not None and remembered.is_file():
        return remembered
    if BUNDLED_MODEL.is_file():
        return BUNDLED_MODEL
    raise ModelError("no model was named and none is installed", GIVE_MODEL)


def read_text(path: str | Path, what: str, most_bytes: int, next_step: str = "shorten it") -> bytes:
    """A small file that the user named, or standard input for "-". Raises H2OError."""
    try:
        fd = os.dup(0) if str(path) == "-" else os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        with os.fdopen(fd, "rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise H2OError(f"cannot read {what} {path}: {error.strerror}", "give another file") from None
    if len(data) > most_bytes:
        raise H2OError(f"{what} {path} is longer than {format_size(most_bytes)}", next_step)
    return data
