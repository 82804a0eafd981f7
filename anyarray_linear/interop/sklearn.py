"""The library as scikit-learn estimators, so that a pipeline or a grid search trains on a GPU without PyTorch.

`LinearNetClassifier` and `LinearNetRegressor` are networks of linear layers behind scikit-learn's interface. Parameters have
the names of `MLPClassifier` where they mean the same. What is different:

- `device`: where to compute, as `select_device` takes it; NumPy data are moved there batch by batch, and results come back.
  `None`: where `X` is. That is the CPU, or under `sklearn.config_context(array_api_dispatch=True)` wherever the arrays are:
  CuPy arrays train on their card, torch tensors on their device, and results are of the same library and device. (For
  that, scikit-learn wants SCIPY_ARRAY_API=1 in the environment before Python starts.)
- `dtype`: what to compute in; `None` is float32 for a float32 or float16 `X`, else float64. Most GPUs are many times
  faster in float32.
- `solver` is one of this library's optimizers, and `weight_decay` theirs; there is no `alpha`, which MLPClassifier divides
  by the number of samples.

There are no sample weights: scikit-learn requires that a weight of 0 gives the model that was trained without the sample,
and training by shuffled mini-batches cannot promise it.
"""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Self

import numpy as np

try:
    from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
except ImportError as error:
    raise ImportError('this needs scikit-learn; pip install "anyarray_linear[sklearn]"') from error
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from ..activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ..arrays.checks import describe
from ..arrays.device import Device
from ..arrays.place import Array, computing_on, dtype_name, is_array
from ..arrays.selection import select_device
from ..linear import Linear
from ..losses import MeanSquaredError, SoftmaxCrossEntropy
from ..optimizers import SGD, Adam, AdamW
from ..sequential import Sequential
from ..training.fitting import fit, predict

__all__ = ["LinearNetClassifier", "LinearNetRegressor"]

Host = np.ndarray[Any, Any]

_ACTIVATIONS: dict[str, tuple[tuple[Any, ...], str]] = {  # the layers, and the initializer that was made for them
    "identity": ((), "lecun_normal"),
    "logistic": ((Sigmoid,), "xavier_normal"),
    "tanh": ((Tanh,), "xavier_normal"),
    "relu": ((ReLU,), "he_normal"),
    "silu": ((SiLU,), "he_normal"),
    "gelu": ((GELU,), "he_normal"),
}

_RANGES: tuple[tuple[str, type, float, float | None, str], ...] = (  # of the parameters that are numbers
    ("weight_decay", Real, 0, None, "left"),
    ("learning_rate_init", Real, 0, None, "neither"),
    ("max_iter", Integral, 1, None, "left"),
    ("tol", Real, 0, None, "left"),
    ("momentum", Real, 0, 1, "left"),
    ("validation_fraction", Real, 0, 1, "neither"),
    ("n_iter_no_change", Integral, 1, None, "left"),
)


