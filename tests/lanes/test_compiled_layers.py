"""LayerNorm and Dropout in the compiled step: within the bounds of rounding, with the masks of every other backend."""

from __future__ import annotations

import copy
import importlib.util

import numpy as np
import pytest
from test_compiled_lane import assert_same_bits, random, weights
from test_normalization import bounds, reference

from anyarray_linear import (
    GELU,
    SGD,
    Adam,
    AdamW,
    BinaryCrossEntropy,
    Dropout,
    LayerNorm,
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
)
from anyarray_linear.dropout import dropped, mask_key
from anyarray_linear.guard import Guard
from anyarray_linear.lanes.compiled import blas as products
from anyarray_linear.lanes.compiled import program, running, steps
from anyarray_linear.testing import gamma, unit_roundoff

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Code is compiled for the first step, not for the hundredth."""
    monkeypatch.setattr(steps, "patience", lambda step: 0)


@pytest.fixture
def four_threads(monkeypatch):
    """Everything is cut for four threads."""
    for name, value in (("WORTH_CUTTING", 1), ("ROWS", 64), ("CHUNK", 64)):
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(running, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(products.alone, "cores", lambda library: 4)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


def norm_of(features, dtype, eps=1e-5):
    layer = LayerNorm(features, eps, dtype=dtype)
    layer.W, layer.b = ((1 + 0.3 * random(features, seed=seed)).astype(dtype) for seed in (1, 2))
    return layer


# ----------------------------------------------------------------------------------------------------------------------
# LayerNorm


def assert_norm_is_right(shape, shift, dtype):
    """All that a layer normalisation computes, read off the weights after a step of which the rest is exact.

    The input is the identity, so the first layer's output is its weights, and its gradient that of the norm's input.
    """
    N, n = shape
    x, dz = (random(N, n) + shift).astype(dtype), random(N, n, seed=3, dtype=dtype)
    norm = norm_of(n, dtype, 1e-2)
    w, b = norm.W, norm.b
    exact = reference(x, w, b, dz, norm.eps)
    target = (exact["Z"] - dz * np.longdouble(N * n / 2)).astype(dtype)  # the gradient of the loss is dz, nearly
    dz = 2 * (exact["Z"] - target) / (N * n)
    exact = reference(x, w, b, dz, norm.eps)
    allowed = bounds(x, w, b, dz, exact, dtype)
    first = Linear.from_arrays(np.ascontiguousarray(x.T))
    step = TrainingStep(Sequential(first, norm), MeanSquaredError(), SGD(1.0))
    value = step(np.eye(N, dtype=dtype), target)
    assert step.how.startswith("compiled"), step.how
    u = unit_roundoff(dtype)
    # what dZ is off by, as Z is and by three roundings, carried on by the formulas of backward, which are linear in it
    e = 2 / (N * n) * (allowed["Z"] + u * np.abs(target)) + 4 * u * np.abs(dz)
    h, r = (np.abs(exact[name]).astype(float) for name in "hr")
    dh = e * np.abs(w)
    mean = lambda a: a.mean(-1, keepdims=True)  # noqa: E731
    carried = {"dX": r * (dh + mean(dh) + h * mean(dh * h)), "dW": (e * h).sum(0), "db": e.sum(0)}
    for name, was, now in (("dX", x, first.W.T), ("dW", w, norm.W), ("db", b, norm.b)):
        most = allowed[name] + 1.1 * carried[name].astype(float) + 2 * u * np.abs(now)
        error = np.abs(was.astype(np.longdouble) - exact[name] - now).astype(float)
        assert (error <= most).all(), (name, float((error / most).max()))
    loss = float(((exact["Z"] - target) ** 2).mean())
    assert abs(value - loss) <= float((np.abs(exact["Z"] - target) * allowed["Z"]).mean()) * 2.2 + gamma(N * n + 4, u) * loss


@pytest.mark.parametrize("shape", [(1, 1), (4, 33), (64, 7), (17, 130)], ids=str)
@pytest.mark.parametrize("shift", [0, 20])
def test_layer_normalisation_is_within_the_bounds_of_rounding(shape, shift, dtype):
    assert_norm_is_right(shape, shift, dtype)


@pytest.mark.usefixtures("four_threads")
def test_layer_normalisation_that_is_cut_for_threads(dtype):
    assert_norm_is_right((33, 130), 5, dtype)


def test_a_shared_and_a_frozen_norm(dtype):
    X, y = random(10, 6, dtype=dtype), np.arange(10) % 6

    def make():
        shared, frozen = norm_of(6, dtype), norm_of(6, dtype)
        frozen.trainable = False
        model = Sequential(shared, Linear(6, 6, dtype=dtype, seed=1), frozen, Tanh(), shared, Linear(6, 6, dtype=dtype, seed=2))
        return TrainingStep(model, SoftmaxCrossEntropy(), SGD(0.5))

    compiled, portable = make(), make()
    compiled(X, y)
    with lanes.off():
        portable(X, y)
    assert compiled.how.startswith("compiled"), compiled.how
    for name, W in weights(compiled).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(400, unit_roundoff(dtype)), name
    assert np.array_equal(compiled.model[2].W, norm_of(6, dtype).W)


def test_changed_numbers_of_layers_are_noticed(dtype):
    X, y = random(8, 6, dtype=dtype), np.arange(8) % 4

    def make():
        model = Sequential(norm_of(6, dtype), GELU(), Dropout(0.2, seed=1), Linear(6, 4, dtype=dtype, seed=1))
        return TrainingStep(model, SoftmaxCrossEntropy(), SGD(0.1))

    compiled, portable = make(), make()
    for change in (("0.eps", 1.0), ("2.rate", 0.7), ("2.seed", 5), ("2.step", 2**40), ("2.stream", 3), ("0.W", np.ones(6, dtype))):
        for step in (compiled, portable):
            i, name = change[0].split(".")
            step(X, y) if step is compiled else portable_step(step, X, y)
            setattr(step.model[int(i)], name, change[1])
            step(X, y) if step is compiled else portable_step(step, X, y)
        assert compiled.how.startswith("compiled")
        for name, W in weights(compiled).items():
            assert np.abs(W - weights(portable)[name]).max() <= gamma(4000, unit_roundoff(dtype)), (change, name)


def portable_step(step, X, y):
    with lanes.off():
        step(X, y)


# ----------------------------------------------------------------------------------------------------------------------
# Dropout


def after_a_step(model, X, dZ, dtype):
    """The model after a step of rate 1 in which the loss's gradient is `dZ`, where its output is zero."""
    step = TrainingStep(model, MeanSquaredError(), SGD(1.0))
    step(X, -dZ * np.asarray(dZ.size / 2, dtype))
    assert step.how.startswith("compiled"), step.how
    return model


