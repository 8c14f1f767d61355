"""The frame of every report: a title, where and with what it was measured, pictures, and the commands of the rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from h2o_cli.bench.rows import Row, distinct

_Row = TypeVar("_Row", bound=Row)


def document(title: str, parts: Iterable[str]) -> str:
    """A Markdown document; empty parts are left out."""
    return "\n\n".join([f"# {title}", *filter(None, parts)]) + "\n"


def machines(rows: Sequence[Row]) -> str:
    """The machines and the versions of the programs, a paragraph for each."""
    found = []
    for machine, versions in distinct((row.machine, tuple(row.versions.items())) for row in rows):
        where = f"{machine.cpu}, {machine.n_cores} cores, {machine.kernel}. " if machine else ""
        programs = ", ".join(f"{name} {version}" for name, version in versions if version[:1].isdigit())
        found.append(f"{where}{programs}." if programs else where.rstrip())
    return "\n\n".join(distinct(filter(None, found)))


def started_by(rows: Sequence[Row]) -> str:
    """The commands of the user that made the rows, a line for each."""
    lines = distinct(row.bench for row in rows if row.bench)
    return _fenced(lines) if lines else ""


def commands(rows: Iterable[_Row], name: Callable[[_Row], str]) -> str:
    """The commands of the rows, folded away; the newest of each name."""
    lines = []
    for what, row in {name(row): row for row in rows}.items():
        lines += [f"# {what}", *row.commands]
    if all(line.startswith("# ") for line in lines):
        return ""
    return f"<details><summary>The command of every row</summary>\n\n{_fenced(lines)}\n\n</details>"


def images(names: Iterable[str]) -> list[str]:
    """Pictures that lie beside the report, by their file names."""
    return [f"![{name.removesuffix('.png')}]({name})" for name in names]


def _fenced(lines: Iterable[str]) -> str:
    return "\n".join(["```", *lines, "```"])
