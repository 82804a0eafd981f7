"""Layer normalisation: one kernel for the rows each way, and one or two for the gradients of the parameters."""

from __future__ import annotations

import functools
import struct
from typing import Any

import cupy

from ...arrays.place import Array, Namespace
from ...normalization import normalized as portable
from ...normalization import normalized_gradients as portable_gradients
from ...normalization import normalized_input_gradient as portable_input_gradient
from . import rows
from .kernels import ACCUMULATOR, THREADS, TYPES, blocks, by_value, contiguous, kernel

TILE = 32
"""Columns that a block of the sums over rows takes; its threads are so many columns and `THREADS / TILE` rows."""
ROWS = 128
"""Rows that a block of these sums takes at least, before there are several whose sums are added by a second kernel."""
PARTS = 128
"""Such blocks at most, one below the other."""

# `factor` is eps
_NORMALIZE = rows.SOURCE + """
KERNEL normalize(const T* X, const T* W, const T* b, T* Z, A* H, A* R, const Sizes s)
{
    const A n = A(s.columns);
    WALK {
        ROW
        A m = 0, v = 0;
        EACH_COLUMN m += A(X[start + j]);
        m = shared_sum(m, width) / n;
        EACH_COLUMN {
            const A d = A(X[start + j]) - m;
            v += d * d;
        }
        v = shared_sum(v, width) / n;
        const A r = A(1) / sqrt(v + A(s.factor));
        EACH_COLUMN {
            const A h = (A(X[start + j]) - m) * r;
            H[start + j] = h;
            Z[start + j] = T(h * A(W[j]) + A(b[j]));
        }
        if (here && neighbour == 0) R[row] = r;
    }
}
"""

_GRADIENT = rows.SOURCE + """
KERNEL normalize_gradient(const T* dZ, const A* H, const A* R, const T* W, T* dX, const Sizes s)
{
    const A n = A(s.columns);
    WALK {
        ROW
        A mean = 0, along_H = 0;
        EACH_COLUMN {
            const A dh = A(dZ[start + j]) * A(W[j]);
            mean += dh;
            along_H += dh * H[start + j];
        }
        mean = shared_sum(mean, width) / n;
        along_H = shared_sum(along_H, width) / n;
        EACH_COLUMN dX[start + j] = T(R[row] * (A(dZ[start + j]) * A(W[j]) - mean - H[start + j] * along_H));
    }
}
"""

_COLUMN_SUMS = f"#define TILE {TILE}\n" + """
struct Sizes { long long rows, columns, each; };

// The sums over rows of dZ H and of dZ: a block adds up `each` rows of TILE columns.
KERNEL column_sums(const T* dZ, const A* H, A* partial, T* dW, T* db, const Sizes s)
{
    __shared__ A sums[2][THREADS];
    const int t = threadIdx.x;
    const long long column = (long long)blockIdx.x * TILE + t % TILE;
    const long long first = blockIdx.y * s.each, end = min(first + s.each, s.rows);
    A w = 0, b = 0;
    if (column < s.columns) {
        for (long long row = first + t / TILE; row < end; row += THREADS / TILE) {
            const A g = A(dZ[row * s.columns + column]);
            w += g * H[row * s.columns + column];
            b += g;
        }
    }
    sums[0][t] = w;
    sums[1][t] = b;
    for (int n = THREADS / 2; n >= TILE; n /= 2) {
        __syncthreads();
        if (t < n) {
            sums[0][t] += sums[0][t + n];
            sums[1][t] += sums[1][t + n];
        }
    }
    if (t < TILE && column < s.columns) {
        if (gridDim.y == 1) {
            dW[column] = T(sums[0][t]);
            db[column] = T(sums[1][t]);
        } else {
            A* part = partial + 2 * blockIdx.y * s.columns + column;
            part[0] = sums[0][t];
            part[s.columns] = sums[1][t];
        }
    }
}
"""

