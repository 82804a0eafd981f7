"""Dropout: one kernel each way. The mask is made where it is used, and has the bits of the portable one."""

from __future__ import annotations

import struct

import cupy

from ...arrays.place import Array, Namespace
from ...dropout import FACTORS, threshold
from ...dropout import dropped as portable
from ...dropout import dropped_gradient as portable_gradient
from .kernels import THREADS, TYPES, blocks, by_value, contiguous, kernel

_DROP = "".join(f"#define FACTOR_{i} {factor}u\n" for i, factor in enumerate(FACTORS)) + """
struct Sizes { long long size; double factor; unsigned a, b, threshold, unused; };

__device__ unsigned half_hash(unsigned x)
{
    x = (x ^ x >> 16) * FACTOR_0;
    return (x ^ x >> 15) * FACTOR_1;
}

KERNEL drop(const T* X, T* Z, bool* K, const Sizes s)
{
    const A factor = A(s.factor);
    for (long long i = INDEX; i < s.size; i += STRIDE) {
        const bool kept = half_hash(half_hash(unsigned(i) + s.a) ^ s.b) >> 8 >= s.threshold;
        K[i] = kept;
        Z[i] = T(kept ? A(X[i]) * factor : A(0));
    }
}
"""
_GRADIENT = """
KERNEL drop_gradient(const T* dZ, const bool* K, T* dX, long long size, double factor)
{
    for (long long i = INDEX; i < size; i += STRIDE) dX[i] = T(K[i] ? A(dZ[i]) * A(factor) : A(0));
}
"""


def dropped(xp: Namespace, X: Array, rate: float, a: int, b: int) -> tuple[Array, Array]:
    """`Z = K X / (1 - rate)`, and the mask `K`."""
    if X.dtype.char not in TYPES:
        return portable(xp, X, rate, a, b)
    X, size = contiguous(X), X.size
    Z, K = cupy.ndarray(X.shape, X.dtype), cupy.ndarray(X.shape, bool)
    if size:
        sizes = by_value(struct.pack("qd4I", size, 1 / (1 - rate), a, b, threshold(rate), 0))
        kernel("drop", _DROP, X.dtype.char)((blocks(size),), (THREADS,), (X, Z, K, sizes))
    return Z, K


def dropped_gradient(xp: Namespace, dZ: Array, K: Array, rate: float) -> Array:
    """`dX = K dZ / (1 - rate)`."""
    if dZ.dtype.char not in TYPES or K.dtype.char != "?":
        return portable_gradient(xp, dZ, K, rate)
    dZ, K, size = contiguous(dZ), contiguous(K), dZ.size
    dX = cupy.ndarray(dZ.shape, dZ.dtype)
    if size:
        kernel("drop_gradient", _GRADIENT, dZ.dtype.char)((blocks(size),), (THREADS,), (dZ, K, dX, size, 1 / (1 - rate)))
    return dX
