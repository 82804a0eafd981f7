"""What can be known to be wrong before anything is trained, and its words."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..arrays.checks import check_array
from ..arrays.device import Device
from ..arrays.dtypes import wide
from ..arrays.place import Array, computing_on, dtype_name, namespace
from ..protocol import check_loss, check_model, check_optimizer, parameters
from .batches import Batches
from .data import Data, is_float, loss_dtype

_CHUNK = 1 << 22  # elements read at once when values are checked, so that a memory-mapped file needs little memory


def check_rows(X: Array, y: Array | None, names: tuple[str, str] = ("X", "y")) -> None:
    for name, x in zip(names, (X, y), strict=True):
        if x is None and name == names[1]:
            continue
        check_array(name, x)
        _check_there(name, x)
        xp = namespace(x)
        if dtype_name(x.dtype) == "bfloat16" and not hasattr(xp, "bfloat16"):  # of ml_dtypes, which isdtype does not know
            cure = f"cast it with {name}.astype(xp.float32)"
            raise TypeError(f"{name} is bfloat16, which is no dtype of {xp.__name__}; {cure}")
        if not xp.isdtype(x.dtype, ("bool", "integral", "real floating")):
            raise TypeError(f"{name} is {dtype_name(x.dtype)}; give real numbers, or for y class ids, as integers")
    if X.ndim == 0:
        raise ValueError(f"{names[0]} is a single number; its first axis must be the samples")
    if X.shape[0] == 0:
        raise ValueError(f"{names[0]} has no rows (shape {tuple(X.shape)}); give at least one sample")
    if y is not None and (y.ndim == 0 or y.shape[0] != X.shape[0]):
        raise ValueError(
            f"{names[0]} has {X.shape[0]} rows but {names[1]} has shape {tuple(y.shape)}; they must have as many rows"
        )


def _check_there(name: str, x: Array) -> None:
    """Raise `TypeError` for an array that is still to be computed: training would compute it anew for every batch."""
    known = all(isinstance(size, (int, np.integer)) for size in x.shape)  # what is to be computed may not know, and have NaN
    if known and not callable(getattr(x, "compute", None)):
        return
    kind = type(x).__module__.partition(".")[0]
    raise TypeError(
        f"{name} is a lazy array of {kind}, which says how to compute its values and does not hold them; "
        f"compute it before training, as {name}.compute() does for dask"
    )


def check_parts(model: Any, loss: Any, optimizer: Any, callbacks: Any) -> None:
    """What has to do with training is what it should be, and not its class."""
    check_model(model)
    check_loss(loss)
    check_optimizer(optimizer)
    if not parameters(model):
        raise ValueError(f"model is {model!r:.80}, which has no parameters to train")
    for name, W in parameters(model).items():
        _check_there(f"the parameter {name}", W)
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
    if data.takes_ids and is_float(data.X):
        raise TypeError(f"{names[0]} is {dtype_name(data.X.dtype)}, but the model's first layer takes ids; give integers")
    exact = loss_dtype(data.device, data.dtype)
    for name, x, dtype in zip(names, (data.X, data.y), (data.dtype, exact), strict=True):
        _check_finite(name, x, dtype)
    if data.weights is not None:
        _check_weights(loss, data)
    _try_out(model, loss, data.device, next(data.batches(np.arange(1), 1)), (data.X, data.y), names)


def check_batches(model: Any, loss: Any, batches: Batches) -> None:
    """What can be known before training of batches that the caller makes: of the first one."""
    first = next(batches.batches(), None)
    if first is None:
        raise ValueError(f"{batches.name} gave no batch")
    X, y, weights = first
    names = f"the X of batch 0 of {batches.name}", f"the y of batch 0 of {batches.name}"
    exact = loss_dtype(batches.device, batches.dtype)
    for name, x, dtype in zip(names, (X, y), (batches.dtype, exact), strict=True):
        _check_finite(name, x, dtype)
    _try_out(model, loss, batches.device, (X[:1, ...], y[:1, ...], None if weights is None else weights[:1]), (X, y), names)


def _check_weights(loss: Any, data: Data) -> None:
    assert data.weights is not None
    if tuple(data.weights.shape) != (data.X.shape[0],):
        shape, rows = tuple(data.weights.shape), data.X.shape[0]
        raise ValueError(f"sample_weight has shape {shape} but must have ({rows},), one for each row of X")
    _check_finite("sample_weight", data.weights, loss_dtype(data.device, data.dtype))
    with computing_on(data.weights) as xp:
        low, top = (float(Device.of(data.weights).to_numpy(x)) for x in (xp.min(data.weights), xp.max(data.weights)))
    if low < 0 or not top:
        raise ValueError(f"sample_weight has values from {low:g} to {top:g}; none may be negative, and not all may be 0")


def _are_ids(loss: Any, y: Array, Z: Array) -> bool:
    return hasattr(loss, "check_ids") and not is_float(y) and y.ndim == Z.ndim - 1


def _check_targets(loss: Any, y: Array, Z: Array) -> None:
    if hasattr(loss, "check"):
        loss.check(y, Z)
    elif _are_ids(loss, y, Z):
        loss.check_ids(y, Z.shape[-1])


def _try_out(model: Any, loss: Any, device: Device, batch: Any, whole: tuple[Array, Array], names: tuple[str, str]) -> None:
    """Run one row through model and loss, and let the loss look at all targets; errors speak of what the caller gave."""
    X, y, weights = batch
    try:
        with np.errstate(all="ignore"), device:
            Z = model(X)
            with computing_on(Z) as xp:
                Z = wide(xp, Z)  # as losses are trained with
            if _are_ids(loss, y, Z):  # first: `forward` would speak of one row's
                _check_targets(loss, whole[1], Z)
            if weights is None:
                loss.forward(Z, y)
            else:
                loss.forward(Z, y, weights * 0 + 1)  # this one row's may be 0
        if not _are_ids(loss, y, Z):
            _check_targets(loss, whole[1], Z)
    except (TypeError, ValueError) as error:
        if type(error) not in (TypeError, ValueError):
            raise
        text = str(error)
        if weights is not None and "positional argument" in text:
            text = f"sample_weight is given, but {loss!r:.60} takes none; give it forward(self, Z, target, weights=None)"
        for one, all_of_it in zip((X, y), whole, strict=True):
            text = text.replace(str(tuple(one.shape)), str(tuple(all_of_it.shape)))
        text = text.replace(f"target is {dtype_name(y.dtype)}", f"target is {dtype_name(whole[1].dtype)}")  # before its cast
        text = re.sub(r"\(1,", "(N,", text)  # the outputs of the one row
        if not hasattr(error, "layer"):  # of another layer than the first, X is not the caller's
            text = re.sub(r"\bX\b", names[0], text)
        if "weights" not in text:
            text = re.sub(r"\btarget\b", names[1], re.sub(r"\bZ\b", "the model's output", text))
        raise type(error)(text) from error
