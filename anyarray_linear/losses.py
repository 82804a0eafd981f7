"""Losses: a number to minimise, and its gradient by the model's output.

A loss is a mean, so its gradient carries the division, and everything behind it only sums. The number stays on the device
as a 0-d array: turning it into a Python number is what makes a host wait for a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from array_api_compat import is_torch_array

from . import metrics
from .arrays.checks import check_alike, check_array, check_float, check_place, check_shape
from .arrays.dtypes import wide
from .arrays.numbers import real
from .arrays.place import Array, Namespace, device_of, dtype_name, place_of
from .averages import (
    as_dtype_of,
    as_loss,
    as_row,
    is_whole,
    numbers_per_column,
    only_mean,
    reciprocal,
    scaled_sum,
    shares,
    total,
    weight_of_elements,
    weights_of_rows,
)
from .metrics import Parts


@runtime_checkable
class Loss(Protocol):
    """What every loss offers; write a class with these two methods and `fit` trains with it.

    What a loss may have besides:

    - `forward(Z, target, weights=None)`: weights per sample, `(N,)`, for `fit(sample_weight=...)`; the weighted mean.
    - `divisor(Z, target, weights)`: what that mean divides by, a number or 0-d array, where it is not the number of rows or
      the sum of the weights. `fit` needs it to work on a batch in parts.
    - `check(target, Z)`: raises for a target that is wrong. `fit` calls it once before training, with all of `y` and the
      outputs for one row, so it may read values.
    - `metrics(Z, target) -> {"accuracy": ...}`: sums over a batch, 0-d arrays. `evaluate` adds them up over all batches, and
      divides by the number of samples, or hands them to `scores(parts, rows)`, if there is one: for each name what each
      batch gave, float64 on the host, its first axis the batches, whose numbers of rows are `rows`.
    """

    def forward(self, Z: Array, target: Array, /) -> tuple[Array, Any]:
        """`(loss, cache)` for outputs `Z` `(N, ...)`: a 0-d array where `Z` is, and what `backward` will need."""
        ...

    def backward(self, cache: Any, /) -> Array:
        """`dZ`, the gradient of the loss by `Z`; a loss that is a mean divides here."""
        ...


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
    _, E, S = _exponentials(xp, wide(xp, Z))
    return as_dtype_of(xp, E / S, Z)


class SoftmaxCrossEntropy:
    """Softmax and cross-entropy in one: `loss = mean_i (log sum_j exp Z_ij - Z_i,target_i)`.

    The two belong together: the logarithm cancels the exponential, so no logit overflows (log-sum-exp with the row's maximum
    taken out), and the gradient is simply `dZ = (softmax(Z) - onehot) / N`.

    `forward(Z, target)`: Z `(..., classes)`; target either class ids, integers of shape `(...)`, or one-hot rows or
    probabilities of the shape of `Z`. A 1-D `Z` takes a 0-d id. The mean is over the leading axes.

    A class id outside `0..classes-1` is a `ValueError` where looking is free (NumPy, torch on a CPU), and elsewhere makes
    the loss and that row's gradient NaN.

    class_weights: a number per class, by which each sample of that class counts more or less; the mean is a weighted one.
    label_smoothing: this share of the target is spread evenly over all classes. ignore_id: a class id, such as -1, whose
    samples count for nothing. All as in PyTorch's `CrossEntropyLoss`. reduction: the mean and no other, see `divisor`.

    >>> import numpy as np
    >>> loss = SoftmaxCrossEntropy()
    >>> value, cache = loss.forward(np.zeros((1, 4)), np.asarray([2]))
    >>> float(value) == float(np.log(4)), loss.backward(cache)
    (True, array([[ 0.25,  0.25, -0.75,  0.25]]))
    """

    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    ignore_id: int | None = None

    def __init__(
        self,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        ignore_id: int | None = None,
        *,
        reduction: str = "mean",
    ) -> None:
        only_mean(reduction)
        self.class_weights = None if class_weights is None else numbers_per_column("class_weights", class_weights)
        self.label_smoothing = real("label_smoothing", label_smoothing, below=1.0)
        if ignore_id is not None and (isinstance(ignore_id, bool) or not isinstance(ignore_id, int)):
            raise TypeError(f"ignore_id is {ignore_id!r}; give a class id, an int, or None")
        self.ignore_id = ignore_id

    @property
    def is_plain(self) -> bool:
        """Whether there are no options: every sample counts alike, for its class alone."""
        return self.class_weights is None and not self.label_smoothing and self.ignore_id is None

    def forward(self, Z: Array, target: Array, weights: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """`(loss, cache)`; the loss is a 0-d array of the dtype and on the device of `Z`.

        weights: one per sample: of shape `(N,)`, or as class ids are; the mean is weighted by them.

        Raises `TypeError` and `ValueError` for a target that does not fit `Z`, before anything is computed.
        """
        _check_logits(Z)
        if _target_is_ids(Z, target):
            place = place_of(target)
            if place.dtype_name == "bool":  # an index of bools would be a mask
                with place.entered() as xp:
                    target = xp.astype(target, xp.int32)
            elif place.reads_freely:
                self.check_ids(target, Z.shape[-1], self.ignore_id)
        elif self.ignore_id is not None:
            raise ValueError(f"ignore_id is {self.ignore_id}, but target has rows of probabilities; only ids can be ignored")
        if weights is None and self.is_plain:
            loss, P = place_of(Z).run(cross_entropy, Z, target)
            return loss, {"P": P, "T": target}
        loss, P, V, S = place_of(Z).run(weighted_cross_entropy, Z, target, *self._options(Z, weights))
        return loss, {"P": P, "V": V, "S": S}

    def backward(self, cache: Mapping[str, Array]) -> Array:
        """`dZ`, of the shape of `Z`."""
        P = cache["P"]
        if "T" in cache:
            return place_of(P).run(cross_entropy_gradient, P, cache["T"])
        return place_of(P).run(weighted_cross_entropy_gradient, P, cache["V"], cache["S"])

    def divisor(self, Z: Array, target: Array, weights: Array | None = None) -> Any:
        """What the mean divides by: the number of rows, or the sum of their weights as a 0-d array."""
        if weights is None and self.is_plain:
            return math.prod(Z.shape[:-1])
        return self.targets(Z, target, weights)[1]

    def targets(self, Z: Array, target: Array, weights: Array | None = None) -> tuple[Array, Array]:
        """How much each column of each row counts, of the shape of `Z`, and what the mean divides by, a 0-d array."""
        found: tuple[Array, Array] = place_of(Z).run(targets_of_cross_entropy, Z, target, *self._options(Z, weights))
        return found

    def _options(self, Z: Array, weights: Array | None) -> tuple[Any, ...]:
        classes = None if self.class_weights is None else as_row("class_weights", self.class_weights, Z)
        return weights_of_rows(Z, weights, Z.ndim - 1), classes, self.label_smoothing, self.ignore_id

    def check(self, target: Array, Z: Array) -> None:
        """Raise `ValueError` for class ids that are no column of `Z`. Reads values."""
        if is_whole(place_of(target)) and target.ndim == Z.ndim - 1:
            self.check_ids(target, Z.shape[-1], self.ignore_id)

    def metrics(self, Z: Array, target: Array) -> Mapping[str, Array]:
        """The rows whose largest output is that of the target, and how often each class is the target."""
        found: dict[str, Array] = place_of(Z).run(metrics.of_classes, Z, target, self.ignore_id)
        return found

    def scores(self, parts: Parts, rows: Any) -> dict[str, float]:
        """`accuracy`, and `baseline_accuracy`: that of always saying the most frequent class."""
        return metrics.class_scores(parts)

    @staticmethod
    def check_ids(target: Array, classes: int, ignore_id: int | None = None) -> None:
        """Raise `ValueError` unless every class id is in `0..classes-1`. Reads values: costs a wait on a GPU."""
        if 0 in target.shape or place_of(target).dtype_name == "bool":
            return
        if ignore_id is not None:
            with place_of(target).entered() as xp:
                target = xp.where(target == ignore_id, xp.zeros_like(target), target)
        low, high = place_of(target).run(range_of, target)
        if low < 0 or high >= classes:
            raise ValueError(
                f"target has class ids from {low} to {high}, but Z has {classes} classes, numbered 0 to {classes - 1}"
            )

    def __repr__(self) -> str:
        return shown_with_options(self, class_weights=None, label_smoothing=0.0, ignore_id=None)


def shown_with_options(loss: Any, **defaults: Any) -> str:
    """Its `repr`: the options that are not as by default."""
    options = (f"{name}={value!r}" for name, default in defaults.items() if (value := getattr(loss, name)) != default)
    return f"{type(loss).__name__}({', '.join(options)})"


def _check_logits(Z: Array) -> None:
    if not place_of(Z).computes:
        check_float("Z", Z)
    if Z.ndim == 0 or Z.shape[-1] == 0:
        raise ValueError(f"Z has shape {tuple(Z.shape)} but must be (..., classes) with at least one class")


def _target_is_ids(Z: Array, target: Array) -> bool:
    """Whether `target` holds class ids and not rows; raises if it fits neither."""
    place, here = place_of(target), place_of(Z)
    if is_whole(place) and place.xp is here.xp and place.device == here.device and target.shape == Z.shape[:-1]:
        return True
    check_array("target", target)
    check_place("Z", Z, "target", target)
    if tuple(target.shape) == tuple(Z.shape):
        if not is_whole(place) and target.dtype != Z.dtype:
            raise TypeError(
                f"target is {place.dtype_name} but Z is {dtype_name(Z.dtype)}; cast it with xp.astype(target, Z.dtype)"
            )
        return False
    if tuple(target.shape) != tuple(Z.shape[:-1]):
        raise ValueError(
            f"target has shape {tuple(target.shape)} but Z has {tuple(Z.shape)}; give class ids of shape "
            f"{tuple(Z.shape[:-1])}, or rows of the shape of Z"
        )
    if not is_whole(place):
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
    Z_wide = wide(xp, Z)
    T = _rows_of(xp, target, Z_wide)
    shifted, E, S = _exponentials(xp, Z_wide)
    # a class of probability 0 adds 0 to the loss, also when its logit is -inf
    terms = T * (xp.log(S) - xp.where(T == 0, 0.0, shifted))
    return as_loss(xp, scaled_sum(xp, terms, reciprocal(math.prod(Z.shape[:-1]))), Z), as_dtype_of(xp, E / S, Z)


def cross_entropy_gradient(xp: Namespace, P: Array, target: Array) -> Array:
    """`dZ = (P - T) / N`, with `T` the target as rows."""
    P_wide = wide(xp, P)
    T = _rows_of(xp, target, P_wide)
    # a row of T sums to 1 if it is a distribution; PyTorch defines the rest this way too
    dZ = (P_wide * xp.sum(T, axis=-1, keepdims=True) - T) * reciprocal(math.prod(P.shape[:-1]))
    return as_dtype_of(xp, dZ, P)


def weighted_cross_entropy(
    xp: Namespace,
    Z: Array,
    target: Array,
    weights: Array | None,
    class_weights: Array | None,
    smoothing: float,
    ignore_id: int | None,
) -> tuple[Array, Array, Array, Array]:
    """`sum_ic V_ic (log sum_j exp Z_ij - Z_ic) / S`; also `P = softmax(Z)`, and `V` and `S` of the targets."""
    V, S = targets_of_cross_entropy(xp, Z, target, weights, class_weights, smoothing, ignore_id)
    shifted, E, sums = _exponentials(xp, wide(xp, Z))
    terms = V * (xp.log(sums) - xp.where(V == 0, 0.0, shifted))
    return as_loss(xp, total(xp, terms) / S, Z), as_dtype_of(xp, E / sums, Z), V, S


def targets_of_cross_entropy(
    xp: Namespace,
    Z: Array,
    target: Array,
    weights: Array | None,
    class_weights: Array | None,
    smoothing: float,
    ignore_id: int | None,
) -> tuple[Array, Array]:
    """How much each column of each row counts, `V`, and what the mean divides by, `S`.

    With `T` the target as rows, smoothed, `w` the weights of classes and `s` those of samples: `V_ic = s_i w_c T_ic`. For
    class ids `S` is the sum of `s_i w_id(i)`, for rows of probabilities that of `s_i`: PyTorch's definitions. Both are in
    float32 for float16.
    """
    Z = wide(xp, Z)
    ids = target.ndim < Z.ndim
    if ignore_id is not None:
        counts = xp.expand_dims(target != ignore_id, axis=-1)
        target = xp.where(target == ignore_id, xp.zeros_like(target), target)
    T = hard = _rows_of(xp, target, Z)
    if smoothing:
        T = T * (1 - smoothing) + smoothing / Z.shape[-1]
    each = xp.ones((*Z.shape[:-1], 1), dtype=Z.dtype, device=device_of(Z))  # how much each row counts
    if weights is not None:
        each = each * weights
    if ignore_id is not None:
        each = xp.where(counts, each, 0.0)
    if class_weights is not None:
        T = T * class_weights
    V = T * each
    if ids and class_weights is not None:
        each = each * xp.sum(hard * class_weights, axis=-1, keepdims=True)
    return V, total(xp, each)


def weighted_cross_entropy_gradient(xp: Namespace, P: Array, V: Array, S: Array) -> Array:
    """`dZ_ic = (P_ic sum_k V_ik - V_ic) / S`."""
    return as_dtype_of(xp, (wide(xp, P) * xp.sum(V, axis=-1, keepdims=True) - V) / S, P)


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


class MeanSquaredError:
    """`loss = mean (Z - target)^2` over all elements, as PyTorch's `MSELoss`.

    `forward(Z, target)`: the target has the shape and device of `Z`, or shape `(N,)` for a `Z` of `(N, 1)`; it is of the
    dtype of `Z`, or integers or bools, which are cast. reduction: the mean and no other, see `divisor` for the sum.

    >>> import numpy as np
    >>> loss = MeanSquaredError()
    >>> value, cache = loss.forward(np.asarray([[3.0], [1.0]]), np.asarray([1.0, 1.0]))
    >>> float(value), loss.backward(cache)
    (2.0, array([[2.],
           [0.]]))
    """

    is_plain = True

    def __init__(self, *, reduction: str = "mean") -> None:
        only_mean(reduction)

    def forward(self, Z: Array, target: Array, weights: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """`(loss, cache)`; the loss is a 0-d array of the dtype and on the device of `Z`.

        weights: one per sample, `(N,)`; the mean is weighted by them.

        Raises `ValueError` for a target of another shape, which broadcasting would turn into a wrong loss.
        """
        target = elements_of(Z, target)
        if weights is None:
            loss, D = place_of(Z).run(squared_error, Z, target)
            return loss, {"D": D}
        loss, D, V = place_of(Z).run(weighted_squared_error, Z, target, weights_of_rows(Z, weights, Z.ndim))
        return loss, {"D": D, "V": V}

    def backward(self, cache: Mapping[str, Array]) -> Array:
        """`dZ = 2 (Z - target) / size`, of the shape of `Z`."""
        D = cache["D"]
        if "V" in cache:
            return place_of(D).run(weighted_squared_error_gradient, D, cache["V"])
        return place_of(D).run(squared_error_gradient, D)

    def divisor(self, Z: Array, target: Array, weights: Array | None = None) -> Any:
        """What the mean divides by: the number of elements, each counted with its weight."""
        return weight_of_elements(Z, weights)

    def metrics(self, Z: Array, target: Array) -> Mapping[str, Array]:
        """Sums of squared and absolute errors, and of the target's deviations from its mean."""
        found: dict[str, Array] = place_of(Z).run(metrics.of_numbers, Z, elements_of(Z, target))
        return found

    def scores(self, parts: Parts, rows: Any) -> dict[str, float]:
        """`rmse`, `mae`, `r2`, and `baseline_rmse`: that of always saying the mean."""
        return metrics.number_scores(parts, rows)

    def __repr__(self) -> str:
        return "MeanSquaredError()"


