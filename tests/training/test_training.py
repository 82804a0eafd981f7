"""`fit`, `evaluate` and `predict`: what they compute, where, and what they leave alone."""

from __future__ import annotations

import math
import re
import signal
import threading

import numpy as np
import pytest

from anyarray_linear import (
    SGD,
    Adam,
    Device,
    Linear,
    MeanSquaredError,
    NonFiniteError,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    evaluate,
    fit,
    load_checkpoint,
    load_model,
    predict,
    save_checkpoint,
    save_model,
)
from anyarray_linear.schedules import cosine


@pytest.fixture(autouse=True)
def ctrl_c_is_pythons_own():
    """A parent that ignores SIGINT (nohup, some CI) hands that down, and then no handler is Python's own."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def problem(rows=50, features=4, classes=3, dtype="float32"):
    rng = np.random.default_rng(7)
    X = rng.standard_normal((rows, features)).astype(dtype)
    return X, rng.integers(0, classes, rows)


def network(backend=None, dtype="float32", seed=1, features=4, classes=3):
    seeds = np.random.default_rng(seed)
    device = None if backend is None else backend.device
    place = {"device": device, "dtype": dtype, "seed": seeds}
    return Sequential(Linear(features, 8, **place), ReLU(), Linear(8, classes, **place))


class Watch(ReLU):
    """The identity, as a layer that calls a function at each forward."""

    def __init__(self, see):
        self.see = see

    def forward(self, X):
        self.see(X)
        return X, {"Z": X}

    def __call__(self, X):
        return X

    def gradients(self, dZ, cache, *, needs_dX=True):
        return dZ, {}


class SpoiledLoss(MeanSquaredError):
    """A squared error whose value or gradient is not finite from the given calls of `forward` on, counted from 1."""

    def __init__(self, calls, spoil_value=False):
        self.calls, self.spoil_value, self.called = calls, spoil_value, 0

    def forward(self, Z, target):
        self.called += 1
        value, cache = super().forward(Z, target)
        # the first call is fit's look at one row before training
        self.bad = self.called - 1 in self.calls
        return (value * math.inf if self.bad and self.spoil_value else value), cache

    def backward(self, cache):
        dZ = super().backward(cache)
        return dZ * math.nan if self.bad and not self.spoil_value else dZ


def weights(model, backend=None):
    to_numpy = np.asarray if backend is None else backend.to_numpy
    return {name: np.array(to_numpy(p)) for name, p in model.parameters().items()}


def assert_same(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name in mine:
        np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def seen_batches(epochs=2, rows=10, batch_size=4, **options):
    """The row numbers of every batch that a training saw; each row's only feature is its number."""
    batches = []
    X = np.arange(rows, dtype=np.float32).reshape(-1, 1)
    model = Sequential(Watch(lambda X: batches.append(X[:, 0].astype(int).tolist())), Linear(1, 1, dtype="float32"))
    fit(model, X, X, loss=MeanSquaredError(), optimizer=SGD(0.0), epochs=epochs, batch_size=batch_size,
        progress=False, **options)  # fmt: skip
    return batches


def test_every_epoch_sees_every_row_once_in_another_order_and_the_last_batch_is_partial():
    batches = seen_batches()
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2]
    first, second = sum(batches[:3], []), sum(batches[3:], [])
    assert sorted(first) == sorted(second) == list(range(10))
    assert first != second != list(range(10))


def test_the_order_depends_on_the_seed_alone():
    assert seen_batches(seed=3) == seen_batches(seed=3)
    assert seen_batches(seed=np.random.SeedSequence(3)) == seen_batches(seed=np.random.SeedSequence(3))
    assert seen_batches(seed=3) != seen_batches(seed=4)


def test_a_batch_may_be_larger_than_the_data():
    assert [len(batch) for batch in seen_batches(epochs=1, batch_size=99)] == [10]


def test_a_validation_fraction_is_held_out_of_training():
    trained = {row for batch in seen_batches(validation=0.3) for row in batch}
    assert len(trained) == 7


def test_training_is_the_loop_one_would_write_by_hand(backend):
    X, y = problem()
    model, by_hand = network(backend), network(backend)
    history = fit(model, backend.asarray(X), backend.asarray(y), loss=SoftmaxCrossEntropy(),
                  optimizer=Adam(cosine(1e-2, 8)), epochs=2, batch_size=16, seed=5, progress=False)  # fmt: skip
    loss, optimizer, losses = SoftmaxCrossEntropy(), Adam(cosine(1e-2, 8)), []
    for epoch in range(2):
        order = np.random.default_rng(np.random.SeedSequence(5, spawn_key=(int.from_bytes(b"fit"), epoch + 1))).permutation(50)
        for rows in np.split(order, [16, 32, 48]):
            Z, caches = by_hand.forward(backend.asarray(X[rows]))
            value, cache = loss.forward(Z, backend.asarray(y[rows]))
            by_hand.backward(loss.backward(cache), caches)
            optimizer.step(by_hand)
            losses.append(float(backend.to_numpy(value)) * len(rows))
    assert_same(weights(model, backend), weights(by_hand, backend))
    assert [row["epoch"] for row in history.rows] == [1, 2]
    assert [row["steps"] for row in history.rows] == [4, 8]
    assert [row["loss"] for row in history.rows] == pytest.approx([sum(losses[:4]) / 50, sum(losses[4:]) / 50], rel=1e-6)
    assert [row["lr"] for row in history.rows] == [cosine(1e-2, 8)(3), cosine(1e-2, 8)(7)]
    assert not history.interrupted


