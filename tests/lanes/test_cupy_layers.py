"""Dropout and LayerNorm of the CuPy lane: the portable masks bit for bit, the portable numbers to the bound, few kernels."""

from __future__ import annotations

import numpy as np
import pytest
from test_normalization import bounds, layer_on, random, reference

from anyarray_linear import Dropout, lanes

on_cuda = pytest.mark.parametrize("backend", ["cupy:0", "cupy:1"], indirect=True)
dtypes = pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
counted = pytest.mark.stand_in  # which counts launches


def layouts(x):
    """The array, and views that hold the same elements in other orders or places of memory."""
    yield x
    if x.ndim > 1:
        spaced = type(x)((2 * x.shape[0], *x.shape[1:-1], x.shape[-1] + 3), x.dtype)
        spaced[...] = 7
        for view in (spaced[::2, ..., 1:-2], type(x)(x.shape[::-1], x.dtype).T):
            view[...] = x
            yield view


@on_cuda
@dtypes
@pytest.mark.parametrize("shape", [(), (5,), (0,), (0, 3), (3, 0), (40, 5, 3), (700, 401)], ids=str)
def test_masks_have_the_portable_bits_and_elements_the_portable_values(backend, shape, dtype):
    with backend.computing():
        for X in layouts(backend.asarray(random(*shape, dtype=dtype))):
            for rate, seed, step in ((0.5, 0, 0), (0.1, 3, 1), (0.9, 2**63 - 1, 2**40 + 5), (0.0, 1, 1), (0.99, 5, 7)):
                layers = Dropout(rate, seed=seed), Dropout(rate, seed=seed)
                for layer in layers:
                    layer.step = step
                Z, cache = layers[0].forward(X)
                dX, _ = layers[0].gradients(X, cache)
                with lanes.off():
                    expected, portable = layers[1].forward(X)
                K = backend.to_numpy(cache["K"])
                assert K.dtype == bool
                assert np.array_equal(K, backend.to_numpy(portable["K"]))
                for found in (Z, dX):
                    assert backend.owns(found)
                    assert found.dtype == X.dtype
                    assert found.shape == X.shape
                    found, theirs = (backend.to_numpy(x) for x in (found, expected))
                    if dtype != "float16":
                        assert np.array_equal(found, theirs)
                        continue
                    # float16 arrays have the factor rounded there, and not here; then both round the product
                    allowed = 2 * np.finfo(dtype).eps * abs(theirs.astype(float)) + np.finfo(dtype).smallest_subnormal
                    assert (abs(found.astype(float) - theirs) <= allowed).all()


@on_cuda
def test_what_was_not_kept_is_zero_whatever_it_was(backend):
    layer, X = Dropout(0.5, seed=0), backend.asarray(np.full(64, np.inf), "float32")
    Z, cache = layer.forward(X)
    K = backend.to_numpy(cache["K"])
    for found in (Z, layer.gradients(X, cache)[0]):
        assert np.array_equal(backend.to_numpy(found), np.where(K, np.inf, 0))


SHAPES = [(5,), (4, 33), (2, 3, 8), (1, 1), (300, 4), (1000, 70), (3, 1100)]


@on_cuda
@dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_normalised_rows_and_their_gradients_are_the_portable_ones_to_the_bound(backend, shape, dtype):
    layer = layer_on(backend, shape[-1], dtype)
    x, dz = random(*shape, dtype=dtype), random(*shape, seed=3, dtype=dtype)
    w, b = backend.to_numpy(layer.W), backend.to_numpy(layer.b)
    rows = x.reshape(-1, shape[-1])  # by rows, as the reference forms a Jacobian for each
    parts = [(rows[i : i + 1], dz.reshape(rows.shape)[i : i + 1]) for i in range(len(rows))] if shape[-1] > 100 else [(x, dz)]
    with backend.computing():
        for x, dz in parts:
            exact = reference(x, w, b, dz, layer.eps)
            allowed = bounds(x, w, b, dz, exact, dtype)
            for X, dZ in zip(layouts(backend.asarray(x)), layouts(backend.asarray(dz)), strict=True):
                results = []
                for switch in (False, True):
                    with lanes.off() if switch else backend.computing():
                        Z, cache = layer.forward(X)
                        dX, gradients = layer.gradients(dZ, cache)
                        results.append({"Z": Z, "dX": dX, "dW": gradients["W"], "db": gradients["b"], **cache})
                mine, theirs = results
                for name, found in mine.items():
                    assert backend.owns(found)
                    assert (found.dtype, found.shape) == (theirs[name].dtype, theirs[name].shape)
                    if name in allowed:
                        found, portable = (backend.to_numpy(x) for x in (found, theirs[name]))
                        assert (abs(found - exact[name]).astype(float) <= allowed[name]).all(), name
                        assert (abs(found.astype(float) - portable) <= 2 * allowed[name]).all(), name


@on_cuda
@dtypes
def test_no_rows_have_gradients_of_zero(backend, dtype):
    layer = layer_on(backend, 40, dtype)
    X = backend.asarray(np.empty((0, 40), dtype))
    Z, cache = layer.forward(X)
    dX, gradients = layer.gradients(X, cache)
    assert Z.shape == dX.shape == (0, 40)
    assert cache["R"].shape == (0, 1)
    assert all(np.array_equal(backend.to_numpy(x), np.zeros(40, dtype)) for x in gradients.values())


@on_cuda
def test_large_float16_rows_and_sums_do_not_overflow(backend):
    layer = layer_on(backend, 4, "float16")
    X = backend.asarray(np.tile([300.0, -300.0, 60000.0, -60000.0], (5000, 1)), "float16")
    Z, cache = layer.forward(X)
    ones = backend.asarray(np.ones((5000, 4)), "float16")
    assert np.isfinite(backend.to_numpy(Z)).all()
    # from 2,048 on, a float16 sum of ones stays as it is
    assert (backend.to_numpy(layer.gradients(ones, cache)[1]["b"]) == 5000).all()


@on_cuda
@dtypes
def test_equal_inputs_have_equal_bits(backend, dtype):
    layer, X = layer_on(backend, 70, dtype), backend.asarray(random(1000, 70, dtype=dtype))

    def bits():
        Z, cache = layer.forward(X)
        dX, gradients = layer.gradients(Z, cache)
        return [backend.to_numpy(x).tobytes() for x in (Z, dX, *gradients.values())]

    assert bits() == bits()


@counted
@on_cuda
@pytest.mark.parametrize(("N", "backward"), [(128, 2), (129, 3)])
def test_a_layer_is_so_few_kernels(backend, N, backward):
    from cupy_backends.cpu_counters import count

    X, norm, drop = backend.asarray(random(N, 40)), layer_on(backend, 40, "float64"), Dropout(0.5, seed=0)
    frozen = layer_on(backend, 40, "float64")
    frozen.trainable = False
    for layer, back in ((norm, backward), (frozen, 1), (drop, 1)):
        _, cache = layer.forward(X)
        for work, launches in ((lambda: layer.forward(X), 1), (lambda: layer.gradients(X, cache), back)):  # noqa: B023
            for _ in range(3):  # until memory is there, too
                work()
            with count() as c:
                work()
            counts = dict(vars(c))
            assert counts.pop("launches") == launches
            assert set(counts.values()) == {0}, list(counts.items())
