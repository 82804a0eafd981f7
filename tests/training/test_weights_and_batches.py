"""`fit` with weights of samples, in parts, on batches of the caller's own, and what it says where something does not fit."""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear import (
    SGD,
    Adam,
    BinaryCrossEntropy,
    Dropout,
    Linear,
    MeanSquaredError,
    NonFiniteError,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    evaluate,
    fit,
    predict,
    snapshot,
)


def problem(count=60, dtype="float64"):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((count, 5)).astype(dtype)
    return X, rng.integers(0, 3, count), rng.integers(0, 4, count).astype(dtype)


def network(device="cpu", dtype="float64", **options):
    return Sequential(Linear(5, 8, seed=0, device=device, dtype=dtype), ReLU(), Linear(8, 3, seed=1, device=device, dtype=dtype))


def train(model, X, y=None, **options):
    settings = {"loss": SoftmaxCrossEntropy(), "optimizer": Adam(1e-2), "epochs": 3, "progress": False}
    if y is not None:
        settings["batch_size"] = 16
    return fit(model, X, y, **{**settings, **options})


def close(model, other, tolerance=1e-10):
    for name, x in snapshot(model).items():
        assert np.abs(x - snapshot(other)[name]).max() < tolerance


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), SoftmaxCrossEntropy((1.0, 2.0, 0.5), 0.1, ignore_id=2)], ids=repr)
def test_sample_weights_train_as_pytorch_does(loss):
    torch = pytest.importorskip("torch")
    X, y, w = problem()
    model, twin = network(), torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).double()
    with torch.no_grad():
        for ours, theirs in ((model[0], twin[0]), (model[2], twin[2])):
            theirs.weight.copy_(torch.tensor(ours.W))
            theirs.bias.copy_(torch.tensor(ours.b[0]))
    train(model, X, y, loss=loss, sample_weight=w, optimizer=SGD(0.1), batch_size=60, epochs=5)
    classes = torch.tensor(loss.class_weights or (1.0, 1.0, 1.0), dtype=torch.float64)
    criterion = torch.nn.CrossEntropyLoss(
        classes, reduction="none", label_smoothing=loss.label_smoothing, ignore_index=-100 if loss.ignore_id is None else 2
    )
    optimizer = torch.optim.SGD(twin.parameters(), 0.1)
    counts = classes[torch.tensor(y)] * (1.0 if loss.ignore_id is None else torch.tensor(y != 2).double())
    for _ in range(5):
        optimizer.zero_grad()
        each = criterion(twin(torch.tensor(X)), torch.tensor(y))
        ((each * torch.tensor(w)).sum() / (counts * torch.tensor(w)).sum()).backward()
        optimizer.step()
    assert np.abs(model[0].W - twin[0].weight.detach().numpy()).max() < 1e-10


LOSSES = [
    (SoftmaxCrossEntropy(), "ids"), (SoftmaxCrossEntropy((1.0, 5.0, 0.0), 0.1, 2), "ids"),
    (MeanSquaredError(), "rows"), (BinaryCrossEntropy((1.0, 2.0, 3.0)), "rows"),
]  # fmt: skip


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("loss", "kind"), LOSSES, ids=[repr(loss) for loss, _ in LOSSES])
def test_microbatches_give_the_result_of_the_whole_batch(backend, loss, kind, weighted):
    X, y, w = problem()
    w[:16] = 0  # a part in which nothing counts
    y = y if kind == "ids" else np.eye(3)[y]
    results = []
    for parts in (1, 3) if backend.name == "jax" else (1, 3, 16):  # JAX compiles for each size of a part
        model = network(backend.device)
        train(model, X, y, loss=loss, microbatches=parts, sample_weight=w if weighted else None, optimizer=SGD(0.1), epochs=1)
        results.append({name: backend.to_numpy(x) for name, x in snapshot(model).items()})
    for other in results[1:]:
        for name, x in results[0].items():
            assert np.abs(x - other[name]).max() < 1e-12, name