class _LinearNet(BaseEstimator):  # type: ignore[misc]
    """What both estimators share; a subclass says how targets become arrays, and what a good model is."""

    _loss: Any

    def __init__(
        self,
        hidden_layer_sizes: Any = (100,),
        activation: str = "relu",
        *,
        solver: str = "adam",
        weight_decay: float = 0.0,
        batch_size: int | str = "auto",
        learning_rate_init: float = 1e-3,
        max_iter: int = 200,
        random_state: Any = None,
        tol: float = 1e-4,
        verbose: bool = False,
        momentum: float = 0.9,
        nesterovs_momentum: bool = True,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        self.hidden_layer_sizes = hidden_layer_sizes
        self.activation = activation
        self.solver = solver
        self.weight_decay = weight_decay
        self.batch_size = batch_size
        self.learning_rate_init = learning_rate_init
        self.max_iter = max_iter
        self.random_state = random_state
        self.tol = tol
        self.verbose = verbose
        self.momentum = momentum
        self.nesterovs_momentum = nesterovs_momentum
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.device = device
        self.dtype = dtype

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = self.device is None  # for scikit-learn that means: everything stays where X is
        return tags

    # -----------------------------------------------------------------------------------------------------------------
    # What the subclasses say

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        """`X` and `y` as arrays, checked; `reset` says that they are the first."""
        raise NotImplementedError

    def _look_at(self, y: Array) -> None:
        """Remember what targets there are."""
        raise NotImplementedError

    def _encoded(self, y: Array) -> Host:
        """The targets on the host as the loss takes them."""
        raise NotImplementedError

    def _outputs(self) -> int:
        """How many numbers the model gives per sample."""
        raise NotImplementedError

    def _scorer(self, held: Host) -> Any:
        """A function from a row of the history to the score on the `held` targets."""
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def fit(self, X: Any, y: Any) -> Self:
        """Train a new model on `X` `(n_samples, n_features)` and `y`, and return the estimator.

        Training ends after `max_iter` epochs, or when the loss (with `early_stopping`, the score on held-out samples) has
        not improved by `tol` for more than `n_iter_no_change` epochs; then the weights of the best epoch are kept, if there
        is a score.

        Raises `ValueError` or `TypeError` for data or parameters that do not fit, `DeviceUnavailableError` for a device that
        cannot be used, and `NonFiniteError` when training diverges.
        """
        self._check_parameters()
        self.__dict__.pop("model_", None)  # what follows may fail, and then nothing is fitted
        X, y = self._validated(X, y, reset=True)
        self._look_at(y)
        targets = self._encoded(y)
        self._begin(X)
        held = score = None
        if self.early_stopping:
            rows, held_rows = self._split(targets)
            held = _rows(X, held_rows), self._placed(X, targets[held_rows])
            score = self._scorer(targets[held_rows])
            X, targets = _rows(X, rows), targets[rows]
        watch = _Watch(score, self.tol, self.n_iter_no_change)
        self._train(X, targets, self.max_iter, validation=held, callbacks=[watch])
        if score is not None:
            self.validation_scores_ = watch.scores
            self.best_validation_score_ = watch.best
            watch.restore(self.model_)
        if not watch.converged and self.n_iter_ == self.max_iter:
            warnings.warn(
                f"{self.max_iter} epochs are over, and the model was still improving; give a larger max_iter",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

    def _check_parameters(self) -> None:
        for name, kind, low, high, ends in _RANGES:
            check_scalar(getattr(self, name), name, kind, min_val=low, max_val=high, include_boundaries=ends)
        for i, size in enumerate(np.atleast_1d(self.hidden_layer_sizes).tolist()):
            check_scalar(size, f"hidden_layer_sizes[{i}]", Integral, min_val=1)

    def _begin(self, X: Array) -> None:
        """A new model and optimizer, for data like `X`."""
        place = Device.of(X) if self.device is None else select_device(self.device)
        dtype = self.dtype
        if dtype is None:
            dtype = "float32" if dtype_name(X.dtype) in ("float16", "float32") else "float64"
        activation, init = _named("activation", self.activation, _ACTIVATIONS)
        self._optimizer = self._new_optimizer()
        # the layers draw from it, and then every fit its order of the samples
        self._seed = np.random.SeedSequence(int(check_random_state(self.random_state).randint(2**31 - 1)))
        layers: list[Any] = []
        for n_in, n_out in pairwise([X.shape[1], *np.atleast_1d(self.hidden_layer_sizes).tolist(), self._outputs()]):
            layers += [kind() for kind in activation] if layers else []
            layers.append(Linear(n_in, n_out, init=init, dtype=dtype, device=place, seed=self._seed))
        self.model_ = Sequential(*layers)
        self.n_iter_: int = 0
        self.loss_curve_: list[float] = []

    def _new_optimizer(self) -> Any:
        kind = _named("solver", self.solver, {"sgd": SGD, "adam": Adam, "adamw": AdamW})
        more = {}
        if kind is SGD:
            more = {"momentum": self.momentum, "nesterov": bool(self.nesterovs_momentum and self.momentum)}
        return kind(self.learning_rate_init, weight_decay=self.weight_decay, **more)

    def _split(self, targets: Host) -> tuple[Host, Host]:
        """Row numbers to train on and to hold out."""
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        rows, held = train_test_split(
            np.arange(len(targets)),
            test_size=self.validation_fraction,
            random_state=seed,
            stratify=targets if targets.dtype.kind == "i" else None,
        )
        return np.sort(rows), np.sort(held)

    def _train(self, X: Array, targets: Host, epochs: int, **options: Any) -> None:
        batch_size = self.batch_size
        if isinstance(batch_size, str):
            batch_size = _named("batch_size", batch_size, {"auto": min(200, X.shape[0])})
        history = fit(
            self.model_,
            X,
            self._placed(X, targets),
            loss=self._loss,
            optimizer=self._optimizer,
            epochs=epochs,
            batch_size=batch_size,
            seed=self._seed,
            progress=bool(self.verbose),
            **options,
        )
        self.n_iter_ += len(history.rows)
        self.loss_curve_ += [row["loss"] for row in history.rows]
        if history.interrupted:
            warnings.warn("training was interrupted; the model is as trained so far", stacklevel=3)

    def _placed(self, X: Array, targets: Host) -> Array:
        """The targets where `X` is, numbers in the model's dtype."""
        return Device.of(X).asarray(targets, _first(self.model_).dtype if targets.dtype.kind == "f" else None)

    def _continue(self, X: Any, y: Any, known: Any = None) -> Self:
        """One pass over the samples, with the model there is, if there is one; `known`: all targets, if not those of `y`."""
        if self.early_stopping:
            raise ValueError("partial_fit is one pass, and early_stopping is about many; set early_stopping=False")
        self._check_parameters()
        first = not hasattr(self, "model_")
        X, y = self._validated(X, y, reset=first)
        if first:
            self._look_at(y if known is None else known)
        targets = self._encoded(y)
        if first:
            self._begin(X)
        self._check_place(X, "partial_fit")
        self._train(X, targets, 1)
        return self

    # -----------------------------------------------------------------------------------------------------------------
    # Use

    def _raw(self, X: Any, method: str) -> Array:
        """The outputs `Z` `(n_samples, outputs)` of the model, where `X` is."""
        check_is_fitted(self, "model_")
        with _where(X):
            X = validate_data(self, X, reset=False)
        self._check_place(X, method)
        return predict(self.model_, X)

    def _check_place(self, X: Array, method: str) -> None:
        place = _first(self.model_).device
        if self.device is None and Device.of(X) != place:
            raise ValueError(
                f"Inputs passed to {type(self).__name__}.{method}() must use the same namespace and the same device as "
                f"those passed to fit(): X is {describe(X)}, but the model is on {place}; pass arrays of that device, or "
                'move the model with estimator.model_ = estimator.model_.to("cpu"), say'
            )


def _named(name: str, value: Any, choices: dict[str, Any]) -> Any:
    """The choice of that name."""
    if isinstance(value, str) and value in choices:
        return choices[value]
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")


def _where(X: Any) -> AbstractContextManager[Any]:
    """A context in which scikit-learn computes where `X` is; with CuPy arrays, it does so on the current device."""
    return Device.of(X) if is_array(X) else nullcontext()


def _first(model: Any) -> Linear:
    layer: Linear = model[0]
    return layer


def _rows(X: Array, rows: Host) -> Array:
    """Those rows of `X`, where it is."""
    with computing_on(X) as xp:
        return xp.take(X, Device.of(X).asarray(rows), axis=0)


class _Watch:
    """A callback that ends training when nothing improves any more, and keeps the best weights if there is a score.

    As in MLPClassifier: improving is by more than `tol`, over the best epoch so far.
    """

    def __init__(self, score: Any, tol: float, patience: int) -> None:
        self.score, self.tol, self.patience = score, tol, patience
        self.best, self.count, self.converged = -math.inf, 0, False
        self.scores: list[float] = []
        self.kept: Any = None

    def __call__(self, model: Any, row: dict[str, Any]) -> bool:
        """Whether to stop."""
        value = -row["loss"] if self.score is None else self.score(row)
        self.scores.append(value)
        self.count = self.count + 1 if value < self.best + self.tol else 0
        if value > self.best:
            self.best = value
            if self.score is not None:
                self.kept = copy.deepcopy(model)
        self.converged = self.count > self.patience
        return self.converged

    def restore(self, model: Any) -> None:
        """Give `model` the weights of the best epoch."""
        for (_, layer), (_, kept) in zip(model.leaves(), self.kept.leaves() if self.kept else (), strict=False):
            for p, value in kept.parameters().items():
                setattr(layer, p, value)


class LinearNetClassifier(ClassifierMixin, _LinearNet):  # type: ignore[misc]
    """A classifier: linear layers with activations between them, trained by softmax cross-entropy.

    hidden_layer_sizes: the number of features between the layers; `()` is multinomial logistic regression.
    activation: `"relu"`, `"tanh"`, `"logistic"`, `"silu"`, `"gelu"` or `"identity"`.
    solver: `"adam"`, `"adamw"` or `"sgd"`, the last with `momentum` and `nesterovs_momentum`; `learning_rate_init` and
    `weight_decay` are theirs.
    batch_size: samples per step; `"auto"` is 200, or all if there are fewer. max_iter: the most epochs.
    early_stopping: hold out `validation_fraction` of the samples, the classes in proportion, and keep the weights with the
    best accuracy there. tol, n_iter_no_change: when to stop, see `fit`.
    random_state: an int, a `numpy.random.RandomState` or `None`. verbose: show progress.
    device, dtype: see the top of this module.

    Fitted: `classes_`, `model_` (a `Sequential`, for `save_model` and the rest of this library), `n_features_in_`, `n_iter_`
    (epochs), `loss_curve_`; with early stopping `validation_scores_` and `best_validation_score_`.

    >>> import numpy as np
    >>> X = np.asarray([[-2.0], [-1.0], [1.0], [2.0]])
    >>> model = LinearNetClassifier((), learning_rate_init=0.1, random_state=0).fit(X, ["left", "left", "right", "right"])
    >>> model.predict([[-3.0], [3.0]]).tolist()
    ['left', 'right']
    """

    _loss = SoftmaxCrossEntropy()

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """One pass over `X` and `y`, going on from the model there is; the first call needs all `classes`.

        Raises as `fit`, and `ValueError` for a label that is none of the classes, or other classes than before.
        """
        if not hasattr(self, "model_"):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit: the labels of all calls")
        elif classes is not None and not np.array_equal(np.unique(_labels(classes)), _labels(self.classes_)):
            known = _labels(self.classes_).tolist()
            raise ValueError(f"classes is {classes!r:.200}, but this model was begun with {known!r:.200}")
        return self._continue(X, y, classes)

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        with _where(X):
            X, y = validate_data(self, X, y, reset=reset)
            check_classification_targets(y)
        return X, y

    def _look_at(self, y: Any) -> None:
        self.classes_ = np.unique(_labels(y))

    def _encoded(self, y: Array) -> Host:
        labels, classes = _labels(y), _labels(self.classes_)
        if not (known := np.isin(labels, classes)).all():
            raise ValueError(
                f"y has the label {labels[~known].tolist()[0]!r}, which is none of the classes {classes.tolist()!r:.200}"
            )
        return np.searchsorted(classes, labels)

    def _begin(self, X: Array) -> None:
        super()._begin(X)
        if not _is_text(self.classes_):
            self.classes_ = Device.of(X).asarray(self.classes_)

    def _outputs(self) -> int:
        return int(self.classes_.shape[0])

    def _scorer(self, held: Host) -> Any:
        return lambda row: row["validation_accuracy"]

    def predict(self, X: Any) -> Array:
        """The class of each sample, `(n_samples,)`: the one with the largest output."""
        Z = self._raw(X, "predict")
        with computing_on(Z) as xp:
            ids, place = xp.argmax(Z, axis=1), Device.of(Z)
            if _is_text(self.classes_):
                return self.classes_[place.to_numpy(ids)]
            return xp.take(place.asarray(self.classes_), ids)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of the samples that `predict` gets right."""
        with _where(X):
            return float(super().score(X, y, sample_weight))

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class, `(n_samples, n_classes)`, in the order of `classes_`: the outputs' softmax."""
        Z = self._raw(X, "predict_proba")
        with computing_on(Z) as xp:
            E = xp.exp(Z - xp.max(Z, axis=1, keepdims=True))
            return E / xp.sum(E, axis=1, keepdims=True)


def _labels(y: Any) -> Host:
    """Labels of any kind on the host."""
    return Device.of(y).to_numpy(y) if is_array(y) else np.asarray(y)


def _is_text(labels: Array) -> bool:
    """Whether the labels are something that only NumPy has arrays of."""
    return isinstance(labels, np.ndarray) and labels.dtype.kind not in "biuf"


class LinearNetRegressor(RegressorMixin, _LinearNet):  # type: ignore[misc]
    """A regressor: linear layers with activations between them, trained by the mean squared error; one target or several.

    Parameters and fitted attributes are those of `LinearNetClassifier`, without classes. With `early_stopping`, the score is
    the coefficient of determination on the held-out samples (over several targets, of all of them together).
    Like MLPRegressor it takes targets as they are: scale large ones, with TransformedTargetRegressor, say.

    >>> import numpy as np
    >>> X = np.linspace(-1, 1, 20).reshape(-1, 1)
    >>> model = LinearNetRegressor((), learning_rate_init=0.1, random_state=0).fit(X, 3 * X[:, 0] + 1)
    >>> model.predict([[0.0]]).round(1).tolist()
    [1.0]
    """

    _loss = MeanSquaredError()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def partial_fit(self, X: Any, y: Any) -> Self:
        """One pass over `X` and `y`, going on from the model there is. Raises as `fit`."""
        return self._continue(X, y)

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        with _where(X):
            X, y = validate_data(self, X, y, reset=reset, multi_output=True, y_numeric=True)
        return X, y

    def _look_at(self, y: Array) -> None:
        self._target_shape = tuple(y.shape[1:])

    def _encoded(self, y: Array) -> Host:
        targets = Device.of(y).to_numpy(y)
        if targets.shape[1:] != self._target_shape:
            raise ValueError(f"y has shape {targets.shape}, but it must be {(len(targets), *self._target_shape)}, as before")
        return targets if targets.dtype.kind == "f" else targets.astype(np.float64)

    def _outputs(self) -> int:
        return math.prod(self._target_shape)

    def _scorer(self, held: Host) -> Any:
        variance = float(held.var(axis=0).mean()) or 1.0
        return lambda row: 1 - row["validation_loss"] / variance

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination of `predict`, averaged over the targets."""
        with _where(X):
            return float(super().score(X, y, sample_weight))

    def predict(self, X: Any) -> Array:
        """The target of each sample, `(n_samples,)` or `(n_samples, n_targets)`, as `y` was."""
        Z = self._raw(X, "predict")
        with computing_on(Z) as xp:
            return xp.reshape(Z, (Z.shape[0], *self._target_shape))
