"""What is summed, squared or exponentiated of float16 arrays is so in float32, and rounded to float16 once.

A sum of ones in float16 ends at 2,048, a square overflows from 256 on, and a mean over 65,536 rows has shares that float16
rounds by percents. Every case here is wrong by many times its bound, infinite or NaN if it is formed in float16.
"""

import contextlib

import numpy as np
import pytest

from anyarray_linear import (
    GELU,
    BinaryCrossEntropy,
    LayerNorm,
    Linear,
    MeanSquaredError,
    SoftmaxCrossEntropy,
    evaluate,
    lanes,
    linear_backward,
    linear_forward,
    softmax,
)
from anyarray_linear.optimizers import clipped

U = 2.0**-11
TINY = 2.0**-25  # half the distance of the smallest numbers
ROWS = 65_536


@pytest.fixture(params=[True, False], ids=["lanes", "portable"])
def half(request, backend):
    """A backend with float16 arrays, with lanes and without: puts host values there."""
    if "float16" not in backend.dtypes:
        pytest.skip("layers do not compute in float16 here")
    with contextlib.nullcontext() if request.param else lanes.off():
        yield lambda x: backend.asarray(np.asarray(x), "float16" if np.asarray(x).dtype.kind == "f" else None)


def holds(backend, x, exact, *, roundings=1.0, off=0.0):
    """`x` is float16 and `exact`, to so many roundings, and `off` besides; float32's own errors are a percent of one."""
    x = backend.to_numpy(x)
    assert x.dtype == np.float16
    exact = np.broadcast_to(np.asarray(exact, np.float64), x.shape)
    error = np.abs(x.astype(np.float64) - exact)
    bound = 1.01 * roundings * U * np.abs(exact) + TINY + off
    worst = np.argmax(np.where(error <= bound, 0, np.nan_to_num(error / bound, nan=np.inf)))
    share = error.flat[worst] / bound.flat[worst]
    assert np.all(error <= bound), f"{x.flat[worst]} for {exact.flat[worst]}: {share:.3g} bounds"


def in_half(x):
    return np.asarray(x, np.float16).astype(np.float64)


def probabilities(Z):
    E = np.exp(Z - Z.max(axis=-1, keepdims=True))
    return E / E.sum(axis=-1, keepdims=True)


def test_softmax_over_more_classes_than_float16_counts(backend, half):
    holds(backend, softmax(half(np.zeros((2, 70_000)))), 1 / 70_000)


def test_softmax_is_rounded_once(backend, half):
    Z = in_half(3 * np.random.default_rng(0).standard_normal((16, 4096)))
    holds(backend, softmax(half(Z)), probabilities(Z))


LOSSES_OF_IDS = [
    SoftmaxCrossEntropy(),
    SoftmaxCrossEntropy(class_weights=[1.0, 1.0]),
    SoftmaxCrossEntropy(ignore_id=-1),
    SoftmaxCrossEntropy(label_smoothing=0.125),
]


@pytest.mark.parametrize("loss", LOSSES_OF_IDS, ids=repr)
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropy_over_65536_rows(backend, half, loss, weighted):
    Z, ids = in_half(np.tile([[5.0, 0.0]], (ROWS, 1))), np.ones(ROWS, np.int64)
    weights = (half(np.ones(ROWS)),) if weighted else ()
    value, cache = loss.forward(half(Z), half(ids), *weights)
    share = loss.label_smoothing / 2
    T, P = np.asarray([share, 1 - share]), probabilities(Z)[0]
    holds(backend, value, -(T * np.log(P)).sum())
    holds(backend, loss.backward(cache), (P - T) / ROWS, off=U * P / ROWS)  # P is kept in float16


def test_cross_entropy_over_70000_classes(backend, half):
    Z = np.zeros((2, 70_000))
    for loss in (SoftmaxCrossEntropy(), SoftmaxCrossEntropy(ignore_id=-1)):
        value, _ = loss.forward(half(Z), half(np.asarray([0, 69_999])))
        holds(backend, value, np.log(70_000))


def test_weights_of_classes_times_those_of_samples_leave_float16(backend, half):
    Z, ids = np.zeros((600, 2)), np.zeros(600, np.int64)
    loss = SoftmaxCrossEntropy(class_weights=[300.0, 100_000.0])
    value, cache = loss.forward(half(Z), half(ids), half(np.full(600, 300.0)))
    holds(backend, value, np.log(2))
    holds(backend, loss.backward(cache), np.asarray([-0.5, 0.5]) / 600)


