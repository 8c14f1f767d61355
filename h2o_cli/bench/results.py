"""A folder of results: rows as they are measured, and the report, pictures and summary that are made of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec

from h2o_cli.bench.rows import Row, append_line, read_lines
from h2o_cli.output import emit, note, print_json
from runtime.errors import UsageError

_Row = TypeVar("_Row", bound=Row)


def _no_pictures(_rows: Sequence[Any], _folder: Path) -> list[Path]:
    return []


@dataclass(frozen=True)
class Kind(Generic[_Row]):
    """What a benchmark's rows are, and what is made of them. File names are without a folder.

    text makes the report of rows and of the file names of pictures, draw writes the pictures into a folder, summary is
    for the terminal, told is a row in one line for whoever waits. beside: more files that a new benchmark begins anew.
    """

    row: type[_Row]
    text: Callable[[Sequence[_Row], Sequence[str]], str]
    summary: Callable[[Sequence[_Row]], str]
    told: Callable[[_Row], str] | None = None
    draw: Callable[[Sequence[_Row], Path], list[Path]] = _no_pictures
    rows: str = "rows.jsonl"
    report: str = "report.md"
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Results(Generic[_Row]):
    """The results of one benchmark in a folder. json: rows go to standard output, and no summary does."""

    kind: Kind[_Row]
    folder: Path
    json: bool = False

    def begin(self, *, add: bool = False) -> None:
        """Make the folder; without `add`, the rows of an earlier benchmark are removed. Raises UsageError."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in () if add else (self.kind.rows, *self.kind.beside):
                (self.folder / name).unlink(missing_ok=True)
            (self.folder / self.kind.rows).open("ab").close()

    def keep(self, rows: Iterable[_Row]) -> None:
        """Write every row as soon as it is measured, and say what it is. Raises UsageError."""
        for row in rows:
            with self._writing():
                append_line(self.folder / self.kind.rows, row)
            if self.kind.told:
                note(self.kind.told(row))
            if self.json:
                print_json(msgspec.to_builtins(row))

    def read(self) -> list[_Row]:
        """The rows so far. Raises UsageError."""
        return read_lines(self.folder / self.kind.rows, self.kind.row)

    def finish(self, rows: Sequence[_Row], *, again: bool = False) -> None:
        """Draw the pictures, where that can be done, write the report around them, and print the summary.

        again: pictures that are in the folder already are shown too, for what they were drawn from may be gone. Raises
        UsageError.
        """
        with self._writing():
            pictures = self._draw(rows)
            if again:
                pictures += sorted(path.name for path in self.folder.glob("*.png") if path.name not in pictures)
            (self.folder / self.kind.report).write_text(self.kind.text(rows, pictures))
        if not self.json:
            emit(self.kind.summary(rows) + "\n")
        note(f"the rows and {self.kind.report} are in {self.folder}")

    def _draw(self, rows: Sequence[_Row]) -> list[str]:
        """The file names of the pictures; none without matplotlib."""
        try:
            return [path.name for path in self.kind.draw(rows, self.folder)]
        except UsageError as error:
            note(str(error))
            return []

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise UsageError(f"{self.folder} cannot be written: {reason}", "choose another folder") from None


def make_again(folder: Path, kinds: Collection[Kind[Any]]) -> None:
    """Make the report of every benchmark that left rows in a folder again. Raises UsageError where none did."""
    refused, done = UsageError(f"{folder} holds no results", "make some with `h2o bench`"), False
    for kind in kinds:
        results = Results(kind, folder)
        try:
            rows = results.read()
        except UsageError as error:
            refused = error
            continue
        if rows:
            results.finish(rows, again=True)
            done = True
    if not done:
        raise refused


def check_names(what: str, names: Iterable[str] | None, known: Collection[str]) -> None:
    """Raise UsageError for a name that is none of the known ones. what: they name."""
    for name in names or ():
        if name not in known:
            raise UsageError(f"there is no {what} {name!r}", f"choose one of {', '.join(known)}")