def assert_mask_is_the_portable_one(rows, width, rate, seed, number, dtype, stream=0):
    import array_api_compat.numpy as xp

    layer, X = Dropout(rate, seed=seed), random(rows, width, dtype=dtype)
    layer.step, layer.stream = number, stream
    Z, K = dropped(xp, X, rate, *mask_key(seed, number, stream))
    last = Linear(width, rows, init="zeros", bias=False, dtype=dtype)
    after_a_step(Sequential(layer, last), X, np.eye(rows, dtype=dtype), dtype)
    assert np.array_equal(-last.W, Z)
    assert layer.step == number + 1
    # backwards: its input is the first layer's weights, all zero, and so is the gradient where nothing was kept
    layer.step = number
    first = Linear(rows, width, init="zeros", bias=False, dtype=dtype)
    after_a_step(Sequential(first, layer), np.eye(rows, dtype=dtype), np.ones((rows, width), dtype), dtype)
    assert np.array_equal(first.W.T != 0, K)
    factor = np.asarray(1 / (1 - rate), dtype)
    assert np.abs(-first.W.T[K] - factor).max(initial=0) <= 4 * np.finfo(dtype).eps * factor


@pytest.mark.parametrize(("rows", "width"), [(1, 1), (8, 5), (32, 97)])
@pytest.mark.parametrize(("rate", "seed", "number"), [(0.5, 0, 0), (0.1, 3, 1), (0.9, 2**63 - 1, 2**40 + 5), (0.0, 1, 1)])
def test_masks_have_the_portable_bits(rows, width, rate, seed, number, dtype):
    assert_mask_is_the_portable_one(rows, width, rate, seed, number, dtype)


def test_a_stream_of_its_own_has_masks_of_its_own(dtype):
    assert_mask_is_the_portable_one(8, 40, 0.5, 7, 2, dtype, stream=3)


@pytest.mark.usefixtures("four_threads")
def test_a_mask_that_is_made_by_several_threads(dtype):
    assert_mask_is_the_portable_one(64, 50, 0.3, 5, 9, dtype)


