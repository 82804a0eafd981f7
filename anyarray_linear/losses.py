"""Losses: a number to minimise, and its gradient by the model's output.

A loss is a mean, so its gradient carries the division, and everything behind it only sums. The number stays on the device
as a 0-d array: turning it into a Python number is what makes a host wait for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from array_api_compat import is_torch_array

from .arrays.checks import check_alike, check_array, check_float, check_place, check_shape
from .arrays.place import Array, Namespace, device_of, dtype_name, place_of


def softmax(Z: Array) -> Array:
    """Probabilities of logits: `exp Z_ij / sum_k exp Z_ik` along the last axis, the row's maximum taken out first.

    Z: `(..., classes)`, of a floating dtype. Returns an array of its shape, dtype and device. `TypeError` for integers,
    `ValueError` for a number or for no classes.

    >>> import numpy as np
    >>> softmax(np.asarray([0.0, 0.0, -np.inf]))
    array([0.5, 0.5, 0. ])
    """
    _check_logits(Z)
    return place_of(Z).run(softmax_of, Z)


def softmax_of(xp: Namespace, Z: Array) -> Array:
    """`softmax(Z)`."""
    _, E, S = _exponentials(xp, Z)
    return E / S


class SoftmaxCrossEntropy:
    """Softmax and cross-entropy in one: `loss = mean_i (log sum_j exp Z_ij - Z_i,target_i)`.

    The two belong together: the logarithm cancels the exponential, so no logit overflows (log-sum-exp with the row's maximum
    taken out), and the gradient is simply `dZ = (softmax(Z) - onehot) / N`.

    `forward(Z, target)`: Z `(..., classes)`; target either class ids, integers of shape `(...)`, or one-hot rows or
    probabilities of the shape of `Z`. A 1-D `Z` takes a 0-d id. The mean is over the leading axes.

    A class id outside `0..classes-1` is a `ValueError` where looking is free (NumPy, torch on a CPU), and elsewhere makes
    the loss and that row's gradient NaN.

    >>> import numpy as np
    >>> loss = SoftmaxCrossEntropy()
    >>> value, cache = loss.forward(np.zeros((1, 4)), np.asarray([2]))
    >>> float(value) == float(np.log(4)), loss.backward(cache)
    (True, array([[ 0.25,  0.25, -0.75,  0.25]]))
    """

    def forward(self, Z: Array, target: Array) -> tuple[Array, dict[str, Array]]:
        """`(loss, cache)`; the loss is a 0-d array of the dtype and on the device of `Z`.

        Raises `TypeError` and `ValueError` for a target that does not fit `Z`, before anything is computed.
        """
        _check_logits(Z)
        if _target_is_ids(Z, target) and place_of(target).reads_freely:
            self.check_ids(target, Z.shape[-1])
        loss, P = place_of(Z).run(cross_entropy, Z, target)
        return loss, {"P": P, "T": target}

    def backward(self, cache: Mapping[str, Array]) -> Array:
        """`dZ`, of the shape of `Z`."""
        P, T = cache["P"], cache["T"]
        return place_of(P).run(cross_entropy_gradient, P, T)

    @staticmethod
    def check_ids(target: Array, classes: int) -> None:
        """Raise `ValueError` unless every class id is in `0..classes-1`. Reads values: costs a wait on a GPU."""
        if 0 in target.shape:
            return
        low, high = place_of(target).run(range_of, target)
        if low < 0 or high >= classes:
            raise ValueError(
                f"target has class ids from {low} to {high}, but Z has {classes} classes, numbered 0 to {classes - 1}"
            )

    def __repr__(self) -> str:
        return "SoftmaxCrossEntropy()"


def _check_logits(Z: Array) -> None:
    if not place_of(Z).computes:
        check_float("Z", Z)
    if Z.ndim == 0 or Z.shape[-1] == 0:
        raise ValueError(f"Z has shape {tuple(Z.shape)} but must be (..., classes) with at least one class")


def _target_is_ids(Z: Array, target: Array) -> bool:
    """Whether `target` holds class ids and not rows; raises if it fits neither."""
    place, here = place_of(target), place_of(Z)
    if place.integral and place.xp is here.xp and place.device == here.device and target.shape == Z.shape[:-1]:
        return True
    check_array("target", target)
    check_place("Z", Z, "target", target)
    if tuple(target.shape) == tuple(Z.shape):
        if not place.integral and target.dtype != Z.dtype:
            raise TypeError(
                f"target is {place.dtype_name} but Z is {dtype_name(Z.dtype)}; cast it with xp.astype(target, Z.dtype)"
            )
        return False
    if tuple(target.shape) != tuple(Z.shape[:-1]):
        raise ValueError(
            f"target has shape {tuple(target.shape)} but Z has {tuple(Z.shape)}; give class ids of shape "
            f"{tuple(Z.shape[:-1])}, or rows of the shape of Z"
        )
    if not place.integral:
        raise TypeError(
            f"target is {place.dtype_name}, but class ids are integers; cast them with xp.astype(target, xp.int64)"
        )
    return True


def range_of(xp: Namespace, target: Array) -> tuple[int, int]:
    """The smallest and the largest class id."""
    if is_torch_array(target):
        target = xp.astype(target, xp.int64)  # torch finds no minimum of its wider unsigned integers
    return int(xp.min(target)), int(xp.max(target))


def cross_entropy(xp: Namespace, Z: Array, target: Array) -> tuple[Array, Array]:
    """The loss, and `P = softmax(Z)`."""
    T = _rows_of(xp, target, Z)
    shifted, E, S = _exponentials(xp, Z)
    # a class of probability 0 adds 0 to the loss, also when its logit is -inf
    terms = T * (xp.log(S) - xp.where(T == 0, 0.0, shifted))
    return _sum(xp, terms, reciprocal(math.prod(Z.shape[:-1]))), E / S


def cross_entropy_gradient(xp: Namespace, P: Array, target: Array) -> Array:
    """`dZ = (P - T) / N`, with `T` the target as rows."""
    T = _rows_of(xp, target, P)
    # a row of T sums to 1 if it is a distribution; PyTorch defines the rest this way too
    return (P * xp.sum(T, axis=-1, keepdims=True) - T) * reciprocal(math.prod(P.shape[:-1]))


def _exponentials(xp: Namespace, Z: Array) -> tuple[Array, Array, Array]:
    """`Z` less its row's maximum, the exponentials of that, and their sums."""
    shifted = Z - xp.max(Z, axis=-1, keepdims=True)
    E = xp.exp(shifted)
    return shifted, E, xp.sum(E, axis=-1, keepdims=True)


