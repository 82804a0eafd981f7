"""Losses: a number to minimise, and its gradient by the model's output.

A loss is a mean, so its gradient carries the division, and everything behind it only sums. The number stays on the device
as a 0-d array: turning it into a Python number is what makes a host wait for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from array_api_compat import is_torch_array

from .arrays.checks import check_alike, check_array, check_float, check_place, check_shape, surely_ids
from .arrays.place import Array, Namespace, computing_on, device_of, dtype_name, namespace, reading_is_free
from .lanes import lane


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
        check_float("Z", Z)
        if Z.ndim == 0 or Z.shape[-1] == 0:
            raise ValueError(f"Z has shape {tuple(Z.shape)} but must be (..., classes) with at least one class")
        ids = self._target_is_ids(Z, target)
        if ids and reading_is_free(target):
            self.check_ids(target, Z.shape[-1])
        with computing_on(Z) as xp:
            return lane(_cross_entropy, xp)(xp, Z, target, ids)  # type: ignore[no-any-return]

    def backward(self, cache: Mapping[str, Array]) -> Array:
        """`dZ`, of the shape of `Z`."""
        P, T = cache["P"], cache["T"]
        with computing_on(P) as xp:
            return lane(_cross_entropy_gradient, xp)(xp, P, T)

    @staticmethod
    def check_ids(target: Array, classes: int) -> None:
        """Raise `ValueError` unless every class id is in `0..classes-1`. Reads values: costs a wait on a GPU."""
        if 0 in target.shape:
            return
        with computing_on(target) as xp:
            low, high = lane(_range_of, xp)(xp, target)
        if low < 0 or high >= classes:
            raise ValueError(
                f"target has class ids from {low} to {high}, but Z has {classes} classes, numbered 0 to {classes - 1}"
            )

    @staticmethod
    def _target_is_ids(Z: Array, target: Array) -> bool:
        """Whether `target` holds class ids and not rows; raises if it fits neither."""
        if surely_ids(Z, target):
            return True
        check_array("target", target)
        check_place("Z", Z, "target", target)
        xp = namespace(Z)
        integral = xp.isdtype(target.dtype, "integral")
        if tuple(target.shape) == tuple(Z.shape):
            if not integral and target.dtype != Z.dtype:
                raise TypeError(
                    f"target is {dtype_name(target.dtype)} but Z is {dtype_name(Z.dtype)}; "
                    "cast it with xp.astype(target, Z.dtype)"
                )
            return False
        if tuple(target.shape) != tuple(Z.shape[:-1]):
            raise ValueError(
                f"target has shape {tuple(target.shape)} but Z has {tuple(Z.shape)}; give class ids of shape "
                f"{tuple(Z.shape[:-1])}, or rows of the shape of Z"
            )
        if not integral:
            raise TypeError(
                f"target is {dtype_name(target.dtype)}, but class ids are integers; "
                "cast them with xp.astype(target, xp.int64)"
            )
        return True

    def __repr__(self) -> str:
        return "SoftmaxCrossEntropy()"


def _range_of(xp: Namespace, target: Array) -> tuple[int, int]:
    """The smallest and the largest class id."""
    if is_torch_array(target):
        target = xp.astype(target, xp.int64)  # torch finds no minimum of its wider unsigned integers
    return int(xp.min(target)), int(xp.max(target))


def _cross_entropy(xp: Namespace, Z: Array, target: Array, ids: bool) -> tuple[Array, dict[str, Array]]:
    """The loss, and the cache: `P = softmax(Z)`, and the target as rows `T`. Lanes may keep class ids as they are."""
    T = _onehot(xp, target, Z) if ids else target if target.dtype == Z.dtype else xp.astype(target, Z.dtype)
    shifted = Z - xp.max(Z, axis=-1, keepdims=True)
    E = xp.exp(shifted)
    S = xp.sum(E, axis=-1, keepdims=True)
    # a class of probability 0 adds 0 to the loss, also when its logit is -inf
    terms = T * (xp.log(S) - xp.where(T == 0, 0.0, shifted))
    loss = _sum(xp, terms, _reciprocal(math.prod(Z.shape[:-1])))
    return loss, {"P": E / S, "T": T}


def _cross_entropy_gradient(xp: Namespace, P: Array, T: Array) -> Array:
    """`dZ = (P - T) / N`, with `T` rows or class ids."""
    if T.ndim < P.ndim:
        T = _onehot(xp, T, P)
    # a row of T sums to 1 if it is a distribution; PyTorch defines the rest this way too
    return (P * xp.sum(T, axis=-1, keepdims=True) - T) * _reciprocal(math.prod(P.shape[:-1]))


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


def _reciprocal(count: int) -> float:
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
        check_float("Z", Z)
        check_alike("Z", Z, "target", target)
        column = Z.ndim == 2 and Z.shape[1] == 1 and tuple(target.shape) == (Z.shape[0],)
        if not column:
            check_shape("target", target, tuple(Z.shape), "the shape of Z")
        with computing_on(Z) as xp:
            loss, D = lane(_squared_error, xp)(xp, Z, xp.reshape(target, Z.shape) if column else target)
            return loss, {"D": D}

    def backward(self, cache: Mapping[str, Array]) -> Array:
        """`dZ = 2 (Z - target) / size`, of the shape of `Z`."""
        D = cache["D"]
        with computing_on(D):
            return D * (2 * _reciprocal(math.prod(D.shape)))

    def __repr__(self) -> str:
        return "MeanSquaredError()"


def _squared_error(xp: Namespace, Z: Array, target: Array) -> tuple[Array, Array]:
    """`mean D^2`, and `D = Z - target`."""
    D = Z - target
    return _sum(xp, D * D, _reciprocal(math.prod(Z.shape))), D
