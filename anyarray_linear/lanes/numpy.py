"""The NumPy lane: tall inputs in row blocks, the row of ones made once, and optimizers that update in place.

Many rows of few features are bound by memory, not by arithmetic. Worked through in blocks that stay in the cache, each block
of `X` and `dZ` is fetched from memory once for all the products that need it, and `Z` is still in the cache when the bias is
added. Only scratch memory is shared between blocks; what is returned is the caller's alone.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import numpy as np

from .._arrays import Array, Namespace
from ..linear import LinearGradients
from ..losses import _cross_entropy, _cross_entropy_gradient, _reciprocal
from ..optimizers import SGD, Adam, AdamW, _apply, clipped
from .flat import flat_of

BLOCK_BYTES = 1 << 20
"""How much of `X` and `dZ` together makes a block: what stays in the second-level cache of today's cores."""

PACK = 1 << 14
"""Models with up to so many parameters are updated by one call for all of them."""
BLOCK = 1 << 15
"""Elements updated at a time: parameter, gradient, moments and scratch together stay in the second-level cache."""

_ones: dict[Any, Array] = {}  # by dtype, grown to the largest batch yet; read-only


def ones_row(count: int, dtype: Any) -> Array:
    """A read-only row of ones, `(1, count)`, not made anew each time."""
    row = _ones.get(dtype)
    if row is None or row.shape[1] < count:
        row = np.ones((1, max(count, 1024)), dtype)
        row.flags.writeable = False
        _ones[dtype] = row
    return row[:, :count]


def block_rows(X: Array, W: Array) -> int:
    """How many rows make a block; 0 where the rows are too few or too long for blocks to help."""
    if X.shape[0] < 2048:
        return 0
    out_features, in_features = W.shape
    rows: int = BLOCK_BYTES // ((in_features + out_features) * X.itemsize)
    return rows if rows >= 512 and X.shape[0] >= 4 * rows else 0


def forward(xp: Namespace, X: Array, W: Array, b: Array | None) -> Array:
    """`Z = X W^T + b`."""
    rows = block_rows(X, W)
    if not rows:
        Z = X.dot(W.T)  # for two axes the same BLAS call as @, with half a microsecond less around it
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


def backward(xp: Namespace, dZ: Array, X: Array, W: Array, bias: bool, needs_dX: bool) -> LinearGradients:
    """`dX = dZ W`, `dW = dZ^T X` and `db = 1^T dZ`."""
    rows = block_rows(X, W)
    if not rows:
        db = ones_row(dZ.shape[0], dZ.dtype).dot(dZ) if bias else None
        return LinearGradients(dZ.dot(W) if needs_dX else None, dZ.T.dot(X), db)
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
    return LinearGradients(dX, dW, db)


# the loss


def cross_entropy(xp: Namespace, Z: Array, target: Array, ids: bool) -> tuple[Array, dict[str, Array]]:
    """The loss and its cache for class ids, which stay ids: no row of zeros is made, and the softmax is formed in place."""
    if not ids or Z.ndim != 2 or not Z.shape[0]:
        return _cross_entropy(xp, Z, target, ids)
    rows = np.arange(Z.shape[0])
    P = Z - Z.max(axis=1, keepdims=True)
    at_target = P[rows, target]
    np.exp(P, out=P)
    S = P.sum(axis=1, keepdims=True)
    P /= S
    loss = (np.log(S[:, 0]) - at_target).sum() * _reciprocal(Z.shape[0])
    return np.asarray(loss), {"P": P, "T": target}


def cross_entropy_gradient(xp: Namespace, P: Array, T: Array) -> Array:
    """`dZ = (P - T) / N`."""
    if T.ndim == P.ndim:
        return _cross_entropy_gradient(xp, P, T)
    dZ = P.copy()
    dZ[np.arange(P.shape[0]), T] -= 1
    dZ *= _reciprocal(P.shape[0])
    return dZ


# the optimizer


