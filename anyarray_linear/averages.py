"""Means over samples, each of which may count more or less: what losses divide by, and how weights are given."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .arrays.checks import check_array, check_place, describe
from .arrays.device import Device
from .arrays.numbers import real
from .arrays.place import Array, Namespace, Place, dtype_name, is_array, place_of


def numbers_per_column(name: str, values: Any) -> tuple[float, ...]:
    """Weights per class or label as Python floats."""
    if is_array(values):
        values = Device.of(values).to_numpy(values)
    elif isinstance(values, (str, bytes, Mapping)) or not hasattr(values, "__len__"):
        raise TypeError(f"{name} is {describe(values)}; give a list of numbers, one for each column of Z")
    if getattr(values, "ndim", 1) != 1 or not len(values):
        raise ValueError(f"{name} has shape {getattr(values, 'shape', '(0,)')}; give one number for each column of Z")
    return tuple(real(f"{name}[{i}]", value) for i, value in enumerate(values))


def only_mean(reduction: str) -> None:
    """Raise `ValueError` for what PyTorch offers besides the mean, and say what stands for it here."""
    if reduction != "mean":
        raise ValueError(
            f"reduction is {reduction!r}, but losses here are means, so that batches of any size train alike; "
            "the sum is value * loss.divisor(Z, target), and its gradient dZ * loss.divisor(Z, target)"
        )


def as_row(name: str, values: tuple[float, ...], Z: Array) -> Array:
    """`values` where `Z` is and in its dtype (float32 for float16), one for each of its columns."""
    if len(values) != Z.shape[-1]:
        raise ValueError(f"{name} has {len(values)} numbers, but Z has {Z.shape[-1]} columns (shape {tuple(Z.shape)})")
    place = place_of(Z)
    with place.entered() as xp:
        return xp.asarray(values, dtype=_wide_dtype(xp, Z), device=place.device)


def _wide_dtype(xp: Namespace, Z: Array) -> Any:
    """What weights are in: the dtype of `Z`, or float32 for float16."""
    return xp.float32 if dtype_name(Z.dtype) == "float16" else Z.dtype


def weights_of_rows(Z: Array, weights: Array | None, most: int) -> Array | None:
    """The weights of samples, with axes of size 1 for those of `Z` that they have not; `most` axes at most.

    In the dtype of `Z`, or float32 for float16.
    """
    if weights is None:
        return None
    check_array("weights", weights)
    check_place("Z", Z, "weights", weights)
    shape, place = tuple(weights.shape), place_of(weights)
    if len(shape) > most or shape != tuple(Z.shape[: len(shape)]) or (not shape and most):
        raise ValueError(f"weights has shape {shape} but must have {tuple(Z.shape[:1])}, one number for each row of Z")
    if not is_whole(place) and weights.dtype != Z.dtype:
        wanted = dtype_name(Z.dtype)
        raise TypeError(f"weights is {place.dtype_name} but Z is {wanted}; cast it with xp.astype(weights, Z.dtype)")
    with place.entered() as xp:
        return xp.reshape(xp.astype(weights, _wide_dtype(xp, Z), copy=False), (*shape, *[1] * (Z.ndim - len(shape))))


def is_whole(place: Place) -> bool:
    """Whether the dtype is one of integers or bools, which are cast as they are."""
    return place.integral or place.dtype_name == "bool"


def weight_of_elements(Z: Array, weights: Array | None) -> Any:
    """How many elements `Z` has, each counted with the weight of its sample."""
    if weights is None:
        return math.prod(Z.shape)
    W = weights_of_rows(Z, weights, Z.ndim)
    with place_of(Z).entered() as xp:
        return total(xp, W) * math.prod(Z.shape[weights.ndim :])


def scaled_sum(xp: Namespace, terms: Array, factor: float) -> Array:
    """The sum of `terms` times `factor`, a 0-d array."""
    return xp.asarray(xp.sum(terms) * factor)


def total(xp: Namespace, terms: Array) -> Array:
    """The sum of `terms`, a 0-d array of their dtype."""
    return xp.asarray(xp.sum(terms, dtype=terms.dtype))


def as_dtype_of(xp: Namespace, x: Array, like: Array) -> Array:
    """`x` in the dtype of `like`: what was formed in float32 for a float16 array, rounded once."""
    return x if x.dtype == like.dtype else xp.astype(x, like.dtype)


def as_loss(xp: Namespace, total: Array, Z: Array) -> Array:
    """`total` as a 0-d array of the dtype of `Z`; of NumPy's 0-d arrays, arithmetic makes scalars."""
    return xp.astype(xp.asarray(total), Z.dtype, copy=False)


def reciprocal(count: int) -> float:
    """`1 / count`; the mean of nothing is NaN, as everywhere in the field."""
    return 1 / count if count else math.nan


def shares(xp: Namespace, Z: Array, weights: Array) -> Array:
    """What part of the mean each element of `Z` is, with an axis of size 1 for those along which that is the same.

    weights: of `weights_of_rows`; the shares have their dtype.
    """
    per_weight = math.prod(Z.shape) // max(1, math.prod(weights.shape))
    return weights / (total(xp, weights) * per_weight)