def test_data_on_the_host_and_on_the_device_train_alike(backend):
    X, y = problem()
    on_host, on_device = network(backend), network(backend)
    options = {"loss": SoftmaxCrossEntropy(), "epochs": 2, "batch_size": 16, "validation": 0.2, "progress": False}
    host = fit(on_host, X, y, optimizer=SGD(0.1), **options)
    device = fit(on_device, backend.asarray(X), backend.asarray(y), optimizer=SGD(0.1), **options)
    assert_same(weights(on_host, backend), weights(on_device, backend))
    assert all(backend.owns(p) for p in on_host.parameters().values())
    for mine, theirs in zip(host.rows, device.rows, strict=True):
        assert {**mine, "seconds": 0} == {**theirs, "seconds": 0}


def test_X_and_a_float_y_are_cast_to_the_model(backend):
    X, _ = problem()
    y = X @ np.ones((4, 3), np.float32)
    mine, theirs = network(backend), network(backend)
    options = {"loss": MeanSquaredError(), "epochs": 1, "progress": False}
    fit(mine, X.astype(np.float64), y.astype(np.float64), optimizer=SGD(0.1), **options)
    fit(theirs, X, y, optimizer=SGD(0.1), **options)
    assert_same(weights(mine, backend), weights(theirs, backend))


def test_integer_features_are_cast_too():
    X = np.arange(40).reshape(10, 4).astype(np.uint8)
    mine, theirs = network(), network()
    options = {"loss": SoftmaxCrossEntropy(), "epochs": 1, "progress": False}
    fit(mine, X, np.zeros(10, np.uint8), optimizer=SGD(0.01), **options)
    fit(theirs, X.astype(np.float32), np.zeros(10, np.int64), optimizer=SGD(0.01), **options)
    assert_same(weights(mine), weights(theirs))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64", "int8", "int16"])
@pytest.mark.parametrize("there", [False, True], ids=["on the host", "on the device"])
def test_class_ids_of_any_integer_dtype_train_alike(backend, dtype, there):
    X, y = problem()
    mine, theirs = network(backend), network(backend)
    options = {"loss": SoftmaxCrossEntropy(), "epochs": 2, "batch_size": 16, "validation": 0.2, "progress": False}
    ids = backend.asarray(y, dtype) if there else y.astype(dtype)
    one = fit(mine, X, ids, optimizer=SGD(0.1), **options)
    other = fit(theirs, X, y, optimizer=SGD(0.1), **options)
    assert_same(weights(mine, backend), weights(theirs, backend))
    for name in ("validation_loss", "validation_accuracy"):
        assert one.rows[-1][name] == other.rows[-1][name]
    assert evaluate(mine, X, ids, loss=options["loss"]) == evaluate(mine, X, y, loss=options["loss"])
    with pytest.raises(ValueError, match="class ids from"):
        fit(mine, X, ids + np.asarray(3, dtype) if not there else backend.asarray(y + 3, dtype), optimizer=SGD(0.1), **options)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_unsigned_features_train_on_every_backend(backend, dtype):
    X, y = np.arange(200).reshape(50, 4) % 7, problem()[1]
    mine, theirs = network(backend), network(backend)
    options = {"loss": SoftmaxCrossEntropy(), "epochs": 1, "batch_size": 16, "validation": 0.2, "progress": False}
    fit(mine, backend.asarray(X, dtype), y, optimizer=SGD(0.1), **options)
    fit(theirs, backend.asarray(X, "float32"), y, optimizer=SGD(0.1), **options)
    assert_same(weights(mine, backend), weights(theirs, backend))


def test_data_are_not_written_to(backend):
    X, y = problem()
    X_there, y_there = backend.asarray(X), backend.asarray(y)
    fit(network(backend), X_there, y_there, loss=SoftmaxCrossEntropy(), optimizer=Adam(), epochs=1, progress=False)
    np.testing.assert_array_equal(backend.to_numpy(X_there), X)
    np.testing.assert_array_equal(backend.to_numpy(y_there), y)


def test_validation_rows_are_what_evaluate_says(backend):
    X, y = problem()
    held = problem(rows=20, classes=3)
    model = network(backend)
    history = fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(), epochs=1, validation=held, progress=False)
    scores = evaluate(model, *held, loss=SoftmaxCrossEntropy())
    assert history.rows[-1]["validation_loss"] == scores["loss"]
    assert history.rows[-1]["validation_accuracy"] == scores["accuracy"]


