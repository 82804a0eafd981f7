"""Losses: one kernel each way. Rows of cross-entropy are shared by neighbours in a warp."""

from __future__ import annotations

import functools
import struct
from typing import Any

import cupy

from ...arrays.place import Array, Namespace
from ...averages import reciprocal
from . import rows
from .kernels import ACCUMULATOR, THREADS, blocks, by_value, contiguous, kernel

ONE_BLOCK = 1 << 11
"""A loss over up to so many elements is one kernel of one block; over more, the blocks' sums are added by a second one."""

_CROSS_ENTROPY = rows.SOURCE + """
KERNEL cross_entropy(const T* Z, const TARGET* target, T* P, A* partial, T* loss, const Sizes s)
{
    A total = 0;
    WALK {
        ROW
        const T* z = Z + start;
        A top = A(z[0]);  // a NaN need not get here: it is in the sum, too
        EACH_COLUMN top = max(top, A(z[j]));
        for (int o = width / 2; o > 0; o /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, o));
        A S = 0;
        EACH_COLUMN S += exp(A(z[j]) - top);
        S = shared_sum(S, width);
        A term = 0;
#ifdef IDS
        const long long id = (long long)target[row];
        if (neighbour == 0)
            term = id < 0 || id >= s.columns ? A(__int_as_float(0x7fc00000)) : log(S) - (A(z[id]) - top);
#else
        EACH_COLUMN {
            const A t = A(target[start + j]);
            term += t * (log(S) - (t == A(0) ? A(0) : A(z[j]) - top));
        }
#endif
        if (here) total += term;
        EACH_COLUMN P[start + j] = T(exp(A(z[j]) - top) / S);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) {
        if (gridDim.x == 1) *loss = T(total * A(s.factor));
        else partial[blockIdx.x] = total;
    }
}
"""

_CROSS_ENTROPY_GRADIENT = rows.SOURCE + """
KERNEL cross_entropy_gradient(const T* P, const TARGET* target, T* dZ, const Sizes s)
{
    const A factor = A(s.factor);
    WALK {
        ROW
#ifdef IDS
        const long long id = (long long)target[row];
        const bool wrong = id < 0 || id >= s.columns;
        EACH_COLUMN {
            const A t = wrong ? A(__int_as_float(0x7fc00000)) : A(j == id);
            dZ[start + j] = T((A(P[start + j]) - t) * factor);
        }
#else
        A sum = 0;
        EACH_COLUMN sum += A(target[start + j]);
        sum = shared_sum(sum, width);
        EACH_COLUMN dZ[start + j] = T((A(P[start + j]) * sum - A(target[start + j])) * factor);
#endif
    }
}
"""

_SQUARED_ERROR = """
struct Sizes { long long size; double factor; int blocks, unused; };

KERNEL squared_error(const T* Z, const T* target, T* D, A* partial, T* loss, const Sizes s)
{
    A total = 0;
    for (long long i = INDEX; i < s.size; i += STRIDE) {
        const T d = T(A(Z[i]) - A(target[i]));
        D[i] = d;
        total += A(d) * A(d);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) {
        if (gridDim.x == 1) *loss = T(total * A(s.factor));
        else partial[blockIdx.x] = total;
    }
}
"""

_SCALED = """
KERNEL scaled(const T* D, T* dZ, long long size, double factor)
{
    for (long long i = INDEX; i < size; i += STRIDE) dZ[i] = T(A(D[i]) * A(factor));
}
"""

_FINISH = """
KERNEL finish(const A* partial, T* loss, long long count, double factor)
{
    A total = 0;
    for (long long i = threadIdx.x; i < count; i += THREADS) total += partial[i];
    total = block_sum(total);
    if (threadIdx.x == 0) *loss = T(total * A(factor));
}
"""

_IDS = {
    "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long",
    "uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned int", "uint64": "unsigned long long",
}  # fmt: skip


