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
from .arrays.checks import check_alike, check_array, check_float, check_place, check_shape, describe
from .arrays.device import Device
from .arrays.numbers import real
from .arrays.place import Array, Namespace, device_of, dtype_name, place_of
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

    def forward(self, Z: Array, target: Array) -> tuple[Array, Any]:
        """`(loss, cache)` for outputs `Z` `(N, ...)`: a 0-d array where `Z` is, and what `backward` will need."""
        ...

    def backward(self, cache: Any) -> Array:
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

    class_weights: a number per class, by which each sample of that class counts more or less; the mean is a weighted one.
    label_smoothing: this share of the target is spread evenly over all classes. ignore_id: a class id, such as -1, whose
    samples count for nothing. All as in PyTorch's `CrossEntropyLoss`.

    >>> import numpy as np
    >>> loss = SoftmaxCrossEntropy()
    >>> value, cache = loss.forward(np.zeros((1, 4)), np.asarray([2]))
    >>> float(value) == float(np.log(4)), loss.backward(cache)
    (True, array([[ 0.25,  0.25, -0.75,  0.25]]))
    """

    def __init__(
        self, class_weights: Sequence[float] | None = None, label_smoothing: float = 0.0, ignore_id: int | None = None
    ) -> None:
        self.class_weights = None if class_weights is None else _weights_of("class_weights", class_weights)
        self.label_smoothing = real("label_smoothing", label_smoothing, high=1.0)
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
            if place_of(target).reads_freely:
                self.check_ids(target, Z.shape[-1])
        elif self.ignore_id is not None:
            raise ValueError(f"ignore_id is {self.ignore_id}, but target has rows of probabilities; ids can be ignored, rows not")
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
        return place_of(Z).run(targets_of_cross_entropy, Z, target, *self._options(Z, weights))[1]

    def _options(self, Z: Array, weights: Array | None) -> tuple[Any, ...]:
        classes = None if self.class_weights is None else _there("class_weights", self.class_weights, Z)
        return _rows_weights(Z, weights, Z.ndim - 1), classes, self.label_smoothing, self.ignore_id

    def check(self, target: Array, Z: Array) -> None:
        """Raise `ValueError` for class ids that are no column of `Z`. Reads values."""
        if not place_of(target).is_floating and target.ndim == Z.ndim - 1:
            self.check_ids(target, Z.shape[-1])

    def metrics(self, Z: Array, target: Array) -> Mapping[str, Array]:
        """The rows whose largest output is that of the target, and how often each class is the target."""
        return place_of(Z).run(metrics.of_classes, Z, target, self.ignore_id)

    def scores(self, parts: Parts, rows: Any) -> dict[str, float]:
        """`accuracy`, and `baseline_accuracy`: that of always saying the most frequent class."""
        return metrics.class_scores(parts)

    def check_ids(self, target: Array, classes: int) -> None:
        """Raise `ValueError` unless every class id is in `0..classes-1`. Reads values: costs a wait on a GPU."""
        if 0 in target.shape or place_of(target).dtype_name == "bool":
            return
        if self.ignore_id is not None:
            with place_of(target).entered() as xp:
                target = xp.where(target == self.ignore_id, xp.zeros_like(target), target)
        low, high = place_of(target).run(range_of, target)
        if low < 0 or high >= classes:
            raise ValueError(
                f"target has class ids from {low} to {high}, but Z has {classes} classes, numbered 0 to {classes - 1}"
            )

    def __repr__(self) -> str:
        return _shown(self, class_weights=None, label_smoothing=0.0, ignore_id=None)


def _shown(loss: Any, **defaults: Any) -> str:
    """Its `repr`: the options that are not as by default."""
    options = (f"{name}={value!r}" for name, default in defaults.items() if (value := getattr(loss, name)) != default)
    return f"{type(loss).__name__}({', '.join(options)})"


def _weights_of(name: str, values: Any) -> tuple[float, ...]:
    """Weights per class or label as Python floats."""
    if isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} is {describe(values)}; give a sequence of numbers, one for each column of Z, in their order")
    if hasattr(values, "dtype"):
        values = Device.of(values).to_numpy(values)
    if getattr(values, "ndim", 1) != 1 or not len(values):
        raise ValueError(f"{name} has shape {getattr(values, 'shape', '(0,)')}; give one number for each column of Z")
    return tuple(real(f"{name}[{i}]", value) for i, value in enumerate(values))


def _there(name: str, values: tuple[float, ...], Z: Array) -> Array:
    """`values` where `Z` is and in its dtype, one for each of its columns."""
    if len(values) != Z.shape[-1]:
        raise ValueError(f"{name} has {len(values)} numbers, but Z has {Z.shape[-1]} columns (shape {tuple(Z.shape)})")
    place = place_of(Z)
    with place.entered() as xp:
        return xp.asarray(values, dtype=Z.dtype, device=place.device)


def _rows_weights(Z: Array, weights: Array | None, most: int) -> Array | None:
    """The weights of samples, with axes of size 1 for those of `Z` that they have not; `most` axes at most."""
    if weights is None:
        return None
    check_array("weights", weights)
    check_place("Z", Z, "weights", weights)
    shape, place = tuple(weights.shape), place_of(weights)
    if len(shape) > most or shape != tuple(Z.shape[: len(shape)]) or (not shape and most):
        raise ValueError(f"weights has shape {shape} but must have {tuple(Z.shape[:1])}, one number for each row of Z")
    if place.is_floating and weights.dtype != Z.dtype:
        raise TypeError(f"weights is {place.dtype_name} but Z is {dtype_name(Z.dtype)}; cast it with xp.astype(weights, Z.dtype)")
    with place.entered() as xp:
        return xp.reshape(xp.astype(weights, Z.dtype, copy=False), (*shape, *[1] * (Z.ndim - len(shape))))


def _check_logits(Z: Array) -> None:
    if not place_of(Z).computes:
        check_float("Z", Z)
    if Z.ndim == 0 or Z.shape[-1] == 0:
        raise ValueError(f"Z has shape {tuple(Z.shape)} but must be (..., classes) with at least one class")


def _target_is_ids(Z: Array, target: Array) -> bool:
    """Whether `target` holds class ids and not rows; raises if it fits neither."""
    place, here = place_of(target), place_of(Z)
    if (place.integral or place.dtype_name == "bool") and place.xp is here.xp and place.device == here.device and target.shape == Z.shape[:-1]:
        return True
    check_array("target", target)
    check_place("Z", Z, "target", target)
    if tuple(target.shape) == tuple(Z.shape):
        if place.is_floating and target.dtype != Z.dtype:
            raise TypeError(
                f"target is {place.dtype_name} but Z is {dtype_name(Z.dtype)}; cast it with xp.astype(target, Z.dtype)"
            )
        return False
    if tuple(target.shape) != tuple(Z.shape[:-1]):
        raise ValueError(
            f"target has shape {tuple(target.shape)} but Z has {tuple(Z.shape)}; give class ids of shape "
            f"{tuple(Z.shape[:-1])}, or rows of the shape of Z"
        )
    if place.is_floating:
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
    shifted, E, sums = _exponentials(xp, Z)
    terms = V * (xp.log(sums) - xp.where(V == 0, 0.0, shifted))
    return xp.astype(_total(xp, terms) / S, Z.dtype, copy=False), E / sums, V, S


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

    With `T` the target as rows, smoothed, `w` the weights of classes and `s` those of samples: `V_ic = s_i w_c T_ic`. For class
    ids `S` is the sum of `s_i w_id(i)`, for rows of probabilities that of `s_i`: PyTorch's definitions.
    """
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
    return V, _total(xp, each)