def test_evaluate_weights_batches_by_their_rows_and_counts_hits(backend):
    X, y = problem(dtype="float64")
    model = network(backend, dtype="float64")
    Z = backend.to_numpy(model(backend.asarray(X)))
    rows = np.log(np.exp(Z).sum(axis=1)) - Z[np.arange(50), y]
    for batch_size in (7, 1024):
        scores = evaluate(model, X, y, loss=SoftmaxCrossEntropy(), batch_size=batch_size)
        assert scores["loss"] == pytest.approx(rows.mean(), rel=1e-13)
        assert scores["accuracy"] == (Z.argmax(axis=1) == y).mean()


def test_accuracy_counts_every_id_of_targets_of_any_shape(backend):
    X, y = problem(rows=60, dtype="float64")
    X, y = X.reshape(10, 2, 3, 4), y.reshape(10, 2, 3)
    model = network(backend, dtype="float64")
    found = backend.to_numpy(model(backend.asarray(X))).argmax(axis=-1)
    for batch_size in (3, 1024):
        scores = evaluate(model, X, y, loss=SoftmaxCrossEntropy(), batch_size=batch_size)
        assert scores["accuracy"] == (found == y).sum() / 60 < 1


def test_outputs_that_are_not_numbers_are_never_right(backend):
    X, y = problem()
    model = network(backend)
    model[2].b = backend.asarray(np.asarray([[np.nan, 0, 0]]), "float32")  # argmax says 0
    with np.errstate(invalid="ignore"):
        assert evaluate(model, X, 0 * y, loss=SoftmaxCrossEntropy())["accuracy"] == 0


def test_evaluate_has_errors_and_no_accuracy_for_real_targets():
    scores = evaluate(Linear(2, 1), np.ones((3, 2)), np.ones((3, 1)), loss=MeanSquaredError())
    assert scores.keys() == {"loss", "rmse", "mae", "r2", "baseline_rmse"}


def test_predict_gives_raw_outputs_where_X_lives(backend):
    X, _ = problem()
    model = network(backend)
    expected = backend.to_numpy(model(backend.asarray(X)))
    for batch_size in (7, 1024):
        there = predict(model, backend.asarray(X), batch_size=batch_size)
        assert backend.owns(there)
        # products of another height may be summed in another order
        np.testing.assert_allclose(backend.to_numpy(there), expected, rtol=1e-5, atol=1e-6)
        assert isinstance(predict(model, X, batch_size=batch_size), np.ndarray)


def test_callbacks_see_every_row_and_can_stop():
    X, y = problem()
    seen = []
    history = fit(network(), X, y, loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), epochs=9, progress=False,
                  callbacks=[lambda model, row: len(seen) == 2, lambda model, row: seen.append(row["epoch"])])  # fmt: skip
    assert seen == [1, 2, 3]
    assert len(history.rows) == 3
    assert not history.interrupted


def test_zero_epochs_train_nothing():
    X, y = problem()
    model = network()
    before = weights(model)
    assert fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), epochs=0, progress=False).rows == []
    assert_same(weights(model), before)


