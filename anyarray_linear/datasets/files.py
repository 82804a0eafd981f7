"""Loading `.npz` and `.csv` files: all of a data set to train on, or the features alone to predict from."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..arrays.place import Array
from ._checks import Data, Task, as_features, check_file, is_npz, listed, refusal, shown
from ._columns import chosen, looking_like_row_numbers
from ._csv import Layout, Progress, Table, is_number, is_value, read_csv
from ._cures import pipeline
from ._npz import read_npz
from ._targets import Target, of_numbers, of_texts, spelling


class Reading(NamedTuple):
    """A file as it was read, and what the user should hear of it."""

    data: Data
    target: str
    """What the target is called in the file, such as `the column 'kind'`."""
    told: str
    """What the target was taken for, and why."""
    instead: Task | None
    """What `task` would make of it else, if it can be anything else."""
    suspicious: tuple[str, ...]
    """What is to be warned of: columns that look like row numbers."""


def load_data(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    task: Task | None = None,
    features: Sequence[str] | None = None,
    drop: Sequence[str] = (),
) -> Data:
    """Load features and targets from a file.

    Args:
        path: a `.npz` with the arrays `X` `(N, D)` and `y` `(N,)` (or `data` and `target`); or a `.csv` or `.tsv`, plain or
            as `.gz`, in UTF-8, with one sample per line, cells separated by commas, semicolons or tabs, with or without a
            header (the first line is one when it holds no number, or when its numbers can only be names: 0, 1, 2, ... or
            years; or when a column is named by an argument). Lines that begin with `#` are comments. `True` and `False`
            are 1 and 0 in features.
        target: the name of the target column (default: the last one) or array (default: `y`).
        task: `"classification"` or `"regression"`. Default: texts and truth values are classes. Whole numbers are if there
            are one or two different ones, or at most 20 and each twice on average, or if they count without a gap from 0
            or 1 and each occurs at least 5 times. All else is numbers to predict.
        features: the columns to learn from, in this order (default: all but the target).
        drop: columns to leave out.

    Returns:
        `Data(X, y, classes, features)`. Classes are what occurs in the data, sorted; their ids count from 0, and
        `classes` has each one's name as it was written.

    Raises:
        DataError: the file cannot be used; one line says what was wrong, where, and how to fix it.
        ValueError: `task` is not one of the two.
        TypeError: `target` is no name, or `features` or `drop` no list of names.

    Warns of a column that looks like a number of the rows.

    >>> import pathlib, tempfile
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "fruit.csv"
    >>> _ = path.write_text("length,width,name\\n18.5,3.5,banana\\n7.1,7.0,apple\\n")
    >>> X, y, classes, features = load_data(path)
    >>> X.shape, y.tolist(), classes, features
    ((2, 2), [1, 0], ('apple', 'banana'), ('length', 'width'))
    """
    reading = read_data(path, target=target, task=task, features=features, drop=drop)
    for line in reading.suspicious:
        warnings.warn(line, stacklevel=2)
    return reading.data


def read_data(
    path: str | os.PathLike[str],
    *,
    target: str | None = None,
    task: Task | None = None,
    features: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    progress: Progress | None = None,
) -> Reading:
    """What `load_data` loads, and what there is to say about it; `progress` hears how many rows of a text are read."""
    if task not in (None, "classification", "regression"):
        raise ValueError(f"task is {task!r}, but must be 'classification', 'regression' or None")
    if target is not None and not isinstance(target, str):
        raise TypeError(f"target is {target!r:.40}; give the name of a column, or of an array, as a str")
    for name, names in (("features", features), ("drop", drop)):
        if isinstance(names, str):
            raise TypeError(f"{name} is {names!r:.40}, a single str; give a list of names: {name}=[{names!r:.40}]")
    path = check_file(path)
    if not is_npz(path):
        return _from_csv(path, target, task, features, drop, progress)
    if features is not None or drop:
        name = "features" if features is not None else "drop"
        raise refusal(path, f"{name} is about the columns of a .csv, and those of X have no names; save fewer of them")
    return _from_npz(path, target, task)


def load_features(
    path: str | os.PathLike[str],
    n_features: int,
    *,
    features: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Array:
    """Load the features alone, to predict from: a file for `load_data`, with its targets or without.

    Args:
        path: a `.npz` with the array `X` (or `data`) `(N, n_features)`; or a text as `load_data` takes it, with `n_features`
            columns, or one more, whose last column is then taken for the target and left out.
        n_features: how many features the model takes.
        features: the column names that the model was trained on (`Data.features`). Given, a `.csv` with a header is
            read by these names, whatever the order of its columns and whatever other columns it has.
        progress: a function that hears how many rows of a text are read, at every 10,000.

    Returns:
        `X`, float32 or float64, `(N, n_features)`.

    Raises:
        DataError: the file cannot be used; one line says what was wrong, where, and how to fix it.
    """
    path = check_file(path)
    if is_npz(path):
        X = as_features(path, read_npz(path, ("X",))[0], _in_array("X"))
        if X.shape[1] != n_features:
            raise refusal(path, f"X has {X.shape[1]} features but the model takes {n_features}; give it the same ones")
        return X

    def choose(row: list[str]) -> Layout:
        named = features is not None and set(features) <= {cell.strip() for cell in row}
        names = _header(path, row) if named else _names(path, row, n_features)
        if names is not None and features is not None:
            index = {name: i for i, name in enumerate(names)}
            missing = [name for name in features if name not in index]
            if missing:
                raise refusal(
                    path,
                    f"has no column {listed(missing)}, which the model was trained on "
                    f"(it has {listed(names)}); add or rename columns",
                )
            return Layout(names, [index[name] for name in features], None)
        if len(row) not in (n_features, n_features + 1):
            raise refusal(
                path,
                f"has {len(row)} columns but the model takes {n_features} features "
                "(a target may follow them); give it the same columns",
            )
        return Layout(names, list(range(n_features)), None)

    table = read_csv(path, choose, progress)
    return as_features(path, table.X, table.where)


def _from_npz(path: Path, target: str | None, task: Task | None) -> Reading:
    name = "y" if target is None else target
    X, y = read_npz(path, ("X", name))
    X = as_features(path, X, _in_array("X"))
    if y.shape[:1] != X.shape[:1]:
        raise refusal(path, f"X has shape {X.shape} but {name} has {y.shape}; save one target for each row of X")
    if y.dtype.kind == "U":
        labels, codes = np.unique(y, return_inverse=True)
        found = of_texts(path, labels.tolist(), codes.reshape(y.shape), task, _in_array(name))
    else:
        found = of_numbers(path, y, task, _in_array(name))
    return Reading(Data(X, found.y, found.classes, None), f"the array {shown(name)}", found.told, found.instead, ())


def _from_csv(
    path: Path,
    target: str | None,
    task: Task | None,
    features: Sequence[str] | None,
    drop: Sequence[str],
    progress: Progress | None,
) -> Reading:
    first_row: list[str] = []

    def choose(row: list[str]) -> Layout:
        first_row[:] = row
        if len(row) < 2:
            raise refusal(path, "has one column only; put the features in the first columns and the target in the last, "
                          f"with commas, semicolons or tabs between them (its first line is {shown(row[0])})")
        if target is None and features is None and not drop:
            names = _names(path, row, len(row) - 1)
            return Layout(names, list(range(len(row) - 1)), len(row) - 1)
        return chosen(path, _header(path, row), target, features, drop)

    table = read_csv(path, choose, progress)
    if table.layout.names is None and _is_header(first_row, table):
        table = table.without_first_row(_header(path, first_row))
    layout = table.layout
    X = as_features(path, table.X, table.where, pipeline(path, layout.target_name))
    names = None if layout.names is None else tuple(layout.names[i] for i in layout.columns)
    found = _target(path, table, task)
    suspicious = looking_like_row_numbers(X, found, [layout.name(i) for i in layout.columns])
    where = f"the {layout.name(layout.target or 0)}"
    told = tuple(f"{path.name}: {line}" for line in suspicious)
    return Reading(Data(X, found.y, found.classes, names), where, found.told, found.instead, told)


def _target(path: Path, table: Table, task: Task | None) -> Target:
    """The column of targets: numbers if all of them are, else names."""
    _, labels, codes, _, _ = table
    numeric = [is_number(label) for label in labels]
    if all(numeric):
        y = np.array([float(label) for label in labels])[codes]
        return of_numbers(path, y, task, table.where, spelling(labels))
    if any(map(_is_finite, labels)) and task != "classification":
        row = int((codes == numeric.index(False)).argmax())
        raise refusal(
            path,
            f"{table.where(row)} is {shown(labels[codes[row]])} but other targets are numbers; "
            "correct it, or ask for the task 'classification' if all are names",
        )
    return of_texts(path, labels, codes, task, table.where)


def _names(path: Path, row: list[str], n_features: int) -> list[str] | None:
    """The column names, if the first row is a header: no cell of it is a number, or it counts 0, 1, 2, ... as pandas
    does for columns without names (a sample of more than four columns hardly does). It is none if all features are."""
    counts = len(row) > 4 and row == [str(i) for i in range(len(row))]
    texts = [i for i, cell in enumerate(row) if not is_value(cell)]
    if counts or len(texts) == len(row):
        return _header(path, row)
    if all(i >= n_features for i in texts):
        return None
    raise refusal(
        path,
        f"the first line has numbers, but its column {texts[0] + 1} is {shown(row[texts[0]].strip())}; if it is a sample, "
        "correct that cell; if it is a header, let each name begin with a letter, or name the target column",
    )


def _is_header(row: list[str], table: Table) -> bool:
    """Whether a first row is a header for all that its features read as numbers (years, say): they are different whole
    numbers, and its target is the only one that is text."""
    names = [name.strip() for name in row[:-1]]
    texts = [not _is_finite(label) for label in table.labels]
    return (
        all(map(str.isdecimal, names))
        and len(set(names)) == len(names)
        and texts[0]
        and not any(texts[1:])
        and len(texts) > 1
        and int((table.codes == 0).sum()) == 1
    )


def _is_finite(label: str) -> bool:
    return is_number(label) and math.isfinite(float(label))


def _in_array(name: str) -> Callable[..., str]:
    """What words a position in an array for a message: `X[3, 0]`."""
    return lambda *at: f"{name}[{', '.join(map(str, at))}]"


def _header(path: Path, row: list[str]) -> list[str]:
    """The column names in a first row, if each column has its own; else `DataError`."""
    names = [name.strip() for name in row]
    seen: set[str] = set()
    for number, name in enumerate(names, 1):
        if not name:
            raise refusal(
                path,
                f"column {number} has no name in the header; give it one, or remove it if it only counts "
                "the rows (in pandas: to_csv(path, index=False))",
            )
        if name in seen:
            raise refusal(path, f"two columns are called {shown(name)} in the header; rename one")
        seen.add(name)
    return names
