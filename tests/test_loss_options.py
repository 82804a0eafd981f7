"""The options of losses: PyTorch's definitions in float64, the same values on every backend, gradients by differences."""

from __future__ import annotations

import math

import numpy as np
import pytest

from anyarray_linear import BinaryCrossEntropy, Linear, MeanSquaredError, SoftmaxCrossEntropy, evaluate
from anyarray_linear.losses import Loss

CLASS_WEIGHTS = (0.5, 2.0, 0.0, 3.25)
OPTIONS = [
    {}, {"class_weights": CLASS_WEIGHTS}, {"label_smoothing": 0.1}, {"ignore_id": 1}, {"ignore_id": -100},
    {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.3},
    {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.3, "ignore_id": 1},
]  # fmt: skip


def logits(*shape, seed=0):
    return 3 * np.random.default_rng(seed).standard_normal(shape)


def both(loss, Z, target, weights=None):
    value, cache = loss.forward(Z, target, weights)
    return value, loss.backward(cache)


def by_pytorch(torch, criterion, Z, target):
    """The value and gradient of a PyTorch loss; its classes are axis 1, ours the last."""
    Z_t = torch.tensor(Z, requires_grad=True)
    value = criterion(torch.movedim(Z_t, -1, 1) if Z.ndim > 2 else Z_t, torch.tensor(target))
    value.backward()
    return value.detach().numpy(), Z_t.grad.numpy()


def torch_options(torch, options):
    names = {"class_weights": "weight", "label_smoothing": "label_smoothing", "ignore_id": "ignore_index"}
    found = {names[name]: value for name, value in options.items()}
    return {**found, "weight": torch.tensor(found["weight"], dtype=torch.float64)} if "weight" in found else found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", [(40, 4), (6, 5, 4), (3, 2, 5, 4)], ids=str)
def test_cross_entropy_of_ids_is_pytorchs(options, shape):
    torch = pytest.importorskip("torch")
    Z, ids = logits(*shape), np.random.default_rng(1).integers(0, 4, shape[:-1])
    if options.get("ignore_id") == -100:
        ids.reshape(-1)[::3] = -100
    value, dZ = both(SoftmaxCrossEntropy(**options), Z, ids)
    expected = by_pytorch(torch, torch.nn.CrossEntropyLoss(**torch_options(torch, options)), Z, ids)
    assert abs(value - expected[0]) < 1e-10
    assert np.abs(dZ - expected[1]).max() < 1e-10


@pytest.mark.parametrize("options", [o for o in OPTIONS if "ignore_id" not in o], ids=str)
def test_cross_entropy_of_probabilities_is_pytorchs(options):
    torch = pytest.importorskip("torch")
    Z, T = logits(40, 4), np.random.default_rng(1).dirichlet(np.ones(4), 40)
    value, dZ = both(SoftmaxCrossEntropy(**options), Z, T)
    expected = by_pytorch(torch, torch.nn.CrossEntropyLoss(**torch_options(torch, options)), Z, T)
    assert abs(value - expected[0]) < 1e-10
    assert np.abs(dZ - expected[1]).max() < 1e-10


@pytest.mark.parametrize("positive_weights", [None, (0.5, 1.0, 7.0)])
@pytest.mark.parametrize("hard", [True, False])
def test_binary_cross_entropy_is_pytorchs(positive_weights, hard):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    Z, T = logits(30, 3), rng.random((30, 3))
    Z[:3] = [[-800, 800, 0], [800, -800, -0.0], [40, -40, 1e-9]]
    T = np.round(T) if hard else T
    weight = None if positive_weights is None else torch.tensor(positive_weights, dtype=torch.float64)
    value, dZ = both(BinaryCrossEntropy(positive_weights), Z, T)
    expected = by_pytorch(torch, torch.nn.BCEWithLogitsLoss(pos_weight=weight), Z, T)
    assert abs(value - expected[0]) < 1e-10 * max(1, abs(expected[0]))
    assert np.abs(dZ - expected[1]).max() < 1e-10


def each_loss():
    rng = np.random.default_rng(2)
    ids, rows = rng.integers(0, 4, 12), rng.dirichlet(np.ones(4), 12)
    for options in OPTIONS:
        yield SoftmaxCrossEntropy(**options), ids
        if "ignore_id" not in options:
            yield SoftmaxCrossEntropy(**options), rows
    yield MeanSquaredError(), rng.standard_normal((12, 4))
    yield BinaryCrossEntropy(), rng.random((12, 4))
    yield BinaryCrossEntropy(CLASS_WEIGHTS), rng.random((12, 4))


LOSSES = list(each_loss())
NAMES = [f"{loss!r}-{target.shape}" for loss, target in LOSSES]