# what is refused, before anything is trained


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"X": [[1.0]]}, TypeError, "X is a list"),
        ({"y": [1]}, TypeError, "y is a list"),
        ({"X": np.float32(1)}, ValueError, "X is a single number"),
        ({"X": np.empty((0, 4), np.float32), "y": np.empty(0, int)}, ValueError, "X has no rows"),
        ({"y": np.zeros(49, int)}, ValueError, "X has 50 rows but y has shape"),
        ({"X": np.full((50, 4), np.nan, np.float32)}, ValueError, "X has a value in row 0 (rows counted from 0) that is NaN or infinite"),
        ({"X": np.full((50, 4), 1e300)}, ValueError, "X has a value in row 0 (rows counted from 0) that is NaN or infinite"),
        ({"y": np.full(50, 3)}, ValueError, "class ids from 3 to 3"),
        ({"y": np.full(50, -1)}, ValueError, "class ids from -1 to -1"),
        ({"X": np.zeros((50, 5), np.float32)}, ValueError, "in_features = 4"),
        ({"epochs": -1}, ValueError, "epochs is -1"),
        ({"epochs": 1.5}, TypeError, "epochs is 1.5"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"batch_size": True}, TypeError, "batch_size is True"),
        ({"skip_nonfinite": -1}, ValueError, "skip_nonfinite is -1"),
        ({"validation": 1.0}, ValueError, "validation is 1.0"),
        ({"validation": 0.001}, ValueError, "leaves nothing on one side"),
        ({"validation": "half"}, TypeError, "validation is neither"),
        ({"validation": (np.full((2, 4), np.inf, np.float32), np.zeros(2, int))}, ValueError, "the validation X has a value in row 0"),
        ({"validation": (np.zeros((2, 4), np.float32), np.zeros(3, int))}, ValueError, "the validation X has 2 rows"),
        ({"seed": -1}, ValueError, "seed is -1"),
        ({"seed": "zero"}, TypeError, "seed is 'zero'"),
        ({"resume": True}, ValueError, "checkpoint=folder"),
        ({"checkpoint_every": 1}, ValueError, "checkpoint=folder"),
        ({"y": np.full((50, 3), np.nan, np.float32)}, ValueError, "y has a value in row 0 (rows counted from 0) that is NaN or infinite"),
        ({"X": np.ones((50, 4), np.complex64)}, TypeError, "X is complex64"),
        ({"X": np.full((50, 4), "1")}, TypeError, "X is str"),
        ({"X": np.full((50, 4), 1, object)}, TypeError, "X is object"),
        ({"y": np.ones(50, np.complex128)}, TypeError, "y is complex128"),
        ({"y": np.full(50, "a")}, TypeError, "y is str"),
        ({"X": np.ones((50, 4)).view(np.matrix)}, TypeError, "X is a numpy matrix"),
        ({"X": np.ma.MaskedArray(np.ones((50, 4)))}, TypeError, "X is a numpy MaskedArray"),
        ({"y": np.ma.MaskedArray(np.zeros(50, int))}, TypeError, "y is a numpy MaskedArray"),
        ({"validation": (np.ones((2, 4), complex), np.zeros(2, int))}, TypeError, "the validation X is complex128"),
        ({"model": ReLU()}, ValueError, "model is ReLU(), which has no parameters to train"),
        ({"model": ReLU}, TypeError, "model is the class ReLU"),
        ({"model": None}, TypeError, "model is a NoneType"),
        ({"loss": SoftmaxCrossEntropy}, TypeError, "loss is the class SoftmaxCrossEntropy; give an object such as"),
        ({"loss": None}, TypeError, "loss is a NoneType"),
        ({"loss": np.random.default_rng(0)}, TypeError, "loss is a numpy Generator"),
        ({"y": np.arange(50) % 3 - 1}, ValueError, "class ids from -1 to 1"),  # of all rows
        ({"y": np.zeros(50)}, TypeError, "y is float64, but class ids are integers"),  # as it was given
        ({"optimizer": SGD}, TypeError, "optimizer is the class SGD; give an object such as"),
        ({"optimizer": None}, TypeError, "optimizer is a NoneType"),
        ({"callbacks": print}, TypeError, "give a list of functions"),
        ({"callbacks": [1]}, TypeError, "give a list of functions"),
        ({"validation": np.float32(1.5)}, ValueError, "validation is 1.5"),
    ],
)
def test_bad_arguments_are_refused_and_the_model_is_left_alone(change, error, words):
    X, y = problem()
    model, optimizer = network(), Adam()
    before = weights(model)
    seed = np.random.default_rng(0)
    arguments = {"X": X, "y": y, "loss": SoftmaxCrossEntropy(), "optimizer": optimizer, "progress": False, "seed": seed, **change}
    with pytest.raises(error) as raised:
        fit(arguments.pop("model", model), arguments.pop("X"), arguments.pop("y"), **arguments)
    assert words in str(raised.value)
    assert_same(weights(model), before)
    assert optimizer.steps == 0
    assert seed.bit_generator.seed_seq.n_children_spawned == 0


def test_evaluate_and_predict_refuse_what_fit_refuses():
    X, y = problem()
    for bad in (X.astype(complex), X.astype(str), X.view(np.matrix), np.ma.MaskedArray(X)):
        with pytest.raises(TypeError, match=r"^X is "):
            evaluate(network(), bad, y, loss=SoftmaxCrossEntropy())
        with pytest.raises(TypeError, match=r"^X is "):
            predict(network(), bad)
    with pytest.raises(TypeError, match="loss is the class"):
        evaluate(network(), X, y, loss=SoftmaxCrossEntropy)
    with pytest.raises(TypeError, match="model is the class"):
        predict(Linear, X)


def test_a_fraction_for_validation_may_be_a_numpy_number():
    assert seen_batches(validation=np.float32(0.25)) == seen_batches(validation=0.25)
    assert sum(map(len, seen_batches(validation=np.float64(0.3), epochs=1))) == 7


def test_the_order_is_drawn_from_another_stream_than_the_weights_of_that_seed():
    (batch,) = seen_batches(epochs=1, rows=40, batch_size=40, seed=3)
    children = np.random.SeedSequence(3).spawn(40)  # those of Linear(seed=3), and all that a fit might have had
    assert batch not in [np.random.default_rng(child).permutation(40).tolist() for child in children]


def test_the_row_of_a_bad_value_is_named_where_data_are_on_the_device(backend):
    X, y = problem()
    X[31, 2] = np.inf
    with pytest.raises(ValueError, match="row 31"):
        fit(network(backend), backend.asarray(X), backend.asarray(y), loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1))


