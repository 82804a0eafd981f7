"""The fingerprint of data: which changes it sees, and that place, dtype and the way of reading are none."""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear.arrays import fingerprint as module
from anyarray_linear.arrays.fingerprint import fingerprint

X = np.random.default_rng(0).standard_normal((50, 3))


@pytest.mark.parametrize("row", [0, 1, 24, 49])
def test_a_single_value_counts(row):
    other = X.copy()
    other[row, 1] += 1
    assert fingerprint(other, "float32") != fingerprint(X, "float32")


def test_the_shape_counts():
    assert fingerprint(X.reshape(25, 6), "float32") != fingerprint(X, "float32")


def test_what_training_does_not_see_does_not_count():
    assert fingerprint(X + 1e-12, "float32") == fingerprint(X, "float32")


def test_data_in_a_file_is_read_a_part_at_a_time(tmp_path, monkeypatch):
    whole = fingerprint(X, "float32")
    np.save(tmp_path / "X.npy", X)
    monkeypatch.setattr(module, "AT_ONCE", 10)  # 3 rows
    assert fingerprint(np.load(tmp_path / "X.npy", mmap_mode="r"), "float32") == whole


def test_it_is_the_same_on_every_backend(backend):
    rows = np.asarray([3, 3, 0, 41])
    x = backend.asarray(X.astype("float32"))
    for numbers in (None, 60):
        assert fingerprint(x, "float32", numbers=numbers) == fingerprint(X, "float32", numbers=numbers)
        assert fingerprint(x, "float32", rows, numbers=numbers) == fingerprint(X[rows], "float32", numbers=numbers)


@pytest.mark.parametrize(("numbers", "looked_at"), [(60, 20), (0, 16)])
def test_of_large_data_rows_spread_over_all_are_looked_at(numbers, looked_at):
    one = fingerprint(X, "float64", numbers=numbers)
    seen = [fingerprint(X + (np.arange(50) == i)[:, None], "float64", numbers=numbers) != one for i in range(50)]
    assert sum(seen) == looked_at
    assert seen[0]
    assert seen[-1]
    assert max(np.diff(np.flatnonzero(seen))) <= 4
