"""What a target is, classes or a number to predict, by a rule that is written down; and the names that classes keep."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..arrays.place import Array
from ._checks import Task, as_float, check_finite, listed, refusal, shown

MAX_CLASSES = 65_536
"""More of them are refused: it would make an output layer that large, and they are rarely classes."""
FEW, REPEATED = 20, 5


class Target(NamedTuple):
    """A target that can be trained on, and how it was understood."""

    y: Array
    """int64 `(N,)`, ids of classes; or float32 or float64, `(N,)` or `(N, M)`, numbers to predict."""
    classes: tuple[str, ...] | None
    """The name of each class as it was written, in the order of the ids; `None`: numbers."""
    told: str
    """What it was taken for, and what was seen in it, in words."""
    instead: Task | None
    """What else it could be, if that was asked for."""


def are_classes(values: Array, counts: Array) -> bool:
    """The rule: whether numbers are classes; `values` are the distinct ones, sorted, and `counts` how often each occurs.

    They are if all of them are whole, and

    - there are one or two of them,
    - or at most `FEW`, each of them twice on average,
    - or they count without a gap from 0 or from 1, as ids of classes do, and each occurs at least `REPEATED` times.

    >>> are_classes(np.array([1, 2, 3]), np.array([59, 71, 48])), are_classes(np.arange(25, 347), np.full(322, 2))
    (True, False)
    """
    if (values != np.floor(values)).any():
        return False
    K, N = len(values), counts.sum()
    gapless = values[0] in (0, 1) and values[-1] - values[0] == K - 1
    return bool(K <= 2 or (K <= FEW and N >= 2 * K) or (gapless and counts.min() >= REPEATED))


def of_numbers(
    path: Path,
    y: Array,
    task: Task | None,
    where: Callable[..., str],
    spelled: Callable[[Array], Sequence[str]] | None = None,
) -> Target:
    """The target that numbers `y` are; else `DataError`.

    `where` words a position, given an index per axis; `spelled` gives the distinct numbers as they were written.
    """
    if y.ndim == 2 and y.shape[1] == 1:
        y = y[:, 0]
    if y.ndim not in (1, 2) or 0 in y.shape:
        raise refusal(path, f"y has shape {y.shape} but must be (samples,); save it with one target per row of X")
    if y.dtype.kind == "f":
        check_finite(path, y, where)
    if y.ndim == 2:
        return _several(path, y, task, where)
    values, ids, counts = np.unique(y, return_inverse=True, return_counts=True)
    what = "different whole numbers" if (values == np.floor(values)).all() else "different numbers"
    seen = f"{len(values)} {what} in {len(y)} samples"
    if task == "regression" or (task is None and not (y.dtype.kind == "b" or are_classes(values, counts))):
        return Target(_regression(path, y, where), None, f"{seen}: a number to predict", "classification")
    if len(values) > MAX_CLASSES:
        raise refusal(path, f"the target has {seen} (the limit is {MAX_CLASSES} classes); ask for the task 'regression'")
    names = tuple((spelled or _plain)(values))
    other: Task | None = None if y.dtype.kind == "b" else "regression"
    return Target(ids.astype(np.int64), names, f"{len(values)} {what}, so classes: {listed(names)}", other)


def _several(path: Path, y: Array, task: Task | None, where: Callable[..., str]) -> Target:
    """Rows of numbers to predict."""
    one_hot = ((y == 0) | (y == 1)).all() and (y.sum(axis=1) == 1).all()
    if task == "classification" or (task is None and (y.dtype.kind in "biu" or one_hot)):
        raise refusal(
            path,
            f"y has shape {y.shape} but class ids have (samples,); save y.argmax(axis=1) if it is one-hot, "
            "or ask for the task 'regression'",
        )
    return Target(_regression(path, y, where), None, f"{y.shape[1]} numbers per sample to predict", None)


def _regression(path: Path, y: Array, where: Callable[..., str]) -> Array:
    y = as_float(y)
    check_finite(path, y, where)
    return y


def _plain(values: Array) -> list[str]:
    return [plain(value) for value in values]


def plain(value: Any) -> str:
    """A number or truth value as people write it: a whole one without a point."""
    is_whole = value.dtype.kind == "f" and value == np.floor(value) and abs(value) < 1e15
    return str(int(value)) if is_whole else str(value)


def spelling(labels: Sequence[str]) -> Callable[[Array], list[str]]:
    """Numbers as the texts `labels` have them; of several ways to write one, the first; `3` for what a program wrote as
    `3.000e+00`."""
    written: dict[float, str] = {}
    for label in labels:
        written.setdefault(float(label), label)
    return lambda values: [plain(v) if re.search("[eE]", written[float(v)]) else written[float(v)] for v in values]


def of_texts(path: Path, labels: list[str], codes: Array, task: Task | None, where: Callable[..., str]) -> Target:
    """The classes that texts are, their ids in the sorted order of the names; else `DataError`.

    `labels` are the distinct names, and `codes`, int `(N,)`, says which of them each sample has.
    """
    if task == "regression":
        raise refusal(
            path,
            f"the target is text such as {shown(labels[0])}, but regression needs numbers; "
            "correct it, or ask for the task 'classification'",
        )
    if codes.ndim != 1:
        raise refusal(path, f"the text labels have shape {codes.shape} but must be (samples,); save one for each row of X")
    if len(labels) > MAX_CLASSES:
        raise refusal(
            path,
            f"the target has {len(labels)} different texts (the limit is {MAX_CLASSES} classes); "
            "name the right target column",
        )
    for code, label in enumerate(labels):
        if label.strip().lower() in ("", "nan"):
            row = int((codes == code).argmax())
            raise refusal(path, f"{where(row)} is {shown(label)}, as missing values are; name it or remove that sample")
    order = np.array(sorted(range(len(labels)), key=labels.__getitem__))
    names = tuple(labels[i] for i in order)
    told = f"{len(names)} different texts, so classes: {listed(names)}"
    return Target(np.argsort(order)[codes].astype(np.int64), names, told, None)
