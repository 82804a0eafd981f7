"""What both estimators share: a network of linear layers with scikit-learn's parameters, its training and its use."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, Self

import numpy as np
from scipy.sparse import issparse
from sklearn.base import BaseEstimator, clone
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.utils import check_random_state, check_scalar
from sklearn.utils.validation import check_is_fitted, validate_data

from ...activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ...arrays.checks import describe
from ...arrays.device import Device
from ...arrays.place import Array, dtype_name, is_array
from ...arrays.selection import select_device
from ...linear import Linear
from ...optimizers import SGD, Adam, AdamW
from ...sequential import Sequential
from .inputs import Host, on_host, weights_of, where
from .samples import Samples, outputs
from .stopping import Watch, take_weights

_ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "identity": (),
    "logistic": (Sigmoid,),
    "tanh": (Tanh,),
    "relu": (ReLU,),
    "silu": (SiLU,),
    "gelu": (GELU,),
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


class LinearNet(BaseEstimator):  # type: ignore[misc]
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
        warm_start: bool = False,
        init: Any = "auto",
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
        self.warm_start = warm_start
        self.init = init
        self.device = device
        self.dtype = dtype

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        tags.array_api_support = self.device is None  # for scikit-learn that means: everything stays where X is
        return tags

    def __sklearn_array_api_convert__(self, converter: Any) -> Self:
        """For scikit-learn's `move_estimator_to`: this estimator, its arrays and its model's through `converter`."""
        moved: Self = clone(self)
        for name, value in vars(self).items():
            if name not in ("model_", "_optimizer"):
                setattr(moved, name, converter(value) if is_array(value) else copy.deepcopy(value))
        if hasattr(self, "model_"):
            moved.model_ = self.model_.to()
            for layer, own in zip(moved._linear("model_"), self._linear("model_"), strict=True):
                layer.W, layer.b = converter(own.W), converter(own.b)
            state = self._optimizer.state_dict()
            for own in state["moments"].values():
                own.update({m: converter(x) for m, x in own.items()})
            moved._optimizer = self._new_optimizer()
            moved._optimizer.load_state_dict(state)
        return moved

    # -----------------------------------------------------------------------------------------------------------------
    # What the subclasses say

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        """`X` and `y` as arrays, checked; `reset` says that they are the first."""
        raise NotImplementedError

    def _look_at(self, y: Array, new: bool) -> None:
        """Remember what targets there are; if they are not `new`, they must be as they were."""
        raise NotImplementedError

    def _encoded(self, y: Array) -> Host:
        """The targets on the host as the loss takes them."""
        raise NotImplementedError

    def _outputs(self) -> int:
        """How many numbers the model gives per sample."""
        raise NotImplementedError

    def _weights(self, y: Array, sample_weight: Any) -> Host | None:
        """The weight of each sample, or `None` where all count alike."""
        return weights_of(sample_weight, None, on_host(y))

    def _score(self, Z: Host, targets: Host, weights: Host | None) -> float:
        """How good the outputs `Z` are, for early stopping."""
        raise NotImplementedError

    # -----------------------------------------------------------------------------------------------------------------
    # Training

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """Train a new model on `X` `(n_samples, n_features)` and `y`, and return the estimator.

        X: an array, a DataFrame, or a sparse matrix, of which a batch at a time is made dense.
        sample_weight: a number >= 0 per sample; a batch's loss is the weighted mean, and a sample of weight 0 is left out.

        Training ends after `max_iter` epochs, or when the loss (with `early_stopping`, the score on held-out samples) has
        not improved by `tol` for more than `n_iter_no_change` epochs; then the weights of the best epoch are kept, if there
        is a score.

        Raises `ValueError` or `TypeError` for data or parameters that do not fit, `DeviceUnavailableError` for a device that
        cannot be used, and `NonFiniteError` when training diverges.
        """
        self._check_parameters()
        earlier = self.__dict__.pop("model_", None)  # what follows may fail, and then nothing is fitted
        if not self.warm_start:
            earlier = None
        X, y = self._validated(X, y, reset=earlier is None)
        self._look_at(y, earlier is None)
        samples = Samples(X, self._encoded(y), self._weights(y, sample_weight)).that_count()
        self._begin(X, earlier)
        score = None
        if self.early_stopping:
            rows, held = self._split(samples.targets)
            score = self._scorer(samples.rows(held))
            samples = samples.rows(rows)
        watch, epochs_before = Watch(score, self.tol, self.n_iter_no_change), self.n_iter_
        self._train(samples, self.max_iter, callbacks=[watch])
        if score is not None:
            self.validation_scores_ = watch.scores
            self.best_validation_score_ = watch.best
            watch.restore(self.model_)
        if not watch.converged and self.n_iter_ - epochs_before == self.max_iter:
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

    def _begin(self, X: Array, earlier: Any = None) -> None:
        """A new model and optimizer, for data like `X`; with the weights of an `earlier` model, if there is one."""
        place = _home(X) if self.device is None else select_device(self.device)
        dtype = self.dtype
        if dtype is None:
            dtype = "float32" if dtype_name(X.dtype) in ("float16", "float32") else "float64"
        activation = _named("activation", self.activation, _ACTIVATIONS)
        self._optimizer = self._new_optimizer()
        # the layers draw from it, and then every fit its order of the samples
        self._seed = np.random.SeedSequence(int(check_random_state(self.random_state).randint(2**31 - 1)))
        layers: list[Any] = []
        for n_in, n_out in pairwise([X.shape[1], *np.atleast_1d(self.hidden_layer_sizes).tolist(), self._outputs()]):
            layers += [kind() for kind in activation] if layers else []
            layers.append(self._new_layer(n_in, n_out, place, dtype))
        model = Sequential(*layers)
        if earlier is None:
            self.n_iter_: int = 0
            self.loss_curve_: list[float] = []
        else:
            shapes, shapes_before = ([tuple(W.shape) for W in each.parameters().values()] for each in (model, earlier))
            if shapes != shapes_before:
                raise ValueError(
                    f"hidden_layer_sizes is {self.hidden_layer_sizes}, but warm_start=True goes on with a model whose "
                    f"parameters have the shapes {shapes_before}; set warm_start=False for a new one"
                )
            take_weights(model, earlier.to(place, dtype))
        self.model_ = model

    def _new_layer(self, n_in: int, n_out: int, place: Device, dtype: Any) -> Linear:
        """A layer with its first weights; with `init="auto"` weights and biases are uniform on `[-a, a]` as MLPClassifier's,
        `a = sqrt(6 / (n_in + n_out))`, or of 2 for 6 with logistic functions. Glorot and Bengio (2010), "Understanding the
        difficulty of training deep feedforward neural networks"."""
        auto = isinstance(self.init, str) and self.init == "auto"
        a = math.sqrt((2 if self.activation == "logistic" else 6) / (n_in + n_out))

        def uniform(rng: np.random.Generator, shape: tuple[int, int]) -> Host:
            return rng.uniform(-a, a, shape)

        layer = Linear(n_in, n_out, init=uniform if auto else self.init, dtype=dtype, device=place, seed=self._seed)
        if auto:
            layer.b = place.asarray(uniform(np.random.default_rng(self._seed.spawn(1)[0]), (1, n_out)), layer.dtype)
        return layer

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

    def _scorer(self, held: Samples) -> Callable[[], float]:
        """A function that scores the model as it is by then."""
        return lambda: self._score(on_host(outputs(self.model_, held.X)), held.targets, held.weights)

    def _train(self, samples: Samples, epochs: int, **options: Any) -> None:
        batch_size = self.batch_size
        if isinstance(batch_size, str):
            batch_size = _named("batch_size", batch_size, {"auto": min(200, len(samples))})
        history = samples.train(
            self.model_,
            loss=self._loss,
            optimizer=self._optimizer,
            epochs=epochs,
            batch_size=batch_size,
            seed=self._seed,
            progress=bool(self.verbose),
            **options,
        )
        self.n_iter_ += len(history.rows)
        self.loss_curve_ = [*self.loss_curve_, *(row["loss"] for row in history.rows)]
        if history.interrupted:
            warnings.warn("training was interrupted; the model is as trained so far", stacklevel=3)

    def _continue(self, X: Any, y: Any, sample_weight: Any, known: Any = None) -> Self:
        """One pass over the samples, with the model there is, if there is one; `known`: all targets, if not those of `y`."""
        if self.early_stopping:
            raise ValueError("partial_fit is one pass, and early_stopping is about many; set early_stopping=False")
        self._check_parameters()
        first = not hasattr(self, "model_")
        X, y = self._validated(X, y, reset=first)
        if first:
            self._look_at(y if known is None else known, True)
        samples = Samples(X, self._encoded(y), self._weights(y, sample_weight)).that_count()
        if first:
            self._begin(X)
        self._check_place(X, "partial_fit")
        self._train(samples, 1)
        return self

    # -----------------------------------------------------------------------------------------------------------------
    # Use

    @property
    def coefs_(self) -> list[Array]:
        """The weights `(n_in, n_out)` of each layer, as MLPClassifier has them; views where the library has views."""
        return [layer.W.T for layer in self._linear("coefs_")]

    @property
    def intercepts_(self) -> list[Array]:
        """The bias `(n_out,)` of each layer."""
        return [layer.parameters()["b"][0, :] for layer in self._linear("intercepts_")]

    @property
    def loss_(self) -> float:
        """The loss of the last epoch, the mean over its samples."""
        self._linear("loss_")
        return self.loss_curve_[-1]

    def _linear(self, name: str) -> list[Linear]:
        if not hasattr(self, "model_"):
            raise AttributeError(f"this {type(self).__name__} has no {name} before it is fitted")
        return [layer for layer in self.model_ if isinstance(layer, Linear)]

    def _raw(self, X: Any, method: str) -> Array:
        """The outputs `Z` `(n_samples, outputs)` of the model, where `X` is."""
        check_is_fitted(self, "model_")
        with where(X):
            X = validate_data(self, X, reset=False, accept_sparse="csr")
        self._check_place(X, method)
        return outputs(self.model_, X)

    def _check_place(self, X: Array, method: str) -> None:
        place = self._linear("device")[0].device
        if self.device is None and _home(X) != place:
            raise ValueError(
                f"Inputs passed to {type(self).__name__}.{method}() must use the same namespace and the same device as "
                f"those passed to fit(): X is {describe(X)}, but the model is on {place}; pass arrays of that device, or "
                'move the model with estimator.model_ = estimator.model_.to("cpu"), say'
            )


def _home(X: Any) -> Device:
    """Where `X` is; sparse matrices are SciPy's."""
    return select_device("cpu") if issparse(X) else Device.of(X)


def _named(name: str, value: Any, choices: dict[str, Any]) -> Any:
    """The choice of that name."""
    if isinstance(value, str) and value in choices:
        return choices[value]
    raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, choices))}")
