"""No lane gets lost: each is bound to the portable function itself, has its parameters, and is what runs."""

from __future__ import annotations

import inspect
import subprocess
import sys

import numpy as np
import pytest

from anyarray_linear import (
    GELU,
    Adam,
    Dropout,
    LayerNorm,
    Linear,
    MeanSquaredError,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    TrainingStep,
    fit,
    lanes,
    predict,
)
from anyarray_linear.arrays.place import place_of

KNOWN = {  # by backend: what else than its name a lane's module needs
    "numpy": "array_api_compat.numpy",
    "cupy:0": "array_api_compat.cupy",
}
on_lanes = pytest.mark.parametrize("backend", list(KNOWN), indirect=True)


def tables(backend):
    """Each lane for arrays of this backend, with its table, in the order in which they are asked."""
    return lanes._tables(KNOWN[backend.name])


@on_lanes
def test_a_lane_takes_what_the_portable_function_takes_that_it_stands_for(backend):
    for lane, table in tables(backend):
        assert table, lane
        for portable, faster in table.items():
            theirs, ours = (inspect.signature(each).parameters.values() for each in (portable, faster))
            assert [p.kind for p in ours] == [p.kind for p in theirs], portable.__name__


@on_lanes
def test_a_lane_is_bound_to_the_function_that_the_mathematics_calls(backend):
    for lane, table in tables(backend):
        for portable in table:
            module = sys.modules[portable.__module__]
            assert getattr(module, portable.__name__) is portable, f"{lane}: {portable.__name__}"
            assert lanes.of(portable, backend.asarray([1.0])) in [name for name, _ in tables(backend)]
            with lanes.off():
                assert lanes.of(portable, backend.asarray([1.0])).startswith("portable: ")


RENAMED = """
import importlib, sys
module = importlib.import_module({module!r})
module.another_name = module.{name}
del module.{name}
import {lane}
"""


@on_lanes
def test_a_portable_function_that_is_renamed_is_an_error_where_its_lane_is_imported(backend):
    for lane, table in tables(backend):
        for portable in table:
            name = f"anyarray_linear.lanes.{lane}"
            code = RENAMED.format(module=portable.__module__, name=portable.__name__, lane=name)
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
            assert done.returncode == 1
            assert f"cannot import name '{portable.__name__}'" in done.stderr, done.stderr


@on_lanes
def test_every_lane_is_taken_by_somebody(backend, monkeypatch):
    """Over a few trainings, each entry of the tables is asked for: none stands there unused."""
    taken = set()

    class Noting(dict):
        def get(self, portable, otherwise=None):
            taken.add(portable)
            return super().get(portable, otherwise)

        def __getitem__(self, portable):
            taken.add(portable)
            return super().__getitem__(portable)

    for place in (place_of(backend.asarray([1], dtype)) for dtype in (*backend.dtypes, "int64")):
        monkeypatch.setattr(place, "faster", Noting(place.faster))
    rng = np.random.default_rng(0)
    X = backend.asarray(rng.normal(size=(8, 5)), "float32")
    for loss, y in (
        (SoftmaxCrossEntropy(), backend.asarray(rng.integers(0, 3, 8))),
        (MeanSquaredError(), backend.asarray(rng.normal(size=(8, 3)), "float32")),
    ):
        layers = [Linear(i, o, seed=i, dtype="float32", device=backend.device) for i, o in ((5, 6), (6, 4), (4, 3))]
        model = Sequential(layers[0], ReLU(), layers[1], GELU(), layers[2])
        with backend.computing():
            Z, caches = model.forward(X)
            _, cache = loss.forward(Z, y)
            model.backward(loss.backward(cache), caches, needs_dX=False)
        layers[0].trainable = False
        with backend.computing():
            layers[0].gradients(model[0](X), {"X": X})
        layers[0].trainable = True
        norm = LayerNorm(5, dtype="float32", device=backend.device)
        fit(Sequential(norm, Dropout(0.5, seed=0), *model), X, y, loss=loss, optimizer=Adam(), epochs=1, progress=False)
        norm.trainable = False
        norm.gradients(*norm.forward(X))
        fit(model, X, y, loss=loss, optimizer=Adam(), epochs=2, batch_size=4, progress=False)
        TrainingStep(model, loss, Adam())(X, y)
        predict(model, X)
    if "float16" in backend.dtypes:
        half = Sequential(*layers).to(backend.device, "float16")
        fit(half, X, backend.asarray(rng.normal(size=(8, 3)), "float16"), loss=loss, optimizer=Adam(), epochs=1, progress=False)
    unused = {portable for _, table in tables(backend) for portable in table} - taken
    assert not unused, [portable.__name__ for portable in unused]
