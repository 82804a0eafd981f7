"""`evaluate` and `predict`: a model on data, batch by batch, without training."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.dtypes import wide
from ..arrays.numbers import whole
from ..arrays.place import Array, computing_on, place_of
from ..losses import Loss
from ..metrics import class_scores, of_classes
from ..protocol import Layer, check_loss, check_model, outputs
from .batches import Batches
from .checking import check_rows
from .data import Data, is_float, memory_advice, model_place, row_taker, takes_ids


def scores_of(model: Any, data: Data | Batches, loss: Any, batch_size: int, step: Any = None) -> dict[str, float]:
    """The mean loss, and the loss's own metrics; of a loss without any, for class ids, those of classes.

    step: that of the training which is validated, if any.
    """
    values, found, rows = [], [], []
    for X, y, weights in data.batches() if isinstance(data, Batches) else data.batches(None, batch_size):
        with data.device:
            Z = place_of(X).run(outputs, model, X, len(data) if isinstance(data, Data) else X.shape[0], step)
            with computing_on(Z) as xp:
                Z = wide(xp, Z)
            value, _ = loss.forward(Z, y) if weights is None else loss.forward(Z, y, weights)
            found.append(dict(_metrics(loss, Z, y)))
        rows.append(X.shape[0])
        values.append(value)
    if not rows:
        raise ValueError("there are no batches to validate with; give an object whose iter() starts a new pass")
    counts, total = np.asarray(rows), sum(rows)
    losses, parts = _read(data.device, values), {name: _read(data.device, [f[name] for f in found]) for name in found[0]}
    scores = {"loss": math.fsum(losses * counts) / total}
    if hasattr(loss, "scores"):
        return {**scores, **loss.scores(parts, counts)}
    if hasattr(loss, "metrics"):
        return {**scores, **{name: float(part.sum()) / total for name, part in parts.items()}}
    return {**scores, **(class_scores(parts) if parts else {})}


def _metrics(loss: Any, Z: Array, y: Array) -> Mapping[str, Array]:
    """What is summed over a batch."""
    if hasattr(loss, "metrics"):
        return loss.metrics(Z, y)  # type: ignore[no-any-return]
    if is_float(y) or y.ndim != Z.ndim - 1:
        return {}
    return place_of(Z).run(of_classes, Z, y)  # type: ignore[no-any-return]


def _read(device: Device, values: list[Array]) -> np.ndarray[Any, Any]:
    """What every batch gave, on the host in float64: read all at once."""
    with computing_on(values[0]) as xp:
        return device.to_numpy(xp.stack([xp.asarray(value) for value in values])).astype(np.float64)


def evaluate(model: Layer, X: Array, y: Array, *, loss: Loss, batch_size: int = 1024) -> dict[str, float]:
    """`{"loss": mean, ...}` of `model` on `X` `(N, ...)` and `y`, with what else the loss has to tell.

    Cross-entropies tell `accuracy`, for class ids, rows and labels, and `baseline_accuracy`, that of always saying what is
    most frequent; squared error `rmse`, `mae`, `r2` and `baseline_rmse`, that of always saying the mean.

    Arrays move as in `fit`; the values are read once, at the end.

    Raises `TypeError` or `ValueError` for arrays that do not fit.

    >>> import numpy as np
    >>> from anyarray_linear import Linear, SoftmaxCrossEntropy
    >>> evaluate(Linear.from_arrays(np.eye(2)), np.eye(2), np.asarray([0, 0]), loss=SoftmaxCrossEntropy())["accuracy"]
    0.5
    """
    check_model(model)
    check_loss(loss)
    check_rows(X, y)
    data = Data(X, y, *model_place(model, X), takes_ids=takes_ids(model))
    batch_size = whole("batch_size", batch_size)
    with memory_advice(data.device, batch_size):
        return scores_of(model, data, loss, batch_size)


def predict(model: Layer, X: Array, *, batch_size: int = 1024) -> Array:
    """The raw outputs `Z` `(N, ...)` of `model` for `X` `(N, ...)`, where `X` lives and in the model's dtype.

    Raises `TypeError` or `ValueError` for an `X` that does not fit.

    >>> import numpy as np
    >>> from anyarray_linear import Linear
    >>> predict(Linear.from_arrays(np.eye(2)), np.eye(2))
    array([[1., 0.],
           [0., 1.]])
    """
    check_model(model)
    check_rows(X, None)
    data = Data(X, X, *model_place(model, X), takes_ids=takes_ids(model))
    batch_size = whole("batch_size", batch_size)
    with memory_advice(data.device, batch_size):
        return _predict(model, data, batch_size)


def _predict(model: Any, data: Data, batch_size: int) -> Array:
    home, take, parts = Device.of(data.X), row_taker(data.X, None), []
    for i in range(0, len(data), batch_size):
        X = data.device.asarray(take(i, min(i + batch_size, len(data))), dtype=data.dtypes[0])
        with data.device:
            parts.append(home.asarray(place_of(X).run(outputs, model, X, len(data))))
    with computing_on(parts[0]) as xp:
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)
