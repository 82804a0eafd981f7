"""`evaluate` and `predict`: a model on data, batch by batch, without training."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.numbers import whole
from ..arrays.place import Array, computing_on, dtype_name
from .checking import check_loss, check_model, check_rows
from .data import Data, is_float, memory_advice, model_place, row_taker


def scores_of(model: Any, data: Data, loss: Any, batch_size: int) -> dict[str, float]:
    """Mean loss and, where the targets are class ids, the share that the largest output gets right."""
    losses, right, weights = [], [], []
    for X, y in data.batches(None, batch_size):
        with data.device:
            Z = model(X)
            value, _ = loss.forward(Z, y)
        with computing_on(Z) as xp:
            losses.append(xp.astype(value, xp.float32) if dtype_name(value.dtype) == "float16" else value)
            weights.append(X.shape[0])
            if not is_float(y) and y.ndim == Z.ndim - 1:
                found = xp.argmax(Z, axis=-1)
                # of a row with NaN that is the NaN's position, which would be right by chance
                hits = (found == xp.astype(y, found.dtype)) & ~xp.isnan(xp.max(Z, axis=-1))
                right.append(xp.count_nonzero(hits))
    with computing_on(losses[0]) as xp:
        host = data.device.to_numpy(xp.stack(losses)).astype(np.float64)
        scores = {"loss": math.fsum(host * weights) / len(data)}
        if right:
            per_row = math.prod(data.y.shape[1:])
            scores["accuracy"] = int(data.device.to_numpy(xp.sum(xp.stack(right)))) / (len(data) * per_row)
    return scores


def evaluate(model: Any, X: Array, y: Array, *, loss: Any, batch_size: int = 1024) -> dict[str, float]:
    """`{"loss": mean, "accuracy": fraction}` of `model` on `X` `(N, ...)` and `y`; accuracy where `y` are class ids.

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
    data = Data(X, y, *model_place(model, X))
    batch_size = whole("batch_size", batch_size)
    with memory_advice(data.device, batch_size):
        return scores_of(model, data, loss, batch_size)


def predict(model: Any, X: Array, *, batch_size: int = 1024) -> Array:
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
    data = Data(X, X, *model_place(model, X))
    batch_size = whole("batch_size", batch_size)
    with memory_advice(data.device, batch_size):
        return _predict(model, data, batch_size)


def _predict(model: Any, data: Data, batch_size: int) -> Array:
    home, take, parts = Device.of(data.X), row_taker(data.X, None), []
    for i in range(0, len(data), batch_size):
        X = data.device.asarray(take(i, min(i + batch_size, len(data))), dtype=data.dtype)
        with data.device:
            parts.append(home.asarray(model(X)))
    with computing_on(parts[0]) as xp:
        return parts[0] if len(parts) == 1 else xp.concat(parts, axis=0)