def test_what_is_not_kept_is_zero_whatever_it_was(dtype):
    K = Dropout(0.5, seed=0).forward(np.ones((1, 64)))[1]["K"]
    found = []
    for lost in (1.0, np.inf, np.nan):
        last = Linear(64, 1, init="zeros", bias=False, dtype=dtype)
        X = np.where(K, 1, lost).astype(dtype)
        after_a_step(Sequential(Dropout(0.5, seed=0), last), X, np.ones((1, 1), dtype), dtype)
        found.append(last.W)
    assert np.array_equal(found[0] != 0, K)
    assert all(np.array_equal(W, found[0]) for W in found)


def test_passes_are_counted_as_ever(dtype):
    """A shared layer's twice, one that is called off too; one that is left to the definition once."""
    shared = Dropout(0.5, seed=1)
    model = Sequential(shared, Linear(6, 6, dtype=dtype, seed=0), shared, Linear(6, 4, dtype=dtype, seed=1))
    step = TrainingStep(model, SoftmaxCrossEntropy(), SGD(0.1))
    step.guard = Guard(model[1].device, model[1].dtype, allowed=9)
    X, y = random(8, 6, dtype=dtype), np.arange(8) % 4
    step(X, y)
    assert shared.step == 2
    step(np.full_like(X, np.nan), y)
    assert step.how.startswith("compiled")
    assert shared.step == 4
    with pytest.raises(ValueError, match=r"out of range|class id"):
        step(X, np.full(8, 4))
    assert shared.step == 6  # the definition came as far as the loss
    step.on_rows(X, y, np.asarray([0, -1]), 0, 2)  # as NumPy counts: the definition's, too
    assert shared.step == 8


# ----------------------------------------------------------------------------------------------------------------------
# both, in models

ACTIVATIONS = {"none": None, "relu": ReLU, "tanh": Tanh, "sigmoid": Sigmoid, "silu": SiLU, "gelu": GELU,
               "tanh-gelu": lambda: GELU(approximate="tanh")}  # fmt: skip
ORDERS = {
    "norm, activation, dropout": lambda norm, f, drop: [norm, *f, drop],
    "activation, dropout, norm": lambda norm, f, drop: [*f, drop, norm],
    "dropout, norm, activation": lambda norm, f, drop: [drop, norm, *f],
}
RULES = {
    "sgd": lambda: SGD(0.1),
    "nesterov": lambda: SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "sgd-clipped": lambda: SGD(0.1, clip_norm=0.5),
    "adam": lambda: Adam(1e-3, eps=1e-2),
    "adamw-clipped": lambda: AdamW(1e-3, eps=1e-2, clip_norm=0.5),
}
LOSSES = {
    "ids": (SoftmaxCrossEntropy, lambda n, dtype: np.arange(n) % 4),
    "rows": (SoftmaxCrossEntropy, lambda n, dtype: np.eye(4, dtype=dtype)[np.arange(n) % 4]),
    "squared": (MeanSquaredError, lambda n, dtype: random(n, 4, dtype=dtype)),
    "binary": (BinaryCrossEntropy, lambda n, dtype: random(n, 4) > 0),
}


def step_of(order="norm, activation, dropout", activation="relu", loss="ids", rule="sgd", dtype="float32"):
    f = [] if ACTIVATIONS[activation] is None else [ACTIVATIONS[activation]()]
    middle = ORDERS[order](norm_of(11, dtype, 1e-2), f, Dropout(0.25, seed=3))
    layers = [Linear(6, 11, dtype=dtype, seed=0), *middle, Linear(11, 4, dtype=dtype, seed=1)]
    return TrainingStep(Sequential(*layers), LOSSES[loss][0](), RULES[rule]())


def assert_like_the_definition(make, loss, dtype, rows=(9, 1, 4, 9)):
    """Steps with batches of several sizes: a sum here has at most 11 terms of size 1 or so, and sums follow on one another."""
    compiled, portable = make(), make()
    for n in rows:
        X, y = random(n, 6, dtype=dtype), LOSSES[loss][1](n, dtype)
        value = compiled(X, y)
        assert compiled.how.startswith("compiled"), compiled.how
        with lanes.off():
            expected = portable(X, y)
        assert abs(value - expected) <= gamma(4000, unit_roundoff(dtype)) * (1 + abs(expected))
    for name, W in weights(compiled).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(8000, unit_roundoff(dtype)), name
    assert [layer.step for layer in compiled.model if isinstance(layer, Dropout)] == [len(rows)]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_order_and_activation(order, activation, dtype):
    assert_like_the_definition(lambda: step_of(order, activation, dtype=dtype), "ids", dtype)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_and_rule(loss, rule, dtype):
    assert_like_the_definition(lambda: step_of(loss=loss, rule=rule, activation="tanh", dtype=dtype), loss, dtype)