def test_class_ids_out_of_range_are_refused_on_every_backend(backend):
    X, y = problem()
    y[17] = 3
    with pytest.raises(ValueError, match="class ids from 0 to 3"):
        fit(network(backend), backend.asarray(X), backend.asarray(y), loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1))


# numbers that go wrong in training


@pytest.mark.parametrize("spoil_value", [False, True], ids=["gradient", "loss"])
def test_the_first_bad_step_is_named_and_neither_it_nor_any_after_it_is_applied(backend, spoil_value):
    X, _ = problem()
    y = X[:, :3].copy()
    model, before_it = network(backend), network(backend)
    options = {"optimizer": SGD(0.1, momentum=0.9), "epochs": 3, "batch_size": 16, "progress": False}
    with pytest.raises(NonFiniteError) as raised:
        fit(model, X, y, loss=SpoiledLoss({6}, spoil_value), **options)
    assert raised.value.step == 6
    assert "step 6 (epoch 2, batch 2 of 4)" in str(raised.value)
    assert len(raised.value.history.rows) == 1
    flag = threading.Event()
    steps = []
    watched = Sequential(*before_it, Watch(lambda X: steps.append(1) or (len(steps) == 5 and flag.set())))
    options["optimizer"] = SGD(0.1, momentum=0.9)
    assert fit(watched, X, y, loss=MeanSquaredError(), stop=flag, **options).interrupted
    assert_same(weights(model, backend), weights(before_it, backend))


def test_the_parameters_that_were_bad_are_named():
    huge = np.float32(1e38)
    model = Sequential(Linear(1, 1, dtype="float32", init=lambda rng, shape: np.ones(shape)))
    X = np.full((4, 1), huge)
    with pytest.raises(NonFiniteError) as raised:
        fit(model, X, np.zeros((4, 1), np.float32), loss=MeanSquaredError(), optimizer=SGD(0.1), epochs=1, progress=False)
    assert "a loss of inf" in str(raised.value)
    assert "not finite for 0.W;" in str(raised.value)
    assert_same(weights(model), {"0.W": np.ones((1, 1), np.float32), "0.b": np.zeros((1, 1), np.float32)})


def test_skip_nonfinite_passes_over_so_many_bad_steps_and_counts_them(backend):
    X, _ = problem()
    y = X[:, :3].copy()
    options = {"epochs": 2, "batch_size": 16, "progress": False}
    model = network(backend)
    history = fit(model, X, y, loss=SpoiledLoss({2, 7}), optimizer=SGD(0.1), skip_nonfinite=2, **options)
    assert history.skipped == 2
    assert len(history.rows) == 2
    assert all(math.isfinite(row["loss"]) for row in history.rows)
    assert all(np.isfinite(p).all() for p in weights(model, backend).values())
    with pytest.raises(NonFiniteError, match=r"step 7 \(epoch 2"):
        fit(network(backend), X, y, loss=SpoiledLoss({2, 7}), optimizer=SGD(0.1), skip_nonfinite=1, **options)


def test_a_skipped_step_leaves_the_weights_as_a_zero_learning_rate_would():
    X, _ = problem()
    y = X[:, :3].copy()
    options = {"epochs": 1, "batch_size": 16, "progress": False}
    skipped, by_hand = network(), network()
    fit(skipped, X, y, loss=SpoiledLoss({2}), optimizer=SGD(0.1), skip_nonfinite=1, **options)
    fit(by_hand, X, y, loss=MeanSquaredError(), optimizer=SGD(lambda step: 0.0 if step == 1 else 0.1), **options)
    assert_same(weights(skipped), weights(by_hand))


def test_a_gradient_whose_sum_overflows_is_still_finite():
    # each element is finite in float32, their sum is not: the cheap test must not be the last word
    X = np.full((2, 4), 1e38, np.float32)
    model = Linear(4, 1, dtype="float32", init="zeros", bias=False)
    y = np.full((2, 1), -1.0, np.float32)
    fit(model, X, y, loss=MeanSquaredError(), optimizer=SGD(1e-38), epochs=1, progress=False)
    assert np.isfinite(model.W).all()
    assert (model.W != 0).all()


@pytest.mark.parametrize("interrupt", ["flag", "ctrl-c"])
def test_a_bad_step_is_told_when_training_is_stopped_later_in_its_epoch(backend, interrupt, tmp_path):
    X, _ = problem()
    flag, seen = threading.Event(), []
    stop = flag.set if interrupt == "flag" else lambda: signal.raise_signal(signal.SIGINT)
    model = Sequential(Watch(lambda X: seen.append(1) or (len(seen) == 7 and stop())), *network(backend))
    before_it = network(backend)
    options = {"optimizer": SGD(0.1), "batch_size": 16, "progress": False}
    with pytest.raises(NonFiniteError, match=r"step 6 \(epoch 2, batch 2 of 4\)") as raised:
        fit(model, X, X[:, :3].copy(), loss=SpoiledLoss({6}), epochs=3, stop=flag, checkpoint=tmp_path, **options)
    assert raised.value.step == 6
    assert len(list(tmp_path.glob("*.safetensors"))) == 2  # of epoch 1, and the best: that of the stopped epoch is not saved
    flag, count = threading.Event(), []
    watched = Sequential(Watch(lambda X: count.append(1) or (len(count) == 5 and flag.set())), *before_it)
    fit(watched, X, X[:, :3].copy(), loss=MeanSquaredError(), epochs=3, stop=flag, **{**options, "optimizer": SGD(0.1)})
    assert_same(weights(model, backend), weights(watched, backend))


