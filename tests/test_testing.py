"""The checks of `anyarray_linear.testing`, themselves checked against exact rational arithmetic and simulated hardware."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import Unavailable, _cuda, make_backend
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from spoiled import Spoiled

from anyarray_linear import GELU, Linear, ReLU, Sequential, Tanh
from anyarray_linear.testing import (
    adjoint_check,
    assert_equivalent,
    compare,
    gamma,
    gradcheck,
    linear_error_bounds,
    linear_reference,
    unit_roundoff,
    usable_devices,
)


def operands(N=6, in_features=40, out_features=7, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = (N, in_features), (out_features, in_features), (1, out_features), (N, out_features)
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def exactly(A, B):
    """`A @ B` in rational numbers."""
    to_fractions = np.vectorize(Fraction, otypes=[object])
    return to_fractions(A.astype(np.float64)) @ to_fractions(B.astype(np.float64))


# --- bounds


@pytest.mark.parametrize(("dtype", "u"), [("float16", 2**-11), ("float32", 2**-24), ("float64", 2**-53)])
def test_unit_roundoff_is_half_the_gap_above_one(dtype, u):
    one = np.ones((), dtype=dtype)
    assert unit_roundoff(dtype) == u == float(np.nextafter(one, np.asarray(2, dtype=dtype)) - one) / 2


def test_gamma_bounds_the_product_of_n_roundings():
    u, n = Fraction(1, 2**11), 100
    assert (1 + u) ** n - 1 <= Fraction(gamma(n, float(u)))
    assert 1 - (1 - u) ** n <= Fraction(gamma(n, float(u)))
    assert gamma(2**24, 2**-24) == float("inf")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(data=st.data())
def test_hard_limit_holds_for_any_values_in_exact_arithmetic(dtype, data):
    width = 32 if dtype == "float32" else 64
    N, K, M = data.draw(st.tuples(st.integers(0, 4), st.integers(1, 9), st.integers(1, 4)))
    floats = st.floats(allow_nan=False, allow_infinity=False, width=width)
    X, W, b, dZ = (
        data.draw(hnp.arrays(dtype, shape, elements=floats)) for shape in ((N, K), (M, K), (1, M), (N, M))
    )
    bounds = linear_error_bounds(X, W, b, dZ)
    with np.errstate(all="ignore"):
        computed = {"Z": X @ W.T + b, "dX": dZ @ W, "dW": dZ.T @ X, "db": dZ.sum(0, keepdims=True)}
    exact = {"Z": exactly(X, W.T) + exactly(np.ones((N, 1)), b), "dX": exactly(dZ, W), "dW": exactly(dZ.T, X)}
    exact["db"] = exactly(np.ones((1, N)), dZ)
    for name, bound in bounds.items():
        assert bound.shape == computed[name].shape
        assert bound.dtype == np.float64
        for index in np.ndindex(bound.shape):
            if np.isfinite(bound[index]):
                error = abs(Fraction(float(computed[name][index])) - exact[name][index])
                assert error <= Fraction(float(bound[index])), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_reference_is_the_exact_product_rounded_once(dtype):
    X, W, b, dZ = operands(dtype=dtype)
    W[:, 1] = -W[:, 0]  # with X alike in these columns, the sums cancel: a plain sum in float64 would lose digits
    X[:, :2] = 1e6 * X[:, :1]
    reference = linear_reference(X, W, b, dZ)
    exact = {"Z": exactly(X, W.T) + exactly(np.ones((len(X), 1)), b), "dX": exactly(dZ, W), "dW": exactly(dZ.T, X)}
    for name, fractions in exact.items():
        rounded = np.vectorize(float)(fractions)
        gap = np.abs(reference[name] - rounded)
        allowed = 2**-52 * np.abs(rounded) + 1e-6 * linear_error_bounds(X, W, b, dZ)[name]
        if np.finfo(np.longdouble).nmant > 60 or dtype == "float32":
            assert np.all(gap <= allowed), name


def test_hard_limit_of_one_product_is_tight():
    # n = 1: one rounding, whose error comes as near to u |x w| as the values allow
    X = np.linspace(1, 1.99, 1000, dtype=np.float32)[:, None]
    W = np.asarray([[1.001]], dtype=np.float32)
    error = np.abs((X @ W.T).astype(np.float64) - linear_reference(X, W)["Z"])
    assert 0.9 < np.max(error / linear_error_bounds(X, W)["Z"]) <= 1


def test_structured_data_breaks_the_sharp_gate_but_not_the_hard_limit():
    N = 65_536
    X, W, dZ = np.zeros((N, 1), dtype="float32"), np.ones((1, 1), dtype="float32"), np.full((N, 1), 0.1, dtype="float32")
    one_by_one = float(np.cumsum(dZ, dtype=np.float32)[-1])
    error = abs(one_by_one - linear_reference(X, W, dZ=dZ)["db"].item())
    assert error > linear_error_bounds(X, W, dZ=dZ, sharp=True)["db"].item()
    assert error < linear_error_bounds(X, W, dZ=dZ)["db"].item()


def test_float16_bound_rejects_a_sum_that_stalls():
    N = 4096
    X, W, dZ = np.zeros((N, 1), dtype="float16"), np.ones((1, 1), dtype="float16"), np.ones((N, 1), dtype="float16")
    stalled = float(np.cumsum(dZ, dtype=np.float16)[-1])
    assert stalled == 2048  # 2048 + 1 is not a float16
    reference = linear_reference(X, W, dZ=dZ)["db"].item()
    assert reference == N
    assert abs(stalled - reference) > 100 * linear_error_bounds(X, W, dZ=dZ)["db"].item()


def test_float16_bound_allows_a_float32_sum_rounded_at_the_end():
    X, W, b, _ = operands(in_features=500, dtype="float16")
    summed = X.astype(np.float32) @ W.T.astype(np.float32)
    Z = summed.astype(np.float16) + b
    share = np.abs(Z - linear_reference(X, W, b)["Z"]) / linear_error_bounds(X, W, b)["Z"]
    assert share.max() <= 1


@pytest.mark.parametrize("cut", [True, False], ids=["cut off", "rounded"])
def test_tf32_bounds_allow_operands_of_eleven_bits_and_float32_bounds_do_not(cut):
    def tf32(x):
        bits = x.view(np.int32) + (0 if cut else 2**12)
        return (bits & ~np.int32(2**13 - 1)).view(np.float32)

    X, W, b, _ = operands(in_features=512)
    error = np.abs(tf32(X) @ tf32(W).T + b - linear_reference(X, W, b)["Z"])
    for sharp in (False, True):
        assert np.all(error <= linear_error_bounds(X, W, b, sharp=sharp, tf32=True)["Z"])
    assert not np.all(error <= linear_error_bounds(X, W, b, sharp=True)["Z"])


def test_hard_limit_allows_subnormal_numbers_to_be_flushed_to_zero():
    def flush(x):
        return np.where(np.abs(x) < np.finfo(np.float32).smallest_normal, np.float32(0), x)

    X, W, _, _ = operands()
    X *= np.float32(1e-38)
    Z = np.zeros((len(X), len(W)), dtype=np.float32)
    for k in range(X.shape[1]):
        Z = flush(Z + flush(flush(X[:, k, None]) * flush(W[None, :, k])))
    error = np.abs(Z - linear_reference(X, W)["Z"])
    assert error.max() > 0
    assert np.all(error <= linear_error_bounds(X, W)["Z"])


def test_nothing_is_proven_where_the_dtype_may_overflow():
    X, W = np.asarray([[3e38, -3e38]], dtype=np.float32), np.asarray([[2, 2], [0, 1e-38]], dtype=np.float32)
    assert np.isinf(linear_error_bounds(X, W)["Z"]).tolist() == [[True, False]]


# --- assert_equivalent


def test_correct_layer_is_equivalent_and_the_share_is_reported(backend):
    for dtype in backend.dtypes:
        X, W, b, dZ = operands(in_features=512, dtype=dtype)
        layer = Linear.from_arrays(backend.asarray(W), backend.asarray(b))
        found = assert_equivalent(layer, X, dZ, devices=[backend.device], sharp=True)
        assert [(a.output, a.shape, a.dtype) for a in found] == [
            (name, x.shape, dtype) for name, x in zip(("Z", "dX", "dW", "db"), (dZ, X, W, b), strict=True)
        ]
        assert all(0 <= a.share <= 1 and 0 <= a.sharp_share <= 1 and not a.complaint for a in found)


def test_layer_without_bias_has_no_db_to_compare():
    X, W, _, dZ = operands()
    found = assert_equivalent(Linear.from_arrays(W), X, dZ, devices=["cpu"])
    assert [a.output for a in found] == ["Z", "dX", "dW"]


@pytest.mark.parametrize(("output", "index"), [("Z", (5, 6)), ("dX", (0, 39)), ("dW", (6, 0)), ("db", (0, 3))])
def test_failure_says_which_output_where_by_how_much_and_on_which_device(output, index):
    X, W, b, dZ = operands()
    layer = Spoiled.from_arrays(W, b)
    layer.spoil = (output, index, 0.5)
    message = rf"{output}\[{index[0]}, {index[1]}\] on cpu \(float32\) .* off by 0\.5, .* times the hard limit .* 1 of \d+"
    with pytest.raises(AssertionError, match=message):
        assert_equivalent(layer, X, dZ, devices=["cpu"])


def test_not_a_number_is_never_equivalent():
    X, W, b, dZ = operands()
    layer = Spoiled.from_arrays(W, b)
    layer.spoil = ("dX", (0, 0), np.nan)
    with pytest.raises(AssertionError, match=r"dX\[0, 0\] .* is nan"):
        assert_equivalent(layer, X, dZ, devices=["cpu"])


def test_wrong_shape_or_dtype_is_never_equivalent():
    class Wrong(Linear):
        def gradients(self, dZ, cache, *, needs_dX=True):
            dX, gradients = super().gradients(dZ, cache, needs_dX=needs_dX)
            return dX.astype(np.float64), {**gradients, "b": gradients["b"][0]}

    X, W, b, dZ = operands()
    with pytest.raises(AssertionError, match=r"dX on cpu .* is float64[^\n]*\ndb .* shape \(7,\)"):
        assert_equivalent(Wrong.from_arrays(W, b), X, dZ, devices=["cpu"])


class Forgetful(Linear):
    """A layer whose gradients are changed by `change`, a function of `dX` and the dict."""

    change = staticmethod(lambda dX, gradients: (dX, gradients))

    def gradients(self, dZ, cache, *, needs_dX=True):
        return self.change(*super().gradients(dZ, cache, needs_dX=needs_dX))


MISSING_OR_UNKNOWN = [
    (lambda dX, g: (dX, {"W": g["W"]}), "db", "missing"),
    (lambda dX, g: (dX, {"b": g["b"]}), "dW", "missing"),
    (lambda dX, g: (dX, {**g, "W": None}), "dW", "missing"),
    (lambda dX, g: (None, g), "dX", "missing"),
    (lambda dX, g: (dX, {**g, "c": g["b"]}), "dc", "no"),
]


@pytest.mark.parametrize(("change", "output", "word"), MISSING_OR_UNKNOWN)
def test_a_missing_or_unknown_gradient_is_never_equivalent(backend, change, output, word):
    X, W, b, dZ = operands()
    layer = Forgetful.from_arrays(backend.asarray(W), backend.asarray(b))
    layer.change = change
    with pytest.raises(AssertionError, match=rf"^{output} on [^\n]* {word}[^\n]*$"):
        assert_equivalent(layer, X, dZ, devices=[backend.device])


def test_inputs_are_rounded_to_the_dtype_of_the_layer_before_the_reference_is_computed():
    X, W, b, dZ = operands(dtype="float64")
    layer = Linear.from_arrays(W.astype(np.float32), b.astype(np.float32))
    assert_equivalent(layer, X, dZ, devices=["cpu"], sharp=True)


def test_no_devices_is_an_error_and_not_a_success():
    X, W, b, dZ = operands()
    with pytest.raises(ValueError, match="devices is empty"):
        assert_equivalent(Linear.from_arrays(W, b), X, dZ, devices=[])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, 1e39])
@pytest.mark.parametrize("name", ["X", "W", "b", "dZ"])
def test_operands_that_are_not_finite_in_the_dtype_of_the_layer_are_refused(backend, name, bad):
    arrays = dict(zip(("X", "W", "b", "dZ"), operands(dtype="float64"), strict=True))
    arrays[name][0, 0] = bad
    with np.errstate(over="ignore"):
        W, b = (backend.asarray(arrays[p].astype("float32")) for p in ("W", "b"))
    layer, X, dZ = Linear.from_arrays(W, b), arrays["X"], arrays["dZ"]
    for check in (compare, lambda *operands: assert_equivalent(*operands, devices=[backend.device])):
        with pytest.raises(ValueError, match=f"^{name} has a value that is NaN or infinite in float32"):
            check(layer, X, dZ)
    if name == "X" and bad != 1e39:
        with pytest.raises(ValueError, match=r"^X has a value that is NaN or infinite in float64"):
            gradcheck(layer, backend.asarray(X))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"devices": "cpu"}, TypeError, r"devices is 'cpu', which is one; give a list: devices=\['cpu'\]"),
        ({"layer": Sequential(Linear(40, 7))}, TypeError, "layer is a Sequential"),
        ({"layer": ReLU()}, TypeError, "layer is a ReLU"),
        ({"X": np.ones((6, 41))}, ValueError, "X has shape .* in_features = 40"),
        ({"X": np.float64(1)}, ValueError, "X has shape .* in_features = 40"),
        ({"dZ": np.ones((6, 8))}, ValueError, "dZ has shape .* must have"),
        ({"dZ": np.ones((7, 6))}, ValueError, "dZ has shape .* must have"),
        ({"dZ": [[1.0]]}, TypeError, "dZ is a list"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(change, error, words):
    X, W, b, dZ = operands()
    arguments = {"layer": Linear.from_arrays(W, b), "X": X, "dZ": dZ, "devices": ["cpu"], **change}
    with pytest.raises(error, match=words):
        assert_equivalent(**arguments)


def test_default_devices_are_the_cpu_and_every_cuda_device():
    devices = usable_devices()
    assert str(devices[0]) == "cpu"
    try:
        count = len(_cuda()[1])
    except Unavailable:
        count = 0
    assert [str(device) for device in devices[1:]] == [f"cuda:{index}" for index in range(count)]
    assert "cpu" not in map(str, usable_devices("float16"))  # NumPy has no float16 products with float32 sums


@pytest.mark.parametrize("tf32", [False, True])
def test_compare_allows_what_tf32_rounds_away_where_it_is_on_and_only_there(tf32):
    try:
        make_backend("cupy:0")
    except Unavailable as why:
        pytest.skip(str(why))
    # an error between the two gates, in an otherwise right result; CuPy looks at the variable once per process
    code = """