@pytest.mark.parametrize(("loss", "target"), LOSSES, ids=NAMES)
def test_weights_are_the_weighted_mean(loss, target):
    """A sample of weight 3 is as three of weight 1, and one of weight 0 as if it were not there; scale does not matter."""
    Z, weights = logits(12, 4), np.asarray([3, 0, 1, 2, 0, 1, 1, 4, 1, 0, 2, 1])
    value, dZ = both(loss, Z, target, weights / 7)
    rows = np.repeat(np.arange(12), weights)
    expected, each = both(loss, Z[rows], target[rows])
    summed = np.zeros_like(Z)
    np.add.at(summed, rows, each)
    assert abs(value - expected) < 1e-13
    assert np.abs(dZ - summed).max() < 1e-13
    plain = both(loss, Z, target)
    ones = both(loss, Z, target, np.ones(12))
    assert abs(plain[0] - ones[0]) < 1e-14 * max(1, abs(plain[0]))
    assert np.abs(plain[1] - ones[1]).max() < 1e-14


@pytest.mark.parametrize(("loss", "target"), LOSSES, ids=NAMES)
def test_gradients_are_those_of_the_value(loss, target):
    rng = np.random.default_rng(3)
    Z, V, weights, h = logits(12, 4) / 3, rng.standard_normal((12, 4)), rng.random(12), 1e-5
    _, dZ = both(loss, Z, target, weights)
    slope = (loss.forward(Z + h * V, target, weights)[0] - loss.forward(Z - h * V, target, weights)[0]) / (2 * h)
    # third derivatives of at most some 10 in the mean, so off by h^2 times that; values of some 5, rounded, over 2 h
    assert abs(slope - np.sum(dZ * V)) < 1e-9


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(("loss", "target"), LOSSES, ids=NAMES)
def test_every_backend_has_the_same_values_to_rounding(backend, loss, target, dtype, weighted):
    if dtype not in backend.dtypes:
        pytest.skip(f"layers do not compute in {dtype} here")
    if backend.name in ("strict-device1", "numpy-readonly") and dtype == "float32":
        pytest.skip("as in float64")
    weights = np.random.default_rng(4).random(12).astype(dtype) if weighted else None
    z = logits(12, 4).astype(dtype)
    t = target.astype(dtype) if target.dtype.kind == "f" else target
    expected, expected_dZ = both(loss, z.astype(float), t.astype(float) if t.dtype.kind == "f" else t,
                                 None if weights is None else weights.astype(float))  # fmt: skip
    value, dZ = both(loss, backend.asarray(z), backend.asarray(t), None if weights is None else backend.asarray(weights))
    for x, shape in ((value, ()), (dZ, (12, 4))):
        assert backend.owns(x)
        assert tuple(x.shape) == shape
        assert str(x.dtype).rpartition(".")[2] == dtype
    # some 20 roundings in exp, log, quotients and sums of 48 terms, of numbers up to 12 in the loss, 1 in P, and the gradient
    # is at most a share of the weights; float16 rounds each step
    u = np.finfo(dtype).eps / 2
    assert abs(backend.to_numpy(value).astype(float) - expected) <= 100 * u * 12 * max(1, abs(expected))
    scale = np.abs(expected_dZ) + np.abs(expected_dZ).max()
    assert (np.abs(backend.to_numpy(dZ).astype(float) - expected_dZ) <= 100 * u * scale + 1e-7 * (dtype == "float16")).all()


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8", "bool"])
def test_integers_and_bools_are_cast_as_targets(backend, dtype):
    Z, t = backend.asarray(logits(6, 1), "float32"), np.asarray([0, 1, 1, 0, 1, 0])
    for loss in (MeanSquaredError(), BinaryCrossEntropy()):
        for shape in ((6,), (6, 1)):
            cast = both(loss, Z, backend.asarray(t.reshape(shape), dtype))
            given = both(loss, Z, backend.asarray(t.reshape(shape), "float32"))
            for x, y in zip(cast, given, strict=True):
                assert np.array_equal(backend.to_numpy(x), backend.to_numpy(y))
    Z = backend.asarray(logits(6, 2), "float32")
    for target in (t, np.stack([1 - t, t], axis=1)):
        cast = both(SoftmaxCrossEntropy(), Z, backend.asarray(target, dtype))
        given = both(SoftmaxCrossEntropy(), Z, backend.asarray(t, "int64"))
        assert np.array_equal(backend.to_numpy(cast[1]), backend.to_numpy(given[1]))


