"""The compiled step is the portable one, to rounding; what it cannot take it leaves, and says so."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
import os
import re
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest
from running_error import Rounded

from anyarray_linear import (
    GELU,
    SGD,
    Adam,
    AdamW,
    BinaryCrossEntropy,
    Device,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
    TrainingStep,
    fit,
    lanes,
    restore,
    snapshot,
)
from anyarray_linear.guard import Guard
from anyarray_linear.lanes.compiled import blas as products
from anyarray_linear.lanes.compiled import building, program, running, steps, updates
from anyarray_linear.schedules import cosine
from anyarray_linear.testing import gamma, unit_roundoff

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Code is compiled for the first step, not for the hundredth."""
    monkeypatch.setattr(steps, "patience", lambda step: 0)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


def random(*shape, dtype="float32", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def model_of(sizes, activation=None, dtype="float32", bias=True):
    layers = []
    for i, (width, out) in enumerate(itertools.pairwise(sizes)):
        layers.append(Linear(width, out, dtype=dtype, bias=bias, init="pytorch", seed=i))
        if activation is not None and i < len(sizes) - 2:
            layers.append(activation())
    return Sequential(*layers)


def step_of(sizes=(6, 5, 4), activation=ReLU, loss=SoftmaxCrossEntropy, optimizer=None, dtype="float32", **options):
    model = model_of(sizes, activation, dtype, **options)
    return TrainingStep(model, loss(), SGD(0.5) if optimizer is None else optimizer)


def weights(step):
    return {name: np.array(W) for name, W in step.model.parameters().items()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, W in one.items():
        assert np.array_equal(W, other[name], equal_nan=True), name


# ----------------------------------------------------------------------------------------------------------------------
# the bits are right

erf = np.vectorize(math.erf)


def normal(x):
    return np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def tanh_gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def tanh_gelu_slope(x):
    t, du = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)), math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * du


# function, derivative, and the largest sizes of the first and second derivative
SMOOTH = {
    Tanh: (np.tanh, lambda x: 1 - np.tanh(x) ** 2, 1.0, 0.8),
    Sigmoid: (sigmoid, lambda x: sigmoid(x) * (1 - sigmoid(x)), 0.25, 0.1),
    SiLU: (lambda x: x * sigmoid(x), lambda x: sigmoid(x) * (1 + x * (1 - sigmoid(x))), 1.1, 0.5),
    GELU: (lambda x: x * (1 + erf(x / math.sqrt(2))) / 2, lambda x: (1 + erf(x / math.sqrt(2))) / 2 + x * normal(x), 1.13, 0.8),
    "tanh-gelu": (tanh_gelu, tanh_gelu_slope, 1.13, 0.8),
}
if GELU().approximate == "tanh":
    SMOOTH[GELU] = SMOOTH["tanh-gelu"]
MAKES = {"tanh-gelu": lambda: GELU(approximate="tanh"), None: None}


def expected_gradients(step, X, y, dtype):
    """The loss's gradient by every parameter, from the derivation, each with a bound on the error that rounding makes."""
    exact = lambda x: Rounded(x, 0.0, dtype)  # noqa: E731
    linear = [layer for layer in step.model if isinstance(layer, Linear)]
    kind = step.activation
    A, inputs, slopes = exact(X), [], []
    for i, layer in enumerate(linear):
        inputs.append(A)
        A = A @ exact(layer.W).T
        if layer.b is not None:
            A = A + exact(layer.b)
        if i == len(linear) - 1 or kind is None:
            slopes.append(None)
        elif kind is ReLU:
            assert (np.abs(A.value) > A.error).all(), "this test's numbers are too near to where ReLU bends"
            slopes.append(exact((A.value > 0).astype(float)))
            A = A.relu()
        else:
            f, slope, first, second = SMOOTH[kind]
            slopes.append(A.smooth(slope, second))
            A = A.smooth(f, first)
    n, classes = A.value.shape
    if isinstance(step.loss, SoftmaxCrossEntropy):
        T = np.eye(classes)[y] if y.ndim == 1 else y.astype(float)
        E = np.exp(A.value - A.value.max(1, keepdims=True))
        P = E / E.sum(1, keepdims=True)
        # softmax: dP = P (dZ - sum P dZ), at most twice the largest error of the row; then the roundings of its formula
        carried = 2 * P * A.error.max(1, keepdims=True) + P * gamma(classes + 40, unit_roundoff(dtype))
        whole = T.sum(1, keepdims=True)
        D = (Rounded(P, carried, dtype) * exact(np.broadcast_to(whole, P.shape)) - exact(T)) * exact(np.full(P.shape, 1 / n))
    else:
        D = (A - exact(y.reshape(A.value.shape))) * exact(np.full(A.value.shape, 2 / A.value.size))
    gradients = {}
    names = [name for name, layer in step.model.leaves() if isinstance(layer, Linear)]
    for i in range(len(linear) - 1, -1, -1):
        if slopes[i] is not None:
            D = D * slopes[i]
        gradients[f"{names[i]}.W"] = D.T @ inputs[i]
        if linear[i].b is not None:
            gradients[f"{names[i]}.b"] = exact(np.ones((1, n))) @ D
        D = D @ exact(linear[i].W)
    return gradients


