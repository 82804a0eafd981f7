"""What is told of a model besides its loss: accuracy, errors, and those of a baseline that knows only the targets.

Each comes in two halves: sums over a batch, formed where the batch is, and scores of all batches' sums, on the host. Nothing
waits for a device in between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from .arrays.dtypes import wide
from .arrays.place import Array, Namespace, device_of

Parts = Mapping[str, Any]
"""For each name what each batch gave, on the host, the first axis being the batches."""


def of_classes(xp: Namespace, Z: Array, target: Array, ignore_id: int | None = None) -> dict[str, Array]:
    """How many rows have their largest output in the column of the target, and how often each class is the target."""
    found = xp.argmax(Z, axis=-1)
    ids = xp.astype(target, found.dtype) if target.ndim < Z.ndim else xp.argmax(xp.astype(target, Z.dtype), axis=-1)
    # of a row with NaN the largest is the NaN, which would be right by chance
    right = (found == ids) & ~xp.isnan(xp.max(Z, axis=-1))
    if ignore_id is not None:
        right = right & (ids != ignore_id)
    columns = xp.arange(Z.shape[-1], dtype=found.dtype, device=device_of(Z))
    is_class = xp.reshape(ids, (-1, 1)) == columns
    if ignore_id is not None:
        is_class = is_class & (xp.reshape(ids, (-1, 1)) != ignore_id)
    return {"right": xp.count_nonzero(right), "classes": xp.count_nonzero(is_class, axis=0)}


def class_scores(parts: Parts) -> dict[str, float]:
    """The share of rows that are right, and that of the most frequent class."""
    of_class = parts["classes"].sum(axis=0)
    count = float(of_class.sum())
    if not count:
        return {"accuracy": math.nan, "baseline_accuracy": math.nan}
    return {"accuracy": float(parts["right"].sum()) / count, "baseline_accuracy": float(of_class.max()) / count}


def of_labels(xp: Namespace, Z: Array, target: Array) -> dict[str, Array]:
    """How many labels have a positive logit where they are true, and how often each of them is true."""
    true = xp.reshape(target > 0.5, (-1, *target.shape[1:]))
    right = ((Z > 0) == (target > 0.5)) & ~xp.isnan(Z)
    return {"right": xp.count_nonzero(right), "true": xp.count_nonzero(true, axis=0)}


def label_scores(parts: Parts, rows: Any) -> dict[str, float]:
    """The share of labels that are right, and that of what is more frequent for each."""
    true = parts["true"].sum(axis=0)
    count = float(rows.sum())
    elements = count * true.size
    more = np.maximum(true, count - true).sum()
    return {"accuracy": float(parts["right"].sum()) / elements, "baseline_accuracy": float(more) / elements}


def of_numbers(xp: Namespace, Z: Array, target: Array) -> dict[str, Array]:
    """For each output: the sums of squared and of absolute errors, the target's mean, and its squared deviations from it."""
    Z, target = wide(xp, Z), wide(xp, target)
    D = Z - target
    mean = xp.mean(target, axis=0, keepdims=True)
    away = target - mean
    return {
        "squared": xp.sum(D * D, axis=0),
        "absolute": xp.sum(xp.abs(D), axis=0),
        "mean": xp.reshape(mean, mean.shape[1:]),
        "away": xp.sum(away * away, axis=0),
    }


def number_scores(parts: Parts, rows: Any) -> dict[str, float]:
    """Root mean square and mean absolute error, R^2 (the mean over outputs), and the error of always saying the mean.

    The deviations of all rows from their mean are those of each batch from its own, and those of the batches' means (Chan,
    Golub and LeVeque, 1979): sums of squares would cancel.
    """
    count, outputs = float(rows.sum()), parts["squared"][0].size
    weights = rows.reshape(-1, *[1] * (parts["mean"].ndim - 1))
    mean = (weights * parts["mean"]).sum(axis=0) / count
    away = (parts["away"] + weights * (parts["mean"] - mean) ** 2).sum(axis=0)
    squared = parts["squared"].sum(axis=0)
    with np.errstate(all="ignore"):
        explained = np.where(away > 0, 1 - squared / away, np.where(squared > 0, 0.0, 1.0))  # as scikit-learn has it
        return {
            "rmse": math.sqrt(squared.sum() / (count * outputs)),
            "mae": float(parts["absolute"].sum()) / (count * outputs),
            "r2": float(explained.mean()),
            "baseline_rmse": math.sqrt(away.sum() / (count * outputs)),
        }
