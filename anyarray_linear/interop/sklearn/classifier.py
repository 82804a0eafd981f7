"""The classifier."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from scipy.sparse import issparse
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets, type_of_target
from sklearn.utils.validation import column_or_1d, validate_data

from ...activations import Sigmoid
from ...arrays.device import Device
from ...arrays.place import Array, computing_on
from ...binary import BinaryCrossEntropy
from ...losses import SoftmaxCrossEntropy, softmax
from .inputs import Host, is_text, on_host, weights_of, where
from .network import LinearNet


class LinearNetClassifier(ClassifierMixin, LinearNet):  # type: ignore[misc]
    """A classifier: linear layers with activations between them, trained by softmax cross-entropy.

    With several labels per sample, `y` `(n_samples, n_labels)` of 0 and 1, it is trained by binary cross-entropy.

    hidden_layer_sizes: the number of features between the layers; `()` is multinomial logistic regression.
    activation: `"relu"`, `"tanh"`, `"logistic"`, `"silu"`, `"gelu"` or `"identity"`.
    solver: `"adam"`, `"adamw"` or `"sgd"`, the last with `momentum` and `nesterovs_momentum`; `learning_rate_init` and
    `weight_decay` are theirs.
    batch_size: samples per step; `"auto"` is 200, or all if there are fewer. max_iter: the most epochs.
    early_stopping: hold out `validation_fraction` of the samples, the classes in proportion, and keep the weights with the
    best accuracy there. tol, n_iter_no_change: when to stop, see `fit`.
    warm_start: whether `fit` goes on from the weights that there are, instead of new ones.
    class_weight: how much the samples of a class count, `{class: weight}`, or `"balanced"` for as much per class.
    random_state: an int, a `numpy.random.RandomState` or `None`. verbose: show progress.
    init, device, dtype: see the top of this module.

    Fitted: `classes_`, `model_` (a `Sequential`, for `save_model` and the rest of this library), `n_features_in_`, `n_iter_`
    (epochs), `loss_curve_`, `loss_`, `coefs_`, `intercepts_`; with early stopping `validation_scores_` and
    `best_validation_score_`.

    >>> import numpy as np
    >>> X = np.asarray([[-2.0], [-1.0], [1.0], [2.0]])
    >>> model = LinearNetClassifier((), learning_rate_init=0.1, random_state=0).fit(X, ["left", "left", "right", "right"])
    >>> model.predict([[-3.0], [3.0]]).tolist()
    ['left', 'right']
    """

    classes_: Any
    _loss: Any
    _several: bool
    """Whether a sample may have several labels."""

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
        class_weight: Any = None,
        init: Any = "auto",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            hidden_layer_sizes,
            activation,
            solver=solver,
            weight_decay=weight_decay,
            batch_size=batch_size,
            learning_rate_init=learning_rate_init,
            max_iter=max_iter,
            random_state=random_state,
            tol=tol,
            verbose=verbose,
            momentum=momentum,
            nesterovs_momentum=nesterovs_momentum,
            early_stopping=early_stopping,
            validation_fraction=validation_fraction,
            n_iter_no_change=n_iter_no_change,
            warm_start=warm_start,
            init=init,
            device=device,
            dtype=dtype,
        )
        self.class_weight = class_weight

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.classifier_tags.multi_label = True
        return tags

    def partial_fit(self, X: Any, y: Any, classes: Any = None, sample_weight: Any = None) -> Self:
        """One pass over `X` and `y`, going on from the model there is; the first call needs all `classes`.

        With several labels per sample, `classes` are the numbers of the columns of `y`.

        Raises as `fit`, and `ValueError` for a label that is none of the classes, or other classes than before.
        """
        if self.class_weight == "balanced":
            raise ValueError(
                'class_weight="balanced" is about all samples, and partial_fit sees a part; give the weights as a dict: '
                "dict(zip(classes, compute_class_weight('balanced', classes=classes, y=all_y)))"
            )
        if not hasattr(self, "model_"):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit: the labels of all calls")
        elif classes is not None and not np.array_equal(np.unique(on_host(classes)), on_host(self.classes_)):
            known = on_host(self.classes_).tolist()
            raise ValueError(f"classes is {classes!r:.200}, but this model was begun with {known!r:.200}")
        return self._continue(X, y, sample_weight, classes)

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        with where(X):
            X, y = validate_data(self, X, y, reset=reset, accept_sparse="csr", multi_output=True)
            check_classification_targets(y)
            several = type_of_target(y) == "multilabel-indicator"
            if reset:
                self._several = several
            elif several != self._several:
                known = "several labels" if self._several else "one label"
                raise ValueError(f"y has shape {tuple(y.shape)}, but this model is for {known} per sample")
            if not several:
                y = column_or_1d(y, warn=True)
        return X, y.toarray() if issparse(y) else y

    def _look_at(self, y: Any, new: bool) -> None:
        labels = on_host(y)
        found = np.arange(labels.shape[1]) if labels.ndim > 1 else np.unique(labels)
        if not new and not np.array_equal(found, on_host(self.classes_)):
            raise ValueError(
                f"y has the classes {found.tolist()!r:.200}, but warm_start=True goes on with a model for "
                f"{on_host(self.classes_).tolist()!r:.200}; set warm_start=False for a new one"
            )
        self.classes_ = found
        self._loss = BinaryCrossEntropy() if self._several else SoftmaxCrossEntropy()

    def _encoded(self, y: Array) -> Host:
        labels, classes = on_host(y), on_host(self.classes_)
        if self._several:
            if labels.shape[1] != len(classes):
                raise ValueError(f"y has {labels.shape[1]} columns, but this model is for {len(classes)} labels")
            return labels.astype(np.float64)
        if not (known := np.isin(labels, classes)).all():
            raise ValueError(
                f"y has the label {labels[~known].tolist()[0]!r}, which is none of the classes {classes.tolist()!r:.200}"
            )
        return np.searchsorted(classes, labels)

    def _weights(self, y: Array, sample_weight: Any) -> Host | None:
        return weights_of(sample_weight, self.class_weight, on_host(y))

    def _begin(self, X: Array, earlier: Any = None) -> None:
        super()._begin(X, earlier)
        if not is_text(self.classes_) and not issparse(X):
            self.classes_ = Device.of(X).asarray(self.classes_)

    def _outputs(self) -> int:
        return int(self.classes_.shape[0])

    def _score(self, Z: Host, targets: Host, weights: Host | None) -> float:
        right = ((Z > 0) == (targets > 0)).all(axis=1) if self._several else Z.argmax(axis=1) == targets
        return float(np.average(right, weights=weights))

    def predict(self, X: Any) -> Array:
        """The class of each sample, `(n_samples,)`: the one with the largest output; or 0 or 1 for each label."""
        Z = self._raw(X, "predict")
        with computing_on(Z) as xp:
            place = Device.of(Z)
            if self._several:
                return xp.astype(Z > 0, xp.int64)
            ids = xp.argmax(Z, axis=1)
            if is_text(self.classes_):
                return self.classes_[place.to_numpy(ids)]
            return xp.take(place.asarray(self.classes_), ids)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of the samples that `predict` gets right, with several labels all of them."""
        with where(X):
            return float(super().score(X, y, sample_weight))

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class, `(n_samples, n_classes)`, in the order of `classes_`: the outputs' softmax.

        With several labels per sample that of each label, by itself: the outputs' sigmoid.
        """
        Z = self._raw(X, "predict_proba")
        return Sigmoid()(Z) if self._several else softmax(Z)