@pytest.mark.parametrize("stopped", [False, True])
def test_an_update_that_overflows_in_the_last_step_is_told_and_not_saved(backend, stopped, tmp_path):
    X, y = problem()
    flag = threading.Event()
    schedule = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 1e39]  # finite as a Python number, and infinite in float32

    def lr(step):
        if stopped and step == 7:
            flag.set()
        return schedule[step]

    model = network(backend)
    with pytest.raises(NonFiniteError, match=r"after step 8 \(epoch 2\) 0.W, .* the update itself overflowed.* 1e\+39") as raised:
        fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=SGD(lr), epochs=2 + stopped, batch_size=16, progress=False,
            checkpoint=tmp_path, checkpoint_every=1, stop=flag)  # fmt: skip
    assert len(raised.value.history.rows) == 1
    state = load_checkpoint(tmp_path, network(), SGD(lr))
    assert state["step"] == 7


def test_weights_that_overflowed_before_the_bad_step_are_called_so(backend):
    X, y = problem()
    with pytest.raises(NonFiniteError, match=r"^step 4 .* the update before it overflowed"):
        fit(network(backend), X, y, loss=SoftmaxCrossEntropy(), optimizer=SGD(lambda step: 1e39 if step == 2 else 0.1),
            epochs=1, batch_size=16, progress=False)  # fmt: skip


# stopping


def stopping_network(at, action):
    calls = []

    def see(X):
        calls.append(1)
        if len(calls) == at:
            action()

    return Sequential(Watch(see), *network())


def test_ctrl_c_finishes_the_step_and_gives_the_handler_back():
    X, y = problem()
    model = stopping_network(6, lambda: signal.raise_signal(signal.SIGINT))
    optimizer = SGD(0.1)
    history = fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=optimizer, batch_size=16, epochs=9, progress=False)
    assert history.interrupted
    assert optimizer.steps == 6
    assert len(history.rows) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    by_hand = network()
    flag = threading.Event()
    counted = Sequential(Watch(lambda X, seen=[]: seen.append(1) or (len(seen) == 6 and flag.set())), *by_hand)
    fit(counted, X, y, loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), batch_size=16, epochs=9, stop=flag, progress=False)
    assert_same(weights(model), weights(counted))


def test_a_second_ctrl_c_interrupts_at_once():
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    X, y = problem()
    optimizer = SGD(0.1)
    history = fit(stopping_network(2, twice), X, y, loss=SoftmaxCrossEntropy(), optimizer=optimizer, epochs=9, batch_size=16,
                  progress=False)  # fmt: skip
    assert history.interrupted
    assert optimizer.steps == 1


def test_training_works_off_the_main_thread_and_leaves_signals_alone():
    X, y = problem()
    model, by_hand, results = network(), network(), []
    before = signal.getsignal(signal.SIGINT)
    options = {"loss": SoftmaxCrossEntropy(), "epochs": 2, "progress": False}
    thread = threading.Thread(target=lambda: results.append(fit(model, X, y, optimizer=Adam(), **options)))
    thread.start()
    thread.join()
    fit(by_hand, X, y, optimizer=Adam(), **options)
    assert len(results[0].rows) == 2
    assert_same(weights(model), weights(by_hand))
    assert signal.getsignal(signal.SIGINT) is before


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys):
    X, y = problem()
    fit(network(), X, y, loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), epochs=2, validation=0.2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split()[:2] for line in lines] == [["epoch", "1"], ["epoch", "2"]]
    assert all("validation accuracy" in line for line in lines)


# the same training on every backend


