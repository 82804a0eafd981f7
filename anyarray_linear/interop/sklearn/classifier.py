"""The classifier."""

from __future__ import annotations

from typing import Any, Self

import numpy as np
from sklearn.base import ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import validate_data

from ...arrays.device import Device
from ...arrays.place import Array, computing_on
from ...losses import SoftmaxCrossEntropy
from .inputs import Host, is_text, on_host, where
from .network import LinearNet


class LinearNetClassifier(ClassifierMixin, LinearNet):  # type: ignore[misc]
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

    classes_: Any
    _loss = SoftmaxCrossEntropy()

    def partial_fit(self, X: Any, y: Any, classes: Any = None) -> Self:
        """One pass over `X` and `y`, going on from the model there is; the first call needs all `classes`.

        Raises as `fit`, and `ValueError` for a label that is none of the classes, or other classes than before.
        """
        if not hasattr(self, "model_"):
            if classes is None:
                raise ValueError("classes must be passed on the first call to partial_fit: the labels of all calls")
        elif classes is not None and not np.array_equal(np.unique(on_host(classes)), on_host(self.classes_)):
            known = on_host(self.classes_).tolist()
            raise ValueError(f"classes is {classes!r:.200}, but this model was begun with {known!r:.200}")
        return self._continue(X, y, classes)

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        with where(X):
            X, y = validate_data(self, X, y, reset=reset)
            check_classification_targets(y)
        return X, y

    def _look_at(self, y: Any, new: bool) -> None:
        found = np.unique(on_host(y))
        if not new and not np.array_equal(found, on_host(self.classes_)):
            raise ValueError(
                f"y has the classes {found.tolist()!r:.200}, but warm_start=True goes on with a model for "
                f"{on_host(self.classes_).tolist()!r:.200}; set warm_start=False for a new one"
            )
        self.classes_ = found

    def _encoded(self, y: Array) -> Host:
        labels, classes = on_host(y), on_host(self.classes_)
        if not (known := np.isin(labels, classes)).all():
            raise ValueError(
                f"y has the label {labels[~known].tolist()[0]!r}, which is none of the classes {classes.tolist()!r:.200}"
            )
        return np.searchsorted(classes, labels)

    def _begin(self, X: Array, earlier: Any = None) -> None:
        super()._begin(X, earlier)
        if not is_text(self.classes_):
            self.classes_ = Device.of(X).asarray(self.classes_)

    def _outputs(self) -> int:
        return int(self.classes_.shape[0])

    def _score(self, Z: Host, targets: Host) -> float:
        return float((Z.argmax(axis=1) == targets).mean())

    def predict(self, X: Any) -> Array:
        """The class of each sample, `(n_samples,)`: the one with the largest output."""
        Z = self._raw(X, "predict")
        with computing_on(Z) as xp:
            ids, place = xp.argmax(Z, axis=1), Device.of(Z)
            if is_text(self.classes_):
                return self.classes_[place.to_numpy(ids)]
            return xp.take(place.asarray(self.classes_), ids)

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The share of the samples that `predict` gets right."""
        with where(X):
            return float(super().score(X, y, sample_weight))

    def predict_proba(self, X: Any) -> Array:
        """The probability of each class, `(n_samples, n_classes)`, in the order of `classes_`: the outputs' softmax."""
        Z = self._raw(X, "predict_proba")
        with computing_on(Z) as xp:
            E = xp.exp(Z - xp.max(Z, axis=1, keepdims=True))
            return E / xp.sum(E, axis=1, keepdims=True)
