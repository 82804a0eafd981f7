"""What every layer and loss has in common."""

from __future__ import annotations

from types import MappingProxyType

import numpy as np
import pytest

from anyarray_linear import (
    GELU,
    SGD,
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
    snapshot,
)

LAYERS = {
    "Linear": lambda: Linear(3, 3, seed=0),
    "ReLU": ReLU,
    "Tanh": Tanh,
    "Sigmoid": Sigmoid,
    "SiLU": SiLU,
    "GELU": GELU,
    "GELU by tanh": lambda: GELU(approximate="tanh"),
    "Dropout": lambda: Dropout(0.5, seed=0),
    "LayerNorm": lambda: LayerNorm(3),
    "Sequential": lambda: Sequential(Linear(3, 3, seed=0), ReLU()),
}
LOSSES = {
    "ids": (SoftmaxCrossEntropy, np.asarray([0, 2, 1, 0, 1])),
    "probabilities": (SoftmaxCrossEntropy, np.full((5, 3), 1 / 3)),
    "squared": (MeanSquaredError, np.ones((5, 3))),
}


def wrapped(cache):
    """The cache as a mapping that is no dict."""
    return [wrapped(each) for each in cache] if isinstance(cache, list) else MappingProxyType(cache)


@pytest.mark.parametrize("name", LAYERS)
def test_a_layers_cache_may_be_any_mapping(backend, name):
    layer, rng = LAYERS[name]().to(backend.device, "float64"), np.random.default_rng(0)
    X, dZ = (backend.asarray(rng.normal(size=(5, 3))) for _ in range(2))
    _, cache = layer.forward(X)
    (dX, gradients), (expected, expected_gradients) = (layer.gradients(dZ, each) for each in (wrapped(cache), cache))
    assert (backend.to_numpy(dX) == backend.to_numpy(expected)).all()
    assert gradients.keys() == expected_gradients.keys()
    for p, gradient in gradients.items():
        assert (backend.to_numpy(gradient) == backend.to_numpy(expected_gradients[p])).all()
    assert (backend.to_numpy(layer.backward(dZ, wrapped(cache))) == backend.to_numpy(expected)).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_losss_cache_may_be_any_mapping(backend, name):
    make, target = LOSSES[name]
    Z, target = backend.asarray(np.random.default_rng(0).normal(size=(5, 3))), backend.asarray(target)
    _, cache = make().forward(Z, target)
    assert (backend.to_numpy(make().backward(MappingProxyType(cache))) == backend.to_numpy(make().backward(cache))).all()


def test_a_step_and_a_snapshot_are_of_objects_and_in_their_order():
    model, loss, optimizer = Linear(1, 1), MeanSquaredError(), SGD(0.1)
    for parts, words in (
        ((model, optimizer, loss), "^loss is a SGD; give an object such as SoftmaxCrossEntropy"),
        ((model, MeanSquaredError, optimizer), "^loss is the class MeanSquaredError"),
        ((model, loss, SGD), "^optimizer is the class SGD"),
        ((Linear, loss, optimizer), "^model is the class Linear"),
    ):
        with pytest.raises(TypeError, match=words):
            TrainingStep(*parts)
    with pytest.raises(TypeError, match=r"^model is a str"):
        snapshot("model")