def weighted_cross_entropy_gradient(xp: Namespace, P: Array, V: Array, S: Array) -> Array:
    """`dZ_ic = (P_ic sum_k V_ik - V_ic) / S`."""
    return xp.astype((P * xp.sum(V, axis=-1, keepdims=True) - V) / S, P.dtype, copy=False)


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


def _total(xp: Namespace, terms: Array) -> Array:
    """The sum of `terms`, a 0-d array; of float16 in float32."""
    return xp.asarray(xp.sum(terms, dtype=xp.float32 if dtype_name(terms.dtype) == "float16" else terms.dtype))


def reciprocal(count: int) -> float:
    """`1 / count`; the mean of nothing is NaN, as everywhere in the field."""
    return 1 / count if count else math.nan


class MeanSquaredError:
    """`loss = mean (Z - target)^2` over all elements, as PyTorch's `MSELoss`.

    `forward(Z, target)`: the target has the shape and device of `Z`, or shape `(N,)` for a `Z` of `(N, 1)`; it is of the
    dtype of `Z`, or integers or bools, which are cast.

    >>> import numpy as np
    >>> loss = MeanSquaredError()
    >>> value, cache = loss.forward(np.asarray([[3.0], [1.0]]), np.asarray([1.0, 1.0]))
    >>> float(value), loss.backward(cache)
    (2.0, array([[2.],
           [0.]]))
    """

    def forward(self, Z: Array, target: Array, weights: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """`(loss, cache)`; the loss is a 0-d array of the dtype and on the device of `Z`.

        weights: one per sample, `(N,)`; the mean is weighted by them.

        Raises `ValueError` for a target of another shape, which broadcasting would turn into a wrong loss.
        """
        target = _elements(Z, target)
        if weights is None:
            loss, D = place_of(Z).run(squared_error, Z, target)
            return loss, {"D": D}
        loss, D, V = place_of(Z).run(weighted_squared_error, Z, target, _rows_weights(Z, weights, Z.ndim))
        return loss, {"D": D, "V": V}

    def backward(self, cache: Mapping[str, Array]) -> Array:
        """`dZ = 2 (Z - target) / size`, of the shape of `Z`."""
        D = cache["D"]
        if "V" in cache:
            return place_of(D).run(weighted_squared_error_gradient, D, cache["V"])
        return place_of(D).run(squared_error_gradient, D)

    def divisor(self, Z: Array, target: Array, weights: Array | None = None) -> Any:
        """What the mean divides by: the number of elements, each counted with its weight."""
        return _weight_of_elements(Z, weights)

    def metrics(self, Z: Array, target: Array) -> Mapping[str, Array]:
        """Sums of squared and absolute errors, and of the target's deviations from its mean."""
        return place_of(Z).run(metrics.of_numbers, Z, _elements(Z, target))

    def scores(self, parts: Parts, rows: Any) -> dict[str, float]:
        """`rmse`, `mae`, `r2`, and `baseline_rmse`: that of always saying the mean."""
        return metrics.number_scores(parts, rows)

    def __repr__(self) -> str:
        return "MeanSquaredError()"


class BinaryCrossEntropy:
    """Sigmoid and cross-entropy in one, for labels that are each true or not: of logits, as `BCEWithLogitsLoss` of PyTorch.

    `loss = mean -(p T log S + (1 - T) log(1 - S))` over all elements, with `S = sigmoid(Z)`, formed so that no exponential
    overflows. Its gradient is `dZ = (S (1 + (p - 1) T) - p T) / size`, which without `p` is `(S - T) / size`.

    `forward(Z, target)`: targets in `[0, 1]` of the shape of `Z`, or `(N,)` for a `Z` of `(N, 1)`; integers and bools are cast.
    positive_weights: `p`, a number per label (the last axis of `Z`), by which its positives count more or less.

    >>> import numpy as np
    >>> value, cache = BinaryCrossEntropy().forward(np.zeros((1, 2)), np.asarray([[True, False]]))
    >>> float(value) == float(np.log(2)), BinaryCrossEntropy().backward(cache)
    (True, array([[-0.25,  0.25]]))
    """

    def __init__(self, positive_weights: Sequence[float] | None = None) -> None:
        self.positive_weights = None if positive_weights is None else _weights_of("positive_weights", positive_weights)

    def forward(self, Z: Array, target: Array, weights: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """`(loss, cache)`; the loss is a 0-d array of the dtype and on the device of `Z`.

        weights: one per sample, `(N,)`; the mean is weighted by them.

        Raises `TypeError` and `ValueError` for a target that does not fit `Z`.
        """
        target, p = _elements(Z, target), self.positive_weights
        here = None if p is None else _there("positive_weights", p, Z)
        loss, dZ = place_of(Z).run(binary_cross_entropy, Z, target, here, _rows_weights(Z, weights, Z.ndim))
        return loss, {"dZ": dZ}

    def backward(self, cache: Mapping[str, Array]) -> Array:
        """`dZ`, of the shape of `Z`."""
        dZ: Array = cache["dZ"]
        return dZ

    def divisor(self, Z: Array, target: Array, weights: Array | None = None) -> Any:
        """What the mean divides by: the number of elements, each counted with its weight."""
        return _weight_of_elements(Z, weights)

    def check(self, target: Array, Z: Array) -> None:
        """Raise `ValueError` for targets outside `[0, 1]`. Reads values."""
        place = place_of(target)
        if 0 in target.shape or place.dtype_name == "bool":
            return
        with place.entered() as xp:
            low, high = float(xp.min(target)), float(xp.max(target))
        if not 0 <= low <= high <= 1:
            raise ValueError(f"target has values from {low:g} to {high:g}, but they are to be from 0 (not) to 1 (the label is true)")

    def metrics(self, Z: Array, target: Array) -> Mapping[str, Array]:
        """The labels that are told right, and how many are positive."""
        return place_of(Z).run(metrics.of_labels, Z, _elements(Z, target))

    def scores(self, parts: Parts, rows: Any) -> dict[str, float]:
        """`accuracy` over all labels, and `baseline_accuracy`: that of saying for each label what is more frequent."""
        return metrics.label_scores(parts, rows)

    def __repr__(self) -> str:
        return _shown(self, positive_weights=None)


def _elements(Z: Array, target: Array) -> Array:
    """The target of a loss that compares element by element, in the shape and dtype of `Z`."""
    place, theirs = place_of(Z), place_of(target)
    if not place.computes:
        check_float("Z", Z)
    if theirs is not place:
        if theirs.integral or theirs.dtype_name == "bool":
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


def _weight_of_elements(Z: Array, weights: Array | None) -> Any:
    """How many elements `Z` has, each counted with the weight of its sample."""
    if weights is None:
        return math.prod(Z.shape)
    W = _rows_weights(Z, weights, Z.ndim)
    with place_of(Z).entered() as xp:
        return _total(xp, W) * math.prod(Z.shape[weights.ndim :])


def squared_error(xp: Namespace, Z: Array, target: Array) -> tuple[Array, Array]:
    """`mean D^2`, and `D = Z - target`."""
    D = Z - xp.reshape(target, Z.shape)
    return _sum(xp, D * D, reciprocal(math.prod(Z.shape))), D


def squared_error_gradient(xp: Namespace, D: Array) -> Array:
    """`dZ = 2 D / size`."""
    return D * (2 * reciprocal(math.prod(D.shape)))


def weighted_squared_error(xp: Namespace, Z: Array, target: Array, weights: Array) -> tuple[Array, Array, Array]:
    """`sum_ij V_i D_ij^2`, `D = Z - target` and `V`, the weights of the rows, which sum to 1 over all elements."""
    D = Z - target
    V = _shares(xp, Z, weights)
    return xp.astype(_total(xp, V * (D * D)), Z.dtype, copy=False), D, V


def weighted_squared_error_gradient(xp: Namespace, D: Array, V: Array) -> Array:
    """`dZ = 2 V D`."""
    return 2.0 * V * D


def binary_cross_entropy(
    xp: Namespace, Z: Array, target: Array, positive_weights: Array | None, weights: Array | None
) -> tuple[Array, Array]:
    """The loss, and its gradient by `Z`.

    With `E = exp(-|Z|)`: `-log sigmoid(Z) = max(-Z, 0) + log(1 + E)`, and `-log(1 - sigmoid(Z))` is that of `-Z`.
    """
    E = xp.exp(-xp.abs(Z))
    L = xp.log1p(E)
    pT = target if positive_weights is None else positive_weights * target
    each = pT * (xp.maximum(-Z, 0.0) + L) + (1.0 - target) * (xp.maximum(Z, 0.0) + L)
    sigmoid = xp.where(Z >= 0, 1.0, E) / (1.0 + E)
    dZ = sigmoid * (1.0 - target + pT) - pT
    if weights is None:
        factor = reciprocal(math.prod(Z.shape))
        return _sum(xp, each, factor), dZ * factor
    V = _shares(xp, Z, weights)
    return xp.astype(_total(xp, V * each), Z.dtype, copy=False), V * dZ


def _shares(xp: Namespace, Z: Array, weights: Array) -> Array:
    """What part of the mean each element of `Z` is, with an axis of size 1 for those along which that is the same."""
    per_weight = math.prod(Z.shape) // max(1, math.prod(weights.shape))
    return xp.astype(weights / (_total(xp, weights) * float(per_weight)), Z.dtype, copy=False)
