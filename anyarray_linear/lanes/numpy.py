"""The NumPy lane: tall inputs in row blocks, the row of ones made once, and optimizers that update in place.

Many rows of few features are bound by memory, not by arithmetic. Worked through in blocks that stay in the cache, each block
of `X` and `dZ` is fetched from memory once for all the products that need it, and `Z` is still in the cache when the bias is
added. Only scratch memory is shared between blocks; what is returned is the caller's alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ..activations import ReLU, activation_gradient
from ..arrays.place import Array, Namespace
from ..averages import reciprocal
from ..binding import Binding, Flat, flat_of
from ..clipping import clipped
from ..guard import all_finite
from ..linear import affine, affine_gradients
from ..losses import cross_entropy, cross_entropy_gradient, range_of
from ..optimizers import SGD, Adam, AdamW, apply_update

# An array of 32 MiB that nobody touches, freed at once: from then on glibc keeps freed memory of up to that size at hand. It
# would give it back to the system, and take it again page by page, at each step: a quarter of the time of a tall layer.
np.empty((1 << 25) - (1 << 13), np.uint8)

BLOCK_BYTES = 1 << 20
"""How much of `X` and `dZ` together makes a block: what stays in the second-level cache of today's cores."""

PACK = 1 << 14
"""Neighbouring parameters of up to so many elements together are updated by one call for all of them."""
BLOCK = 1 << 16
"""Elements updated at a time: with gradient, moments and scratch what stays in the cache between the passes."""
SMALL = 1 << 13
"""Products of arrays of fewer elements each are formed by `dot`: the same BLAS with 0.3 us less around it, but it fills its
result with zeros first, which is more than that for larger ones."""


@lru_cache(8)
def ones_row(count: int, dtype: Any) -> Array:
    """A read-only row of ones, `(1, count)`, not made anew each time."""
    row = np.ones((1, count), dtype)
    row.flags.writeable = False
    return row


TALL = 2048
"""Fewer rows are never worked through in blocks."""


def block_rows(X: Array, W: Array) -> int:
    """How many rows make a block; 0 where they are too long, or too few, for blocks to help."""
    out_features, in_features = W.shape
    rows: int = BLOCK_BYTES // ((in_features + out_features) * X.itemsize)
    return rows if rows >= 512 and X.shape[0] >= 4 * rows else 0


def _affine(xp: Namespace, X: Array, W: Array, b: Array | None) -> Array:
    """`Z = X W^T + b`."""
    rows = block_rows(X, W) if len(X) >= TALL else 0
    if not rows:
        Z = X.dot(W.T) if X.size < SMALL and W.size < SMALL else X @ W.T
        if b is not None:
            Z += b
        return Z
    Z = np.empty((X.shape[0], W.shape[0]), W.dtype)
    for i in range(0, X.shape[0], rows):
        Z_block = Z[i : i + rows]
        np.matmul(X[i : i + rows], W.T, out=Z_block)
        if b is not None:
            Z_block += b
    return Z


def _affine_gradients(
    xp: Namespace, dZ: Array, X: Array, W: Array, bias: bool, needs_dX: bool
) -> tuple[Array | None, Array, Array | None]:
    """`dX = dZ W`, `dW = dZ^T X` and `db = 1^T dZ`."""
    rows = block_rows(X, W) if len(X) >= TALL else 0
    if not rows:
        db = ones_row(len(dZ), dZ.dtype).dot(dZ) if bias else None
        if X.size < SMALL and W.size < SMALL:
            return dZ.dot(W) if needs_dX else None, dZ.T.dot(X), db
        return dZ @ W if needs_dX else None, dZ.T @ X, db
    dX = np.empty(X.shape, W.dtype) if needs_dX else None
    dW, scratch = np.zeros(W.shape, W.dtype), np.empty(W.shape, W.dtype)
    db = np.zeros((1, W.shape[0]), W.dtype) if bias else None
    for i in range(0, X.shape[0], rows):
        dZ_block = dZ[i : i + rows]
        if dX is not None:
            np.matmul(dZ_block, W, out=dX[i : i + rows])
        np.matmul(dZ_block.T, X[i : i + rows], out=scratch)
        dW += scratch
        if db is not None:
            db += ones_row(dZ_block.shape[0], dZ.dtype) @ dZ_block
    return dX, dW, db


# activations


def _activation_gradient(xp: Namespace, layer: Any, dZ: Array, kept: Array) -> Array:
    """`dX = dZ f'(X)`; for `ReLU` by masking the bits of `dZ`, as `where` mispredicts a branch at every other element."""
    if type(layer) is not ReLU or dZ.dtype not in _BITS:
        return activation_gradient(xp, layer, dZ, kept)
    bits = _BITS[dZ.dtype]
    dX = np.subtract(kept <= 0, 1, dtype=bits)  # no bit where Z <= 0, every bit elsewhere
    dX &= dZ.view(bits)
    return dX.view(dZ.dtype)


_BITS: dict[Any, Any] = {np.dtype("float32"): np.dtype("int32"), np.dtype("float64"): np.dtype("int64")}


# the loss


@lru_cache(8)
def _numbers(count: int) -> Array:
    """The numbers below `count`, not made anew each time; read-only."""
    numbers = np.arange(count)
    numbers.flags.writeable = False
    return numbers


def _range_of(xp: Namespace, target: Array) -> tuple[int, int]:
    """The smallest and the largest class id."""
    return int(np.minimum.reduce(target, axis=None)), int(np.maximum.reduce(target, axis=None))


