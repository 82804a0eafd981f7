"""The pitfalls of linear layers as facts that run: collapse, broken symmetry, vanishing signals."""

from __future__ import annotations

import math

import numpy as np
import pytest

from anyarray_linear import SGD, Adam, Linear, ReLU, Sequential, SoftmaxCrossEntropy, Tanh


def train(backend, model, steps=20, optimizer=None):
    """A few steps on a problem that has something to learn; the losses on the way."""
    rng, optimizer, loss_function = np.random.default_rng(0), optimizer or SGD(0.5), SoftmaxCrossEntropy()
    x = rng.standard_normal((32, 4))
    X, ids = backend.asarray(x, "float32"), backend.asarray((x[:, 0] * x[:, 1] > 0).astype("int64"))
    losses = []
    for _ in range(steps):
        Z, caches = model.forward(X)
        loss, cache = loss_function.forward(Z, ids)
        model.backward(loss_function.backward(cache), caches)
        optimizer.step(model)
        losses.append(float(backend.to_numpy(loss)))
    return losses


def hidden_units_are_equal(backend, model):
    """Whether every hidden unit has the same incoming weights, bias and outgoing weights as the first one."""
    W, b, outgoing = (backend.to_numpy(x) for x in (model[0].W, model[0].b, model[2].W))
    return np.array_equal(W, W[:1].repeat(len(W), 0)) and np.all(b == b[0, 0]) and np.all(outgoing == outgoing[:, :1])


def test_two_linear_layers_without_activation_are_one(backend):
    first, second = (Linear(i, o, seed=i, dtype="float64", device=backend.device) for i, o in ((4, 64), (64, 3)))
    deep = Sequential(first, second)
    one = deep.collapse()
    assert len(one) == 1
    assert tuple(one[0].W.shape) == (3, 4)  # 15 numbers do what 451 did
    X = backend.asarray(np.random.default_rng(0).standard_normal((10, 4)))
    assert np.allclose(backend.to_numpy(one(X)), backend.to_numpy(deep(X)), rtol=0, atol=1e-13)
    bent = Sequential(first, ReLU(), second)
    assert len(bent.collapse()) == 3
    assert not np.allclose(backend.to_numpy(bent(X)), backend.to_numpy(deep(X)), rtol=0, atol=0.1)


@pytest.mark.parametrize("optimizer", [lambda: SGD(0.5, momentum=0.9), lambda: Adam(0.05)], ids=["SGD", "Adam"])
def test_hidden_units_that_start_equal_stay_equal_through_training(backend, optimizer):
    # of equal units each has the same gradient, so that no step can ever tell them apart
    def constant(value):
        return lambda rng, shape: np.full(shape, value)

    model = Sequential(
        Linear(4, 8, init=constant(0.1), dtype="float32", device=backend.device),
        Tanh(),
        Linear(8, 2, init=lambda rng, shape: np.asarray([[0.2], [-0.1]]).repeat(8, 1), dtype="float32", device=backend.device),
    )
    before = backend.to_numpy(model[0].W).copy()
    train(backend, model, optimizer=optimizer())
    assert not np.allclose(backend.to_numpy(model[0].W), before), "it did train"
    W, outgoing = backend.to_numpy(model[0].W), backend.to_numpy(model[2].W)
    # a BLAS may add the columns of one product in different orders, so equal to rounding
    assert np.allclose(W, W[:1], rtol=0, atol=1e-5)
    assert np.allclose(outgoing, outgoing[:, :1], rtol=0, atol=1e-5)
    assert np.linalg.matrix_rank(W, tol=1e-3) == 1, "eight units do the work of one"


@pytest.mark.parametrize("activation", [ReLU, Tanh])
def test_zero_initialisation_keeps_hidden_units_identical_and_learns_only_the_frequencies(backend, activation):
    def model_with(init):
        sizes = ((4, 8), (8, 2))
        first, second = (
            Linear(i, o, init=init, dtype="float32", device=backend.device, seed=n) for n, (i, o) in enumerate(sizes)
        )
        return Sequential(first, activation(), second)

    zeros = model_with("zeros")
    losses = train(backend, zeros, steps=100)
    assert hidden_units_are_equal(backend, zeros)
    # both activations are 0 at 0: nothing but the last bias ever moves, and it can only learn how frequent the classes are
    assert not np.any(backend.to_numpy(zeros[0].W))
    assert not np.any(backend.to_numpy(zeros[2].W))
    assert np.any(backend.to_numpy(zeros[2].b))
    drawn = model_with("he_normal")
    assert train(backend, drawn, steps=100)[-1] < losses[-1] / 2
    assert not hidden_units_are_equal(backend, drawn)


DEPTH, WIDTH, ROWS = 10, 256, 64


def ten_layers(backend, scale):
    """Second moments of the activations after each ReLU, and norms of dX on the way back, relative to those that came in."""

    def init(rng, shape):
        return scale * math.sqrt(2 / shape[1]) * rng.standard_normal(shape)

    seeds, rng = np.random.SeedSequence(0), np.random.default_rng(1)
    layers = [Linear(WIDTH, WIDTH, init=init, dtype="float32", device=backend.device, seed=seeds) for _ in range(DEPTH)]
    A, caches, moments, norms = backend.asarray(rng.standard_normal((ROWS, WIDTH)), "float32"), [], [], []
    for layer in layers:
        Z, of_linear = layer.forward(A)
        A, of_relu = ReLU().forward(Z)
        caches.append((of_linear, of_relu))
        moments.append(float(np.mean(backend.to_numpy(A).astype("float64") ** 2)))
    dX = backend.asarray(rng.standard_normal((ROWS, WIDTH)), "float32")
    start = float(np.linalg.norm(backend.to_numpy(dX)))
    for layer, (of_linear, of_relu) in zip(reversed(layers), reversed(caches), strict=True):
        dX, _ = layer.gradients(ReLU().gradients(dX, of_relu)[0], of_linear)
        norms.append(float(np.linalg.norm(backend.to_numpy(dX))) / start)
    return np.asarray(moments), np.asarray(norms)


def test_he_initialisation_keeps_activations_and_gradients_over_ten_relu_layers(backend):
    moments, norms = ten_layers(backend, scale=1.0)
    # Each layer multiplies a row's second moment by a factor with mean 1 and variance 5/width (He weights and a ReLU:
    # the mean over `width` units of g^2 [g > 0] 2 has the variance (4 * 3/2 - 1)/width). All rows share the weights, so
    # their mean has no smaller spread; after ten layers it is sqrt(50/256) = 0.44 on the logarithm. Three times that:
    within = math.exp(3 * math.sqrt(5 * DEPTH / WIDTH))
    assert np.all(moments < within)
    assert np.all(moments > 1 / within)
    # backward the same factors act, on squared norms
    assert np.all(norms**2 < within)
    assert np.all(norms**2 > 1 / within)


def test_a_tenth_of_he_initialisation_lets_activations_and_gradients_vanish(backend):
    # a ReLU and a linear layer without bias are homogeneous: ten layers of a tenth of the weights give 10^-10 of the signal
    moments, norms = ten_layers(backend, scale=0.1)
    he_moments, he_norms = ten_layers(backend, scale=1.0)
    powers = 0.1 ** np.arange(1, DEPTH + 1)
    assert np.allclose(moments, he_moments * powers**2, rtol=1e-3)
    assert np.allclose(norms, he_norms * powers, rtol=1e-3)
    assert moments[-1] < 1e-18
    assert norms[-1] < 1e-9
