"""One look at an array: its place is one object, found without asking anybody once it is known."""

from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from anyarray_linear import GELU, SGD, Adam, Linear, ReLU, Sequential, SoftmaxCrossEntropy, TrainingStep
from anyarray_linear.arrays.place import place_of


def test_arrays_have_one_place_if_namespace_device_and_dtype_are_equal(backend):
    x, y = backend.asarray([1.0], "float32"), backend.asarray([[2.0, 3.0]], "float32")
    assert place_of(x) is place_of(y)
    assert place_of(x) is not place_of(backend.asarray([1.0], "float64"))
    assert place_of(x) is not place_of(backend.asarray([1]))
    assert place_of(x).xp is backend.xp
    assert place_of(x).device == backend.native
    assert (place_of(x).dtype, place_of(x).dtype_name) == (x.dtype, "float32")


@pytest.mark.parametrize("pair", [("cupy:0", "cupy:1"), ("strict", "strict-device1")], ids=lambda pair: pair[0])
def test_devices_have_places_of_their_own(pair, request):
    from conftest import make_backend

    if not set(pair) <= set(request.config.pluginmanager.get_plugin("anyarray_linear_backends").here):
        pytest.skip("there is one device")
    one, two = (make_backend(name).asarray([1.0], "float32") for name in pair)
    assert place_of(one) is not place_of(two)


def test_threads_that_look_for_the_first_time_at_once_find_one_place():
    dtype = np.dtype([("only", "f4"), ("here", "f8")])  # no other test looks at arrays of it
    found, together = [], threading.Barrier(8)

    def look():
        x = np.zeros(1, dtype)
        together.wait()
        found.append(place_of(x))

    threads = [threading.Thread(target=look) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(map(id, found))) == 1


def calls(work, names):
    """How often functions of these names are called in `work`, in Python code of any module."""
    found = []

    def note(frame, event, argument):
        if event == "call" and frame.f_code.co_name in names:
            found.append(f"{frame.f_code.co_name} in {frame.f_back.f_code.co_filename}:{frame.f_back.f_lineno}")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return found


@pytest.mark.parametrize("how", ["by hand", "TrainingStep"])
@pytest.mark.parametrize("optimizer", [lambda: SGD(1e-3, momentum=0.9), lambda: Adam(1e-3, clip_norm=1.0)], ids=["SGD", "Adam"])
def test_a_warm_step_asks_for_no_namespace(backend, how, optimizer):
    rng = np.random.default_rng(0)
    X, y = backend.asarray(rng.normal(size=(8, 5)), "float32"), backend.asarray(rng.integers(0, 3, 8))
    layers = [Linear(i, o, seed=i, dtype="float32", device=backend.device) for i, o in ((5, 6), (6, 4), (4, 3))]
    model, loss, rule = Sequential(layers[0], ReLU(), layers[1], GELU(), layers[2]), SoftmaxCrossEntropy(), optimizer()
    whole = TrainingStep(model, loss, rule)

    def by_hand():
        Z, caches = model.forward(X)
        _, cache = loss.forward(Z, y)
        _, gradients = model.gradients(loss.backward(cache), caches, needs_dX=False)
        rule.step(model, gradients)

    step = by_hand if how == "by hand" else lambda: whole(X, y)
    for _ in range(4):
        step()
    assert calls(step, {"array_namespace", "_get_namespace", "__array_namespace__"}) == []


def test_a_namespace_that_is_asked_for_would_be_seen():
    from array_api_compat import array_namespace

    assert len(calls(lambda: array_namespace(np.ones(1)), {"array_namespace"})) == 1
