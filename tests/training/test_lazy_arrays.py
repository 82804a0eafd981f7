"""Arrays that hold no values yet: a layer takes them, and training says what to do."""

from __future__ import annotations

import pickle
import sys
import types

import numpy as np
import pytest

from anyarray_linear import SGD, Device, Linear, MeanSquaredError, evaluate, fit, predict


def test_a_device_keeps_the_name_of_its_namespace(backend):
    device = Device.of(backend.asarray([0.0]))
    assert device.namespace_name == device.xp.__name__ == backend.xp.__name__
    if device.kind not in ("jax",):  # whose devices do not pickle
        assert pickle.loads(pickle.dumps(device)).xp is device.xp


@pytest.fixture
def lazy(monkeypatch):
    """A class of arrays of a namespace in a module below its library's, as dask's are."""
    import array_api_compat.numpy as xp

    library, namespace = types.ModuleType("lazily"), types.ModuleType("lazily.array")
    vars(namespace).update({name: value for name, value in vars(xp).items() if not name.startswith("__")})
    namespace.__array_namespace_info__ = xp.__array_namespace_info__
    monkeypatch.setitem(sys.modules, "lazily", library)
    monkeypatch.setitem(sys.modules, "lazily.array", namespace)

    class Lazy:
        device = "somewhere"

        def __init__(self, values, shape=None):
            self.values, self.dtype = values, values.dtype
            self.shape = values.shape if shape is None else shape
            self.ndim = len(self.shape)

        def __array_namespace__(self, api_version=None):
            return namespace

        def compute(self):
            return self.values

    Lazy.__module__ = "lazily.array.core"
    return Lazy


X = np.ones((4, 2), "float32")


def test_the_namespace_of_a_lazy_array_is_not_its_librarys_top(lazy):
    device = Device.of(lazy(X))
    assert (device.kind, device.namespace_name, device.xp.__name__) == ("lazily", "lazily.array", "lazily.array")


@pytest.mark.parametrize("shape", [None, (float("nan"), 2), (None, 2)])
def test_lazy_arrays_are_refused_in_words_before_training(lazy, shape):
    layer, loss = Linear(2, 1, dtype="float32"), MeanSquaredError()
    for call in (
        lambda: fit(layer, lazy(X, shape), X[:, :1], loss=loss, optimizer=SGD(0.1)),
        lambda: evaluate(layer, lazy(X, shape), X[:, :1], loss=loss),
        lambda: predict(layer, lazy(X, shape)),
    ):
        with pytest.raises(TypeError, match=r"^X is a lazy array of lazily, .* as X\.compute\(\) does for dask"):
            call()
    with pytest.raises(TypeError, match=r"^y is a lazy array"):
        fit(layer, X, lazy(X, shape), loss=loss, optimizer=SGD(0.1))


def test_dask_goes_through_a_layer_and_not_into_training():
    dask = pytest.importorskip("dask.array")
    layer, lazily = Linear.from_arrays(dask.ones((1, 2), dtype="float32")), dask.from_array(X, chunks=2)
    assert np.array_equal(layer(lazily).compute(), X.sum(axis=1, keepdims=True))
    assert Device.of(lazily).xp.__name__ in ("dask.array", "array_api_compat.dask.array")
    with pytest.raises(TypeError, match=r"the parameter W is a lazy array of dask"):
        fit(layer, X, X[:, :1], loss=MeanSquaredError(), optimizer=SGD(0.1))
    with pytest.raises(TypeError, match=r"X is a lazy array of dask"):
        predict(Linear(2, 1, dtype="float32"), lazily)