@functools.cache
def _cross_entropy(name: str, source: str, dtype: str, ids: Any) -> Any:
    kind = "#define TARGET T\n" if ids is None else f"#define IDS\n#define TARGET {_IDS[ids.name]}\n"
    return kernel(name, source, dtype, kind)


@functools.lru_cache(maxsize=4096)
def _row_sizes(size: int, classes: int) -> tuple[int, int, float, Any]:
    """Blocks forward and back, the factor, and the sizes."""
    count = size // classes
    (shift, spread), factor = rows.shared(count, classes), reciprocal(count)
    sizes = by_value(struct.pack(rows.SIZES, count, classes, factor, shift, 0))
    return 1 if size <= ONE_BLOCK else spread, spread, factor, sizes


@functools.lru_cache(maxsize=4096)
def _sizes(size: int) -> tuple[int, float, Any]:
    factor = reciprocal(size)
    sizes = by_value(struct.pack("qdii", size, factor, 0, 0))
    return 1 if size <= ONE_BLOCK else blocks(size), factor, sizes


def _summed(work: Any, arguments: tuple[Any, ...], sizes: Any, grid: int, factor: float, x: Array) -> Array:
    """Run a loss kernel, and where it has several blocks the one that adds up their sums; the 0-d loss."""
    loss = cupy.ndarray((), x.dtype)
    if grid == 1:
        work((1,), (THREADS,), (*arguments, None, loss, sizes))
        return loss
    partial = cupy.ndarray((grid,), ACCUMULATOR[x.dtype.char])
    work((grid,), (THREADS,), (*arguments, partial, loss, sizes))
    kernel("finish", _FINISH, x.dtype.char)((1,), (THREADS,), (partial, loss, grid, factor))
    return loss


def cross_entropy(xp: Namespace, Z: Array, target: Array) -> tuple[Array, Array]:
    """The loss, and the softmax."""
    ids = target.ndim < Z.ndim
    if not ids:
        target = target.astype(Z.dtype, copy=False)
    Z, target = contiguous(Z), contiguous(target)
    P = cupy.ndarray(Z.shape, Z.dtype)
    grid, _, factor, sizes = _row_sizes(Z.size, Z.shape[-1])
    work = _cross_entropy("cross_entropy", _CROSS_ENTROPY, Z.dtype.char, target.dtype if ids else None)
    return _summed(work, (Z, target, P), sizes, grid, factor, Z), P


def cross_entropy_gradient(xp: Namespace, P: Array, T: Array) -> Array:
    """`dZ = (P - T) / N`, with `T` class ids or rows."""
    T = T if T.ndim < P.ndim else T.astype(P.dtype, copy=False)
    P, T, dZ = contiguous(P), contiguous(T), cupy.ndarray(P.shape, P.dtype)
    if P.size:
        _, grid, _, sizes = _row_sizes(P.size, P.shape[-1])
        ids = T.dtype if T.ndim < P.ndim else None
        work = _cross_entropy("cross_entropy_gradient", _CROSS_ENTROPY_GRADIENT, P.dtype.char, ids)
        work((grid,), (THREADS,), (P, T, dZ, sizes))
    return dZ


def squared_error(xp: Namespace, Z: Array, target: Array) -> tuple[Array, Array]:
    """`mean D^2`, and `D = Z - target`."""
    D = cupy.ndarray(Z.shape, Z.dtype)
    grid, factor, sizes = _sizes(Z.size)
    work = kernel("squared_error", _SQUARED_ERROR, Z.dtype.char)
    return _summed(work, (contiguous(Z), contiguous(target.reshape(Z.shape)), D), sizes, grid, factor, Z), D


def squared_error_gradient(xp: Namespace, D: Array) -> Array:
    """`dZ = 2 D / size`."""
    D, dZ = contiguous(D), cupy.ndarray(D.shape, D.dtype)
    if D.size:
        work = kernel("scaled", _SCALED, D.dtype.char)
        work((blocks(D.size),), (THREADS,), (D, dZ, D.size, 2 * reciprocal(D.size)))
    return dZ
