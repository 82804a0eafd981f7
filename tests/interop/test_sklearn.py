"""The scikit-learn estimators: scikit-learn's own checks, all of them, and what they do not look at."""

from __future__ import annotations

import contextlib
import doctest
import importlib.util
import pickle
import tracemalloc
import warnings
from collections import Counter

import numpy as np
import pytest

pytest.importorskip("sklearn", minversion="1.7")

import scipy.sparse
import sklearn
from sklearn.base import clone
from sklearn.datasets import make_multilabel_classification
from sklearn.exceptions import ConvergenceWarning, NotFittedError, SkipTestWarning
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import f1_score, log_loss, r2_score, recall_score
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.estimator_checks import check_estimator

from anyarray_linear import Device, DeviceUnavailableError, load_model, predict, save_model
from anyarray_linear.datasets import load_digits
from anyarray_linear.interop.sklearn import LinearNetClassifier, LinearNetRegressor, classifier, regressor, samples

ESTIMATORS = [LinearNetClassifier, LinearNetRegressor]
ABSENT = (  # what check_estimator says of hardware that is not here, and of a method that MLPClassifier does not have either
    *("requires cuda", "XPU device", "MPS device"),
    "does not have a decision_function",
)


def quiet(**options):
    """Options under which training is short, and does not warn that it is."""
    return {"random_state": 0, "max_iter": 30, "n_iter_no_change": 1000, **options}


@pytest.fixture
def _short():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        yield


pytestmark = pytest.mark.usefixtures("_short")


@pytest.fixture(scope="module")
def digits():
    X, y = load_digits()
    return train_test_split(X[:900].astype("float64"), y[:900], random_state=0, stratify=y[:900])


@pytest.fixture(scope="module")
def line():
    X = np.random.default_rng(0).standard_normal((200, 5))
    return X, X @ np.asarray([1.0, -2.0, 0.5, 0.0, 3.0]) + 4


def made(estimator, X, y, **options):
    return estimator(**quiet(**options)).fit(X, y)


# ---------------------------------------------------------------------------------------------------------------------
# scikit-learn's checks