def apply(
    xp: Namespace,
    optimizer: Any,
    places: Mapping[str, tuple[Any, str]],
    gradients: Mapping[str, Array],
    lr: float,
    where: Array | None,
) -> None:
    """Clip and update in place, in blocks that stay in the cache, on all cores: bit for bit the portable definition."""
    rule = _RULES.get(type(optimizer))
    if rule is None:  # somebody's own rule
        return _apply(xp, optimizer, places, gradients, lr, where)
    flat = flat_of(xp, optimizer, places)
    if where is not None and not where:
        return None
    if optimizer.clip_norm is not None:
        gradients = clipped(gradients, optimizer.clip_norm)
    if flat.W.size <= PACK:  # one call for all parameters, where calls cost more than copying the gradients
        packed = np.concatenate([gradients[name].reshape(-1) for name in flat.views])
        pieces = [(flat.W, packed, flat.moments)]
    else:
        pieces = [
            (flat.W[part], gradients[name].reshape(-1), [moment[part] for moment in flat.moments])
            for name, part in flat.slices.items()
        ]
    blocks = [
        (W[i : i + BLOCK], dW[i : i + BLOCK], [moment[i : i + BLOCK] for moment in moments])
        for W, dW, moments in pieces
        for i in range(0, W.size, BLOCK)
    ]

    def update(blocks: list[Any]) -> None:
        scratch = np.empty(min(BLOCK, flat.W.size), flat.W.dtype)
        for W, dW, moments in blocks:
            rule(optimizer, W, dW, moments, scratch[: W.size], lr, optimizer.steps)

    _on_all_cores(update, blocks)
    return None


def _adam(optimizer: Any, W: Array, dW: Array, moments: list[Array], S: Array, lr: float, t: int) -> None:
    """`Adam._update` in place, operation by operation; `S` is scratch."""
    M, V = moments
    beta1, beta2 = optimizer.betas
    if optimizer.weight_decay:
        if type(optimizer) is AdamW:
            W *= 1 - lr * optimizer.weight_decay
        else:
            dW = dW + np.multiply(W, optimizer.weight_decay, out=S)
    np.multiply(dW, 1 - beta1, out=S)
    M *= beta1
    M += S
    np.multiply(dW, dW, out=S)
    S *= 1 - beta2
    V *= beta2
    V += S
    np.sqrt(V, out=S)
    S /= math.sqrt(1 - beta2**t)
    S += optimizer.eps
    np.divide(M, S, out=S)
    S *= lr / (1 - beta1**t)
    W -= S


def _sgd(optimizer: Any, W: Array, dW: Array, moments: list[Array], S: Array, lr: float, t: int) -> None:
    """`SGD._update` in place, operation by operation; `S` is scratch."""
    if optimizer.weight_decay:
        dW = dW + np.multiply(W, optimizer.weight_decay, out=S)
    if optimizer.momentum:
        (V,) = moments
        V *= optimizer.momentum
        V += dW
        dW = np.add(dW, np.multiply(V, optimizer.momentum, out=S), out=S) if optimizer.nesterov else V
    W -= np.multiply(dW, lr, out=S)


_RULES: dict[type, Callable[..., None]] = {SGD: _sgd, Adam: _adam, AdamW: _adam}

_pool: ThreadPoolExecutor | None = None


def _forget_pool() -> None:
    global _pool
    _pool = None


os.register_at_fork(after_in_child=_forget_pool)  # threads do not survive a fork


def _on_all_cores(work: Callable[[list[Any]], None], blocks: list[Any]) -> None:
    """`work` on shares of the blocks, one share per core; NumPy lets go of the interpreter while it computes."""
    global _pool
    cores = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(blocks) // 2)
    if cores < 2:
        return work(blocks)
    if _pool is None:
        _pool = ThreadPoolExecutor(thread_name_prefix="anyarray_linear")
    # in the caller's context: np.errstate counts there too
    others = [_pool.submit(copy_context().run, work, blocks[i::cores]) for i in range(1, cores)]
    work(blocks[::cores])
    for other in others:
        other.result()
    return None