def elements_of(Z: Array, target: Array) -> Array:
    """The target of a loss that compares element by element, in the shape and dtype of `Z`."""
    place, theirs = place_of(Z), place_of(target)
    if not place.computes:
        check_float("Z", Z)
    if theirs is not place:
        if is_whole(theirs):
            check_place("Z", Z, "target", target)
            with theirs.entered() as xp:
                target = xp.astype(target, Z.dtype)
        else:
            check_alike("Z", Z, "target", target)
    if Z.ndim == 2 and Z.shape[1] == 1 and tuple(target.shape) == (Z.shape[0],):
        with place.entered() as xp:
            return xp.reshape(target, Z.shape)
    check_shape("target", target, tuple(Z.shape), "the shape of Z")
    return target


def squared_error(xp: Namespace, Z: Array, target: Array) -> tuple[Array, Array]:
    """`mean D^2`, and `D = Z - target`."""
    D = Z - xp.reshape(target, Z.shape)
    D_wide = wide(xp, D)
    return as_loss(xp, scaled_sum(xp, D_wide * D_wide, reciprocal(math.prod(Z.shape))), Z), D


def squared_error_gradient(xp: Namespace, D: Array) -> Array:
    """`dZ = 2 D / size`."""
    return as_dtype_of(xp, wide(xp, D) * (2 * reciprocal(math.prod(D.shape))), D)


def weighted_squared_error(xp: Namespace, Z: Array, target: Array, weights: Array) -> tuple[Array, Array, Array]:
    """`sum_ij V_i D_ij^2`, `D = Z - target` and `V`, the weights of the rows, which sum to 1 over all elements."""
    D = Z - target
    D_wide, V = wide(xp, D), shares(xp, Z, weights)
    return as_loss(xp, total(xp, V * (D_wide * D_wide)), Z), D, V


def weighted_squared_error_gradient(xp: Namespace, D: Array, V: Array) -> Array:
    """`dZ = 2 V D`."""
    return as_dtype_of(xp, 2.0 * V * wide(xp, D), D)
