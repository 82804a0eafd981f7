"""Which columns of a table are features: those that were asked for, and those that should not be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..arrays.place import Array
from ._checks import listed, refusal, shown
from ._csv import Layout
from ._targets import Target

MANY = 20
"""So few rows may have a different whole number each by chance."""


def chosen(
    path: Path, names: list[str], target: str | None, features: Sequence[str] | None, drop: Sequence[str]
) -> Layout:
    """The layout of a table with a header: the target (the last column that is not left out, if it is not named), and the
    features (all other columns, if they are not named)."""
    for name in (*drop, *(features or ()), *([] if target is None else [target])):
        if name not in names:
            raise refusal(path, f"has no column {shown(name)} in its header (it has {listed(names)}); name one of these")
    left = [name for name in names if name not in drop]
    if not left:
        raise refusal(path, "has no column left when all of them are dropped; drop fewer")
    target = left[-1] if target is None else target
    features = [name for name in left if name != target] if features is None else [n for n in features if n not in drop]
    if target in drop or target in features:
        what = "left out (drop)" if target in drop else "a feature"
        raise refusal(path, f"{shown(target)} is {what} and the target too; name another column as the target")
    if not features:
        raise refusal(path, f"has no column left for the features beside the target {shown(target)}; name other ones")
    return Layout(names, [names.index(name) for name in features], names.index(target))


def looking_like_row_numbers(X: Array, target: Target, names: Sequence[str]) -> list[str]:
    """A warning for each column that can say which row it is and nothing else, such as an `id`.

    That is a column of whole numbers that are all different; or, in a file whose classes come one after the other, one that
    never goes down: it says the class by the order of the file.
    """
    found = []
    N, D = X.shape
    if N < MANY or D == 1:
        return []
    in_order = target.classes is not None and np.count_nonzero(np.diff(target.y)) == len(target.classes) - 1
    for x, name in zip(X.T, names, strict=True):
        steps = np.diff(x)
        rising = bool((steps >= 0).all()) or bool((steps <= 0).all())
        if (steps != 0).all() and len(np.unique(x)) == N and (x == np.floor(x)).all():
            found.append(f"{name} has another whole number in every row, as an id has; if it is one, leave it out (drop)")
        elif in_order and rising and steps.any():
            found.append(f"{name} is sorted as the classes are, so it may tell them by the order of the file; "
                         "if it has no meaning, leave it out (drop)")  # fmt: skip
    return found
