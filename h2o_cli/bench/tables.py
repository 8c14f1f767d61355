"""Tables in Markdown, and figures as text."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from h2o_cli.bench.rows import Median

NONE = "-"
STEADY = 0.05  # a spread below this part of the median is not printed


def markdown_table(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> str:
    """A table whose first row is the head. All columns but those in `left` are right-aligned."""
    rule = ["---" if i in left else "---:" for i in range(len(rows[0]))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))


def number(value: float | None, digits: int = 0) -> str:
    """A figure with so many digits after the point."""
    return NONE if value is None else f"{value:.{digits}f}"


def millions(value: float | None, digits: int = 0) -> str:
    """Bytes as MB."""
    return number(None if value is None else value / 1e6, digits)


def percent(value: float | None) -> str:
    """A share in percent, without the sign."""
    return number(None if value is None else 100 * value)


def shown(found: Median | None, digits: int = 0) -> str:
    """A median; with least and most where they are apart."""
    if found is None:
        return NONE
    text = number(found.value, digits)
    if found.most - found.least <= STEADY * abs(found.value):
        return text
    return f"{text} [{number(found.least, digits)}-{number(found.most, digits)}]"