def test_accumulate_is_the_old_name_of_microbatches():
    X, y, _ = problem()
    new, old = network(), network()
    train(new, X, y, microbatches=4)
    with pytest.warns(DeprecationWarning, match="now called microbatches"):
        train(old, X, y, accumulate=4)
    close(new, old, 1e-300)


@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        (np.ones(59), ValueError, r"^sample_weight has shape \(59,\) but must have \(60,\)"),
        (np.ones((60, 1)), ValueError, r"^sample_weight has shape \(60, 1\)"),
        ([1.0] * 60, TypeError, "^sample_weight is a list"),
        (np.full(60, -1.0), ValueError, "^sample_weight has values from -1"),
        (np.zeros(60), ValueError, "^sample_weight .* not all may be 0"),
        (np.full(60, np.nan), ValueError, r"^sample_weight has a value in row 0"),
    ],
)
def test_weights_that_are_wrong_are_named(weights, error, match):
    X, y, _ = problem()
    with pytest.raises(error, match=match):
        train(network(), X, y, sample_weight=weights)


def test_a_loss_that_takes_no_weights_is_told():
    class Own:
        def forward(self, Z, target):
            return np.mean(Z), np.ones_like(Z)

        def backward(self, cache):
            return cache

    X, y, w = problem()
    with pytest.raises(TypeError, match=r"^sample_weight is given, but .* forward\(self, Z, target, weights=None\)"):
        train(network(), X, y, loss=Own(), sample_weight=w)


# batches of the caller's own


