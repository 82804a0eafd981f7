"""Cross-entropy of labels that are each true or not: one sample may have several, or none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from . import metrics
from .arrays.dtypes import wide
from .arrays.place import Array, Namespace, place_of
from .averages import (
    as_dtype_of,
    as_loss,
    as_row,
    numbers_per_column,
    only_mean,
    reciprocal,
    scaled_sum,
    shares,
    total,
    weight_of_elements,
    weights_of_rows,
)
from .losses import elements_of, shown_with_options
from .metrics import Parts


class BinaryCrossEntropy:
    """Sigmoid and cross-entropy in one, for labels that are each true or not: of logits, as `BCEWithLogitsLoss` of PyTorch.

    `loss = mean -(p T log S + (1 - T) log(1 - S))` over all elements, with `S = sigmoid(Z)`, formed so that no exponential
    overflows. Its gradient is `dZ = (S (1 + (p - 1) T) - p T) / size`, which without `p` is `(S - T) / size`.

    `forward(Z, target)`: targets in `[0, 1]` of the shape of `Z`, or `(N,)` for a `Z` of `(N, 1)`; integers and bools are
    cast.
    positive_weights: `p`, a number per label (the last axis of `Z`), by which its positives count more or less.
    reduction: the mean and no other; the sum is `value * loss.divisor(Z, target)`.

    >>> import numpy as np
    >>> value, cache = BinaryCrossEntropy().forward(np.zeros((1, 2)), np.asarray([[True, False]]))
    >>> float(value) == float(np.log(2)), BinaryCrossEntropy().backward(cache)
    (True, array([[-0.25,  0.25]]))
    """

    positive_weights: tuple[float, ...] | None = None
    is_plain = True  # without weights of samples, all elements count alike in the mean

    def __init__(self, positive_weights: Sequence[float] | None = None, *, reduction: str = "mean") -> None:
        only_mean(reduction)
        p = positive_weights
        self.positive_weights = None if p is None else numbers_per_column("positive_weights", p)

    def forward(self, Z: Array, target: Array, weights: Array | None = None) -> tuple[Array, dict[str, Array]]:
        """`(loss, cache)`; the loss is a 0-d array of the dtype and on the device of `Z`.

        weights: one per sample, `(N,)`; the mean is weighted by them.

        Raises `TypeError` and `ValueError` for a target that does not fit `Z`.
        """
        target, p = elements_of(Z, target), self.positive_weights
        here = None if p is None else as_row("positive_weights", p, Z)
        loss, dZ = place_of(Z).run(binary_cross_entropy, Z, target, here, weights_of_rows(Z, weights, Z.ndim))
        return loss, {"dZ": dZ}

    def backward(self, cache: Mapping[str, Array]) -> Array:
        """`dZ`, of the shape of `Z`."""
        dZ: Array = cache["dZ"]
        return dZ

    def divisor(self, Z: Array, target: Array, weights: Array | None = None) -> Any:
        """What the mean divides by: the number of elements, each counted with its weight."""
        return weight_of_elements(Z, weights)

    def check(self, target: Array, Z: Array) -> None:
        """Raise `ValueError` for targets outside `[0, 1]`. Reads values."""
        place = place_of(target)
        if 0 in target.shape or place.dtype_name == "bool":
            return
        with place.entered() as xp:
            low, high = float(xp.min(target)), float(xp.max(target))
        if not 0 <= low <= high <= 1:
            raise ValueError(f"target has values from {low:g} to {high:g}, but they must be from 0 (false) to 1 (true)")

    def metrics(self, Z: Array, target: Array) -> Mapping[str, Array]:
        """The labels that are told right, and how many are positive."""
        found: dict[str, Array] = place_of(Z).run(metrics.of_labels, Z, elements_of(Z, target))
        return found

    def scores(self, parts: Parts, rows: Any) -> dict[str, float]:
        """`accuracy` over all labels, and `baseline_accuracy`: that of saying for each label what is more frequent."""
        return metrics.label_scores(parts, rows)

    def __repr__(self) -> str:
        return shown_with_options(self, positive_weights=None)


def binary_cross_entropy(
    xp: Namespace, Z: Array, target: Array, positive_weights: Array | None, weights: Array | None
) -> tuple[Array, Array]:
    """The loss, and its gradient by `Z`.

    With `E = exp(-|Z|)`: `-log sigmoid(Z) = max(-Z, 0) + log(1 + E)`, and `-log(1 - sigmoid(Z))` is that of `-Z`.
    """
    like, Z, target = Z, wide(xp, Z), wide(xp, target)
    E = xp.exp(-xp.abs(Z))
    L = xp.log1p(E)
    pT = target if positive_weights is None else positive_weights * target
    each = pT * (xp.maximum(-Z, 0.0) + L) + (1.0 - target) * (xp.maximum(Z, 0.0) + L)
    sigmoid = xp.where(Z >= 0, 1.0, E) / (1.0 + E)
    dZ = sigmoid * (1.0 - target + pT) - pT
    if weights is None:
        factor = reciprocal(math.prod(Z.shape))
        return as_loss(xp, scaled_sum(xp, each, factor), like), as_dtype_of(xp, dZ * factor, like)
    V = shares(xp, Z, weights)
    return as_loss(xp, total(xp, V * each), like), as_dtype_of(xp, V * dZ, like)