import numpy as np
from spoiled import Spoiled
from anyarray_linear.arrays import cards
from anyarray_linear.testing import adjoint_check, compare, linear_error_bounds
rng = np.random.default_rng(0)
X, W, dZ = (rng.standard_normal(shape).astype(np.float32) for shape in ((6, 512), (7, 512), (6, 7)))
exact, tf32 = (linear_error_bounds(X, W, dZ=dZ, sharp=True, tf32=on)["Z"][0, 0] for on in (False, True))
layer = Spoiled.from_arrays(W).to("cuda:0")
layer.spoil = ("Z", (0, 0), 3 * exact)
assert 100 * exact < tf32
print(cards.float32_products(0), [bool(a.complaint) for a in compare(layer, X, dZ, "cuda:0", sharp=True)])
"""
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "CUPY_TF32": str(int(tf32))}
    found = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True, timeout=240)
    if tf32 and found.startswith("float32"):
        pytest.skip("this card has no TF32")
    assert found.strip() == f"{'TF32' if tf32 else 'float32'} [{not tf32}, False, False]"


def test_compare_reports_a_wrong_result_without_raising():
    X, W, b, dZ = operands()
    layer = Spoiled.from_arrays(W, b)
    layer.spoil = ("dW", (0, 0), 1.0)
    assert [bool(a.complaint) for a in compare(layer, X, dZ)] == [False, False, True, False]


# --- gradcheck


def test_gradient_of_a_linear_layer_is_exact_to_rounding(backend):
    X, W, b, _ = operands(dtype="float64")
    layer = Linear.from_arrays(backend.asarray(W), backend.asarray(b))
    errors = gradcheck(layer, backend.asarray(X))
    assert list(errors) == ["X", "W", "b"]
    assert max(errors.values()) < 1e-12


@pytest.mark.parametrize(("output", "index"), [("dX", (5, 3)), ("dW", (6, 0)), ("db", (0, 6))])
def test_gradcheck_notices_an_error_of_one_part_in_a_million_in_one_element(output, index):
    X, W, b, _ = operands(dtype="float64")
    layer = Spoiled.from_arrays(W, b)
    layer.spoil = (output, index, 1e-6)
    with pytest.raises(AssertionError, match=f"^{output} gives the slope [^\n]*$"):
        gradcheck(layer, X)


@pytest.mark.parametrize(("change", "output", "word"), MISSING_OR_UNKNOWN)
def test_gradcheck_notices_a_missing_or_unknown_gradient(backend, change, output, word):
    X, W, b, _ = operands(dtype="float64")
    layer = Forgetful.from_arrays(backend.asarray(W), backend.asarray(b))
    layer.change = change
    with pytest.raises(AssertionError, match=rf"^{output} is [^\n]*{word}[^\n]*$"):
        gradcheck(layer, backend.asarray(X))


def test_gradcheck_notices_a_gradient_of_another_shape():
    X, W, b, _ = operands(dtype="float64")
    layer = Forgetful.from_arrays(W, b)
    layer.change = lambda dX, g: (dX, {"W": g["W"], "b": g["b"][0]})
    with pytest.raises(AssertionError, match=r"^db is of shape \(7,\), but must have the shape of b, \(1, 7\)$"):
        gradcheck(layer, X)


def test_gradcheck_of_a_network_agrees_with_every_gradient_and_leaves_the_parameters_alone():
    network = Sequential(Linear(5, 8, seed=0), GELU(), Linear(8, 6, seed=1), ReLU(), Linear(6, 2, seed=2), Tanh())
    before = {name: value.copy() for name, value in network.parameters().items()}
    errors = gradcheck(network, np.random.default_rng(0).standard_normal((9, 5)))
    assert set(errors) == {"X", *before}
    assert max(errors.values()) < 1e-6
    for name, value in network.parameters().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_step_never_crosses_a_kink():
    # at distances from 1e-5 on, a fixed step of 1e-3 or more would cross most of these kinks
    X = np.geomspace(1e-5, 1, 40) * np.where(np.arange(40) % 2, 1, -1)
    assert gradcheck(ReLU(), X)["X"] < 1e-6


@pytest.mark.parametrize("at", [0.0, 1e-9, -1e-9])
def test_a_kink_at_the_point_or_too_near_to_it_is_told(at):
    with pytest.raises(ValueError, match=r"kink at this X or within 2e-07 of it"):
        gradcheck(ReLU(), np.asarray([1.0, at, -1.0]))


def test_a_kink_beside_outputs_whose_rounding_hides_it_is_told():
    with pytest.raises(ValueError, match="no step of X is small enough"):
        gradcheck(ReLU(), np.asarray([1e12, 1e-3, -1.0]))


@pytest.mark.parametrize("scales", [(1e8, 1, 1), (1, 1, 1e8), (1, 1e-8, 1), (1e-8, 1e-8, 1e-8), (1e20, 1, 1), (1, 1, 1e20), (1e6, 0, 1)])
def test_gradient_of_a_linear_layer_is_exact_to_rounding_at_any_scale(backend, scales):
    X, W, b, _ = operands(dtype="float64")
    X, W, b = (x * scale for x, scale in zip((X, W, b), scales, strict=True))
    layer = Linear.from_arrays(backend.asarray(W), backend.asarray(b))
    assert max(gradcheck(layer, backend.asarray(X)).values()) < 1e-12


@pytest.mark.parametrize("scales", [(1e8, 1, 1), (1, 1, 1e8)])
@pytest.mark.parametrize("output", ["dX", "dW", "db"])
def test_gradcheck_notices_a_wrong_element_of_a_linear_layer_at_any_scale(scales, output):
    X, W, b, _ = operands(dtype="float64")
    layer = Spoiled.from_arrays(W * scales[1], b * scales[2])
    layer.spoil = (output, (0, 0), 1e-6 * (scales[0] if output == "dW" else 1))
    with pytest.raises(AssertionError, match=f"^{output} gives the slope"):
        gradcheck(layer, X * scales[0])


def test_gradcheck_of_a_network_on_large_data_agrees():
    network = Sequential(Linear(5, 8, seed=0), GELU(), Linear(8, 6, seed=1), ReLU(), Linear(6, 2, seed=2))
    assert max(gradcheck(network, 1e4 * np.random.default_rng(0).standard_normal((9, 5))).values()) < 1e-6


def test_gradcheck_notices_a_wrong_slope_of_a_nonlinear_layer():
    class Wrong(Tanh):
        def gradients(self, dZ, cache, *, needs_dX=True):
            dX, none = super().gradients(dZ, cache, needs_dX=needs_dX)
            return dX * 1.0001, none

    with pytest.raises(AssertionError, match="dX gives the slope"):
        gradcheck(Wrong(), np.linspace(-2, 2, 20))


# --- adjoint_check


def test_backward_is_the_adjoint_of_forward_in_every_dtype(backend):
    for dtype in backend.dtypes:
        X, W, b, _ = operands(dtype=dtype)
        layer = Linear.from_arrays(backend.asarray(W), backend.asarray(b))
        shares = adjoint_check(layer, backend.asarray(X))
        assert list(shares) == ["X", "W", "b"]
        sharp = adjoint_check(layer, backend.asarray(X), sharp=True)
        assert all(0 <= shares[name] <= sharp[name] <= 1 for name in shares)


@pytest.mark.parametrize("output", ["dX", "dW", "db"])
@pytest.mark.parametrize(("sharp", "error"), [(False, 0.1), (True, 0.01)])
def test_adjoint_check_notices_one_wrong_element_in_float32(output, sharp, error):
    X, W, b, _ = operands()
    layer = Spoiled.from_arrays(W, b)
    layer.spoil = (output, (0, 0), error)
    with pytest.raises(AssertionError, match=f"<{output}, V>"):
        adjoint_check(layer, X, sharp=sharp)