def test_fifty_steps_stay_within_the_propagated_rounding_bound(backend):
    """A linear model with a squared error is a quadratic problem, so how an error grows is known exactly.

    With `A = [X 1]` and `W` extended by `b`, one step is `W - lr (W H - C)`, `H = 2 A^T A / size`. An error `e` in `W` becomes
    `e (I - lr H)`, no longer than `e` where `lr` times the largest eigenvalue of `H` is at most 2. So the errors of the steps
    only add up, and each step's own error has a bound from its operation counts (Higham, ch. 3).
    """
    N, I, O, lr, steps = 24, 6, 3, 0.05, 50
    rng = np.random.default_rng(0)
    X, T = rng.standard_normal((N, I)).astype(np.float32), rng.standard_normal((N, O)).astype(np.float32)
    layer = Linear(I, O, dtype="float32", device=backend.device, seed=0)
    W, b = (backend.to_numpy(p).astype(np.float64) for p in (layer.W, layer.b))
    fit(layer, backend.asarray(X), backend.asarray(T), loss=MeanSquaredError(), optimizer=SGD(lr), epochs=steps,
        batch_size=N, progress=False)  # fmt: skip

    A = np.hstack([X, np.ones((N, 1))]).astype(np.float64)
    assert lr * np.linalg.eigvalsh(2 / (N * O) * A.T @ A).max() <= 2
    u = 2.0**-24
    bound = 0.0
    for _ in range(steps):
        Z = X @ W.T + b
        dZ = 2 * (Z - T) / (N * O)
        dW, db = dZ.T @ X, dZ.sum(axis=0, keepdims=True)
        error_Z = (I + 1) * u * (np.abs(X) @ np.abs(W.T) + np.abs(b))
        error_dZ = 2 / (N * O) * error_Z + 3 * u * np.abs(dZ)  # a subtraction, a product, and the constant's own rounding
        error_dW = np.abs(error_dZ).T @ np.abs(X) + N * u * np.abs(dZ).T @ np.abs(X)
        error_db = error_dZ.sum(axis=0, keepdims=True) + N * u * np.abs(dZ).sum(axis=0, keepdims=True)
        new_W, new_b = W - lr * dW, b - lr * db
        step_W = lr * error_dW + 2 * u * lr * np.abs(dW) + u * np.abs(new_W)
        step_b = lr * error_db + 2 * u * lr * np.abs(db) + u * np.abs(new_b)
        bound += 1.01 * math.hypot(np.linalg.norm(step_W), np.linalg.norm(step_b))  # the 1 %: all terms of second order
        W, b = new_W, new_b
    error = math.hypot(np.linalg.norm(backend.to_numpy(layer.W) - W), np.linalg.norm(backend.to_numpy(layer.b) - b))
    assert 0 < error < bound
    assert bound < 1e-4 * np.linalg.norm(W)  # a bound that says something


def test_one_seed_gives_the_same_bits_and_order_on_every_backend(backend):
    here, host = network(backend), network()
    assert_same(weights(here, backend), weights(host))
    seen = {"here": [], "host": []}
    for name, place in (("here", Device.of(here[0].W)), ("host", Device.of(host[0].W))):
        X = np.arange(20, dtype=np.float32).reshape(-1, 1)
        see = seen[name].append
        model = Sequential(Watch(lambda X, place=place, see=see: see(place.to_numpy(X)[:, 0].tolist())),
                           Linear(1, 1, dtype="float32", device=place))  # fmt: skip
        fit(model, place.asarray(X), place.asarray(X), loss=MeanSquaredError(), optimizer=SGD(0.0), epochs=2, batch_size=8,
            progress=False)  # fmt: skip
    assert seen["here"] == seen["host"]


# memory


@pytest.fixture
def small_cuda(monkeypatch):
    """A CUDA device whose pool is limited to 64 MiB, so that running out costs nothing."""
    cupy = pytest.importorskip("cupy")
    try:
        usable = cupy.cuda.runtime.getDeviceCount() > 0
    except cupy.cuda.runtime.CUDARuntimeError as error:
        pytest.skip(f"CuPy has no working device: {error}")
    if not usable:
        pytest.skip("CuPy sees no device")
    pool = cupy.get_default_memory_pool()
    pool.free_all_blocks()
    pool.set_limit(size=64 << 20)
    yield pool
    pool.set_limit(size=0)