@pytest.mark.parametrize("ends", ["norm", "dropout", "both"])
def test_they_may_come_first_and_last(ends, dtype):
    def make():
        outer = {"norm": [LayerNorm], "dropout": [Dropout], "both": [Dropout, LayerNorm]}[ends]
        first, last = ([norm_of(k, dtype) if kind is LayerNorm else Dropout(0.25, seed=k) for kind in outer] for k in (6, 4))
        model = Sequential(*first, Linear(6, 4, dtype=dtype, seed=0), Tanh(), *last)
        return TrainingStep(model, MeanSquaredError(), SGD(0.1))

    compiled, portable = make(), make()
    for n in (8, 3):
        X, y = random(n, 6, dtype=dtype), random(n, 4, dtype=dtype)
        wide = np.zeros((2 * n, 9), dtype)
        wide[::2, 1:7] = X
        compiled(wide[::2, 1:7], y)
        assert compiled.how.startswith("compiled"), compiled.how
        portable_step(portable, X, y)
    for name, W in weights(compiled).items():
        assert np.abs(W - weights(portable)[name]).max() <= gamma(1000, unit_roundoff(dtype)), name


def test_inputs_of_any_layout_give_the_same_bits(dtype):
    X, y = random(12, 6, dtype=dtype), np.arange(12) % 4
    wide = np.zeros((24, 9), dtype)
    wide[::2, 1:7] = X
    read_only, read_only_y = X.copy(), y.copy()
    read_only.flags.writeable = read_only_y.flags.writeable = False

    def make(first):
        layers = [] if first is None else [norm_of(6, dtype) if first == "norm" else Dropout(0.25, seed=2)]
        model = Sequential(*layers, Linear(6, 5, dtype=dtype, seed=0), LayerNorm(5, dtype=dtype), Dropout(0.25, seed=1),
                           Linear(5, 4, dtype=dtype, seed=1))  # fmt: skip
        return TrainingStep(model, SoftmaxCrossEntropy(), SGD(0.5))

    for first in (None, "norm", "dropout"):
        expected = make(first)
        expected(X, y)
        for X_like, y_like in [
            (wide[::2, 1:7], y), (np.asfortranarray(X), y), (X[::-1].copy()[::-1], y), (read_only, read_only_y),
            (X.reshape(3, 4, 6), y.reshape(3, 4)), (X, y.astype("int8")),
        ]:  # fmt: skip
            step = make(first)
            step(X_like, y_like)
            assert step.how.startswith("compiled")
            assert_same_bits(weights(step), weights(expected))
        step = make(first)
        step.on_rows(X[::-1].copy(), y[::-1].copy(), np.arange(12)[::-1].copy(), 0, 12)
        assert step.how.startswith("compiled")
        assert_same_bits(weights(step), weights(expected))


def test_an_empty_batch_is_left_to_the_definition(dtype):
    compiled, portable = step_of(dtype=dtype), step_of(dtype=dtype)
    X, y = random(0, 6, dtype=dtype), np.zeros(0, np.int64)
    assert np.isnan(compiled(X, y))
    portable_step(portable, X, y)
    assert compiled.how.startswith("portable")
    assert_same_bits(weights(compiled), weights(portable))
    assert [compiled.model[3].step, portable.model[3].step] == [1, 1]


def test_layers_that_do_not_fit_each_other_are_told_as_ever():
    model = Sequential(Linear(6, 5, dtype="float32", seed=0), LayerNorm(4, dtype="float32"), Linear(4, 3, dtype="float32", seed=1))
    with pytest.raises(ValueError, match="layer 1"):
        TrainingStep(model, SoftmaxCrossEntropy(), SGD(0.1))(random(8, 6), np.arange(8) % 3)