class Passes:
    """An object whose `iter()` starts a new pass; it has no length."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        yield from self.batches


def batches(count=60, size=16, weights=False):
    X, y, w = problem(count)
    return [(X[i : i + size], y[i : i + size], *([w[i : i + size]] if weights else [])) for i in range(0, count, size)]


@pytest.mark.parametrize("weights", [False, True])
def test_a_list_of_batches_trains_as_a_loop_does(backend, weights):
    model, by_hand = network(backend.device), network(backend.device)
    history = train(model, batches(weights=weights), epochs=2)
    loss, optimizer = SoftmaxCrossEntropy(), Adam(1e-2)
    for _ in range(2):
        for batch in batches(weights=weights):
            X, y, *w = map(backend.asarray, batch)
            Z, caches = by_hand.forward(X)
            by_hand.backward(loss.backward(loss.forward(Z, y, *w)[1]), caches)
            optimizer.step(by_hand)
    for name, x in snapshot(model).items():
        assert np.abs(backend.to_numpy(x) - backend.to_numpy(snapshot(by_hand)[name])).max() < 1e-12
    assert [row["steps"] for row in history.rows] == [4, 8]


def test_objects_without_length_and_lists_are_one():
    listed, passed, source = network(), network(), Passes(batches())
    first = train(listed, batches(), validation=batches(20))
    second = train(passed, source, validation=Passes(batches(20)))
    close(listed, passed, 1e-300)
    assert [row["validation_loss"] for row in first.rows] == [row["validation_loss"] for row in second.rows]
    assert source.passes == 4  # three epochs, and a look before


def test_a_dataloader_is_taken():
    torch = pytest.importorskip("torch")
    X, y, _ = problem(dtype="float32")
    data = torch.utils.data.TensorDataset(torch.tensor(X), torch.tensor(y))
    model, other = network(dtype="float32"), network(dtype="float32")
    train(model, torch.utils.data.DataLoader(data, batch_size=16))
    train(other, batches())
    close(model, other, 1e-5)


@pytest.mark.parametrize("source", [batches(), Passes(batches())], ids=["list", "object"])
@pytest.mark.parametrize("stop_after", [2, 4, 7])
def test_batches_resume_to_the_same_bits_if_they_come_the_same_way(tmp_path, source, stop_after):
    class Stop:
        count = 0

        def is_set(self):
            self.count += 1
            return self.count >= stop_after

    def model():
        return Sequential(Linear(5, 8, seed=0), Dropout(0.2, seed=3), Linear(8, 3, seed=1))

    whole, resumed = model(), model()
    expected = train(whole, source)
    assert train(model(), source, checkpoint=tmp_path, stop=Stop()).interrupted
    found = train(resumed, source, checkpoint=tmp_path, resume=True)
    close(whole, resumed, 1e-300)
    assert [row["loss"] for row in found.rows] == [row["loss"] for row in expected.rows]


def test_the_guard_judges_batches_too():
    bad = batches()
    bad[2] = (np.where(np.arange(5) == 1, 1e308, bad[2][0]), bad[2][1])
    with pytest.raises(NonFiniteError, match=r"step 3 .*not finite"):
        train(network(), bad)
    assert train(network(), bad, skip_nonfinite=3).skipped == 3


@pytest.mark.parametrize(
    ("source", "options", "error", "match"),
    [
        ((b for b in batches()), {}, TypeError, r"^X is a generator, which can be gone through only once; give .*__iter__"),
        (3, {}, TypeError, r"^X is a int, which is neither an array nor an iterable"),
        ([], {}, ValueError, "^X gave no batch"),
        ([np.ones((3, 5))], {}, TypeError, r"^batch 0 of X is a numpy array on cpu; it must be \(X, y\)"),
        ([(np.ones((3, 5)),)], {}, TypeError, "^batch 0 of X is a tuple of 1"),
        ([(np.ones((3, 5)), np.ones(2, int))], {}, ValueError, "^batch 0 of X has an X of shape"),
        ([(np.ones((3, 5)), [0, 1, 2])], {}, TypeError, "^the y of batch 0 of X is a list"),
        ([(np.ones((3, 4)), np.ones(3, int))], {}, ValueError, r"^the X of batch 0 of X has shape \(3, 4\)"),
        (batches(), {"batch_size": 8}, ValueError, "^batch_size is 8, but X gives batches"),
        (batches(), {"validation": 0.2}, ValueError, "^validation is 0.2, a fraction, but X gives batches"),
        (batches(), {"sample_weight": np.ones(60)}, ValueError, "^sample_weight is for arrays"),
        (np.ones((3, 5)), {}, TypeError, "^y is missing"),
    ],
    ids=["generator", "int", "empty", "array", "tuple of 1", "rows", "list", "features", "batch_size", "fraction", "sample_weight", "no y"],
)
def test_batches_that_are_wrong_are_named(source, options, error, match):
    with pytest.raises(error, match=match):
        train(network(), source, **options)


# ids


class Embedding:
    """A layer of a user's own that takes ids: row `i` of `W` for each id `i`."""

    takes = "ids"

    def __init__(self, count, size, W=None):
        self.W = np.random.default_rng(0).standard_normal((count, size)).astype("float32") if W is None else W
        self.dW = None

    def forward(self, X):
        return self.W[X].reshape(X.shape[0], -1), X

    def gradients(self, dZ, cache, *, needs_dX=True):
        dW = np.zeros_like(self.W)
        np.add.at(dW, cache, dZ.reshape(*cache.shape, -1))
        return None, {"W": dW}

    def backward(self, dZ, cache, *, accumulate=False, needs_dX=True):
        self.dW = self.gradients(dZ, cache)[1]["W"]

    def parameters(self):
        return {"W": self.W}

    def to(self, device=None, dtype=None):
        return Embedding(*self.W.shape, W=self.W)

    def __call__(self, X):
        return self.forward(X)[0]


def test_ids_are_not_cast():
    ids = np.random.default_rng(1).integers(0, 7, (50, 2))
    y = (ids[:, 0] > ids[:, 1]).astype(int)
    model = Sequential(Embedding(7, 4), Linear(8, 2, dtype="float32", seed=0))
    train(model, ids, y, epochs=100, optimizer=Adam(3e-2), validation=(ids, y))
    assert evaluate(model, ids, y, loss=SoftmaxCrossEntropy())["accuracy"] == 1
    assert predict(model, ids).shape == (50, 2)
    train(model, [(ids, y)], epochs=1)
    with pytest.raises(TypeError, match=r"^X is float64, but the model's first layer takes ids; give integers"):
        train(model, ids.astype(float), y)


# errors