def test_weights_may_be_bools_and_per_element_of_a_sequence(backend):
    Z, ids = backend.asarray(logits(3, 5, 4)), backend.asarray(np.arange(15).reshape(3, 5) % 4)
    mask = np.arange(15).reshape(3, 5) % 2 == 0
    value = both(SoftmaxCrossEntropy(), Z, ids, backend.asarray(mask))[0]
    kept = both(SoftmaxCrossEntropy(), logits(3, 5, 4)[mask], (np.arange(15).reshape(3, 5) % 4)[mask])[0]
    assert abs(backend.to_numpy(value) - kept) < 1e-14
    per_sample = both(SoftmaxCrossEntropy(), Z, ids, backend.asarray([1.0, 0.0, 0.0]))[0]
    first = both(SoftmaxCrossEntropy(), logits(3, 5, 4)[:1], np.arange(5).reshape(1, 5) % 4)[0]
    assert abs(backend.to_numpy(per_sample) - first) < 1e-14


def test_an_ignored_id_counts_for_nothing_wherever_it_is(backend):
    Z, ids = logits(6, 4), np.asarray([0, -1, 3, -1, 2, 1])
    loss = SoftmaxCrossEntropy(ignore_id=-1)
    value, dZ = both(loss, backend.asarray(Z), backend.asarray(ids))
    kept = ids >= 0
    expected, rows = both(SoftmaxCrossEntropy(), Z[kept], ids[kept])
    assert abs(backend.to_numpy(value) - expected) < 1e-14
    assert np.abs(backend.to_numpy(dZ)[kept] - rows).max() < 1e-15
    assert np.array_equal(backend.to_numpy(dZ)[~kept], np.zeros((2, 4)))
    scores = loss.scores({name: backend.to_numpy(x)[None] for name, x in
                          loss.metrics(backend.asarray(Z), backend.asarray(ids)).items()}, np.asarray([6]))  # fmt: skip
    assert scores["accuracy"] == np.mean(Z.argmax(1)[kept] == ids[kept])
    assert scores["baseline_accuracy"] == 0.25
    loss.check(backend.asarray(ids), backend.asarray(Z))
    with pytest.raises(ValueError, match="class ids from"):
        loss.check(backend.asarray([0, -2]), backend.asarray(Z))