@pytest.mark.parametrize("call", ["fit", "validation", "evaluate", "predict", "Linear", "load_model", "load_model into", "load_checkpoint"])
def test_running_out_of_gpu_memory_says_what_was_there_and_what_to_change_and_gives_the_memory_back(small_cuda, call, tmp_path):
    import cupy

    def layer(features, outputs, device="cuda:0"):
        return Linear(features, outputs, dtype="float32", device=device, seed=0)

    model = Sequential(layer(64, 512), ReLU(), layer(512, 8))
    X, y = np.zeros((40_000, 64), np.float32), np.zeros(40_000, int)
    options = {"loss": SoftmaxCrossEntropy(), "optimizer": Adam(), "epochs": 1, "progress": False}
    saved = layer(1500, 1500, "cpu")  # 9 MB
    save_model(saved, tmp_path / "m")
    rule = Adam()
    rule.step(saved, {"W": saved.W, "b": saved.b})
    save_checkpoint(tmp_path, saved, rule, state={})
    into = layer(1500, 1500)
    calls = {
        "fit": lambda: fit(model, X, y, batch_size=40_000, **options),
        "validation": lambda: fit(layer(64, 20_000), X[:8], y[:8], batch_size=8, validation=(X[:900], y[:900]), **options),
        "evaluate": lambda: evaluate(model, X, y, loss=SoftmaxCrossEntropy(), batch_size=40_000),
        "predict": lambda: predict(model, X, batch_size=40_000),
        "Linear": lambda: layer(6000, 6000),
        "load_model": lambda: load_model(tmp_path / "m", device="cuda:0"),
        "load_model into": lambda: load_model(tmp_path / "m", into=into),
        "load_checkpoint": lambda: load_checkpoint(tmp_path, into, Adam()),
    }
    small_cuda.free_all_blocks()
    if call == "validation":  # in so many rows at once as memory lets it, which are fewer than 900
        calls[call]()
        return
    before = into.W.get()
    kept = cupy.zeros(50 << 20, cupy.uint8) if call.startswith("load") else None
    held = small_cuda.used_bytes()
    with pytest.raises(MemoryError) as raised:
        calls[call]()
    message = str(raised.value)
    assert "allocating" in message  # CuPy's own words: how much was asked for
    free = re.search(r"cuda:0 had ([0-9,]+) MiB free of [0-9,]+ MiB; ", message)
    assert free is not None
    assert 0 <= int(free[1].replace(",", "")) <= 64 - held // 2**20
    assert ("smaller batch_size than 40000" if call in ("fit", "evaluate", "predict") else "another device") in message
    assert (into.W.get() == before).all()
    del raised
    assert small_cuda.total_bytes() < held + (1 << 20)  # nothing of what failed is kept, by the pool neither
    del kept
    evaluate(model, X, y, loss=SoftmaxCrossEntropy(), batch_size=256)  # the process goes on


def test_validation_takes_no_more_rows_than_fit_in_a_few_megabytes_or_in_a_batch():
    X, y = problem(rows=40_000)

    class Counted(Watch):
        def __call__(self, X):
            self.see(len(X))
            return X

    def most_rows(width, batch_size):
        seen = []
        model = Sequential(Counted(seen.append), Linear(4, width, dtype="float32"), Linear(width, 3, dtype="float32"))
        model[0].forward = lambda X: (X, {"Z": X})
        fit(model, X[:8], y[:8], loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), epochs=1, batch_size=batch_size,
            validation=(X, y), progress=False)  # fmt: skip
        return max(seen)

    assert most_rows(width=8, batch_size=8) == 1024
    assert most_rows(width=8, batch_size=2000) == 2000
    assert most_rows(width=5_000, batch_size=8) == 2**20 // (4 + 5_000 + 1 + 3 + 1) == 209


class OutOfMemoryError(RuntimeError):
    """As torch's, which is no `MemoryError`."""


@pytest.mark.parametrize(
    ("error", "explained"),
    [
        (OutOfMemoryError("Tried to allocate 2.00 GiB"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), True),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes"), True),
        (MemoryError(), True),
        (RuntimeError("something else"), False),
    ],
    ids=str,
)
def test_memory_that_ran_out_is_told_by_any_librarys_error(error, explained):
    def fail(X):
        raise error

    X, y = problem()
    model = Sequential(Watch(fail), *network())
    model[0].__class__ = type("Failing", (Watch,), {"__call__": lambda self, X: fail(X)})
    with pytest.raises(MemoryError if explained else RuntimeError) as raised:
        fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), progress=False)
    if explained:
        assert re.match(f"{re.escape(str(error)) or 'an allocation failed'}; cpu had .* MiB free of .*; use a smaller", str(raised.value))


def test_torch_without_memory_says_what_to_change():
    torch = pytest.importorskip("torch")

    class Hungry(Watch):
        def __call__(self, X):
            return torch.empty(1 << 50)

    model = Sequential(Hungry(None), Linear.from_arrays(torch.ones(3, 4)))
    with pytest.raises(MemoryError, match=r"you tried to allocate [0-9]+ bytes[^;]*; use a smaller batch_size than 8"):
        predict(model, problem()[0], batch_size=8)


@pytest.mark.parametrize("validation", [None, pytest.param(0.5, marks=pytest.mark.slow)])
def test_training_from_a_memory_mapped_file_takes_bounded_memory(validation, tmp_path):
    import tracemalloc

    X = np.lib.format.open_memmap(tmp_path / "X.npy", mode="w+", dtype=np.float32, shape=(400_000, 64))
    X[:] = np.random.default_rng(0).standard_normal((1, 64), dtype=np.float32)
    X.flush()
    X, y = np.load(tmp_path / "X.npy", mmap_mode="r"), np.zeros(400_000, np.uint8)
    assert X.nbytes == 102_400_000
    fit(network(features=64), X[:9], y[:9], loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), epochs=1, progress=False)  # imports
    tracemalloc.start()
    try:
        fit(network(features=64), X, y, loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), batch_size=4096, epochs=1, progress=False,
            validation=validation)  # fmt: skip
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < X.nbytes // 3  # 17 MB are a chunk whose values are checked, and what checks it; 3 MB each order of the rows
