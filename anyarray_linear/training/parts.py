"""A batch in parts, of one process or of several: the loss and gradients of the whole from those of its parts."""

from __future__ import annotations

from typing import Any

from ..arrays.dtypes import wide
from ..arrays.place import Array, computing_on, device_of, place_of
from ..protocol import join, trained
from ..scaling import LossScale, value_and_gradient

Gradients = dict[str, Array]
_DIVISOR = "(what the mean divides by)"  # travels among the gradients, as it is summed over ranks with them


def in_parts(
    model: Any,
    loss: Any,
    X: Array,
    y: Array,
    weights: Array | None,
    parts: int,
    rows: int,
    scale: LossScale | None = None,
) -> tuple[Array, Gradients]:
    """The loss and gradients of `X` and `y`, which are a share of a batch of `rows` rows, worked through in `parts` parts.

    Both are what the share adds to those of the batch. Where samples count differently, only the whole batch knows what its
    mean divides by: then this share's part of that is among the gradients, and `divided` divides when all are summed.
    With a scale, the gradients are so much larger. They are summed, and returned, in float32 where the model is float16.
    """
    is_weighted = weights is not None or (hasattr(loss, "divisor") and not getattr(loss, "is_plain", False))
    size = max(1, -(-X.shape[0] // parts))
    value, gradients = None, {}
    for i in range(0, X.shape[0], size):
        whole = size >= X.shape[0]
        some = [x if whole or x is None else x[i : min(i + size, X.shape[0]), ...] for x in (X, y, weights)]
        more, more_gradients = (_weighted if is_weighted else _plain)(model, loss, rows, scale, *some)
        with computing_on(more) as xp:
            more_gradients = {name: wide(xp, dW) for name, dW in more_gradients.items()}
        if value is None:
            value, gradients = more, more_gradients
            continue
        with computing_on(value):
            value = value + more
            gradients = {name: dW + more_gradients[name] for name, dW in gradients.items()}
    return _nothing(model, is_weighted) if value is None else (value, gradients)


def _plain(
    model: Any, loss: Any, rows: int, scale: LossScale | None, X: Array, y: Array, weights: None
) -> tuple[Array, Gradients]:
    """Gradients are linear in `dZ`, and that is small: so it is `dZ` that is scaled."""
    Z, caches = model.forward(X)
    value, dZ = value_and_gradient(loss, Z, y, None)
    share = X.shape[0] / rows
    if share != 1:
        with computing_on(dZ):
            value, dZ = value * share, dZ * share
    dZ = dZ if scale is None else scale.times(dZ, Z.dtype)
    return value, model.gradients(dZ, caches, needs_dX=False)[1]


def _weighted(
    model: Any, loss: Any, rows: int, scale: LossScale | None, X: Array, y: Array, weights: Array | None
) -> tuple[Array, Gradients]:
    Z, caches = model.forward(X)
    with computing_on(Z) as xp:
        exact = wide(xp, Z)
        value, dZ = value_and_gradient(loss, exact, y, weights)
        divisor = _divisor(loss, exact, y, weights)
        if not hasattr(divisor, "dtype"):
            divisor = xp.asarray(divisor, dtype=exact.dtype, device=device_of(Z))
        share = xp.astype(divisor / rows, exact.dtype, copy=False)
        counts = share > 0  # where all samples weigh nothing, the mean is 0/0
        value, dZ = xp.where(counts, value * share, 0.0), xp.where(counts, dZ * share, 0.0)
        dZ = dZ if scale is None else scale.times(dZ, Z.dtype)
    return value, {**model.gradients(dZ, caches, needs_dX=False)[1], _DIVISOR: share}


def _divisor(loss: Any, Z: Array, y: Array, weights: Array | None) -> Any:
    if hasattr(loss, "divisor"):
        return loss.divisor(Z, y, weights)
    if weights is None:
        return Z.shape[0]
    with computing_on(weights) as xp:
        return xp.sum(weights)


def _nothing(model: Any, is_weighted: bool) -> tuple[Array, Gradients]:
    """What an empty share adds; the mean over no rows would be NaN."""
    found = {join(name, p): W for name, layer in trained(model) for p, W in layer.parameters().items()}
    W = next(iter(found.values()))
    with place_of(W).entered() as xp:
        found = {name: wide(xp, W) for name, W in found.items()}
        W = next(iter(found.values()))
        zero = xp.zeros((), dtype=W.dtype, device=device_of(W))
        gradients = {name: xp.zeros_like(W) for name, W in found.items()}
    return zero, {**gradients, _DIVISOR: zero} if is_weighted else gradients


def divided(value: Array, gradients: Gradients) -> tuple[Array, Gradients]:
    """Loss and gradients of the batch, when all of its parts are summed."""
    if _DIVISOR not in gradients:
        return value, gradients
    gradients = dict(gradients)
    total = gradients.pop(_DIVISOR)
    with computing_on(total):
        return value / total, {name: dW / total for name, dW in gradients.items()}
