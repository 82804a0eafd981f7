"""What can be known to be wrong before anything is trained, and its words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.checks import check_array
from ..arrays.device import Device
from ..arrays.place import Array, computing_on, dtype_name, namespace
from ..protocol import parameters
from .data import Data, is_float

_CHUNK = 1 << 22  # elements read at once when values are checked, so that a memory-mapped file needs little memory


def check_rows(X: Array, y: Array | None, names: tuple[str, str] = ("X", "y")) -> None:
    for name, x in zip(names, (X, y), strict=True):
        if x is None and name == names[1]:
            continue
        check_array(name, x)
        if not namespace(x).isdtype(x.dtype, ("bool", "integral", "real floating")):
            raise TypeError(f"{name} is {dtype_name(x.dtype)}; give real numbers, or for y class ids, as integers")
    if X.ndim == 0:
        raise ValueError(f"{names[0]} is a single number; its first axis must be the samples")
    if X.shape[0] == 0:
        raise ValueError(f"{names[0]} has no rows (shape {tuple(X.shape)}); give at least one sample")
    if y is not None and (y.ndim == 0 or y.shape[0] != X.shape[0]):
        raise ValueError(
            f"{names[0]} has {X.shape[0]} rows but {names[1]} has shape {tuple(y.shape)}; they must have as many rows"
        )


def _check_object(name: str, value: Any, methods: tuple[str, ...], example: str) -> None:
    """Raise `TypeError` unless `value` is an object with these methods, and no class."""
    if isinstance(value, type) or not all(callable(getattr(value, method, None)) for method in methods):
        what = f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {what}; give an object such as {example}")


def check_model(model: Any) -> None:
    _check_object("model", model, ("forward", "gradients", "parameters", "__call__"), "Sequential(Linear(4, 3), ReLU())")


def check_loss(loss: Any) -> None:
    _check_object("loss", loss, ("forward", "backward"), "SoftmaxCrossEntropy()")


def check_parts(model: Any, loss: Any, optimizer: Any, callbacks: Any) -> None:
    """What has to do with training is what it should be, and not its class."""
    check_model(model)
    check_loss(loss)
    _check_object("optimizer", optimizer, ("step", "learning_rate"), "Adam(lr=1e-3)")
    if not parameters(model):
        raise ValueError(f"model is {model!r:.80}, which has no parameters to train")
    if not isinstance(callbacks, Sequence) or not all(map(callable, callbacks)):
        raise TypeError(f"callbacks is {callbacks!r:.80}; give a list of functions f(model, row): callbacks=[f]")


def _check_finite(name: str, x: Array, dtype: Any) -> None:
    """Raise `ValueError` naming the first row with NaN or infinity, also where only the cast to `dtype` makes it."""
    if not is_float(x):
        return
    rows = max(1, _CHUNK // max(1, math.prod(x.shape[1:])))
    for start in range(0, x.shape[0], rows):
        part = x[start : min(start + rows, x.shape[0]), ...]
        with computing_on(part) as xp, np.errstate(over="ignore"):
            part = xp.astype(part, getattr(xp, dtype_name(dtype)))
            if bool(xp.all(xp.isfinite(part))):
                continue
        host = np.isfinite(Device.of(part).to_numpy(part)).reshape(part.shape[0], -1)
        row = int(np.flatnonzero(~host.all(axis=1))[0])
        raise ValueError(
            f"{name} has a value in row {start + row} (rows counted from 0) that is NaN or infinite in {dtype_name(dtype)}; "
            f"remove the row, replace the value or scale the data"
        )


def check_data(model: Any, loss: Any, data: Data, names: tuple[str, str]) -> None:
    """Everything that can be known before training: shapes by running one row, and values by reading them once."""
    for name, x in zip(names, (data.X, data.y), strict=True):
        _check_finite(name, x, data.dtype)
    X, y = next(data.batches(np.arange(1), 1))
    with np.errstate(all="ignore"), data.device:
        Z = model(X)
        loss.forward(Z, y)
    if hasattr(loss, "check_ids") and not is_float(data.y) and data.y.ndim == Z.ndim - 1:
        loss.check_ids(data.y, Z.shape[-1])