def assert_right(step, X, y, dtype):
    before, gradients = weights(step), expected_gradients(step, X, y, dtype)
    step(X, y)
    assert step.how.startswith("compiled"), step.how
    for name, W in weights(step).items():
        exact = Rounded(before[name], 0.0, dtype) - Rounded(np.full(W.shape, 0.5), 0.0, dtype) * gradients[name]
        assert exact.share(W) <= 1, name


@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("kind", [None, ReLU, *SMOOTH], ids=str)
def test_gradients_are_within_the_bound(kind, rows, dtype):
    sizes = (13, 17, 33, 5)
    step = step_of(sizes, MAKES.get(kind, kind), dtype=dtype)
    step.activation = kind
    assert_right(step, random(rows, 13, dtype=dtype), np.arange(rows) % 5, dtype)


@pytest.mark.parametrize("sizes", [(1, 1), (3, 1), (1, 7, 2), (40, 100, 3), (16, 16, 16)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("target", ["ids", "rows", "columns", "squared"])
def test_targets_and_shapes(target, bias, sizes, dtype):
    rows, classes = 9, sizes[-1]
    loss = MeanSquaredError if target in ("columns", "squared") else SoftmaxCrossEntropy
    step = step_of(sizes, Tanh, loss, dtype=dtype, bias=bias)
    step.activation = Tanh
    if target == "ids":
        y = np.arange(rows) % classes
    elif target == "rows":  # of probabilities, a zero among them
        y = np.abs(random(rows, classes, dtype=dtype)) * (random(rows, classes, dtype=dtype) > 0)
    elif target == "columns" and classes == 1:
        y = random(rows, dtype=dtype)
    else:
        y = random(rows, classes, dtype=dtype)
    assert_right(step, random(rows, sizes[0], dtype=dtype), y, dtype)


OPTIONS = {
    "class weights": (lambda: SoftmaxCrossEntropy(class_weights=[1.0, 2.0, 0.0, 0.5]), "ids"),
    "smoothing": (lambda: SoftmaxCrossEntropy(label_smoothing=0.1), "ids"),
    "smoothed rows": (lambda: SoftmaxCrossEntropy(label_smoothing=0.1), "rows"),
    "ignored": (lambda: SoftmaxCrossEntropy(ignore_id=0), "ids"),
    "all of them": (lambda: SoftmaxCrossEntropy([1.0, 2.0, 3.0, 0.5], 0.2, ignore_id=3), "ids"),
    "cross-entropy": (SoftmaxCrossEntropy, "ids"),
    "rows": (SoftmaxCrossEntropy, "rows"),
    "squared": (MeanSquaredError, "rows"),
    "squared, of integers": (MeanSquaredError, "labels"),
    "binary": (BinaryCrossEntropy, "labels"),
    "binary, of bools": (BinaryCrossEntropy, "bools"),
    "binary, of shares": (BinaryCrossEntropy, "rows"),
    "positive weights": (lambda: BinaryCrossEntropy([1.0, 3.0, 0.0, 0.5]), "labels"),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_and_their_options(name, weighted, dtype):
    loss, kind = OPTIONS[name]
    rows = 24
    X = random(rows, 6, dtype=dtype)
    y = {
        "ids": np.arange(rows) % 4,
        "rows": np.abs(random(rows, 4, dtype=dtype)) % 1,
        "labels": (random(rows, 4) > 0).astype("int64"),
        "bools": random(rows, 4) > 0,
    }[kind]
    counts = np.abs(random(rows, dtype=dtype)) * (np.arange(rows) % 5 > 0) if weighted else None
    compiled, portable = (TrainingStep(Linear(6, 4, dtype=dtype, seed=0), loss(), SGD(1.0)) for _ in range(2))
    value = compiled(X, y, counts)
    assert compiled.how.startswith("compiled"), compiled.how
    with lanes.off():
        expected = portable(X, y, counts)
    # every element of dZ is at most some 3 in size, and a mean: no sum is larger than the largest of X
    few = gamma(60, unit_roundoff(dtype)) * 3 * np.abs(X).max()
    assert abs(value - expected) <= few * max(1, abs(expected))
    for p, W in weights(compiled).items():
        assert np.abs(W - weights(portable)[p]).max() <= few


@pytest.mark.parametrize("loss", [MeanSquaredError, BinaryCrossEntropy])
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_weights_of_samples_may_have_all_axes_that_outputs_have(loss, axes, dtype):
    X, y, counts = random(2, 3, 6, dtype=dtype), random(2, 3, 4, dtype=dtype) ** 2 / 40, random(*(2, 3, 4)[:axes], dtype=dtype) ** 2
    step, portable = (step_of(loss=loss, dtype=dtype) for _ in range(2))
    value = step(X, y, counts)
    with lanes.off():
        assert abs(value - portable(X, y, counts)) <= gamma(4000, unit_roundoff(dtype)) * abs(value)
    assert step.how.startswith("compiled" if axes < 3 else "portable: this batch")
    for name, W in weights(step).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(4000, unit_roundoff(dtype)), name


def test_products_that_are_cut_for_threads(dtype, monkeypatch):
    monkeypatch.setattr(program, "WORTH_CUTTING", 1)
    monkeypatch.setattr(program, "ROWS", 64)
    monkeypatch.setattr(program, "CHUNK", 64)
    monkeypatch.setattr(running, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(products.alone, "cores", lambda library: 4)
    step = step_of((70, 130, 40), Tanh, dtype=dtype)
    step.activation = Tanh
    assert_right(step, random(50, 70, dtype=dtype), np.arange(50) % 40, dtype)
    assert "4 threads" in step.how


def test_the_loss_is_that_of_before_the_update(dtype):
    step = step_of((6, 5, 4), Tanh, dtype=dtype)
    X, y = random(8, 6, dtype=dtype), np.arange(8) % 4
    expected, _ = step.loss.forward(step.model(X), y)
    value = step(X, y)
    assert type(value) is np.ndarray
    assert value.shape == ()
    assert value.dtype == dtype
    assert abs(value - expected) <= 100 * unit_roundoff(dtype) * abs(expected)
    kept = value.copy()
    step(X, y)
    assert value == kept


RULES = {
    "sgd": lambda: SGD(0.1),
    "sgd-decay": lambda: SGD(0.1, weight_decay=0.01),
    "momentum": lambda: SGD(0.1, momentum=0.9),
    "nesterov": lambda: SGD(cosine(0.1, 20), momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda: Adam(1e-2),
    "adam-decay": lambda: Adam(1e-2, betas=(0.8, 0.99), eps=1e-3, weight_decay=0.1),
    "adamw": lambda: AdamW(cosine(1e-2, 20, warmup=5)),
    "sgd-clipped": lambda: SGD(0.1, clip_norm=0.5),
    "adamw-clipped": lambda: AdamW(1e-2, clip_norm=0.5),
    "clip-far-off": lambda: SGD(0.1, clip_norm=1e6),
}


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule, dtype):
    # X is the identity, so the gradients of both are the same but for the rounding of the weights
    X, y = np.eye(6, dtype=dtype), 3 + random(6, 4, dtype=dtype)
    compiled, portable = (
        TrainingStep(Linear(6, 4, dtype=dtype, seed=0), MeanSquaredError(), RULES[rule]()) for _ in range(2)
    )
    for n in range(1, 11):
        compiled(X, y)
        with lanes.off():
            portable(X, y)
        assert compiled.how.startswith("compiled")
        for name, W in weights(compiled).items():
            assert np.abs(W - weights(portable)[name]).max() <= n * gamma(40, unit_roundoff(dtype)) * 4
    assert compiled.optimizer.steps == portable.optimizer.steps == 10
    for one, other in zip(compiled.optimizer.moments().values(), portable.optimizer.moments().values(), strict=True):
        assert one.keys() == other.keys()
        for m, moment in one.items():
            assert np.abs(moment - other[m]).max() <= gamma(400, unit_roundoff(dtype)) * (1 + np.abs(other[m]).max())


@pytest.mark.parametrize("rule", RULES)
def test_updates_by_hand(rule, dtype, monkeypatch):
    monkeypatch.setattr(updates, "LARGE", 1)
    monkeypatch.setattr(updates, "AFTER", 0)
    monkeypatch.setattr(updates, "CHUNK", 16)
    monkeypatch.setattr(updates, "_otherwise", None)  # it is not called
    fast, slow = RULES[rule](), RULES[rule]()
    model, same = (model_of((6, 50, 4), Tanh, dtype) for _ in range(2))
    for n in range(5):
        gradients = {name: random(*W.shape, dtype=dtype, seed=n) for name, W in model.parameters().items()}
        called_off = np.asarray(n == 2)
        fast.step(model, gradients, where=~called_off)
        with lanes.off():
            slow.step(same, gradients, where=~called_off)
        for name, W in model.parameters().items():
            assert np.abs(W - same.parameters()[name]).max() <= (n + 1) * gamma(60, unit_roundoff(dtype)) * 4
    assert fast.steps == 5


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_clipping_does_not_overflow(size, dtype):
    if dtype == "float64":
        size = size**6
    X, y = np.eye(3, dtype=dtype), np.full((3, 3), size, dtype=dtype)
    step = TrainingStep(
        Linear(3, 3, init="zeros", dtype=dtype, bias=False), MeanSquaredError(), SGD(1.0, clip_norm=min(1.0, size / 16))
    )
    with np.errstate(all="ignore"):
        step(X, y)
    norm = np.linalg.norm(step.model.W.astype(np.longdouble) / step.optimizer.clip_norm)
    # the 1e-6 that PyTorch adds to the norm counts where the norm is as small
    own = size * 2 / 3
    assert norm == pytest.approx(min(own / (own + 1e-6), own * step.optimizer.clip_norm / own) if size < 1 else 1, rel=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# what it is given


def test_inputs_of_any_layout_give_the_same_bits(dtype):
    X, y = random(12, 6, dtype=dtype), np.arange(12) % 4
    wide = np.zeros((24, 9), dtype)
    wide[::2, 1:7] = X
    transposed = np.asfortranarray(X)
    backwards = X[::-1].copy()[::-1]
    read_only, read_only_y = X.copy(), y.copy()
    read_only.flags.writeable = read_only_y.flags.writeable = False
    expected = step_of(dtype=dtype)
    expected(X, y)
    for X_like, y_like in [
        (wide[::2, 1:7], y),
        (transposed, y),
        (backwards, y[::-1].copy()[::-1]),
        (read_only, read_only_y),
        (X.reshape(3, 4, 6), y.reshape(3, 4)),
        (X, y.astype("int8")),
        (X, y.astype("uint64")),
        (X, np.repeat(y, 2)[::2]),
    ]:
        step = step_of(dtype=dtype)
        step(X_like, y_like)
        assert step.how.startswith("compiled")
        assert_same_bits(weights(step), weights(expected))


@pytest.mark.parametrize("kind", ["ids", "small ids", "rows"])
def test_rows_in_an_order(kind, dtype):
    X, order = random(20, 6, dtype=dtype), np.random.default_rng(0).permutation(20)
    y = random(20, 4, dtype=dtype) if kind == "rows" else (np.arange(20) % 4).astype("int64" if kind == "ids" else "int16")
    loss = MeanSquaredError if kind == "rows" else SoftmaxCrossEntropy
    gathered, by_hand = step_of(dtype=dtype, loss=loss), step_of(dtype=dtype, loss=loss)
    for start, stop in ((0, 8), (8, 16), (16, 20)):
        gathered.on_rows(X, y, order, start, stop)
        assert gathered.how.startswith("compiled")
        by_hand(X[order[start:stop]], y[order[start:stop]])
    assert_same_bits(weights(gathered), weights(by_hand))


def test_an_order_that_leaves_the_data_is_told_as_ever():
    step, X, y = step_of(), random(20, 6), np.arange(20) % 4
    step.on_rows(X, y, np.arange(20), 0, 8)
    before = weights(step)
    with pytest.raises(IndexError):
        step.on_rows(X, y, np.asarray([0, 20]), 0, 2)
    assert_same_bits(weights(step), before)
    step.on_rows(X, y, np.asarray([0, -1]), 0, 2)  # as NumPy counts
    assert not np.array_equal(step.model[0].W, before["0.W"])


def test_an_activation_may_come_first_last_or_twice(dtype):
    X, y = random(10, 6, dtype=dtype), np.arange(10) % 6
    wide = np.zeros((10, 9), dtype)
    wide[:, :6] = X

    def make():
        model = Sequential(SiLU(), Linear(6, 8, dtype=dtype, seed=0), Tanh(), Sigmoid(), Linear(8, 6, dtype=dtype, seed=1), GELU())
        return TrainingStep(model, SoftmaxCrossEntropy(), SGD(0.5))

    compiled, strided, portable = make(), make(), make()
    compiled(X, y), strided(wide[:, :6], y)
    with lanes.off():
        portable(X, y)
    assert_same_bits(weights(compiled), weights(strided))
    for name, W in weights(compiled).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(400, unit_roundoff(dtype))


def test_a_shared_layer_and_a_frozen_one(dtype):
    X, y = random(10, 6, dtype=dtype), np.arange(10) % 6

    def make():
        shared, frozen = Linear(6, 6, dtype=dtype, seed=0), Linear(6, 6, dtype=dtype, seed=1)
        frozen.trainable = False
        model = Sequential(frozen, Tanh(), shared, Tanh(), Sequential(frozen, shared))
        return TrainingStep(model, SoftmaxCrossEntropy(), SGD(0.5))

    compiled, portable = make(), make()
    compiled(X, y)
    with lanes.off():
        portable(X, y)
    assert compiled.how.startswith("compiled"), compiled.how
    for name, W in weights(compiled).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(400, unit_roundoff(dtype))
    assert np.array_equal(compiled.model[0].W, Linear(6, 6, dtype=dtype, seed=1).W)


def test_batches_of_other_sizes(dtype):
    compiled, portable = step_of(dtype=dtype), step_of(dtype=dtype)
    for rows in (8, 3, 8, 1, 20, 5, 6, 3):
        X, y = random(rows, 6, dtype=dtype), np.arange(rows) % 4
        compiled(X, y)
        with lanes.off():
            portable(X, y)
        assert compiled.how.startswith("compiled")
    for name, W in weights(compiled).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(2000, unit_roundoff(dtype))


def test_an_empty_batch_is_left_to_the_definition(dtype):
    compiled, portable = step_of(dtype=dtype), step_of(dtype=dtype)
    X, y = random(0, 6, dtype=dtype), np.zeros(0, np.int64)
    value = compiled(X, y)
    with lanes.off():
        assert np.isnan(portable(X, y))
    assert np.isnan(value)
    assert compiled.how.startswith("portable")
    assert_same_bits(weights(compiled), weights(portable))


@pytest.mark.parametrize(
    ("X", "y"),
    [
        (random(3, 6), np.asarray([0, 4, 1])),
        (random(3, 6), np.asarray([0, -1, 1])),
        (random(3, 6), np.asarray([0, 1])),
        (random(3, 5), np.asarray([0, 1, 2])),
        (random(3, 6, dtype="float64"), np.asarray([0, 1, 2])),
        (random(3, 6), random(3, 4, dtype="float64")),
    ],
)
def test_what_does_not_fit_is_told_as_ever_and_changes_nothing(X, y):
    compiled, portable = step_of(optimizer=Adam(0.1)), step_of(optimizer=Adam(0.1))
    compiled(random(3, 6), np.asarray([0, 1, 2]))
    before, steps_before = weights(compiled), compiled.optimizer.steps
    with lanes.off(), pytest.raises((TypeError, ValueError)) as expected:
        portable(X, y)
    with pytest.raises(type(expected.value), match=re.escape(str(expected.value)[:20])):
        compiled(X, y)
    assert_same_bits(weights(compiled), before)
    assert compiled.optimizer.steps == steps_before


@pytest.mark.parametrize("count", [3, 5])
def test_weights_of_labels_that_are_too_few_or_too_many_are_told_as_ever(count):
    step = step_of(loss=lambda: BinaryCrossEntropy([2.0] * count))
    before = weights(step)
    with pytest.raises(ValueError, match=f"positive_weights has {count} numbers, but Z has 4 columns"):
        step(random(3, 6), np.zeros((3, 4), bool))
    assert_same_bits(weights(step), before)


# ----------------------------------------------------------------------------------------------------------------------
# what changes between steps


def change_rate(step):
    step.optimizer.lr = 0.01


def change_clipping(step):
    step.optimizer.clip_norm = 0.1


def change_momentum(step):
    step.optimizer.momentum = 0.0


def change_weights(step):
    step.model[0].W = np.ones_like(step.model[0].W)


def change_bias(step):
    step.model[2].b = np.ones_like(step.model[2].b)


def freeze(step):
    step.model[0].trainable = False


def change_frozen(step):
    freeze(step)
    step(random(8, 6, dtype=step.model[0].dtype.name), np.arange(8) % 4)
    step.model[0].W = np.ones_like(step.model[0].W)


def change_moment(step):
    step.optimizer.moments()["0.W"]["V"] = np.ones_like(step.model[0].W)


def change_moments_of_one(step):
    step.optimizer.moments()["2.b"] = {"V": np.ones_like(step.model[2].b)}


def change_loss(step):
    step.loss = SoftmaxCrossEntropy(label_smoothing=0.5)


def restore_state(step):
    step.optimizer.load_state_dict(step.optimizer.state_dict())


@pytest.mark.parametrize(
    "change",
    [change_rate, change_clipping, change_momentum, change_weights, change_bias, freeze, change_frozen, change_moment,
     change_moments_of_one, change_loss, restore_state],
)  # fmt: skip
def test_changes_between_steps_are_noticed(change, dtype):
    X, y = random(8, 6, dtype=dtype), np.arange(8) % 4
    compiled, portable = (step_of(optimizer=SGD(0.1, momentum=0.9), dtype=dtype) for _ in range(2))
    for step, lane in ((compiled, True), (portable, False)):
        switch = lanes.off if not lane else lambda: np.errstate()
        with switch():
            for _ in range(3):
                step(X, y)
            change(step)
            for _ in range(3):
                step(X, y)
    assert compiled.how.startswith("compiled"), compiled.how
    for name, W in weights(compiled).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(4000, unit_roundoff(dtype)), name


def test_another_loss_model_guard_or_function_of_gradients_is_taken():
    bound = gamma(4000, unit_roundoff("float32"))
    X, y, targets = random(8, 6), np.arange(8) % 4, random(8, 4)
    step, portable = step_of(), step_of()
    step(X, y)
    with lanes.off():
        portable(X, y)
    step.loss = portable.loss = MeanSquaredError()
    value = step(X, targets)
    assert step.how.startswith("compiled")
    with lanes.off():
        assert abs(value - portable(X, targets)) <= bound * abs(value)
    for name, W in weights(step).items():
        assert np.abs(W - weights(portable)[name]).max() <= bound
    calls = []
    step.gradients = lambda *arguments: calls.append(1) or steps.loss_and_gradients(*arguments)
    step(X, targets)
    assert calls
    assert "gradients of one's own" in step.how
    step.gradients = steps.loss_and_gradients
    step.guard = type("Own", (Guard,), {"judge": lambda *arguments: np.asarray(False)})(Device.of(X), X.dtype, 0)
    before = weights(step)
    step(X, targets)
    assert_same_bits(weights(step), before)
    assert "a guard of one's own" in step.how
    step.guard, step.model = None, model_of((6, 5, 4), ReLU)
    with pytest.raises(ValueError, match="belongs to the model it stepped first"):
        step(X, targets)


def test_a_frozen_layer_of_any_layout_is_taken_or_left_to_the_definition(dtype):
    X, y = random(8, 6, dtype=dtype), np.arange(8) % 4
    step, portable = (step_of(dtype=dtype) for _ in range(2))
    for each, switch in ((step, np.errstate), (portable, lanes.off)):
        each.model[0].trainable = False
        with switch():
            each(X, y)
            each.model[0].W = np.asfortranarray(random(5, 6, dtype=dtype))
            each(X, y)
    assert step.how == "portable: a parameter that is not contiguous is not compiled"
    for name, W in weights(step).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(4000, unit_roundoff(dtype)), name


def test_lanes_can_be_switched_off_between_steps():
    X, y = random(8, 6), np.arange(8) % 4
    mixed, portable = step_of(), step_of()
    mixed(X, y)
    with lanes.off():
        mixed(X, y)
        assert mixed.how.startswith("portable")
        portable(X, y), portable(X, y), portable(X, y)
    mixed(X, y)
    assert mixed.how.startswith("compiled")
    for name, W in weights(mixed).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(2000, unit_roundoff("float32"))


def test_arrays_of_the_user_are_never_written():
    W, b = random(4, 6), random(1, 4)
    before = W.copy(), b.copy()
    step = TrainingStep(Linear.from_arrays(W, b), SoftmaxCrossEntropy(), SGD(0.5))
    step(random(8, 6), np.arange(8) % 4)
    assert np.array_equal(W, before[0])
    assert np.array_equal(b, before[1])
    assert not np.array_equal(step.model.W, W)


def test_a_copy_goes_on_by_itself():
    X, y = random(8, 6), np.arange(8) % 4
    step = step_of(optimizer=Adam(0.1))
    step(X, y)
    other = copy.deepcopy(step)
    step(X, y), other(X, y)
    assert_same_bits(weights(step), weights(other))
    step(X, y)
    assert not np.array_equal(step.model[0].W, other.model[0].W)


# ----------------------------------------------------------------------------------------------------------------------
# the guard, and fit


def test_the_guard_calls_a_step_off():
    X, y = random(8, 6), np.arange(8) % 4
    step = step_of(optimizer=Adam(0.1))
    step.guard = Guard(step.model[0].device, step.model[0].dtype, allowed=1)
    value = step(X, y)
    assert step.guard.read() == (float(value) * 8, 8, 0, 0)
    before = weights(step)
    bad = X.copy()
    bad[3, 2] = np.nan
    step(bad, y)
    assert step.how.startswith("compiled")
    assert_same_bits(weights(step), before)
    assert step.guard.read()[1:] == (8, 1, 0)
    step(X, y)
    assert not np.array_equal(step.model[0].W, before["0.W"])
    before = weights(step)
    step(bad, y)
    step(X, y)  # after the last straw nothing is applied
    assert_same_bits(weights(step), before)
    assert step.guard.read()[2:] == (2, 4)
    assert step.optimizer.steps == 5


def test_without_a_guard_not_a_number_spreads():
    X, y = random(8, 6), np.arange(8) % 4
    X[3, 2] = np.nan
    step = step_of(activation=Tanh)
    assert np.isnan(step(X, y))
    assert np.isnan(step.model[0].W).all()


def test_fit_gives_what_steps_by_hand_give():
    X, y = random(50, 6), np.arange(50) % 4
    model = model_of((6, 5, 4), ReLU)
    fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(0.01), epochs=3, batch_size=16, progress=False)
    portable = model_of((6, 5, 4), ReLU)
    with lanes.off():
        fit(portable, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(0.01), epochs=3, batch_size=16, progress=False)
    apart = [
        np.abs(W - expected).max()
        for W, expected in zip(model.parameters().values(), portable.parameters().values(), strict=True)
    ]
    assert 0 < max(apart) <= 1e-5  # other bits: it was compiled


# ----------------------------------------------------------------------------------------------------------------------
# what is left to the portable definition


class Doubled(ReLU):
    pass


@pytest.mark.parametrize(("part", "name"), [
    (lambda step: step.model, "forward"), (lambda step: step.model[1], "forward"), (lambda step: step.model[2], "gradients"),
    (lambda step: step.loss, "backward"), (lambda step: step.optimizer, "step"),
])  # fmt: skip
def test_a_function_that_was_put_in_place_of_a_part_s_own_is_called(part, name):
    step, calls = step_of(), []
    own = part(step)
    before = getattr(own, name)

    def watched(*arguments, **options):
        calls.append(1)
        return before(*arguments, **options)

    setattr(own, name, watched)
    for _ in range(2):
        step(random(8, 6), np.arange(8) % 4)
    assert step.how == f"portable: what was assigned to {type(own).__name__}.{name} is not compiled"
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: step_of(activation=Doubled), "Doubled is not compiled"),
        (lambda: TrainingStep(model_of((6, 4)), type("Own", (SoftmaxCrossEntropy,), {})(), SGD(0.1)), "loss Own"),
        (lambda: step_of(optimizer=type("Own", (SGD,), {})(0.1)), "rule Own"),
        (lambda: TrainingStep(model_of((6, 4)), SoftmaxCrossEntropy(), SGD(0.1), gradients=lambda *a: steps.loss_and_gradients(*a)),
         "gradients of one's own"),
    ],
)  # fmt: skip
def test_what_is_not_compiled_says_so_and_runs(make, reason):
    step, same = make(), make()
    X, y = random(8, 6), np.arange(8) % 4
    for _ in range(2):
        step(X, y)
        assert step.how.startswith("portable: ")
        assert reason in step.how
        with lanes.off():
            same(X, y)
    for name, W in weights(step).items():
        assert np.abs(W - weights(same)[name]).max() <= 1e-5


def test_without_numba_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr(building.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(running, "code_for", building.code_for.__wrapped__)
    step = step_of()
    step(random(8, 6), np.arange(8) % 4)
    assert step.how == 'portable: numba is not installed (pip install "anyarray_linear[fast]")'


def test_it_is_not_for_the_first_steps(monkeypatch):
    monkeypatch.undo()
    step = step_of()
    X, y = random(8, 6), np.arange(8) % 4
    for _ in range(steps.PATIENCE):
        step(X, y)
        assert step.how.startswith("portable")
    step(X, y)
    assert step.how.startswith("compiled")


def test_a_step_that_goes_on_from_a_state_waits_as_long_as_one_that_never_stopped(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(steps, "_LARGE", 20)  # so that its 59 numbers make this a large model
    one, other = step_of(optimizer=Adam(0.1)), step_of(optimizer=Adam(0.1))
    X, y = random(8, 6), np.arange(8) % 4
    for _ in range(steps.PATIENCE // 3 + 1):
        one(X, y)
    assert one.how.startswith("compiled")
    restore(other.model, snapshot(one.model))
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert one(X, y) == other(X, y)
    assert other.how.startswith("compiled")
    assert_same_bits(weights(one), weights(other))


# ----------------------------------------------------------------------------------------------------------------------
# threads, processes, the machine


def train(step, X, y, count=5):
    for _ in range(count):
        step(X, y)
    return weights(step)


LARGE = (300, 400, 200)


def test_the_bits_do_not_depend_on_how_many_threads_work():
    X, y = random(96, 300), np.arange(96) % 200
    library = products.blas()
    many = train(step_of(LARGE, optimizer=AdamW(0.01, clip_norm=1.0)), X, y)
    step = step_of(LARGE, optimizer=AdamW(0.01, clip_norm=1.0))
    step(X, y)
    if library.set_threads is None:
        pytest.skip("this BLAS has no threads to set")
    before = library.threads()
    library.set_threads(1)  # as threadpoolctl does
    try:
        one = train(step, X, y, 4)
        assert "1 thread" in step.how
    finally:
        library.set_threads(before)
    assert_same_bits(one, many)
    assert library.threads() == before


def test_steps_in_many_threads_at_once():
    X, y = random(96, 300), np.arange(96) % 200
    expected = train(step_of(LARGE), X, y)
    found = [None] * 4

    def work(i):
        found[i] = train(step_of(LARGE), X, y)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for bits in found:
        assert_same_bits(bits, expected)


def test_denormals_are_flushed_inside_and_kept_outside():
    tiny = np.float32(1e-40)
    model = Linear.from_arrays(np.full((1, 1), tiny), None)
    step = TrainingStep(model, MeanSquaredError(), SGD(0.0))
    value = step(np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32))
    assert value == 0
    assert np.full(3, tiny) * np.float32(0.5) == pytest.approx(5e-41, rel=1e-3, abs=0)


def run(code, **environment):
    """Run code in a process of its own."""
    start = """
        import numpy as np, os, sys, threading
        from anyarray_linear import *
        from anyarray_linear.lanes.compiled import steps
        steps.patience = lambda step: 0
        X = np.random.default_rng(0).standard_normal((96, 300)).astype("float32"); y = np.arange(96) % 200
        def make():
            model = Sequential(Linear(300, 400, dtype="float32", seed=0), ReLU(), Linear(400, 200, dtype="float32", seed=1))
            return TrainingStep(model, SoftmaxCrossEntropy(), Adam(0.01))
        def train():
            step = make()
            for _ in range(5): step(X, y)
            assert step.how.startswith("compiled"), step.how
            return float(np.abs(step.model[0].W).sum())
    """
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(start) + textwrap.dedent(code)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip


def printed(result):
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.split()


def test_two_processes_give_the_same_bits_and_the_second_loads_no_numba():
    train_and_tell = "print(train(), 'numba' in sys.modules)"
    first, second = (printed(run(train_and_tell)) for _ in range(2))
    assert first[0] == second[0]
    assert second[1] == "False"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_it_survives_a_fork():
    found = printed(run("""
        import warnings; warnings.simplefilter("ignore")
        before = train()
        child = os.fork()
        if child == 0:
            os._exit(0 if train() == before else 1)
        print(os.waitpid(child, 0)[1], train() == before)
    """))
    assert found == ["0", "True"]


def test_a_thread_may_outlive_the_main_one():
    found = printed(run("""
        import time
        def later():
            threading.main_thread().join()
            print(train() > 0, flush=True)
        threading.Thread(target=later).start()
    """))
    assert found == ["True"]


def test_threads_that_wait_do_not_keep_a_process():
    assert printed(run("print(train() > 0)")) == ["True"]


def test_a_cache_that_cannot_be_written_to_costs_time_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.touch()
    result = run("print(train() > 0); train()", ANYARRAY_CACHE_DIR=str(file / "folder"))
    assert printed(result) == ["True"]
    assert result.stderr.count("is not kept") == 1


def test_a_model_of_linear_and_relu_waits_for_no_other_layers(dtype, tmp_path):
    common, other = step_of(dtype=dtype), step_of(activation=GELU, dtype=dtype)
    for step in (common, other):
        step(random(8, 6, dtype=dtype), np.arange(8) % 4)
        assert step.how.startswith("compiled"), step.how
    assert common.kept["plan"].runner.code.name == dtype
    assert other.kept["plan"].runner.code.name == f"{dtype}-whole"
    said = run("train()", ANYARRAY_CACHE_DIR=str(tmp_path)).stderr
    assert said.count("compiling") == 1
    assert [path.name.startswith("step-float32-") and "whole" not in path.name for path in tmp_path.iterdir()] == [True]


def test_a_damaged_file_is_made_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("ANYARRAY_CACHE_DIR", str(tmp_path))
    path = tmp_path / "step.o"
    building._write(path, b"code")
    assert building._read(path) == b"code"
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:10], b"", whole[:-1] + b"!"):
        path.write_bytes(damaged)
        assert building._read(path) is None


def test_numpys_own_blas_is_found():
    library = products._own()
    assert library.single
    assert library.double
