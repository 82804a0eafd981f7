"""Numbers at the ends of their range: nothing overflows on the way to a result that is in range, and what underflows is 0."""

from __future__ import annotations

import contextlib
import warnings

import numpy as np
import pytest

from anyarray_linear import (
    GELU,
    SGD,
    Adam,
    AdamW,
    BinaryCrossEntropy,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
    fit,
    lanes,
    softmax,
)

WITH_LANES = pytest.mark.parametrize("around", [contextlib.nullcontext, lanes.off], ids=["lanes", "portable"])
DTYPES = pytest.mark.parametrize("dtype", ["float32", "float64"])
ACTIVATIONS = [ReLU(), Tanh(), Sigmoid(), SiLU(), GELU(), GELU(approximate="tanh")]


def extremes(dtype):
    """Numbers from the smallest to the largest, of both signs."""
    info = np.finfo(dtype)
    sizes = [0, info.smallest_subnormal, info.tiny / 4, info.tiny, 1e-30, 1e-20, 1, 50, 90, 200, 800, 1e4, 1e20, info.max / 4]
    return np.asarray([sign * size for size in sizes for sign in (1, -1)], dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Clipping


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_norm_is_formed_without_overflow(backend, dtype):
    """3e20 and 4e20 became 0 and 0: their squares are infinite in float32."""
    if dtype == "float64" and "cupy" in backend.name:
        pytest.skip("the kernel adds up squares in float64")
    most = float(np.finfo(dtype).max)
    for a, b, expected in (
        (3.0, 4.0, (3 / (5 + 1e-6), 4 / (5 + 1e-6))),  # as PyTorch's, which adds that
        (3e20, 4e20, (0.6, 0.8)),
        (-0.3 * most, 0.4 * most, (-0.6, 0.8)),
        (most, most, (0.5**0.5, 0.5**0.5)),
        (1.0, most, (1 / most, 1.0)),
        (0.25, -0.5, (0.25, -0.5)),
    ):
        layer = Linear.from_arrays(backend.asarray(np.zeros((1, 1)), dtype), backend.asarray(np.zeros((1, 1)), dtype))
        gradients = {"W": backend.asarray([[a]], dtype), "b": backend.asarray([[b]], dtype)}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            SGD(1.0, clip_norm=1.0).step(layer, gradients)
        found = [-float(backend.to_numpy(x)[0, 0]) for x in (layer.W, layer.b)]
        assert found == pytest.approx(expected, rel=8 * float(np.finfo(dtype).eps), abs=float(np.finfo(dtype).tiny))


@pytest.mark.parametrize("scale", [2.0**20, 2.0**49, 2.0**51, 2.0**100])
def test_scaling_by_a_power_of_two_changes_no_bit_of_what_clipping_gives(backend, scale):
    """Where the numbers are scaled down first, the norm has the bits that it has where they are not."""
    dW = np.random.default_rng(0).standard_normal((64, 64)).astype("float32")

    def clipped(scale):
        layer = Linear.from_arrays(backend.asarray(np.zeros((64, 64)), "float32"))
        SGD(1.0, clip_norm=2.0**100 * scale / 2.0**100).step(layer, {"W": backend.asarray(dW * np.float32(scale))})
        return backend.to_numpy(layer.W) / np.float32(scale)

    with lanes.off():
        assert np.array_equal(clipped(scale), clipped(2.0**10))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_stays_so_when_clipped(backend, bad):
    layer = Linear.from_arrays(backend.asarray(np.zeros((1, 2)), "float32"))
    with np.errstate(invalid="ignore"):
        SGD(1.0, clip_norm=1.0).step(layer, {"W": backend.asarray([[bad, 1.0]], "float32")})
    assert np.isnan(backend.to_numpy(layer.W)[0, 0])


# ---------------------------------------------------------------------------------------------------------------------
# Nothing is raised, nothing warned of


@WITH_LANES
@DTYPES
@pytest.mark.parametrize("layer", ACTIVATIONS, ids=repr)
def test_activations_of_all_sizes_raise_and_warn_of_nothing(layer, dtype, around):
    X = extremes(dtype)
    with around(), np.errstate(all="raise"), warnings.catch_warnings():
        warnings.simplefilter("error")
        for x in (X, *X.reshape(-1, 1)):
            Z, cache = layer.forward(x)
            dX, _ = layer.gradients(np.ones_like(x), cache)
            assert np.isfinite(Z).all()
            assert np.isfinite(dX).all()


@DTYPES
def test_the_tanh_form_of_GELU_is_what_it_was_where_nothing_overflows(dtype):
    """Cut off at 16, from where on tanh U is 1 in every dtype."""
    X = np.linspace(-40, 40, 4001).astype(dtype)
    a, c = np.sqrt(2 / np.pi), 0.044715
    T = np.tanh(a * X.astype("float64") * (1 + c * X.astype("float64") ** 2))
    exact = 0.5 * X * (1 + T)
    assert np.abs(GELU(approximate="tanh")(X) - exact).max() < 40 * 4 * np.finfo(dtype).eps
    far = np.abs(X) > 16
    assert np.array_equal(GELU(approximate="tanh")(X)[far], np.maximum(X[far], 0))


@WITH_LANES
@DTYPES
@pytest.mark.parametrize("soft", [True, False])
def test_losses_of_far_logits_raise_nothing(dtype, around, soft):
    Z, ids = np.asarray([[0, -200, -1000, 5], [1e-30, 800, -800, 90]], dtype), np.asarray([0, 1])
    T = np.eye(4, dtype=dtype)[ids]
    with around(), np.errstate(all="raise"):
        for loss in (SoftmaxCrossEntropy(), SoftmaxCrossEntropy(label_smoothing=0.1)):
            _, cache = loss.forward(Z, T if soft else ids)
            assert np.isfinite(loss.backward(cache)).all()
        for loss in (BinaryCrossEntropy(), MeanSquaredError()):
            _, cache = loss.forward(np.abs(Z), T)
            loss.backward(cache)
        tiny = np.full((2, 2), np.finfo(dtype).tiny, dtype)
        MeanSquaredError().forward(tiny, 0 * tiny)
        assert np.isfinite(softmax(Z)).all()


@WITH_LANES
@DTYPES
@pytest.mark.parametrize("rule", [SGD(0.1, momentum=0.9), Adam(), AdamW(), Adam(clip_norm=1.0), SGD(0.1, clip_norm=1.0)], ids=repr)
@pytest.mark.parametrize("size", [1e-30, "tiny", "subnormal"])
def test_updates_by_tiny_gradients_raise_nothing_and_happen_once(dtype, around, rule, size):
    value = {"tiny": np.finfo(dtype).tiny * 3, "subnormal": np.finfo(dtype).smallest_subnormal}.get(size, size)
    results = []
    for state in ("raise", "ignore"):
        layer, optimizer = Linear.from_arrays(np.full((300, 300), 0.5, dtype)), type(rule)(**rule.hyperparameters())
        with around(), np.errstate(all=state):
            for _ in range(3):
                optimizer.step(layer, {"W": np.full((300, 300), value, dtype)})
        results.append((layer.W.tobytes(), optimizer.steps))
    assert results[0] == results[1]


@WITH_LANES
def test_a_layer_of_tiny_numbers_raises_nothing(around):
    layer, X = Linear.from_arrays(np.full((2, 2), 1e-30, "float32")), np.full((2, 2), 1e-30, "float32")
    with around(), np.errstate(all="raise"):
        Z, cache = layer.forward(X)
        layer.backward(X, cache)
    assert not Z.any()


def test_what_really_overflows_is_raised_still():
    large = np.full((2, 2), 1e30, "float32")
    layer = Linear.from_arrays(large)
    try:
        with np.errstate(all="raise"):
            np.dot(large, large)
    except FloatingPointError:
        with np.errstate(all="raise"), pytest.raises(FloatingPointError, match="overflow"):
            layer(large)
    else:
        pytest.skip("np.dot of this NumPy does not tell of what it overflows")


def test_a_training_under_raise_is_the_one_without():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((64, 8)).astype("float32") * 100, rng.integers(0, 4, 64)
    weights = []
    for state in ("raise", "warn"):
        model = Sequential(Linear(8, 16, dtype="float32", seed=0), GELU(), Linear(16, 4, dtype="float32", seed=1))
        with np.errstate(all=state):
            fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(), epochs=3, progress=False)
        weights.append(model[0].W.tobytes())
    assert weights[0] == weights[1]