def _cross_entropy(xp: Namespace, Z: Array, target: Array) -> tuple[Array, Array]:
    """The loss and the softmax for class ids: no row of zeros is made, and the softmax is formed in place."""
    if target.ndim == Z.ndim or Z.ndim != 2 or not len(Z):
        return cross_entropy(xp, Z, target)
    P = Z - np.maximum.reduce(Z, axis=1, keepdims=True)
    at_target = P[_numbers(len(Z)), target]
    np.exp(P, out=P)
    S = np.add.reduce(P, axis=1, keepdims=True)
    P /= S
    loss = np.add.reduce(np.log(S[:, 0]) - at_target) * reciprocal(len(Z))
    return np.asarray(loss), P


def _cross_entropy_gradient(xp: Namespace, P: Array, target: Array) -> Array:
    """`dZ = (P - T) / N`."""
    if target.ndim == P.ndim or P.ndim != 2:
        return cross_entropy_gradient(xp, P, target)
    dZ = P.copy()
    dZ[_numbers(len(P)), target] -= 1
    dZ *= reciprocal(len(P))
    return dZ


# the training loop


def _all_finite(xp: Namespace, x: Array) -> bool:
    """Whether no element is NaN or infinite; the sum without what `np.sum` has around it."""
    return math.isfinite(np.add.reduce(x, axis=None)) or bool(np.isfinite(x).all())


# the optimizer


@np.errstate(under="ignore")  # harmless, and what is half updated in place could not be done again
def _apply_update(
    xp: Namespace,
    optimizer: Any,
    bound: Binding,
    gradients: Mapping[str, Array],
    by: Any,
    where: Array | None,
    scale: Array | None = None,
) -> None:
    """Clip and update in place, in blocks that stay in the cache: bit for bit the portable definition."""
    rule = _RULES.get(type(optimizer))
    if rule is None or scale is not None:  # somebody's own rule, or a loop's own scale
        return apply_update(xp, optimizer, bound, gradients, by, where, scale)
    flat = flat_of(xp, bound)
    if where is not None and not where:
        return None
    if optimizer.clip_norm is not None:
        gradients = clipped(gradients, optimizer.clip_norm)
    if flat.W.size <= PACK:  # the usual case of a small model, without what only large ones need
        ((W, dW, moments),) = _pieces(flat, gradients)
        rule(W, dW, moments, np.empty_like(dW), by)
        return None
    scratch = np.empty(min(BLOCK, flat.W.size), flat.W.dtype)
    for W, dW, moments in _pieces(flat, gradients):
        for i in range(0, W.size, BLOCK):
            part = slice(i, min(i + BLOCK, W.size))
            rule(W[part], dW[part], [moment[part] for moment in moments], scratch[: part.stop - i], by)
    return None


def _pieces(flat: Flat, gradients: Mapping[str, Array]) -> Iterator[tuple[Array, Array, list[Array]]]:
    """`(W, dW, moments)` of each large parameter, and of runs of small ones, whose gradients are copied together: a call
    costs more than the copy."""
    run: list[Array] = []
    start = end = 0
    for name, part in flat.slices.items():
        dW = gradients[name].reshape(-1)
        if run and part.stop - start > PACK:
            yield flat.W[start:end], _joined(run), [moment[start:end] for moment in flat.moments]
            run = []
        if not run:
            start = part.start
        run.append(dW)
        end = part.stop
    yield flat.W[start:end], _joined(run), [moment[start:end] for moment in flat.moments]


def _joined(run: list[Array]) -> Array:
    return run[0] if len(run) == 1 else np.concatenate(run)


def _adam(W: Array, dW: Array, moments: list[Array], S: Array, by: Any) -> None:
    """`Adam.update` in place, operation by operation; `S` is scratch."""
    M, V = moments
    if by.shrink != 1:
        W *= by.shrink
    if by.decay:
        dW = dW + np.multiply(W, by.decay, out=S)
    np.multiply(dW, by.rest1, S)
    np.multiply(M, by.beta1, M)
    np.add(M, S, M)
    np.multiply(dW, dW, S)
    np.multiply(S, by.rest2, S)
    np.multiply(V, by.beta2, V)
    np.add(V, S, V)
    np.sqrt(V, S)
    np.add(S, by.eps, S)
    np.divide(M, S, S)
    np.multiply(S, by.rate, S)
    np.subtract(W, S, W)


def _sgd(W: Array, dW: Array, moments: list[Array], S: Array, by: Any) -> None:
    """`SGD.update` in place, operation by operation; `S` is scratch."""
    if by.decay:
        dW = dW + np.multiply(W, by.decay, out=S)
    if by.momentum:
        (V,) = moments
        V *= by.momentum
        V += dW
        dW = np.add(dW, np.multiply(V, by.momentum, out=S), out=S) if by.nesterov else V
    W -= np.multiply(dW, by.lr, out=S)


_RULES: dict[type, Callable[..., None]] = {SGD: _sgd, Adam: _adam, AdamW: _adam}


OPERATIONS = {
    affine: _affine,
    affine_gradients: _affine_gradients,
    activation_gradient: _activation_gradient,
    range_of: _range_of,
    cross_entropy: _cross_entropy,
    cross_entropy_gradient: _cross_entropy_gradient,
    all_finite: _all_finite,
    apply_update: _apply_update,
}
"""The portable operations, and their faster equals for NumPy arrays."""