@pytest.mark.parametrize(
    ("X", "y", "loss", "match"),
    [
        (np.ones((60, 4)), np.zeros(60, int), SoftmaxCrossEntropy(), r"^X has shape \(60, 4\) but its last axis must be in_features = 5"),
        (np.ones((60, 5)), np.zeros((60, 2)), SoftmaxCrossEntropy(), r"^y has shape \(60, 2\) but the model's output has \(N, 3\)"),
        (np.ones((60, 5)), np.full(60, 3), SoftmaxCrossEntropy(), r"^y has class ids from 3 to 3, but the model's output has 3"),
        (np.ones((60, 5)), np.zeros(60), MeanSquaredError(), r"^y has shape \(60,\) but must have \(N, 3\), the shape of the model"),
        (np.ones((60, 5)), np.full((60, 3), 2), BinaryCrossEntropy(), r"^y has values from 2 to 2"),
    ],
)
def test_messages_speak_of_the_callers_X_and_y(X, y, loss, match):
    with pytest.raises(ValueError, match=match):
        train(network(), X, y, loss=loss)


def test_a_misfit_inside_says_which_layer_and_what_came_before_it():
    model = Sequential(Linear(5, 8, seed=0), ReLU(), Linear(9, 3, seed=1))
    where = r"^in layer 2, Linear\(9, 3, .*after layer 1, ReLU\(\): X has shape \({}, 8\) but its last axis must be in_features = 9"
    for call in (model, model.forward):
        with pytest.raises(ValueError, match=where.format(4)):
            call(np.ones((4, 5)))
    with pytest.raises(ValueError, match=where.format("N")):
        train(model, *problem()[:2])
    nested = Sequential(Linear(5, 5, seed=0), Sequential(Linear(5, 4, seed=0), Linear(3, 2, seed=0)))
    with pytest.raises(ValueError, match=r"^in layer 1: in layer 1, Linear\(3, 2, .*after layer 0, Linear\(5, 4"):
        nested(np.ones((4, 5)))
    with pytest.raises(TypeError, match=r"^in layer 1, Linear.*X is float64 but W is float32"):
        Sequential(Linear(5, 5), Linear(5, 5, dtype="float32"))(np.ones((4, 5)))
    with pytest.raises(ValueError, match=r"^X has shape \(4, 6\)"):
        model(np.ones((4, 6)))


# frozen layers


def test_the_last_layer_of_a_loaded_model_is_fine_tuned_in_three_lines(tmp_path, backend):
    from anyarray_linear import load_model, save_model

    X, y, _ = problem()
    save_model(network(), tmp_path / "m")
    model = load_model(tmp_path / "m", device=backend.device)
    model[:-1].trainable = False
    before = {name: backend.to_numpy(x).copy() for name, x in snapshot(model).items()}
    train(model, X, y, optimizer=Adam(1e-2, weight_decay=0.1), checkpoint=tmp_path / "c")
    after = {name: backend.to_numpy(x) for name, x in snapshot(model).items()}
    assert {name for name in after if not np.array_equal(after[name], before[name])} == {"2.W", "2.b"}
    again = load_model(tmp_path / "m", device=backend.device)
    for layer in again[:-1]:
        layer.trainable = False
    train(again, X, y, optimizer=Adam(1e-2, weight_decay=0.1), checkpoint=tmp_path / "c", resume=True, epochs=5)
    assert np.array_equal(backend.to_numpy(again[0].W), before["0.W"])


def test_a_users_layer_that_forms_gradients_all_the_same_is_frozen_too():
    ids = np.random.default_rng(1).integers(0, 7, (50, 2))
    model = Sequential(Embedding(7, 4), Linear(8, 2, dtype="float32", seed=0))
    model[0].trainable = False
    before = model[0].W.copy()
    train(model, ids, (ids[:, 0] > ids[:, 1]).astype(int))
    assert np.array_equal(model[0].W, before)
    assert model.trainable
    model.trainable = False
    assert not model.trainable
    with pytest.raises((TypeError, ValueError), match="no parameters"):
        train(model, ids, (ids[:, 0] > ids[:, 1]).astype(int))
