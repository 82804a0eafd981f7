"""Reading a table of numbers, and one column of targets, from a text file with `,`, `;` or tab between cells.

NumPy's reader is tried first, as it is several times faster. It explains nothing, though, so whatever it does not take (a
quote, a truth value, a mistake) is read again by the standard library's `csv`, one row at a time. Both see one line at a
time and keep numbers only, so the memory needed is a small multiple of the file's size.
"""

from __future__ import annotations

import csv
import warnings
from array import array
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..arrays.place import Array
from ._checks import refusal
from ._cures import bad_cell
from ._text import Lines, delimiter_of, opened

if TYPE_CHECKING:
    from _csv import Reader

Progress = Callable[[int], None]
TOLD_ROWS = 10_000
"""After so many rows each, the caller's `progress` hears how many there are."""


class Layout(NamedTuple):
    """Which columns of a table mean what."""

    names: list[str] | None
    """From the header; `None` where the first row is data."""
    columns: list[int]
    """The features, in order."""
    target: int | None

    def name(self, index: int) -> str:
        """A column, for a message."""
        return f"column {index + 1}" if self.names is None else f"column {self.names[index]!r:.42}"

    @property
    def target_name(self) -> str | int | None:
        """The target's column as pandas calls it: by its name, or its index where columns have none."""
        return self.target if self.names is None or self.target is None else self.names[self.target]


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
        return f"line {self.lines[row]}, {self.layout.name(index or 0)}"

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


def is_value(cell: str) -> bool:
    """Whether a cell is a feature: a number, or `True` or `False`, which are 1 and 0."""
    return is_number(cell) or cell.strip().lower() in _TRUTH


_TRUTH = {"true": 1.0, "false": 0.0}


def _value(cell: str) -> float:
    truth = _TRUTH.get(cell.strip().lower())
    return float(cell) if truth is None else truth


def _peculiar(text: str) -> bool:
    return "_" in text or not text.isascii()


def read_csv(path: Path, choose: Callable[[list[str]], Layout], progress: Progress | None = None) -> Table:
    """The table in `path`; `choose` sees the cells of the first row and says what the columns mean.

    Raises `DataError`, with the line and the column, if the text is not such a table.
    """
    return _read(path, choose, _by_numpy, progress) or _read(path, choose, _by_rows, progress)  # type: ignore[return-value]


def _read(
    path: Path, choose: Callable[[list[str]], Layout], read: Callable[..., Table | None], progress: Progress | None
) -> Table | None:
    with opened(path) as file:
        lines = Lines(path, file)
        first = next((line for line in lines if line.strip()), None)
        if first is None:
            raise refusal(path, "holds blank lines only; put in one sample per line")
        before = lines.number - 1
        # strict: without it an unclosed quote swallows the rest of the file in silence.
        dialect = {"delimiter": delimiter_of(path, first), "strict": True, "skipinitialspace": True}
        reader = csv.reader(chain([first], lines), **dialect)  # type: ignore[arg-type]
        try:
            row = next(reader)
            layout = choose(row)
            return read(path, layout, row, first, reader, lines, progress)
        except csv.Error as error:
            raise refusal(path, f"line {max(lines.number, before + 1)}: {error}; correct that line") from error


def _by_numpy(
    path: Path, layout: Layout, row: list[str], first: str, reader: Reader, lines: Lines, progress: Progress | None
) -> Table | None:
    """The table, or `None` where NumPy's reader would not see everything, or see it as anything else."""
    delimiter, width, target = reader.dialect.delimiter, len(row), layout.target
    codes, numbers, labels = array("q"), array("q"), dict[str, int]()

    class Peculiar(ValueError):
        pass

    def plain() -> Iterator[str]:
        for line in lines if layout.names is not None else chain([first], lines):
            if line.isspace() and delimiter not in line:
                continue  # blank lines are no rows
            if line.count(delimiter) != width - 1 or '"' in line or len(line) > csv.field_size_limit():
                raise Peculiar
            if target is not None:
                cell = line.rpartition(delimiter)[2] if target == width - 1 else line.split(delimiter, target + 1)[target]
                if not (label := cell.strip()):
                    raise Peculiar
                codes.append(labels.setdefault(label, len(labels)))
            numbers.append(lines.number)
            if progress is not None and len(numbers) % TOLD_ROWS == 0:
                progress(len(numbers))
            yield line

    if reader.line_num != 1:  # a quote goes over several lines
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # that there are no rows
            X = np.loadtxt(plain(), delimiter=delimiter, usecols=layout.columns, comments=None, ndmin=2)
    except (ValueError, UserWarning):
        return None
    return Table(X, list(labels), np.asarray(codes), np.asarray(numbers), layout)


def _by_rows(
    path: Path, layout: Layout, row: list[str] | None, first: str, reader: Reader, lines: Lines, progress: Progress | None
) -> Table:
    """The table; what cannot be in one is refused."""
    rows = (row for row in reader if len(row) > 1 or (row and row[0].strip()))  # blank lines are no rows
    assert row is not None
    width, (_, columns, target) = len(row), layout
    values, codes, numbers = array("d"), array("q"), array("q")
    labels: dict[str, int] = {}
    if layout.names is not None:
        row = next(rows, None)
    while row is not None:
        if len(row) != width:
            raise refusal(
                path,
                f"line {lines.number} has {len(row)} cells but the first row has {width}; give every line the same number",
            )
        values.extend(_values(path, row, layout, lines.number))
        if target is not None:
            label = row[target].strip()
            if not label:
                position = f"line {lines.number}, {layout.name(target)}"
                raise refusal(path, f"{position} is empty; fill it in or remove the line")
            codes.append(labels.setdefault(label, len(labels)))
        numbers.append(lines.number)
        if progress is not None and len(numbers) % TOLD_ROWS == 0:
            progress(len(numbers))
        row = next(rows, None)
    if not numbers:
        raise refusal(path, "has a header but no rows; put in one sample per line")
    X = np.asarray(values).reshape(len(numbers), len(columns))
    return Table(X, list(labels), np.asarray(codes), np.asarray(numbers), layout)


def _values(path: Path, row: list[str], layout: Layout, line: int) -> list[float]:
    """The features of a row, in order."""
    if not _peculiar("".join(row)) or all(is_value(row[i]) for i in layout.columns):
        try:
            return [float(row[i]) for i in layout.columns]
        except ValueError:
            with_truths = all(is_value(row[i]) for i in layout.columns)
        if with_truths:
            return [_value(row[i]) for i in layout.columns]
    bad = next(i for i in layout.columns if not is_value(row[i]))
    raise bad_cell(path, f"line {line}, {layout.name(bad)}", row[bad].strip(), layout.target_name)
