"""Holding out a part of the data to test on."""

from __future__ import annotations

import numpy as np

from ..arrays.checks import check_array
from ..arrays.place import Array
from ._checks import DataError


def split(X: Array, y: Array, *, test: float = 0.2, seed: int = 0) -> tuple[Array, Array, Array, Array]:
    """Split samples at random into a part to train on and a part to test on.

    Where `y` holds class ids (whole numbers, one axis), each class gives both parts its share, to one sample.

    Args:
        X: NumPy array `(N, ...)`.
        y: NumPy array `(N, ...)`.
        test: the fraction to hold out, above 0 and below 1.
        seed: for the host's NumPy `Generator`; one seed gives one split.

    Returns:
        `X_train, y_train, X_test, y_test`, each in random order, `round(test * N)` samples in the last two.

    Raises:
        TypeError: `X` or `y` is no array, such as a list or a table of pandas.
        ValueError: `test` is not such a fraction, or `X` and `y` differ in length.
        DataError: there are too few samples to have one in each part.

    >>> X, y = np.arange(20).reshape(10, 2), np.array([0, 1] * 5)
    >>> X_train, y_train, X_test, y_test = split(X, y)
    >>> X_train.shape, np.bincount(y_test).tolist()
    ((8, 2), [1, 1])
    """
    check_array("X", X)
    check_array("y", y)
    if not 0 < test < 1:
        raise ValueError(f"test is {test}, but must be a fraction above 0 and below 1, such as test=0.2")
    N = len(X)
    if len(y) != N:
        raise ValueError(f"y has {len(y)} samples but X has {N}; each row of X needs one target")
    order = np.random.default_rng(seed).permutation(N)
    ranked = order[np.argsort(y[order], kind="stable")] if y.ndim == 1 and y.dtype.kind in "iu" else order
    # Along `ranked`, class after class, every (1 / test)-th sample is held out: any run of n samples gives n * test of
    # them, to one sample, and so does each class.
    held_out = np.empty(N, bool)
    held_out[ranked] = np.diff(np.floor(np.arange(N + 1) * test + 0.5)) > 0
    if held_out.all() or not held_out.any():
        raise DataError(f"test={test} of {N} samples leaves one part empty; give more data or another fraction")
    chosen = held_out[order]
    train_rows, test_rows = order[~chosen], order[chosen]
    return X[train_rows], y[train_rows], X[test_rows], y[test_rows]
