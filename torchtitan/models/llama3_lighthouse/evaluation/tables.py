"""Tables of results as CSV and Markdown."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas

Row = dict[str, Any]


def write_csv(rows: Sequence[Row], path: Path, columns: Sequence[str] | None = None) -> None:
    """Write rows with every digit; a cell that a row lacks, or that is None or NaN, stays empty.

    Args:
        columns: the columns and their order; default: those of the rows as they come.
    """
    # Objects keep whole numbers whole in columns with empty cells.
    frame = pandas.DataFrame(list(rows), columns=list(columns or columns_of(rows)), dtype=object)
    frame.to_csv(path, index=False)


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every column that some row has, in the order in which they come."""
    return list(dict.fromkeys(key for row in rows for key in row))


def markdown(rows: Sequence[Row], columns: Sequence[str]) -> str:
    """A table of some columns of the rows, rounded for reading."""
    lines = [[column.removeprefix("lighthouse.") for column in columns], ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)
