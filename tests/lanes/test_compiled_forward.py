"""The compiled forward pass of `predict`, `evaluate` and validation: the numbers of the definition, taken where it pays."""

from __future__ import annotations

import copy
import gc
import importlib.util
import threading
import weakref

import numpy as np
import pytest
from running_error import Rounded
from test_compiled_lane import MAKES, SMOOTH, model_of, random
from test_normalization import bounds, reference

from anyarray_linear import (
    GELU,
    Adam,
    Dropout,
    LayerNorm,
    Linear,
    ReLU,
    Sequential,
    SiLU,
    SoftmaxCrossEntropy,
    evaluate,
    fit,
    lanes,
    predict,
)
from anyarray_linear.lanes.compiled import blas as products
from anyarray_linear.lanes.compiled import building, forward, program, running, steps
from anyarray_linear.protocol import outputs
from anyarray_linear.testing import gamma, unit_roundoff

pytestmark = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="numba is not installed")


@pytest.fixture
def always(monkeypatch):
    """It is taken for everything that it can do, and the definition for nothing."""
    monkeypatch.setattr(forward, "LOADING", 0.0)
    monkeypatch.setattr(forward, "_saved", lambda stage: 1.0)
    monkeypatch.setattr(forward, "is_at_hand", lambda dtype: True)
    monkeypatch.setattr(forward, "outputs", None)