@pytest.mark.parametrize("weighted", [False, True])
def test_squared_errors_whose_squares_leave_float16(backend, half, weighted):
    Z = np.tile([[300.0], [0.0]], (ROWS // 2, 1))
    weights = (half(np.ones(ROWS)),) if weighted else ()
    loss = MeanSquaredError()
    value, cache = loss.forward(half(Z), half(np.zeros_like(Z)), *weights)
    holds(backend, value, 45_000)
    holds(backend, loss.backward(cache), 2 * Z / ROWS)


def test_shares_of_65535_rows_are_not_rounded_to_float16(backend, half):
    """1 / 65,535 is 2 roundings away from its float16, and weights of 3 and 1 make that worse."""
    Z, weights = np.full((65_535, 1), 64.0), np.where(np.arange(65_535) % 2, 3.0, 1.0)
    loss = MeanSquaredError()
    value, cache = loss.forward(half(Z), half(np.zeros_like(Z)), half(weights))
    holds(backend, value, 4096)
    holds(backend, loss.backward(cache), 2 * Z * weights[:, None] / weights.sum())


@pytest.mark.parametrize("weighted", [False, True])
def test_binary_cross_entropy_of_heavy_positives(backend, half, weighted):
    Z, T = np.full((32, 1), -300.0), np.zeros((32, 1))
    T[0] = 1
    weights = (half(np.ones(32)),) if weighted else ()
    loss = BinaryCrossEntropy(positive_weights=[300.0])
    value, cache = loss.forward(half(Z), half(T), *weights)
    holds(backend, value, 300 * 300 / 32)
    holds(backend, loss.backward(cache), -300 * T / 32)


def test_binary_cross_entropy_over_65536_rows(backend, half):
    Z = np.full((ROWS, 1), 5.0)
    loss = BinaryCrossEntropy()
    value, cache = loss.forward(half(Z), half(np.zeros_like(Z)))
    holds(backend, value, np.log1p(np.exp(5.0)))
    holds(backend, loss.backward(cache), 1 / (1 + np.exp(-5.0)) / ROWS)


@pytest.mark.parametrize("out_features", [1, 3])
def test_products_add_up_60000_terms(backend, half, out_features):
    dZ, X, W = (half(np.ones(shape)) for shape in ((60_000, out_features), (60_000, 2), (out_features, 2)))
    found = linear_backward(dZ, X, W)
    holds(backend, found.db, 60_000)
    holds(backend, found.dW, 60_000)
    holds(backend, linear_forward(half(np.ones((2, 60_000))), half(np.ones((out_features, 60_000)))), 60_000)


def test_layer_norm_of_large_rows(backend, half):
    X = in_half(1000 * (5 + np.random.default_rng(0).standard_normal((8, 4096))))
    layer = LayerNorm(4096, dtype="float16", device=backend.device)
    H = (X - X.mean(axis=1, keepdims=True)) / np.sqrt(X.var(axis=1, keepdims=True) + layer.eps)
    # the mean's own error, in float32, is some 2^-24 of 5,000, and H is that of 1,000
    holds(backend, layer(half(X)), H, off=100 * 2**-24)


def test_gradients_of_layer_norm_add_up_60000_rows(backend, half):
    layer = LayerNorm(2, dtype="float16", device=backend.device)
    _, cache = layer.forward(half(np.tile([[3.0, 1.0]], (60_000, 1))))
    _, gradients = layer.gradients(half(np.ones((60_000, 2))), cache)
    holds(backend, gradients["b"], 60_000)
    holds(backend, gradients["W"], np.asarray([60_000, -60_000]) / np.sqrt(1 + 1e-5))


def test_the_norm_to_clip_at_is_not_float16s(backend, half):
    holds(backend, clipped({"W": half(np.ones(ROWS))}, 1.0)["W"], 1 / 256)
    holds(backend, clipped({"W": half(np.full(16, 2.0**15))}, 2.0**15)["W"], 2.0**13)
    # by what they are multiplied is 1.6e-6, of which float16 has 5 bits
    holds(backend, clipped({"W": half(np.full(16, 48_000.0))}, 0.3)["W"], 0.075)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_is_rounded_once_where_it_is_nearly_nothing_and_where_its_cube_overflows(backend, half, approximate):
    X = in_half(np.concatenate([np.linspace(-6e4, 6e4, 2001), np.linspace(-8, 8, 2001)]))
    layer = GELU(approximate=approximate)
    Z, cache = layer.forward(half(X))
    exact, exact_cache = layer.forward(X)  # in float64, which tests of its own hold to PyTorch's
    # 1 + tanh U, in float32, cancels for negative X
    holds(backend, Z, exact, off=np.abs(np.clip(X, -8, 8)) * 2**-24)
    holds(backend, layer.backward(half(np.ones_like(X)), cache), layer.backward(np.ones_like(X), exact_cache), off=2**-20)


def test_what_evaluate_tells_is_summed_in_float32(backend, half):
    X, y = half(np.ones((ROWS, 2))), half(np.full((ROWS, 1), 300.0))
    model = Linear.from_arrays(half(np.zeros((1, 2))))
    found = evaluate(model, X, y, loss=MeanSquaredError(), batch_size=ROWS // 2)
    assert found["rmse"] == found["mae"] == 300
    assert found["baseline_rmse"] == 0
    ids = evaluate(Linear.from_arrays(half(np.eye(2))), X, half(np.zeros(ROWS, np.int64)), loss=SoftmaxCrossEntropy())
    assert ids["accuracy"] == 1
    assert abs(ids["loss"] - np.log(2)) < 1.01 * U