@pytest.mark.parametrize(("loss", "target"), LOSSES, ids=NAMES)
def test_divisors_put_the_mean_of_parts_together(backend, loss, target):
    """What `fit` does with a batch in parts: the mean of all is that of the parts, each as often as it divides by."""
    Z, t, w = backend.asarray(logits(12, 4)), backend.asarray(target), backend.asarray(np.arange(1.0, 13.0))
    for weights in (None, w):
        whole = backend.to_numpy(loss.forward(Z, t, weights)[0])
        parts = []
        for rows in (slice(0, 5), slice(5, 12)):
            own = None if weights is None else weights[rows]
            z, y = Z[rows, ...], t[rows, ...]
            parts.append([float(backend.to_numpy(x) if hasattr(x, "dtype") else x) for x in
                          (loss.forward(z, y, own)[0], loss.divisor(z, y, own))])  # fmt: skip
        (a, n), (b, m) = parts
        assert abs((a * n + b * m) / (n + m) - whole) < 1e-13


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: SoftmaxCrossEntropy(class_weights=3), TypeError, r"^class_weights is a int; give a list"),
        (lambda: SoftmaxCrossEntropy(class_weights=[]), ValueError, r"^class_weights has shape"),
        (lambda: SoftmaxCrossEntropy(class_weights=[[1.0]]), TypeError, r"^class_weights\[0\] is"),
        (lambda: SoftmaxCrossEntropy(class_weights={0: 1.0}), TypeError, r"^class_weights is a dict"),
        (lambda: SoftmaxCrossEntropy(class_weights=[1, -1]), ValueError, r"^class_weights\[1\] is -1"),
        (lambda: SoftmaxCrossEntropy(label_smoothing=1.0), ValueError, "^label_smoothing is 1.0"),
        (lambda: SoftmaxCrossEntropy(ignore_id=1.0), TypeError, "^ignore_id is 1.0"),
        (lambda: BinaryCrossEntropy(positive_weights="a"), TypeError, "^positive_weights is a str"),
    ],
)
def test_options_that_are_wrong_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_what_does_not_fit_is_refused(backend):
    Z, ids = backend.asarray(logits(3, 4), "float32"), backend.asarray([0, 1, 2])
    for loss in (SoftmaxCrossEntropy((1.0, 2.0)), BinaryCrossEntropy((1.0, 2.0))):
        with pytest.raises(ValueError, match=r"_weights has 2 numbers, but Z has 4 columns"):
            loss.forward(Z, Z if isinstance(loss, BinaryCrossEntropy) else ids)
    for shape in ((4,), (3, 1), (3, 4), ()):
        with pytest.raises(ValueError, match=r"^weights has shape .*\(3,\), one number for each row of Z"):
            SoftmaxCrossEntropy().forward(Z, ids, backend.asarray(np.ones(shape), "float32"))
    with pytest.raises(TypeError, match=r"^weights is float64 but Z is float32"):
        MeanSquaredError().forward(Z, Z, backend.asarray(np.ones(3), "float64"))
    with pytest.raises(TypeError, match=r"^weights is a list"):
        MeanSquaredError().forward(Z, Z, [1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match=r"^ignore_id is 1, but target has rows"):
        SoftmaxCrossEntropy(ignore_id=1).forward(Z, Z)
    with pytest.raises(ValueError, match=r"^target has values from -3 to 1, .*from 0 \(false\) to 1"):
        BinaryCrossEntropy().check(backend.asarray([[-3.0, 1.0]]), Z)


def test_class_weights_may_be_an_array_of_any_backend(backend):
    given = SoftmaxCrossEntropy(backend.asarray([1.0, 2.0]))
    assert given.class_weights == (1.0, 2.0)
    assert repr(given) == "SoftmaxCrossEntropy(class_weights=(1.0, 2.0))"
    assert not given.is_plain
    assert SoftmaxCrossEntropy().is_plain


def test_all_losses_are_losses():
    for loss in (SoftmaxCrossEntropy(), MeanSquaredError(), BinaryCrossEntropy()):
        assert isinstance(loss, Loss)


# what evaluate tells


def test_scores_of_regression_are_scikit_learns(backend):
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((50, 3)), 1000 + rng.standard_normal((50, 2))
    layer = Linear(3, 2, seed=0, device=backend.device, dtype="float64")
    layer.b = backend.asarray([[1000.0, 1000.5]])
    Z = backend.to_numpy(layer(backend.asarray(X)))
    scores = evaluate(layer, X, y, loss=MeanSquaredError(), batch_size=16)
    assert scores["r2"] == pytest.approx(metrics.r2_score(y, Z), rel=1e-9)
    assert scores["mae"] == pytest.approx(metrics.mean_absolute_error(y, Z), rel=1e-12)
    assert scores["rmse"] == pytest.approx(math.sqrt(metrics.mean_squared_error(y, Z)), rel=1e-12)
    mean = np.broadcast_to(y.mean(0), y.shape)
    assert scores["baseline_rmse"] == pytest.approx(math.sqrt(metrics.mean_squared_error(y, mean)), rel=1e-9)


def test_r2_does_not_cancel_in_float32():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((400, 1)), 5000 + rng.standard_normal((400, 1))
    layer = Linear.from_arrays(np.zeros((1, 1), "float32"), np.asarray([5000.0], "float32"))
    y = y.astype("float32")
    wide = y.astype(float)
    scores = evaluate(layer, X, y, loss=MeanSquaredError(), batch_size=64)
    assert scores["baseline_rmse"] == pytest.approx(wide.std(), rel=1e-3)  # of a mean that is off by 2^-24 of 5000
    assert scores["r2"] == pytest.approx(1 - ((wide - 5000) ** 2).mean() / wide.var(), abs=1e-3)


@pytest.mark.parametrize("kind", ["ids", "one-hot", "labels"])
def test_accuracy_and_its_baseline(backend, kind):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((37, 4)).astype("float32")
    layer = Linear(4, 3, seed=0, device=backend.device, dtype="float32")
    Z = backend.to_numpy(layer(backend.asarray(X)))
    if kind == "labels":
        y = rng.random((37, 3)) < 0.3
        loss, right = BinaryCrossEntropy(), np.mean((Z > 0) == y)
        baseline = np.mean(np.maximum(y.mean(0), 1 - y.mean(0)))
    else:
        ids = rng.integers(0, 3, 37)
        y = ids if kind == "ids" else np.eye(3, dtype="float32")[ids]
        loss, right = SoftmaxCrossEntropy(), np.mean(Z.argmax(1) == ids)
        baseline = np.bincount(ids).max() / 37
    scores = evaluate(layer, X, y, loss=loss, batch_size=10)
    assert scores["accuracy"] == pytest.approx(right, rel=1e-12)
    assert scores["baseline_accuracy"] == pytest.approx(baseline, rel=1e-12)


def test_a_metric_of_a_users_own_loss_is_summed_and_divided_by_the_samples():
    class Absolute:
        def forward(self, Z, target):
            return np.mean(np.abs(Z - target)), np.sign(Z - target) / Z.size

        def backward(self, cache):
            return cache

        def metrics(self, Z, target):
            return {"far": np.sum(np.abs(Z - target) > 1)}

    X, y = np.linspace(-3, 3, 25).reshape(-1, 1), np.zeros((25, 1))
    scores = evaluate(Linear.from_arrays(np.eye(1)), X, y, loss=Absolute(), batch_size=7)
    assert scores["far"] == np.mean(np.abs(X) > 1)
    assert scores.keys() == {"loss", "far"}
