"""Reading a table of numbers, and one column of targets, from a `.csv` file: UTF-8, with `,`, `;` or tab between cells.

The standard library's `csv` does the reading, one row at a time; a row's numbers go into one flat buffer at once, so
the memory needed is a small multiple of the file's size.
"""

from __future__ import annotations

import csv
import re
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TextIO

import numpy as np

from ..arrays.place import Array
from ._checks import refusal, shown

if TYPE_CHECKING:
    from _csv import Reader

MAX_LINE = 4 * 2**20
"""Characters; a longer line is refused, so that a file without line ends cannot fill the memory."""


class Layout(NamedTuple):
    """Which columns of a table mean what."""

    names: list[str] | None
    """From the header; `None` where the first row is data."""
    columns: list[int]
    """The features, in order."""
    target: int | None


class Table(NamedTuple):
    """A table of numbers, and its column of targets as texts."""

    X: Array
    """float64 `(N, D)`."""
    labels: list[str]
    """The distinct targets, in the order in which they appear."""
    codes: Array
    """int64 `(N,)`: which of `labels` each sample has; empty without a target."""
    lines: Array
    """int64 `(N,)`: the line of the file where each sample ends."""
    layout: Layout

    def where(self, row: int, feature: int | None = None) -> str:
        """Words a position for a message; without a feature it is the target's."""
        index = self.layout.target if feature is None else self.layout.columns[feature]
        return f"line {self.lines[row]}, {_column(self.layout, index or 0)}"

    def without_first_row(self, names: list[str]) -> Table:
        """The same table, its first row being the header `names`; no other row may have the first row's target."""
        layout = self.layout._replace(names=names)
        return Table(self.X[1:], self.labels[1:], self.codes[1:] - 1, self.lines[1:], layout)


def is_number(cell: str) -> bool:
    """Whether a cell reads as a number (also `nan` and `inf`, which are refused later, by position).

    Python reads more than files mean: `1_000`, and digits of other scripts.
    """
    if _peculiar(cell.strip()):
        return False
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _peculiar(text: str) -> bool:
    return "_" in text or not text.isascii()


def read_csv(path: Path, choose: Callable[[list[str]], Layout]) -> Table:
    """The table in `path`; `choose` sees the cells of the first row and says what the columns mean.

    Raises `DataError`, with the line and the column, if the text is not such a table.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first_line = next((line for line in _lines(path, file) if line.strip()), "")
            unquoted = re.sub(r'"[^"]*"', "", first_line)
            delimiter = ";" if ";" in unquoted else "\t" if "\t" in unquoted and "," not in unquoted else ","
            file.seek(0)
            # strict: without it an unclosed quote swallows the rest of the file in silence.
            reader = csv.reader(_lines(path, file), delimiter=delimiter, strict=True, skipinitialspace=True)
            try:
                return _table(path, reader, choose)
            except csv.Error as error:
                raise refusal(path, f"line {reader.line_num}: {error}; correct that line") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise refusal(path, f"is not UTF-8 text (it holds the byte 0x{byte:02x}); save it as CSV UTF-8") from error
    except OSError as error:
        raise refusal(path, f"cannot be read: {error.strerror or error}; check its permissions and the disk") from error
    except MemoryError as error:
        raise refusal(path, "does not fit in memory; use fewer samples") from error


def _lines(path: Path, file: TextIO) -> Iterator[str]:
    number = 0
    while line := file.readline(MAX_LINE):
        number += 1
        if len(line) == MAX_LINE:
            raise refusal(path, f"line {number} is longer than {MAX_LINE} characters; put each sample on its own line")
        if "\0" in line:
            raise refusal(path, f"line {number} holds a NUL byte, so this is no text; save it as CSV UTF-8")
        yield line


def _table(path: Path, reader: Reader, choose: Callable[[list[str]], Layout]) -> Table:
    rows = (row for row in reader if len(row) > 1 or (row and row[0].strip()))  # blank lines are no rows
    row = next(rows, None)
    if row is None:
        raise refusal(path, "holds blank lines only; put in one sample per line")
    layout, width = choose(row), len(row)
    _, columns, target = layout
    values, codes, lines = array("d"), array("q"), array("q")
    labels: dict[str, int] = {}
    if layout.names is not None:
        row = next(rows, None)
    while row is not None:
        if len(row) != width:
            raise refusal(
                path,
                f"line {reader.line_num} has {len(row)} cells but the first row has {width}; "
                "give every line the same number",
            )
        try:
            numbers = [float(row[i]) for i in columns]
            sound = not _peculiar("".join(row)) or all(is_number(row[i]) for i in columns)
        except ValueError:
            sound = False
        if not sound:
            bad = next(i for i in columns if not is_number(row[i]))
            raise _bad_cell(path, reader.line_num, layout, bad, row[bad].strip())
        values.extend(numbers)
        if target is not None:
            label = row[target].strip()
            if not label:
                raise _bad_cell(path, reader.line_num, layout, target, label)
            codes.append(labels.setdefault(label, len(labels)))
        lines.append(reader.line_num)
        row = next(rows, None)
    if not lines:
        raise refusal(path, "has a header but no rows; put in one sample per line")
    X = np.asarray(values).reshape(len(lines), len(columns))
    return Table(X, list(labels), np.asarray(codes), np.asarray(lines), layout)


def _bad_cell(path: Path, line: int, layout: Layout, index: int, cell: str) -> Exception:
    what = f"is {shown(cell)}, not a number" if cell else "is empty"
    how = "write numbers as 1.5 or 2e-3" if cell else "fill it in or remove the line"
    return refusal(path, f"line {line}, {_column(layout, index)} {what}; {how}")


def _column(layout: Layout, index: int) -> str:
    return f"column {index + 1}" if layout.names is None else f"column {shown(layout.names[index])}"