_ADD_PARTS = """
KERNEL add_parts(const A* partial, T* dW, T* db, long long columns, int parts)
{
    for (long long j = INDEX; j < columns; j += STRIDE) {
        A w = 0, b = 0;
        for (int k = 0; k < parts; k++) {
            w += partial[2 * k * columns + j];
            b += partial[(2 * k + 1) * columns + j];
        }
        dW[j] = T(w);
        db[j] = T(b);
    }
}
"""


@functools.lru_cache(maxsize=4096)
def _row_sizes(count: int, columns: int, eps: float) -> tuple[tuple[int], Any]:
    shift, grid = rows.shared(count, columns)
    return (grid,), by_value(struct.pack(rows.SIZES, count, columns, eps, shift, 0))


@functools.lru_cache(maxsize=4096)
def _column_sizes(count: int, columns: int) -> tuple[tuple[int, int], Any]:
    parts = max(1, min(PARTS, -(-count // ROWS)))
    each = -(-count // parts)
    return (-(-columns // TILE), parts), by_value(struct.pack("qqq", count, columns, each))


def _is_known(dZ: Array, H: Array, R: Array) -> bool:
    """Whether the cache is as the kernels take it: it need not be that of a forward pass here."""
    return dZ.dtype.char in TYPES and H.dtype == R.dtype == ACCUMULATOR[dZ.dtype.char] and R.size * H.shape[-1] == H.size


def normalized(xp: Namespace, X: Array, W: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    """`Z = H * W + b`, `H = R (X - mean)` and `R = 1 / sqrt(variance + eps)`."""
    if X.dtype.char not in TYPES:
        return portable(xp, X, W, b, eps)
    X, shape, dtype = contiguous(X), X.shape, X.dtype
    wide = ACCUMULATOR[dtype.char]
    Z, H, R = cupy.ndarray(shape, dtype), cupy.ndarray(shape, wide), cupy.ndarray((*shape[:-1], 1), wide)
    if X.size:
        grid, sizes = _row_sizes(R.size, shape[-1], eps)
        work = kernel("normalize", _NORMALIZE, dtype.char)
        work(grid, (THREADS,), (X, contiguous(W), contiguous(b), Z, H, R, sizes))
    return Z, H, R


def normalized_gradients(
    xp: Namespace, dZ: Array, H: Array, R: Array, W: Array, needs_dX: bool
) -> tuple[Array | None, Array, Array]:
    """`dX = R (dH - mean dH - H mean(dH * H))` with `dH = dZ * W`, `dW = 1^T (dZ * H)` and `db = 1^T dZ`."""
    if not _is_known(dZ, H, R):
        return portable_gradients(xp, dZ, H, R, W, needs_dX)
    dZ, H = contiguous(dZ), contiguous(H)
    dX = normalized_input_gradient(xp, dZ, H, R, W) if needs_dX else None
    columns, dtype = dZ.shape[-1], dZ.dtype
    dW, db = cupy.ndarray((columns,), dtype), cupy.ndarray((columns,), dtype)
    grid, sizes = _column_sizes(R.size, columns)
    parts = grid[1]
    partial = None if parts == 1 else cupy.ndarray((parts, 2, columns), H.dtype)
    kernel("column_sums", _COLUMN_SUMS, dtype.char)(grid, (THREADS,), (dZ, H, partial, dW, db, sizes))
    if partial is not None:
        work = kernel("add_parts", _ADD_PARTS, dtype.char)
        work((blocks(columns),), (THREADS,), (partial, dW, db, columns, parts))
    return dX, dW, db


def normalized_input_gradient(xp: Namespace, dZ: Array, H: Array, R: Array, W: Array) -> Array:
    """`dX = R (dH - mean dH - H mean(dH * H))` with `dH = dZ * W`."""
    if not _is_known(dZ, H, R):
        return portable_input_gradient(xp, dZ, H, R, W)
    dX = cupy.ndarray(dZ.shape, dZ.dtype)
    if dZ.size:
        grid, sizes = _row_sizes(R.size, dZ.shape[-1], 0.0)
        work = kernel("normalize_gradient", _GRADIENT, dZ.dtype.char)
        work(grid, (THREADS,), (contiguous(dZ), contiguous(H), contiguous(R), contiguous(W), dX, sizes))
    return dX