@pytest.mark.parametrize(("i", "p", "shape"), [
    (0, "b", (1, 3)), (0, "b", (1, 7)), (0, "b", (5,)), (0, "W", (4, 6)), (1, "b", (3,)), (1, "b", (1, 5)), (1, "W", (6,)),
])  # fmt: skip
def test_parameters_that_do_not_fit_each_other_are_told_as_ever(i, p, shape):
    def make():
        layers = Linear(6, 5, dtype="float32", seed=0), LayerNorm(5, dtype="float32"), Linear(5, 3, dtype="float32", seed=1)
        step = TrainingStep(Sequential(*layers), SoftmaxCrossEntropy(), SGD(0.1))
        step(random(8, 6), np.arange(8) % 3)
        setattr(step.model[i], p, random(*shape))
        return step

    def outcome(step):
        try:
            return step(random(8, 6), np.arange(8) % 3).shape
        except ValueError as error:
            return str(error)

    step = make()
    found = outcome(step)
    assert step.how.startswith("portable")
    with lanes.off():
        assert found == outcome(make())


def test_the_bits_do_not_depend_on_how_many_threads_work():
    library = products.blas()
    if library.set_threads is None:
        pytest.skip("this BLAS has no threads to set")
    X, y = random(96, 300), np.arange(96) % 200

    def begun():
        model = Sequential(Linear(300, 400, dtype="float32", seed=0), LayerNorm(400, dtype="float32"), GELU(), Dropout(0.2, seed=1),
                           Linear(400, 200, dtype="float32", seed=1))  # fmt: skip
        step = TrainingStep(model, SoftmaxCrossEntropy(), AdamW(0.01, clip_norm=1.0))
        step(X, y)  # now it is cut for as many threads as there are
        return step

    def trained(step):
        for _ in range(4):
            step(X, y)
        assert step.how.startswith("compiled")
        return weights(step)

    many, step = trained(begun()), begun()
    before = library.threads()
    library.set_threads(1)
    try:
        one = trained(step)
    finally:
        library.set_threads(before)
    assert_same_bits(one, many)


# ----------------------------------------------------------------------------------------------------------------------
# fit


def model():
    return Sequential(Linear(6, 11, dtype="float32", seed=0), LayerNorm(11, dtype="float32"), ReLU(), Dropout(0.25, seed=3),
                      Linear(11, 4, dtype="float32", seed=1))  # fmt: skip


def trained(made, X, y, epochs, **options):
    fit(made, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(0.01), epochs=epochs, batch_size=16, progress=False, **options)
    return {name: np.array(W) for name, W in made.parameters().items()}


def test_fit_is_compiled(monkeypatch):
    X, y = random(50, 6), np.arange(50) % 4
    with lanes.off():
        expected = trained(model(), X, y, 3)
    for definition in ("training_step", "training_step_on_rows"):
        monkeypatch.setattr(steps, definition, None)  # it is not called
    found = trained(model(), X, y, 3)
    for name, W in found.items():
        assert np.abs(W - expected[name]).max() <= 1e-4, name


@pytest.mark.parametrize("patience", [0, 6, 100])
def test_a_resumed_training_has_the_bits_of_one_that_never_stopped(patience, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "patience", lambda step: patience)  # 6: in the middle of the second epoch
    X, y = random(50, 6), np.arange(50) % 4
    whole = trained(model(), X, y, 4)
    trained(model(), X, y, 2, checkpoint=tmp_path)
    made = model()
    assert_same_bits(trained(made, X, y, 4, checkpoint=tmp_path, resume=True), whole)
    assert made[3].step == 16


@pytest.mark.parametrize("first", ["portable", "compiled"])
def test_a_training_goes_on_in_another_lane_with_the_same_masks(first, tmp_path):
    X, y = random(50, 6), np.arange(50) % 4
    with lanes.off():
        expected = trained(model(), X, y, 4)
        if first == "portable":
            trained(model(), X, y, 2, checkpoint=tmp_path)
    if first == "compiled":
        trained(model(), X, y, 2, checkpoint=tmp_path)
        with lanes.off():
            found = trained(model(), X, y, 4, checkpoint=tmp_path, resume=True)
    else:
        found = trained(model(), X, y, 4, checkpoint=tmp_path, resume=True)
    for name, W in found.items():
        assert np.abs(W - expected[name]).max() <= 1e-4, name  # another mask is some 1e-2


def test_a_copy_goes_on_by_itself():
    X, y = random(8, 6), np.arange(8) % 4
    step = step_of()
    step(X, y)
    other = copy.deepcopy(step)
    step(X, y), other(X, y)
    assert_same_bits(weights(step), weights(other))
    assert step.model[3].step == other.model[3].step == 2