@pytest.fixture
def four_threads(monkeypatch):
    """Everything is cut for four threads."""
    for name, value in (("WORTH_CUTTING", 1), ("ROWS", 64)):
        monkeypatch.setattr(program, name, value)
    monkeypatch.setattr(running, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(products.alone, "cores", lambda library: 4)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


def portable(model, X):
    with lanes.off():
        return predict(model, X)


# ----------------------------------------------------------------------------------------------------------------------
# the numbers


def assert_right(kind, rows, dtype, sizes=(13, 17, 33, 5)):
    model, X = model_of(sizes, MAKES.get(kind, kind), dtype), random(rows, sizes[0], dtype=dtype)
    Z = predict(model, X, batch_size=40)
    A = Rounded(X, 0.0, dtype)
    for layer in model:
        if isinstance(layer, Linear):
            A = A @ Rounded(layer.W, 0.0, dtype).T + Rounded(layer.b, 0.0, dtype)
        else:
            A = A.relu() if kind is ReLU else A.smooth(SMOOTH[kind][0], SMOOTH[kind][2])
    assert Z.dtype == dtype
    assert A.share(Z) <= 1


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("rows", [1, 7, 64])
@pytest.mark.parametrize("kind", [None, ReLU, *SMOOTH], ids=str)
def test_outputs_are_within_the_bound(kind, rows, dtype):
    assert_right(kind, rows, dtype)


@pytest.mark.usefixtures("always", "four_threads")
def test_outputs_that_are_computed_by_four_threads(dtype):
    assert_right(GELU, 50, dtype, (70, 130, 40))


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("shape", [(1, 1), (4, 33), (64, 7)], ids=str)
def test_layer_normalisation_is_within_the_bound(shape, dtype):
    X, norm = random(*shape, dtype=dtype) + 5, LayerNorm(shape[1], 1e-2, dtype=dtype)
    norm.W, norm.b = (random(shape[1], dtype=dtype, seed=seed) for seed in (1, 2))
    zero = np.zeros_like(X)
    exact = reference(X, norm.W, norm.b, zero, 1e-2)
    error = np.abs(predict(Sequential(norm), X) - exact["Z"]).astype(float)
    assert (error <= bounds(X, norm.W, norm.b, zero, exact, dtype)["Z"]).all()


@pytest.mark.usefixtures("always")
def test_dropout_does_nothing(dtype):
    X, drop = random(9, 6, dtype=dtype), Dropout(0.5, seed=0)
    layers = [Linear(6, 5, dtype=dtype, seed=0), SiLU(), Linear(5, 4, dtype=dtype, seed=1)]
    expected = predict(Sequential(*layers), X)
    found = predict(Sequential(drop, *layers[:2], drop, layers[2], drop), X)
    assert np.array_equal(found, expected)
    assert drop.step == 0


@pytest.mark.usefixtures("always")
def test_inputs_of_any_layout_give_the_same_bits(dtype):
    X = random(12, 6, dtype=dtype)
    wide = np.zeros((24, 9), dtype)
    wide[::2, 1:7] = X
    read_only = X.copy()
    read_only.flags.writeable = False
    odd = np.frombuffer(b"." + X.tobytes(), np.uint8)[1:].view(dtype).reshape(X.shape)
    assert not odd.flags.aligned
    last = [Linear(6, 4, dtype=dtype, seed=1)]
    for model in (model_of((6, 5, 4), SiLU, dtype), Sequential(LayerNorm(6, dtype=dtype), *last), Sequential(GELU(), *last)):
        expected = predict(model, X)
        for like in (wide[::2, 1:7], np.asfortranarray(X), X[::-1].copy()[::-1], read_only, odd):
            assert np.array_equal(predict(model, like), expected)
        assert np.array_equal(predict(model, X.reshape(3, 4, 6)), expected.reshape(3, 4, 4))
        assert np.array_equal(predict(model, X), expected), "X was written to"


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("batch_size", [1, 5, 12, 50])
def test_batches_of_every_size(batch_size, dtype):
    model, X = model_of((6, 50, 4), GELU, dtype), random(12, 6, dtype=dtype)
    first = predict(model, X, batch_size=batch_size)
    kept = first.copy()
    assert np.abs(first - portable(model, X)).max() <= gamma(400, unit_roundoff(dtype))
    predict(model, 2 * X, batch_size=batch_size)
    assert np.array_equal(first, kept), "an output is the caller's alone"
    assert np.array_equal(predict(model, X, batch_size=batch_size), first)


@pytest.mark.usefixtures("always")
def test_many_sizes_one_after_the_other():
    model, X = model_of((6, 5, 4), GELU), random(30, 6)
    for rows in (*range(1, 20), *range(20, 0, -1)):
        assert np.abs(predict(model, X[:rows]) - portable(model, X[:rows])).max() <= gamma(400, unit_roundoff("float32"))


@pytest.mark.usefixtures("always")
def test_evaluate_takes_it_too(dtype):
    model, X, y = model_of((6, 50, 4), GELU, dtype), random(40, 6, dtype=dtype), np.arange(40) % 4
    found = evaluate(model, X, y, loss=SoftmaxCrossEntropy(), batch_size=16)
    with lanes.off():
        expected = evaluate(model, X, y, loss=SoftmaxCrossEntropy(), batch_size=16)
    assert found.keys() == expected.keys()
    assert found["accuracy"] == expected["accuracy"]
    assert abs(found["loss"] - expected["loss"]) <= gamma(400, unit_roundoff(dtype)) * (1 + expected["loss"])


@pytest.mark.usefixtures("always")
def test_one_model_in_many_threads_at_once():
    model, X = model_of((300, 400, 200), GELU), random(96, 300)
    expected, found = predict(model, X), []

    def work():
        found.extend(predict(model, X) for _ in range(10))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 40
    assert all(np.array_equal(Z, expected) for Z in found)


# ----------------------------------------------------------------------------------------------------------------------
# what changes between calls


def assign(model):
    model[0].W = np.ones_like(model[0].W)


def write(model):
    model[0].W[...] = 1


def assign_bias(model):
    model[3].b = np.ones_like(model[3].b)


def change_eps(model):
    model[1].eps = 1.0


def change_kind(model):
    model[2].approximate = "tanh"


def other_layers(model):
    model.layers = (*model.layers[:2], SiLU(), model.layers[3])


def inner_layers(model):
    model[3].layers = (Linear(5, 3, dtype=model[0].dtype.name, seed=9),)


def spaced(model):
    wide = np.zeros((5, 12), model[0].W.dtype)
    wide[:, ::2] = 2 * model[0].W
    model[0].W = wide[:, ::2]


@pytest.mark.parametrize("change", [assign, write, assign_bias, change_eps, change_kind, other_layers, inner_layers, spaced])
def test_changes_between_calls_are_noticed(change, dtype, monkeypatch):
    monkeypatch.setattr(forward, "LOADING", 0.0)
    monkeypatch.setattr(forward, "_saved", lambda stage: 1.0)
    last = Linear(5, 4, dtype=dtype, seed=1)
    layers = Linear(6, 5, dtype=dtype, seed=0), LayerNorm(5, dtype=dtype), GELU(), last
    model = Sequential(*layers[:3], Sequential(last)) if change is inner_layers else Sequential(*layers)
    X = random(8, 6, dtype=dtype)
    before = predict(model, X)
    change(model)
    after = predict(model, X)
    assert after.shape != before.shape or not np.array_equal(after, before)
    assert np.abs(after - portable(model, X)).max() <= gamma(2000, unit_roundoff(dtype))


@pytest.mark.usefixtures("always")
def test_a_copy_and_a_model_of_another_dtype_are_models_of_their_own():
    model, X = model_of((6, 5, 4), GELU), random(8, 6)
    before = predict(model, X)
    other = copy.deepcopy(model)
    other[0].W[...] = 0
    assert np.array_equal(predict(model, X), before)
    assert not np.array_equal(predict(other, X), before)
    assert predict(model.to(dtype="float64"), X).dtype == "float64"


@pytest.mark.usefixtures("always")
def test_what_is_kept_goes_with_its_model():
    model = model_of((6, 5, 4), GELU)
    predict(model, random(8, 6))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


# ----------------------------------------------------------------------------------------------------------------------
# what is left to the definition, and when it pays


class Own(ReLU):
    pass


@pytest.mark.parametrize("make", [
    lambda: Sequential(Linear(6, 4, dtype="float32", seed=0), Own()),
    lambda: type("Subclass", (Sequential,), {})(Linear(6, 4, dtype="float32", seed=0), GELU()),
    lambda: Linear(6, 4, dtype="float32", seed=0),
    lambda: Sequential(GELU()),
    lambda: Sequential(Dropout(0.5, seed=0)),
])  # fmt: skip
def test_what_is_not_compiled_runs_by_the_definition(make, monkeypatch):
    monkeypatch.setattr(forward, "LOADING", 0.0)
    monkeypatch.setattr(forward, "_saved", lambda stage: 1.0)
    monkeypatch.setattr(forward.Forward, "__call__", None)
    model, X = make(), random(8, 6)
    assert np.abs(predict(model, X) - portable(model, X)).max() <= gamma(100, unit_roundoff("float32"))


@pytest.mark.parametrize("shape", [(0, 6), (3, 0, 6), (3, 5), ()], ids=str)
def test_what_is_empty_or_does_not_fit_is_the_definition_s(shape, monkeypatch):
    monkeypatch.setattr(forward, "LOADING", 0.0)
    monkeypatch.setattr(forward.Forward, "__call__", None)
    model, X = model_of((6, 5, 4), GELU), random(*shape)
    found = []
    for run in (lambda: forward.compiled_outputs(None, model, X, 10.0**9), lambda: model(X)):
        try:
            found.append(run().shape)
        except ValueError as error:
            found.append(str(error))
    assert found[0] == found[1]


def taken(model, X, rows, monkeypatch, kept=True):
    called = []
    monkeypatch.setattr(forward.Forward, "__call__", lambda self, X: called.append(1))
    monkeypatch.setattr(forward, "is_at_hand", lambda dtype: kept)
    forward.compiled_outputs(None, model, X, rows)
    return bool(called)


def test_it_is_taken_where_it_pays(monkeypatch):
    """By the number of rows: what is saved is more than loading takes, or without code on disk, than compiling."""
    X = random(8, 64)
    gelu, relu = model_of((64, 64, 10), GELU), model_of((64, 64, 10), ReLU)
    each = forward.Forward(gelu).saved
    assert 0 < each < 64 * 30e-9
    assert not taken(gelu, X, 0.9 * forward.LOADING / each, monkeypatch)
    assert taken(gelu, X, 1.1 * forward.LOADING / each, monkeypatch)
    assert not taken(gelu, X, 0.9 * forward.COMPILING / each, monkeypatch, kept=False)
    assert taken(gelu, X, 1.1 * forward.COMPILING / each, monkeypatch, kept=False)
    assert taken(gelu, X.reshape(2, 4, 64), 0.3 * forward.LOADING / each, monkeypatch), "a row of these is four"
    assert not taken(relu, X, 10.0**12, monkeypatch), "which is as fast without"


def test_predict_says_how_many_rows_there_are(monkeypatch):
    said = []
    monkeypatch.setattr(forward.Forward, "pays", lambda self, xp, saved, step: said.append((saved, step)))
    monkeypatch.setattr(forward, "LOADING", 0.0)
    model, X, y = model_of((6, 5, 4), GELU), random(50, 6), np.arange(50) % 4
    each = forward.Forward(model).saved
    predict(model, X, batch_size=20)
    evaluate(model, X, y, loss=SoftmaxCrossEntropy(), batch_size=20)
    assert said == [(pytest.approx(50 * each), None)] * 6


def test_lanes_say_which_is_taken():
    assert lanes.of(outputs, random(3, 6)) == "compiled"
    with lanes.off():
        assert lanes.of(outputs, random(3, 6)).startswith("portable")


def test_without_numba_it_is_numpy(monkeypatch):
    monkeypatch.setattr(building.PathFinder, "find_spec", lambda name: None)
    monkeypatch.setattr(building, "_loaded", set())
    monkeypatch.setattr(forward, "LOADING", 0.0)
    model, X = model_of((6, 5, 4), GELU), random(8, 6)
    assert not building.is_at_hand("float32")
    expected = portable(model, X)
    assert np.abs(predict(model, X) - expected).max() <= gamma(400, unit_roundoff("float32"))
    monkeypatch.setattr(running, "code_for", building.code_for.__wrapped__)
    monkeypatch.setattr(forward, "COMPILING", 0.0)  # it is asked for, and not there
    assert np.abs(predict(model, X) - expected).max() <= gamma(400, unit_roundoff("float32"))


def test_what_is_at_hand(monkeypatch, tmp_path):
    building.code_for("float32")
    assert building.is_at_hand("float32")
    monkeypatch.setenv("ANYARRAY_CACHE_DIR", str(tmp_path))
    assert building.is_at_hand("float32"), "it is loaded"
    monkeypatch.setattr(building, "_loaded", set())
    assert not building.is_at_hand("float32")


def trained(model, epochs, **options):
    X, y = random(50, 6), np.arange(50) % 4
    return fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(0.01), epochs=epochs, batch_size=16, progress=False,
               validation=(random(30, 6, seed=1), np.arange(30) % 4), **options).rows  # fmt: skip


@pytest.mark.parametrize("activation", [ReLU, GELU])
@pytest.mark.parametrize("patience", [0, 6, 12, 100])
def test_validation_is_compiled_with_the_steps_and_goes_on_with_the_same_bits(activation, patience, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "patience", lambda step: patience)
    calls, call = [], forward.Forward.__call__
    monkeypatch.setattr(forward.Forward, "__call__", lambda self, X: calls.append(1) or call(self, X))
    whole = trained(model_of((6, 5, 4), activation), 4)
    assert len(calls) == {0: 4, 6: 3, 12: 2, 100: 0}[patience]  # an epoch is four steps
    for stop in (1, 3):
        folder = tmp_path / str(stop)
        trained(model_of((6, 5, 4), activation), stop, checkpoint=folder)
        resumed = trained(model_of((6, 5, 4), activation), 4, checkpoint=folder, resume=True)
        without_time = [[{name: row[name] for name in row if name != "seconds"} for row in rows] for rows in (whole, resumed)]
        assert without_time[0] == without_time[1]
