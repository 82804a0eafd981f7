"""The error function: against the C library's, in units of the last place, and against its own integral."""

from __future__ import annotations

import math

import numpy as np
import pytest

from anyarray_linear import GELU
from anyarray_linear.erf import MIDDLE, SMALL, erf, normal_cdf

EDGES = [0.0, -0.0, SMALL, -SMALL, np.nextafter(SMALL, 1), MIDDLE, -MIDDLE, np.nextafter(MIDDLE, 5), 27.0, 40.0, -1e12]


def points(dtype):
    return np.concatenate([np.linspace(-6, 6, 4001), np.logspace(-30, 0, 200), EDGES]).astype(dtype)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_erf_is_right_to_a_few_units_in_the_last_place(backend, dtype):
    x = points(dtype)
    expected = np.asarray([math.erf(float(v)) for v in x])
    with backend.computing():
        found = backend.to_numpy(erf(backend.xp, backend.asarray(x)))
    assert found.dtype == x.dtype
    # Cody's approximations are exact beyond float64; their some 20 roundings are those of numbers of one size
    assert np.abs(found - expected).max(initial=0, where=np.abs(x) > 1e-30) < 8 * np.finfo(dtype).eps
    ulp = np.spacing(np.maximum(np.abs(expected), 1e-30).astype(dtype)).astype(float)
    assert (np.abs(found - expected) <= 6 * ulp).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_nothing_cancels_in_the_tail_of_the_normal_distribution(backend, dtype):
    x = points(dtype)
    x = x[x > -9]
    expected = np.asarray([math.erfc(-float(v) / math.sqrt(2)) / 2 for v in x])
    with backend.computing():
        found = backend.to_numpy(normal_cdf(backend.xp, backend.asarray(x)))
    # the exponent -x^2/2 has a relative error of some roundings, and its exponential that times x^2
    assert (np.abs(found - expected) <= (8 + 2 * x.astype(float) ** 2) * np.finfo(dtype).eps * expected).all()


def test_the_ends_of_the_range_and_NaN(backend):
    with backend.computing():
        found = erf(backend.xp, backend.asarray([np.inf, -np.inf, np.nan, 1e300, -1e300]))
    assert np.array_equal(backend.to_numpy(found), [1, -1, np.nan, 1, -1], equal_nan=True)


def test_the_derivative_of_gelu_is_that_of_its_value():
    x, h = np.linspace(-8, 8, 333), 1e-5
    _, cache = GELU().forward(x)
    dX, _ = GELU().gradients(np.ones_like(x), cache)
    slope = (GELU()(x + h) - GELU()(x - h)) / (2 * h)
    # the third derivative is at most 2, so the difference is off by h^2/3; and rounding of values up to 8, divided by 2 h
    assert np.abs(dX - slope).max() < h**2 + 32 * np.finfo(float).eps / h


def test_where_gelu_s_forms_differ_is_known():
    x = np.linspace(-6, 6, 2001)
    assert 1e-4 < np.abs(GELU()(x) - GELU("tanh")(x)).max() < 5e-4
