"""The regressor."""

from __future__ import annotations

import math
from typing import Any, Self

import numpy as np
from sklearn.base import RegressorMixin
from sklearn.metrics import r2_score
from sklearn.utils.validation import validate_data

from ...arrays.place import Array, computing_on
from ...losses import MeanSquaredError
from .inputs import Host, on_host, where
from .network import LinearNet


class LinearNetRegressor(RegressorMixin, LinearNet):  # type: ignore[misc]
    """A regressor: linear layers with activations between them, trained by the mean squared error; one target or several.

    Parameters and fitted attributes are those of `LinearNetClassifier`, without classes. With `early_stopping`, the score is
    the coefficient of determination on the held-out samples, averaged over the targets.
    Like MLPRegressor it takes targets as they are: scale large ones, with TransformedTargetRegressor, say.

    >>> import numpy as np
    >>> X = np.linspace(-1, 1, 20).reshape(-1, 1)
    >>> model = LinearNetRegressor((), learning_rate_init=0.05, random_state=0).fit(X, 3 * X[:, 0] + 1)
    >>> model.predict([[0.0]]).round(1).tolist()
    [1.0]
    """

    _loss = MeanSquaredError()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.multi_output = True
        return tags

    def partial_fit(self, X: Any, y: Any, sample_weight: Any = None) -> Self:
        """One pass over `X` and `y`, going on from the model there is. Raises as `fit`."""
        return self._continue(X, y, sample_weight)

    def _validated(self, X: Any, y: Any, *, reset: bool) -> tuple[Array, Array]:
        with where(X):
            X, y = validate_data(self, X, y, reset=reset, multi_output=True, y_numeric=True, accept_sparse="csr")
        return X, y

    def _look_at(self, y: Array, new: bool) -> None:
        if new:
            self._target_shape = tuple(y.shape[1:])

    def _encoded(self, y: Array) -> Host:
        targets = on_host(y)
        if targets.shape[1:] != self._target_shape:
            raise ValueError(f"y has shape {targets.shape}, but it must be {(len(targets), *self._target_shape)}, as before")
        return targets if targets.dtype.kind == "f" else targets.astype(np.float64)

    def _outputs(self) -> int:
        return math.prod(self._target_shape)

    def _score(self, Z: Host, targets: Host, weights: Host | None) -> float:
        return float(r2_score(targets, Z.reshape(targets.shape), sample_weight=weights))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """The coefficient of determination of `predict`, averaged over the targets."""
        with where(X):
            return float(super().score(X, y, sample_weight))

    def predict(self, X: Any) -> Array:
        """The target of each sample, `(n_samples,)` or `(n_samples, n_targets)`, as `y` was."""
        Z = self._raw(X, "predict")
        with computing_on(Z) as xp:
            return xp.reshape(Z, (Z.shape[0], *self._target_shape))