def _rows_of(xp: Namespace, target: Array, Z: Array) -> Array:
    """The target as rows of probabilities, of the shape and dtype of `Z`."""
    if target.ndim < Z.ndim:
        return _onehot(xp, target, Z)
    return target if target.dtype == Z.dtype else xp.astype(target, Z.dtype)


def _onehot(xp: Any, ids: Array, Z: Array) -> Array:
    """A row per id with 1 in the id's column; a row of NaN for an id that is no column."""
    columns = xp.arange(Z.shape[-1], device=device_of(Z))
    ids = xp.expand_dims(xp.astype(xp.asarray(ids), columns.dtype), axis=-1)
    T = xp.astype(columns == ids, Z.dtype)
    return xp.where((ids < 0) | (ids >= Z.shape[-1]), math.nan, T)


def _sum(xp: Namespace, terms: Array, factor: float) -> Array:
    """The sum of `terms` times `factor`, a 0-d array. The mean of 65,536 float16 numbers is one, their sum is not."""
    if dtype_name(terms.dtype) == "float16":
        return xp.astype(xp.sum(terms, dtype=xp.float32) * factor, terms.dtype)
    return xp.asarray(xp.sum(terms) * factor)


def reciprocal(count: int) -> float:
    """`1 / count`; the mean of nothing is NaN, as everywhere in the field."""
    return 1 / count if count else math.nan


class MeanSquaredError:
    """`loss = mean (Z - target)^2` over all elements, as PyTorch's `MSELoss`.

    `forward(Z, target)`: the target has the shape, dtype and device of `Z`, or shape `(N,)` for a `Z` of `(N, 1)`.

    >>> import numpy as np
    >>> loss = MeanSquaredError()
    >>> value, cache = loss.forward(np.asarray([[3.0], [1.0]]), np.asarray([1.0, 1.0]))
    >>> float(value), loss.backward(cache)
    (2.0, array([[2.],
           [0.]]))
    """

    def forward(self, Z: Array, target: Array) -> tuple[Array, dict[str, Array]]:
        """`(loss, cache)`; the loss is a 0-d array of the dtype and on the device of `Z`.

        Raises `ValueError` for a target of another shape, which broadcasting would turn into a wrong loss.
        """
        place = place_of(Z)
        if not place.computes or place_of(target) is not place:
            check_float("Z", Z)
            check_alike("Z", Z, "target", target)
        column = Z.ndim == 2 and Z.shape[1] == 1 and tuple(target.shape) == (Z.shape[0],)
        if not column:
            check_shape("target", target, tuple(Z.shape), "the shape of Z")
        loss, D = place.run(squared_error, Z, target)
        return loss, {"D": D}

    def backward(self, cache: Mapping[str, Array]) -> Array:
        """`dZ = 2 (Z - target) / size`, of the shape of `Z`."""
        return place_of(cache["D"]).run(squared_error_gradient, cache["D"])

    def __repr__(self) -> str:
        return "MeanSquaredError()"


def squared_error(xp: Namespace, Z: Array, target: Array) -> tuple[Array, Array]:
    """`mean D^2`, and `D = Z - target`."""
    D = Z - xp.reshape(target, Z.shape)
    return _sum(xp, D * D, reciprocal(math.prod(Z.shape))), D


def squared_error_gradient(xp: Namespace, D: Array) -> Array:
    """`dZ = 2 D / size`."""
    return D * (2 * reciprocal(math.prod(D.shape)))
