"""Activations: their values against float64, their derivatives against a complex step, and their edges."""

from __future__ import annotations

import contextlib
import copy
import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anyarray_linear import GELU, Layer, Linear, ReLU, Sigmoid, SiLU, Tanh, lanes


def GELUTanh():  # a maker of layers, as the classes are
    return GELU(approximate="tanh")


ACTIVATIONS = (ReLU, Tanh, Sigmoid, SiLU, GELU, GELUTanh)


@np.vectorize
def gelu(x):
    return x / 2 * math.erfc(-x / math.sqrt(2))


@np.vectorize
def gelu_derivative(x):
    return math.erfc(-x / math.sqrt(2)) / 2 + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


FORMULA = {  # as the papers write them; they take complex arguments too
    ReLU: lambda x: np.maximum(x, 0),
    Tanh: np.tanh,
    Sigmoid: lambda x: 1 / (1 + np.exp(-x)),
    SiLU: lambda x: x / (1 + np.exp(-x)),
    GELU: lambda x: gelu(x) if x.size else x,
    GELUTanh: lambda x: x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def derivative(activation, x):
    """The derivative of the formula by a complex step, `Im f(x + ih) / h`: no difference, so exact to rounding."""
    if activation is ReLU:
        return (x > 0).astype(np.float64)
    if activation is GELU:  # no complex erf; by the formula of the derivative, which test_erf differentiates numerically
        return gelu_derivative(x) if x.size else x
    return np.imag(FORMULA[activation](x + 1e-100j)) / 1e-100


def close(found, expected, scale, dtype):
    """Within 32 roundings of `scale`: `exp`, `tanh` and `erfc` are good to 4 to 12, and each formula has some more."""
    return np.all(np.abs(found.astype(np.float64) - expected) <= 32 * np.finfo(dtype).eps / 2 * scale)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@given(
    shape=st.sampled_from([(), (3,), (2, 0), (1, 4), (2, 1, 3), (2, 3, 2, 1)]),  # few: JAX compiles for each
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    spread=st.sampled_from([0.01, 1.0, 6.0]),
    seed=st.integers(0, 2**32),
)
def test_values_and_derivatives_are_right_to_rounding(backend, activation, shape, dtype, spread, seed):
    assume(dtype in backend.dtypes)
    rng = np.random.default_rng(seed)
    x, dz = (spread * rng.standard_normal(shape)).astype(dtype), rng.standard_normal(shape).astype(dtype)
    X, dZ = backend.asarray(x), backend.asarray(dz)
    layer, wide = activation(), x.astype(np.float64)

    Z, cache = layer.forward(X)
    dX, gradients = layer.gradients(dZ, cache)

    assert gradients == {}
    for result in (Z, dX):
        assert tuple(result.shape) == shape
        assert result.dtype == X.dtype
        assert shape == () or backend.owns(result)
    # tanh and sigmoid are at most 1; SiLU and GELU are x times such a g, so f' = g + x g', and 1 - tanh^2 has cancelled
    slope = 1 + 0.135 * wide**2 if activation is GELUTanh else 1
    assert close(backend.to_numpy(Z), FORMULA[activation](wide), 1 + np.abs(wide), dtype)
    assert close(backend.to_numpy(dX), dz * derivative(activation, wide), np.abs(dz) * (1 + np.abs(wide) * slope), dtype)
    assert np.array_equal(backend.to_numpy(layer(X)), backend.to_numpy(Z))
    assert np.array_equal(backend.to_numpy(X), x), "X was written to"
    assert np.array_equal(backend.to_numpy(dZ), dz), "dZ was written to"


@pytest.mark.parametrize("layer", [ReLU(), Tanh(), Sigmoid(), SiLU(), GELU(), GELUTanh()], ids=repr)
@pytest.mark.parametrize("lanes_off", [False, True])
def test_an_array_without_axes_gives_arrays_without_axes(backend, layer, lanes_off):
    X, dZ = backend.asarray(0.5, "float32"), backend.asarray(2.0, "float32")
    with lanes.off() if lanes_off else contextlib.nullcontext():
        Z, cache = layer.forward(X)
        for result in (Z, layer(X), layer.gradients(dZ, cache)[0]):
            assert type(result) is type(X)
            assert result.shape == ()
            assert backend.owns(result)


def test_relu_keeps_what_is_positive_and_passes_nothing_at_zero(backend):
    layer = ReLU()
    Z, cache = layer.forward(backend.asarray([-2.0, -0.0, 0.0, 3.0], "float32"))
    assert np.array_equal(backend.to_numpy(Z), [0, 0, 0, 3])
    dX, _ = layer.gradients(backend.asarray([5.0, 5.0, 5.0, 5.0], "float32"), cache)
    assert np.array_equal(backend.to_numpy(dX), [0, 0, 0, 5])


def test_relu_blocks_even_an_infinite_gradient(backend):
    _, cache = ReLU().forward(backend.asarray([-1.0, 1.0], "float32"))
    dX, _ = ReLU().gradients(backend.asarray([np.inf, np.inf], "float32"), cache)
    assert np.array_equal(backend.to_numpy(dX), [0, np.inf])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_NaN_stays_a_NaN_and_does_not_spread(backend, activation):
    layer = activation()
    Z, cache = layer.forward(backend.asarray([np.nan, 1.0], "float32"))
    assert np.array_equal(np.isnan(backend.to_numpy(Z)), [True, False])
    dX, _ = layer.gradients(backend.asarray([1.0, 1.0], "float32"), cache)
    assert not np.isnan(backend.to_numpy(dX)[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_nothing_overflows_at_the_ends_of_the_range(backend, activation, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"layers do not compute in {dtype} here")
    layer, large = activation(), {"float16": 60_000.0, "float32": 1e12, "float64": 1e100}[dtype]
    x = np.asarray([-large, -1000, -300, -40, 40, 300, 1000, large])
    Z, cache = layer.forward(backend.asarray(x, dtype))
    dX, _ = layer.gradients(backend.asarray(np.ones(8), dtype), cache)
    ends = {Tanh: (-1, 1, 0, 0), Sigmoid: (0, 1, 0, 0)}.get(activation, (0, x[4:], 0, 1))
    tiny = 100 * np.finfo(dtype).eps
    Z, dX = backend.to_numpy(Z).astype(np.float64), backend.to_numpy(dX).astype(np.float64)
    assert np.allclose(Z[:4], ends[0], rtol=0, atol=tiny)
    assert np.allclose(Z[4:], ends[1], rtol=np.finfo(dtype).eps, atol=0)
    assert np.allclose(dX[:4], ends[2], rtol=0, atol=tiny)
    assert np.allclose(dX[4:], ends[3], rtol=0, atol=tiny)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_an_activation_is_a_layer_without_parameters(backend, activation):
    layer = activation()
    assert isinstance(layer, Layer)
    assert layer.parameters() == {}
    assert layer.to(backend.device, "float32") is layer
    X = backend.asarray([[1.0, -1.0]], "float32")
    _, cache = layer.forward(X)
    before = dict(vars(layer))
    dX = layer.backward(X, cache)
    assert np.array_equal(backend.to_numpy(dX), backend.to_numpy(layer.gradients(X, cache)[0]))
    assert layer.backward(X, cache, accumulate=True, needs_dX=False) is None
    assert layer.gradients(X, cache, needs_dX=False) == (None, {})
    assert vars(layer) == before
    assert repr(copy.deepcopy(layer)) == repr(layer)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("X", "error"), [([1.0], TypeError), (1.0, TypeError), ("int64", TypeError), ("bool", TypeError), ("complex64", TypeError)]
)
def test_an_X_that_is_no_float_array_is_refused(backend, activation, X, error):
    X = backend.asarray([1], X) if isinstance(X, str) else X
    for call in (activation(), activation().forward):
        with pytest.raises(error, match=r"^X is .*(asarray\(X|astype\(X)"):
            call(X)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_dZ_that_does_not_fit_is_refused(backend, activation):
    layer = activation()
    _, cache = layer.forward(backend.asarray(np.ones((2, 3)), "float32"))
    for shape in ((3,), (2, 1), (1, 3), (2, 3, 1), ()):
        with pytest.raises(ValueError, match=r"^dZ has shape .* must have \(2, 3\)"):
            layer.gradients(backend.asarray(np.ones(shape), "float32"), cache)
    for dtype in ("float64", "int32"):
        with pytest.raises(TypeError, match=rf"^dZ is {dtype} .*astype\(dZ"):
            layer.backward(backend.asarray(np.ones((2, 3)), dtype), cache)
    with pytest.raises(TypeError, match=r"^dZ is a list"):
        layer.gradients([[1.0] * 3] * 2, cache)
    for no_cache in ({}, {"W": 1}, None, [cache]):
        with pytest.raises(TypeError, match=r"^cache is .*second result of .*forward"):
            layer.gradients(backend.asarray(np.ones((2, 3)), "float32"), no_cache)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_derivative_works_on_another_device_than_the_current_one_and_keeps_no_copy(backend, activation):
    X = backend.asarray(np.ones((2, 3)), "float32")
    Z, cache = activation().forward(X)
    assert list(cache) in (["Z"], ["X"])
    assert cache.get("Z", Z) is Z
    assert cache.get("X", X) is X


@pytest.mark.parametrize("approximate", ["erf", None, True, ""])
def test_gelu_has_two_forms_and_no_other(approximate):
    with pytest.raises(ValueError, match=r'approximate is .*"none".*"tanh"'):
        GELU(approximate=approximate)
    assert GELU("tanh").approximate == "tanh"
    assert GELU().approximate == "none"
    assert [repr(GELU()), repr(GELU("tanh"))] == ["GELU()", "GELU(approximate='tanh')"]


def test_silu_and_gelu_are_between_relu_and_the_identity_far_from_zero():
    X = np.asarray([-30.0, 30.0])
    for activation in (SiLU, GELU):
        assert np.allclose(activation()(X), ReLU()(X), rtol=0, atol=1e-11)


def test_activations_compose_with_a_layer_in_its_dtype(backend):
    layer = Linear(3, 4, dtype="float32", device=backend.device, seed=0)
    for activation in ACTIVATIONS:
        Z = activation()(layer(backend.asarray(np.ones((2, 3)), "float32")))
        assert backend.owns(Z)
        assert Z.dtype == backend.xp.float32