@pytest.mark.parametrize("options", [{}, {"solver": "sgd", "dtype": "float64", "device": "cpu"}], ids=["default", "others"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_check_of_scikit_learn_passes(estimator, options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SkipTestWarning)
        results = check_estimator(estimator(**options), on_fail="raise")
    counts = Counter(result["status"] for result in results)
    assert set(counts) <= {"passed", "skipped"}
    assert counts["passed"] >= 50
    if "device" not in options:  # then it says that it takes arrays of any library, and is held to it
        arrays = [result["status"] for result in results if result["check_name"] == "check_array_api_input"]
        assert arrays.count("passed") >= 2
    for why in {str(result["exception"]) for result in results if result["status"] == "skipped"}:
        library, is_missing, _ = why.partition(" is not installed")
        assert importlib.util.find_spec(library) is None if is_missing else any(part in why for part in ABSENT), why


@pytest.mark.parametrize("module", [classifier, regressor])
def test_the_doctests(module):
    assert doctest.testmod(module).failed == 0
    assert doctest.testmod(module).attempted > 0


# ---------------------------------------------------------------------------------------------------------------------
# Learning


def test_it_learns_the_digits_as_well_as_scikit_learns_own(digits):
    X, X_test, y, y_test = digits
    ours = make_pipeline(StandardScaler(), LinearNetClassifier(random_state=0, max_iter=40)).fit(X, y)
    theirs = make_pipeline(StandardScaler(), MLPClassifier(random_state=0, max_iter=40)).fit(X, y)
    assert ours.score(X_test, y_test) > theirs.score(X_test, y_test) - 0.03
    assert ours.score(X_test, y_test) > 0.9


@pytest.mark.parametrize("activation", ["identity", "logistic", "tanh", "relu", "silu", "gelu"])
@pytest.mark.parametrize("solver", ["sgd", "adam", "adamw"])
def test_every_activation_and_solver_learns(line, activation, solver):
    X, y = line
    model = made(LinearNetRegressor, X, y, activation=activation, solver=solver, learning_rate_init=0.01, batch_size=20, max_iter=60)
    assert model.score(X, y) > 0.9


def test_without_hidden_layers_it_is_least_squares(line):
    X, y = line
    y = y + np.random.default_rng(1).standard_normal(len(y))
    model = made(LinearNetRegressor, X, y, hidden_layer_sizes=(), learning_rate_init=0.1, max_iter=500, tol=0)
    exact = np.linalg.lstsq(np.c_[X, np.ones(len(X))], y, rcond=None)[0]
    np.testing.assert_allclose(np.r_[model.model_[0].W[0], model.model_[0].b[0]], exact, rtol=0, atol=1e-3)


def test_several_targets_at_once(line):
    X, y = line
    Y = np.stack([y, -y, X[:, 0]], axis=1)
    model = made(LinearNetRegressor, X, Y, hidden_layer_sizes=(), learning_rate_init=0.1, max_iter=300)
    assert model.predict(X).shape == Y.shape
    assert model.score(X, Y) > 0.99
    column = made(LinearNetRegressor, X, y[:, np.newaxis])
    assert column.predict(X).shape == (200, 1)
    np.testing.assert_array_equal(column.predict(X)[:, 0], made(LinearNetRegressor, X, y).predict(X))


@pytest.mark.parametrize("labels", [["no", "yes", "maybe"], [7, -3, 40], [True, False], [0.5, 2.0]])
def test_labels_of_any_kind_come_back(labels):
    rng = np.random.default_rng(0)
    labels = np.asarray(labels) if labels != [0.5, 2.0] else np.asarray([1.0, 2.0])
    ids = rng.integers(0, len(labels), 120)
    X = np.eye(len(labels))[ids] + 0.05 * rng.standard_normal((120, len(labels)))
    model = made(LinearNetClassifier, X, labels[ids], learning_rate_init=0.02)
    predicted = model.predict(X)
    assert predicted.dtype == labels.dtype
    np.testing.assert_array_equal(predicted, labels[ids])
    np.testing.assert_array_equal(model.classes_, np.unique(labels))
    np.testing.assert_array_equal(model.classes_[model.predict_proba(X).argmax(axis=1)], predicted)


def test_probabilities_of_outputs_that_overflow_are_still_probabilities():
    model = made(LinearNetClassifier, np.asarray([[-1.0], [1.0]]), [0, 1], hidden_layer_sizes=())
    P = model.predict_proba([[1e6], [-1e6]])
    assert np.isfinite(P).all()
    np.testing.assert_allclose(P.sum(axis=1), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Stopping


def test_training_stops_when_nothing_improves(line):
    X, y = line
    model = LinearNetRegressor((), learning_rate_init=0.1, random_state=0, max_iter=2000, tol=1e-4, n_iter_no_change=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.fit(X, y)
    assert model.n_iter_ == len(model.loss_curve_) < 2000
    best, count = np.inf, 0  # MLPClassifier's rule
    for i, loss in enumerate(model.loss_curve_):
        count = count + 1 if loss > best - 1e-4 else 0
        best = min(best, loss)
        assert (count > 5) == (i == model.n_iter_ - 1)


def test_a_training_that_was_still_improving_says_so(line):
    with pytest.warns(ConvergenceWarning, match="3 epochs are over, and the model was still improving; give a larger max_iter"):
        LinearNetRegressor(max_iter=3).fit(*line)


def test_early_stopping_keeps_the_weights_of_the_best_epoch(digits):
    X, _, y, _ = digits
    options = quiet(early_stopping=True, validation_fraction=0.2, learning_rate_init=0.05, max_iter=25)
    model = LinearNetClassifier(**options).fit(X / 16, y)
    best = int(np.argmax(model.validation_scores_))
    assert best < model.n_iter_ - 1, "the best epoch should not be the last one here"
    assert model.best_validation_score_ == max(model.validation_scores_)
    until_then = LinearNetClassifier(**{**options, "max_iter": best + 1}).fit(X / 16, y)
    np.testing.assert_array_equal(model.predict_proba(X / 16), until_then.predict_proba(X / 16))
    assert model.n_iter_ == len(model.validation_scores_) == 25
    patient = LinearNetClassifier(**{**options, "n_iter_no_change": 3, "max_iter": 200}).fit(X / 16, y)
    assert patient.n_iter_ < 200


def test_early_stopping_scores_what_the_fit_did_not_see(line):
    X, y = line
    model = made(LinearNetRegressor, X, y, early_stopping=True, validation_fraction=0.25, max_iter=5)
    _, held = model._split(y)
    assert len(held) == 50
    assert model.best_validation_score_ == pytest.approx(r2_score(y[held], model.predict(X[held])), rel=1e-9)
    other = y.copy()
    other[held] = 0  # the weights do not depend on the held targets, as long as the last epoch is the best
    assert model.validation_scores_ == sorted(model.validation_scores_)
    again = made(LinearNetRegressor, X, other, early_stopping=True, validation_fraction=0.25, max_iter=5)
    assert again.loss_curve_ == model.loss_curve_


def test_held_out_classes_are_in_proportion(digits):
    _, _, y, _ = digits
    _, held = LinearNetClassifier(random_state=0, validation_fraction=0.1)._split(y)
    assert np.abs(np.bincount(y[held]) - np.bincount(y) / 10).max() <= 1


# ---------------------------------------------------------------------------------------------------------------------
# Bit by bit


def test_equal_seeds_give_equal_models_and_others_do_not(digits):
    X, _, y, _ = digits
    first, second, other = (made(LinearNetClassifier, X, y, max_iter=2, random_state=seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.predict_proba(X), second.predict_proba(X))
    assert not np.array_equal(first.predict_proba(X), other.predict_proba(X))


def test_partial_fit_goes_on_from_where_it_was(digits):
    X, _, y, _ = digits
    model = LinearNetClassifier(random_state=0, learning_rate_init=0.005, batch_size=50)
    scores = []
    for _ in range(16):
        for part in np.array_split(np.arange(len(X)), 3):
            model.partial_fit(X[part] / 16, y[part], classes=range(10))
        scores.append(model.score(X / 16, y))
    assert scores[-1] > 0.9 > scores[0]
    assert model.n_iter_ == len(model.loss_curve_) == 48
    assert model._optimizer.steps == 16 * 3 * 5, "one optimizer for all of it, its moments kept"
    model.fit(X / 16, y)
    model.partial_fit(X / 16, y)
    resumed = pickle.loads(pickle.dumps(model))
    for each in (model, resumed):
        each.partial_fit(X / 16, y)
    np.testing.assert_array_equal(model.predict_proba(X), resumed.predict_proba(X))


def test_partial_fit_orders_the_samples_anew_each_time(line):
    X, y = line
    seen = []
    model = LinearNetRegressor((), random_state=0, batch_size=1, learning_rate_init=1e-9, solver="sgd", momentum=0.0)

    class Noting(regressor.MeanSquaredError):
        def forward(self, Z, target):
            seen.append(float(target[0]))
            return super().forward(Z, target)

    model._loss = Noting()
    for _ in range(2):
        model.partial_fit(X[:30], y[:30])
    first, second = seen[1:31], seen[32:62]  # fit looks at one row first
    assert sorted(first) == sorted(second) == sorted(y[:30].tolist())
    assert first != second


def test_partial_fit_refuses_what_does_not_fit(digits, line):
    X, _, y, _ = digits
    with pytest.raises(ValueError, match="classes must be passed on the first call to partial_fit"):
        LinearNetClassifier().partial_fit(X, y)
    with pytest.raises(ValueError, match="y has the label 9, which is none of the classes"):
        LinearNetClassifier().partial_fit(X, y, classes=range(9))
    model = LinearNetClassifier().partial_fit(X, y, classes=range(10))
    with pytest.raises(ValueError, match=r"but this model was begun with \[0, 1"):
        model.partial_fit(X, y, classes=range(11))
    with pytest.raises(ValueError, match="set early_stopping=False"):
        LinearNetRegressor(early_stopping=True).partial_fit(*line)
    with pytest.raises(ValueError, match=r"y has shape \(200, 2\), but it must be \(200,\), as before"):
        LinearNetRegressor().partial_fit(*line).partial_fit(line[0], np.c_[line[1], line[1]])


# ---------------------------------------------------------------------------------------------------------------------
# Sparse X


TEXTS = [
    *["the match ended in a draw", "she scored two goals", "a late goal won the match", "the team lost again", "our team scored"],
    *["rain in the morning", "sun and a light wind", "heavy rain and wind", "a cold clear morning", "snow in the night"],
]


def test_texts_go_from_the_vectorizer_to_the_model_as_they_are():
    pipeline = make_pipeline(TfidfVectorizer(), LinearNetClassifier((8,), **quiet(learning_rate_init=0.05, max_iter=60)))
    pipeline.fit(TEXTS, ["sport"] * 5 + ["weather"] * 5)
    assert pipeline.predict(["two goals in the match", "wind and snow"]).tolist() == ["sport", "weather"]
    assert pipeline.predict_proba(["two goals"]).shape == (1, 2)


def test_the_default_of_the_one_hot_encoder_is_taken():
    X = np.asarray([["red", "s"], ["blue", "m"], ["red", "m"], ["green", "s"]] * 5)
    y = np.asarray([1.0, 2.0, 1.5, 0.5] * 5)
    pipeline = make_pipeline(OneHotEncoder(), LinearNetRegressor((), **quiet(learning_rate_init=0.05, max_iter=400)))
    assert pipeline.fit(X, y).score(X, y) > 0.99


@pytest.mark.parametrize("form", ["csr_array", "csc_matrix", "coo_array"])
@pytest.mark.parametrize("options", [{}, {"early_stopping": True}, {"dtype": "float32"}])
def test_a_sparse_matrix_gives_the_bits_of_the_dense_one(digits, form, options):
    X, X_test, y, _ = digits
    options = {"max_iter": 3, "batch_size": 64, "learning_rate_init": 0.01, **options}
    sparse = getattr(scipy.sparse, form)
    weights = np.random.default_rng(0).uniform(0.5, 2, len(y))
    for how in ({}, {"sample_weight": weights}):
        dense = LinearNetClassifier(**quiet(**options)).fit(X, y, **how)
        model = LinearNetClassifier(**quiet(**options)).fit(sparse(X), y, **how)
        for W, W_ in zip(model.coefs_, dense.coefs_, strict=True):
            np.testing.assert_array_equal(W, W_)
        np.testing.assert_allclose(model.loss_curve_, dense.loss_curve_, rtol=1e-6)
        np.testing.assert_array_equal(model.predict_proba(sparse(X_test)), dense.predict_proba(X_test))
    if "early_stopping" not in options:
        model.partial_fit(sparse(X), y)
        dense.partial_fit(X, y)
        np.testing.assert_array_equal(model.coefs_[0], dense.coefs_[0])


def test_only_a_batch_of_a_sparse_matrix_is_dense(line):
    rows, seen = 3000, []
    X = scipy.sparse.random_array((rows, 500), density=0.01, format="csr", rng=np.random.default_rng(0))
    made = samples.SparseBatches(samples.Samples(X, np.zeros(rows)), 100, np.random.SeedSequence(0))
    for x, _ in made:
        seen.append(x)
    assert [x.shape for x in seen] == [(100, 500)] * 30
    first = np.concatenate(seen)
    np.testing.assert_array_equal(np.sort(first.sum(axis=1)), np.sort(X.toarray().sum(axis=1)))
    np.testing.assert_array_equal(np.concatenate([x for x, _ in made]), first)  # a pass is the same until the epoch is over
    made.next_epoch(None, None)
    assert not np.array_equal(np.concatenate([x for x, _ in made]), first)
    model = LinearNetRegressor((), max_iter=1, batch_size=100)
    with tracemalloc_peak() as peak, warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(X, np.zeros(rows)).predict(X)
    assert peak() < X.shape[0] * X.shape[1] * 8 * 0.75, "all rows were dense at once"


@contextlib.contextmanager
def tracemalloc_peak():
    tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


# ---------------------------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_weight_of_2_is_a_sample_twice_and_of_0_none(digits, estimator):
    X, _, y, _ = digits
    X, y = X[:150] / 16, y[:150] if estimator is LinearNetClassifier else X[:150, 20] * 0.1
    weights = np.random.default_rng(0).integers(0, 4, len(y)).astype(float)
    options = {"batch_size": 10_000, "max_iter": 40, "learning_rate_init": 0.01, "hidden_layer_sizes": (8,)}
    # one batch of all: there the two are the same but for rounding
    weighted = estimator(**quiet(**options)).fit(X, y, sample_weight=weights)
    repeated = estimator(**quiet(**options)).fit(np.repeat(X, weights.astype(int), axis=0), np.repeat(y, weights.astype(int)))
    np.testing.assert_allclose(weighted.coefs_[0], repeated.coefs_[0], atol=1e-9)
    np.testing.assert_allclose(weighted.loss_curve_, repeated.loss_curve_, rtol=1e-9)
    without = estimator(**quiet(**{**options, "batch_size": 32})).fit(X, y, sample_weight=(weights > 0) * 1.0)
    left = estimator(**quiet(**{**options, "batch_size": 32})).fit(X[weights > 0], y[weights > 0])
    np.testing.assert_allclose(without.coefs_[0], left.coefs_[0], rtol=0, atol=1e-12)
    other = estimator(**quiet(**options)).fit(X, y)
    assert np.abs(other.coefs_[0] - weighted.coefs_[0]).max() > 1e-3


def test_class_weights_are_weights_of_samples(digits):
    X, _, y, _ = digits
    X, y = X[y < 3] / 16, np.asarray(["zero", "one", "two"])[y[y < 3]]
    options = {"max_iter": 3, "batch_size": 20}
    of_classes = made(LinearNetClassifier, X, y, class_weight={"zero": 2.0, "one": 0.5}, **options)
    weights = np.select([y == "zero", y == "one"], [2.0, 0.5], 1.0)
    of_samples = LinearNetClassifier(**quiet(**options)).fit(X, y, sample_weight=weights)
    np.testing.assert_array_equal(of_classes.coefs_[0], of_samples.coefs_[0])
    both = LinearNetClassifier(class_weight="balanced", **quiet(**options)).fit(X, y, sample_weight=weights)
    product = weights * compute_sample_weight("balanced", y)
    np.testing.assert_array_equal(both.coefs_[0], LinearNetClassifier(**quiet(**options)).fit(X, y, sample_weight=product).coefs_[0])
    assert not np.array_equal(both.coefs_[0], of_samples.coefs_[0])


def test_balanced_weights_find_the_rare_class():
    rng = np.random.default_rng(0)
    y = (rng.random(2000) < 0.05).astype(int)
    X = rng.standard_normal((2000, 3)) + y[:, np.newaxis]
    plain, balanced = (made(LinearNetClassifier, X, y, hidden_layer_sizes=(), class_weight=w, learning_rate_init=0.02) for w in (None, "balanced"))
    assert recall_score(y, balanced.predict(X)) > 0.75 > recall_score(y, plain.predict(X)) + 0.3


def test_early_stopping_weighs_what_it_holds_out(digits):
    X, _, y, _ = digits
    weights = np.random.default_rng(0).uniform(0.1, 3, len(y))
    model = LinearNetClassifier(**quiet(early_stopping=True, validation_fraction=0.3, max_iter=1)).fit(X / 16, y, weights)
    _, held = model._split(y)
    hits = model.predict(X[held] / 16) == y[held]
    assert model.best_validation_score_ == pytest.approx(np.average(hits, weights=weights[held]), abs=1e-12)


def test_weights_that_make_no_sense_are_named(digits, line):
    X, _, y, _ = digits
    with pytest.raises(ValueError, match=r"sample_weight has shape \(3,\), but there are 675 samples; give \(675,\)"):
        LinearNetClassifier().fit(X, y, sample_weight=[1, 2, 3])
    with pytest.raises(ValueError, match=r"makes a weight of -1.0; weights must be >= 0"):
        LinearNetClassifier().fit(X, y, sample_weight=-np.ones(len(y)))
    with pytest.raises(ValueError, match="makes every weight zero"):
        LinearNetRegressor().fit(*line, sample_weight=np.zeros(200))
    with pytest.raises(ValueError, match="NaN"):
        LinearNetRegressor().fit(*line, sample_weight=np.full(200, np.nan))
    with pytest.raises(ValueError, match='class_weight="balanced" is about all samples, and partial_fit sees a part'):
        LinearNetClassifier(class_weight="balanced").partial_fit(X, y, classes=range(10))


# ---------------------------------------------------------------------------------------------------------------------
# Several labels per sample


@pytest.fixture(scope="module")
def labels():
    return make_multilabel_classification(300, 12, n_classes=4, random_state=0)


def test_several_labels_are_learned_as_well_as_by_scikit_learns_own(labels):
    X, Y = labels
    X = StandardScaler().fit_transform(X)
    model = made(LinearNetClassifier, X[:200], Y[:200], hidden_layer_sizes=(20,), learning_rate_init=0.01, batch_size=50)
    theirs = MLPClassifier((20,), learning_rate_init=0.01, batch_size=50, max_iter=30, random_state=0).fit(X[:200], Y[:200])
    P, found = model.predict_proba(X), model.predict(X)
    assert P.shape == found.shape == Y.shape
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, P > 0.5)
    assert f1_score(Y[200:], found[200:], average="micro") > f1_score(Y[200:], theirs.predict(X[200:]), average="micro") - 0.05
    always = np.tile(Y[:200].mean(axis=0) > 0.5, (100, 1))  # what needs no features
    assert f1_score(Y[200:], found[200:], average="micro") > f1_score(Y[200:], always, average="micro")
    assert model.score(X, Y) == (found == Y).all(axis=1).mean()
    np.testing.assert_array_equal(model.classes_, theirs.classes_)
    theirs.coefs_, theirs.intercepts_ = model.coefs_, model.intercepts_
    np.testing.assert_allclose(theirs.predict_proba(X), P, rtol=1e-9, atol=1e-12)


def test_the_loss_of_several_labels_is_their_mean_log_loss(labels):
    X, Y = labels
    model = made(LinearNetClassifier, X, Y, learning_rate_init=1e-12, max_iter=1)
    P = model.predict_proba(X)
    assert model.loss_ == pytest.approx(np.mean([log_loss(Y[:, j], P[:, j]) for j in range(4)]), rel=1e-6)


def test_several_labels_in_every_form(labels):
    X, Y = labels
    options = {"max_iter": 3, "batch_size": 40}
    model = made(LinearNetClassifier, X, Y, **options)
    sparse = made(LinearNetClassifier, scipy.sparse.csr_array(X), scipy.sparse.csr_array(Y), **options)
    np.testing.assert_array_equal(model.coefs_[0], sparse.coefs_[0])
    first = LinearNetClassifier(**quiet(batch_size=40))
    first.partial_fit(X, Y, classes=range(4)).partial_fit(X, Y)
    assert first.n_iter_ == 2
    stopped = made(LinearNetClassifier, X, Y, early_stopping=True, max_iter=4)
    assert 0 <= stopped.best_validation_score_ <= 1
    with pytest.raises(ValueError, match=r"y has shape \(300,\), but this model is for several labels per sample"):
        first.partial_fit(X, Y[:, 0])
    with pytest.raises(ValueError, match=r"y has 3 columns, but this model is for 4 labels"):
        first.partial_fit(X, Y[:, :3])
    with pytest.raises(ValueError, match="but this model is for one label per sample"):
        LinearNetClassifier().partial_fit(X, Y[:, 0], classes=[0, 1]).partial_fit(X, Y)


# ---------------------------------------------------------------------------------------------------------------------
# As MLPClassifier has it


@pytest.mark.parametrize("sizes", [(), (7,), (7, 5)])
def test_scikit_learns_own_network_computes_the_same_from_coefs_and_intercepts(digits, line, sizes):
    X, _, y, _ = digits
    ours = made(LinearNetClassifier, X, y, hidden_layer_sizes=sizes, activation="tanh", max_iter=2)
    theirs = MLPClassifier(sizes, activation="tanh", max_iter=1, random_state=0).fit(X, y)
    assert [W.shape for W in ours.coefs_] == [W.shape for W in theirs.coefs_]
    assert [b.shape for b in ours.intercepts_] == [b.shape for b in theirs.intercepts_]
    theirs.coefs_, theirs.intercepts_ = ours.coefs_, ours.intercepts_
    np.testing.assert_allclose(theirs.predict_proba(X), ours.predict_proba(X), rtol=1e-9, atol=1e-12)
    assert ours.loss_ == ours.loss_curve_[-1]
    for name in ("coefs_", "intercepts_", "loss_"):
        assert not hasattr(LinearNetClassifier(), name), "only once it is fitted"


def test_a_warm_start_goes_on_from_the_weights_there_are(digits):
    X, _, y, _ = digits
    options = {"hidden_layer_sizes": (9,), "batch_size": 50, "solver": "sgd", "momentum": 0.0, "learning_rate_init": 0.05}
    model = made(LinearNetClassifier, X / 16, y, max_iter=6, warm_start=True, **options)
    kept, curve = [W.copy() for W in model.coefs_], list(model.loss_curve_)
    model.set_params(learning_rate_init=1e-12, max_iter=2).fit(X / 16, y)
    for W, before in zip(model.coefs_, kept, strict=True):
        np.testing.assert_allclose(W, before, atol=1e-9)
    assert model.loss_curve_[:6] == curve
    assert model.n_iter_ == len(model.loss_curve_) == 8
    model.set_params(warm_start=False).fit(X / 16, y)
    assert model.n_iter_ == 2
    assert not np.allclose(model.coefs_[0], kept[0])


def test_a_warm_start_of_something_else_is_refused_and_nothing_is_fitted(digits, line):
    X, _, y, _ = digits
    model = made(LinearNetClassifier, X, y, max_iter=1, warm_start=True)
    with pytest.raises(ValueError, match=r"hidden_layer_sizes is \(3,\), but warm_start=True goes on with a model whose"):
        model.set_params(hidden_layer_sizes=(3,)).fit(X, y)
    with pytest.raises(NotFittedError):
        model.predict(X)
    model = made(LinearNetClassifier, X, y, max_iter=1, warm_start=True)
    with pytest.raises(ValueError, match=r"y has the classes \[0, 1, 2\], but warm_start=True goes on with a model for \[0, 1, 2, 3"):
        model.fit(X[y < 3], y[y < 3])
    model = made(LinearNetRegressor, *line, max_iter=1, warm_start=True)
    with pytest.raises(ValueError, match="features"):
        model.fit(line[0][:, 1:], line[1])


def test_the_first_weights_are_what_init_says(line):
    X, y = line
    model = made(LinearNetRegressor, X, y, init="zeros", hidden_layer_sizes=(), learning_rate_init=1e-12, max_iter=1)
    assert np.abs(model.coefs_[0]).max() < 1e-9
    model = made(LinearNetRegressor, X, y, init=lambda rng, shape: np.full(shape, 0.25), learning_rate_init=1e-12, max_iter=1)
    np.testing.assert_allclose(model.coefs_[1], 0.25, atol=1e-9)
    with pytest.raises(ValueError, match="init is 'best'; the names are"):
        LinearNetRegressor(init="best").fit(X, y)


@pytest.mark.usefixtures("_dispatch")
def test_scikit_learns_move_estimator_to_moves_the_model(backend, digits):
    move = pytest.importorskip("sklearn.utils._array_api")
    if not hasattr(move, "move_estimator_to"):
        pytest.skip("this scikit-learn has no move_estimator_to")
    if backend.name in ("jax", "strictest"):
        pytest.skip("scikit-learn itself does not take these")
    X, X_test, y, _ = digits
    there = backend.asarray(X, "float64")
    model = made(LinearNetClassifier, there, backend.asarray(y), max_iter=2)
    expected = backend.to_numpy(model.predict_proba(backend.asarray(X_test, "float64")))
    moved = move.move_estimator_to(model, np, "cpu")
    np.testing.assert_allclose(moved.predict_proba(X_test), expected, atol=1e-9)
    moved.partial_fit(X, y)
    model.partial_fit(there, backend.asarray(y))
    np.testing.assert_allclose(moved.coefs_[0], backend.to_numpy(model.model_[0].W).T, atol=1e-9)
    assert model.n_iter_ == moved.n_iter_ == 3
    assert backend.owns(model.coefs_[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "swish"}, ValueError, "activation is 'swish'; it must be one of 'identity', 'logistic'"),
        ({"solver": "lbfgs"}, ValueError, "solver is 'lbfgs'; it must be one of 'sgd', 'adam', 'adamw'"),
        ({"batch_size": "all"}, ValueError, "batch_size is 'all'; it must be one of 'auto'"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"hidden_layer_sizes": (3, 0)}, ValueError, r"hidden_layer_sizes\[1\] == 0"),
        ({"hidden_layer_sizes": 2.5}, TypeError, r"hidden_layer_sizes\[0\] must be an instance of int"),
        ({"learning_rate_init": -1.0}, ValueError, "learning_rate_init == -1"),
        ({"device": "gpu"}, ValueError, "device is 'gpu'; expected"),
        ({"device": "cuda:77"}, DeviceUnavailableError, "cuda:77 cannot be used"),
        ({"dtype": "int8"}, TypeError, "dtype is int8, but layers on cpu compute in"),
    ],
)
def test_parameters_that_do_not_fit_are_named(line, options, error, message):
    with pytest.raises(error, match=message):
        LinearNetRegressor(**options).fit(*line)


def test_a_model_that_is_not_fitted_says_so(line):
    with pytest.raises(NotFittedError):
        LinearNetRegressor().predict(line[0])


def test_the_model_goes_on_in_the_rest_of_the_library(tmp_path, digits):
    X, _, y, _ = digits
    pytest.importorskip("safetensors")
    model = made(LinearNetClassifier, X, y, hidden_layer_sizes=7, max_iter=2)
    save_model(model.model_, tmp_path / "m", metadata={"classes": [str(c) for c in model.classes_]})
    np.testing.assert_array_equal(predict(load_model(tmp_path / "m"), X).argmax(axis=1), model.predict(X))


# ---------------------------------------------------------------------------------------------------------------------
# Search, and devices


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_grid_search_over_a_pipeline(digits, jobs):
    X, X_test, y, y_test = digits
    pipeline = make_pipeline(StandardScaler(), LinearNetClassifier(**quiet(dtype="float32", max_iter=15)))
    grid = {"linearnetclassifier__hidden_layer_sizes": [(), (32,)], "linearnetclassifier__learning_rate_init": [1e-6, 1e-2]}
    search = GridSearchCV(pipeline, grid, cv=3, n_jobs=jobs).fit(X, y)
    assert search.best_params_["linearnetclassifier__learning_rate_init"] == 1e-2
    assert search.score(X_test, y_test) > 0.9
    assert search.best_estimator_[-1].model_[0].dtype == np.float32


def place_of(backend):
    """What `device` may be, to compute on that backend."""
    if backend.name.startswith("cupy"):
        return backend.name.replace("cupy", "cuda")
    return backend.device


def test_a_search_with_host_data_trains_on_the_device_that_is_asked_for(backend, digits):
    X, X_test, y, y_test = digits
    device = place_of(backend)
    options = quiet(device=device, dtype="float32", max_iter=8, batch_size=50, learning_rate_init=0.01)
    pipeline = make_pipeline(StandardScaler(), LinearNetClassifier(**options))
    search = GridSearchCV(pipeline, {"linearnetclassifier__hidden_layer_sizes": [(), (16,)]}, cv=2).fit(X[:300], y[:300])
    last = search.best_estimator_[-1]
    assert backend.owns(last.model_[0].W)
    assert isinstance(last.predict(X_test), np.ndarray)
    assert isinstance(last.predict_proba(X_test), np.ndarray)
    assert search.score(X_test, y_test) > 0.8
    on_host = clone(pipeline).set_params(linearnetclassifier__device=None).fit(X[:300], y[:300])
    here = clone(pipeline).fit(X[:300], y[:300])
    np.testing.assert_allclose(here.predict_proba(X_test), on_host.predict_proba(X_test), atol=1e-3)


def test_regressors_cross_validate_on_the_device(backend, line):
    X, y = line
    model = LinearNetRegressor((), **quiet(device=place_of(backend), learning_rate_init=0.1, max_iter=60))
    assert cross_val_score(model, X, y, cv=2).min() > 0.95


@pytest.fixture
def _dispatch():
    with sklearn.config_context(array_api_dispatch=True):
        yield


@pytest.mark.usefixtures("_dispatch")
def test_under_dispatch_everything_follows_the_arrays(backend, digits, line):
    if backend.name in ("jax", "strictest"):
        pytest.skip("scikit-learn itself does not take these")
    X, X_test, y, _ = digits
    for dtype in ("float32", "float64"):
        options = quiet(max_iter=5, learning_rate_init=0.01, early_stopping=True)
        on_host = LinearNetClassifier(**options).fit(X.astype(dtype), y)
        model = LinearNetClassifier(**options).fit(backend.asarray(X, dtype), backend.asarray(y))
        assert all(backend.owns(value) for value in model.model_.parameters().values())
        P, ids = model.predict_proba(backend.asarray(X_test, dtype)), model.predict(backend.asarray(X_test, dtype))
        assert backend.owns(P)
        assert backend.owns(ids)
        assert backend.owns(model.classes_)
        assert backend.to_numpy(P).dtype == dtype
        np.testing.assert_allclose(backend.to_numpy(P), on_host.predict_proba(X_test.astype(dtype)), atol=1e-3 if dtype == "float32" else 1e-9)
        assert isinstance(model.score(backend.asarray(X_test, dtype), backend.asarray(digits[3])), float)
    X, y = line
    for target in (y, np.c_[y, -y]):
        model = LinearNetRegressor((), **quiet(max_iter=5)).fit(backend.asarray(X), backend.asarray(target))
        Z = model.predict(backend.asarray(X))
        assert backend.owns(Z)
        assert tuple(Z.shape) == target.shape
        model.partial_fit(backend.asarray(X), backend.asarray(target))


@pytest.mark.usefixtures("_dispatch")
def test_under_dispatch_text_labels_stay_on_the_host(backend, digits):
    if backend.name in ("jax", "strictest"):
        pytest.skip("scikit-learn itself does not take these")
    X, _, y, _ = digits
    names = np.asarray([f"digit {i}" for i in range(10)])[y]
    model = LinearNetClassifier(**quiet(learning_rate_init=0.01)).fit(backend.asarray(X), names)
    assert backend.owns(model.model_[0].W)
    assert (model.predict(backend.asarray(X)) == names).mean() > 0.9


@pytest.mark.usefixtures("_dispatch")
def test_under_dispatch_other_arrays_than_at_fit_are_refused(backend, line):
    if backend.name in ("jax", "strictest", "numpy", "numpy-readonly"):
        pytest.skip("scikit-learn itself does not take these, or they are NumPy's")
    X, y = line
    model = LinearNetRegressor(**quiet(max_iter=2)).fit(backend.asarray(X), backend.asarray(y))
    with pytest.raises(ValueError, match=r"LinearNetRegressor\.predict\(\) must use the same namespace.*X is a numpy array on cpu, but the"):
        model.predict(X)
    with pytest.raises(ValueError, match=r"LinearNetRegressor\.partial_fit\(\) must use the same"):
        model.partial_fit(X, y)
    model.model_ = model.model_.to("cpu")
    assert isinstance(model.predict(X), np.ndarray)


@pytest.mark.usefixtures("_dispatch")
def test_a_device_that_is_asked_for_takes_arrays_from_anywhere(backend, line):
    if backend.name in ("jax", "strictest"):
        pytest.skip("scikit-learn itself does not take these")
    X, y = line
    model = LinearNetRegressor(**quiet(max_iter=2, device="cpu")).fit(backend.asarray(X), backend.asarray(y))
    assert Device.of(model.model_[0].W) == Device.of(X)
    assert backend.owns(model.predict(backend.asarray(X)))
    assert isinstance(model.predict(X), np.ndarray)


@pytest.mark.parametrize(
    ("name", "value"),
    [("max_iter", 0), ("max_iter", 2.5), ("n_iter_no_change", 0), ("n_iter_no_change", "x"), ("momentum", 2), ("tol", None),
     ("validation_fraction", 2), ("learning_rate_init", -1), ("weight_decay", "a"), ("hidden_layer_sizes", -1),
     ("hidden_layer_sizes", (8, 2.5))],
)  # fmt: skip
def test_a_parameter_that_makes_no_sense_is_named_and_nothing_is_fitted(name, value):
    X, y = np.eye(6), np.asarray(["a", "b", "c"] * 2)
    model = LinearNetClassifier(**{"hidden_layer_sizes": (4,), "max_iter": 1, name: value})
    for attempt in (lambda: model.fit(X, y), lambda: model.partial_fit(X, y, classes=["a", "b", "c"])):
        with pytest.raises((TypeError, ValueError), match=name):
            attempt()
        with pytest.raises(NotFittedError):
            model.predict(X)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_fit_that_fails_leaves_no_older_model_behind():
    X = np.eye(6)
    model = LinearNetClassifier(hidden_layer_sizes=(4,), max_iter=1).fit(X, ["a", "b", "c"] * 2)
    with pytest.raises(ValueError, match="NaN"):
        model.fit(np.full((6, 2), np.nan), ["x", "y", "z"] * 2)
    with pytest.raises(NotFittedError):
        model.predict(X)


@pytest.mark.parametrize(("activation", "factor"), [("relu", 6), ("logistic", 2), ("tanh", 6), ("silu", 6)])
def test_first_weights_and_biases_are_drawn_as_those_of_mlpclassifier(activation: str, factor: int) -> None:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(40, 30)), rng.integers(0, 5, 40)
    given = {"hidden_layer_sizes": (400,), "activation": activation, "max_iter": 1, "learning_rate_init": 1e-12, "random_state": 3}
    ours = made(LinearNetClassifier, X, y, **given)
    for layer, sizes in ((ours.model_[0], (30, 400)), (ours.model_[2], (400, 5))):
        a = np.sqrt(factor / sum(sizes))
        for x in (layer.W, layer.b):
            assert np.abs(x).max() <= a * (1 + 1e-9)
        # uniform on [-a, a]: the mean square of n draws is a^2 / 3 to some a^2 sqrt(4 / (45 n))
        assert np.mean(layer.W**2) == pytest.approx(a**2 / 3, abs=5 * a**2 * np.sqrt(4 / (45 * layer.W.size)))
    assert np.mean(ours.model_[0].b ** 2) == pytest.approx(factor / 430 / 3, abs=5 * factor / 430 * np.sqrt(4 / (45 * 400)))
    again = made(LinearNetClassifier, X, y, **given)
    np.testing.assert_array_equal(ours.model_[0].b, again.model_[0].b)
    if activation in ("relu", "logistic", "tanh"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            theirs = MLPClassifier(**given).fit(X, y)
        a = np.sqrt(factor / 430)
        assert a * 0.99 < np.abs(theirs.coefs_[0]).max() <= a * (1 + 1e-9)
        assert a * 0.98 < np.abs(theirs.intercepts_[0]).max() <= a * (1 + 1e-9)
