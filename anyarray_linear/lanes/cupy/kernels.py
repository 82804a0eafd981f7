"""What the kernels of this lane share: their types, their head, and how work is spread over a card.

A launch costs the host some two microseconds, and a fifth of one more for each argument. So kernels take their sizes and
numbers in one `struct` by value, which is packed once per shape. None has a division of 64-bit numbers per element.
"""

from __future__ import annotations

import functools
from typing import Any

import cupy
import numpy as np

from ...arrays.place import Array

THREADS = 256
"""Threads per block of the kernels here."""
BLOCKS = 1024
"""Blocks at most; each thread then goes through the data in strides."""

TYPES = {"e": ("__half", "float"), "f": ("float", "float"), "d": ("double", "double")}
"""By a dtype's character, what its kernels read and write (`T`), and what they compute in (`A`)."""
ACCUMULATOR: dict[str, np.dtype[Any]] = {"e": np.dtype("f"), "f": np.dtype("f"), "d": np.dtype("d")}

_HEAD = """
typedef %(T)s T;
typedef %(A)s A;
#define THREADS %(threads)d
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define INDEX ((long long)blockIdx.x * THREADS + threadIdx.x)
#define STRIDE ((long long)gridDim.x * THREADS)

__device__ A block_sum(A x)
{
    __shared__ A sums[THREADS];
    sums[threadIdx.x] = x;
    for (int n = THREADS / 2; n > 0; n /= 2) {
        __syncthreads();
        if (threadIdx.x < n) sums[threadIdx.x] += sums[threadIdx.x + n];
    }
    __syncthreads();
    return sums[0];
}
"""


@functools.cache
def kernel(name: str, source: str, dtype: str, before: str = "") -> Any:
    """The kernel `name` of `source` for arrays of a dtype; CuPy compiles it once per device and keeps it on disk."""
    T, A = TYPES[dtype]
    include = "#include <cuda_fp16.h>\n" if dtype == "e" else ""
    code = include + before + _HEAD % {"T": T, "A": A, "threads": THREADS} + source
    # without fused multiply-adds, the optimizers give the very bits of the portable definition
    return cupy.RawKernel(code, name, options=("--fmad=false",))


def blocks(size: int) -> int:
    """How many blocks share `size` elements."""
    return max(1, min(BLOCKS, -(-size // THREADS)))


def contiguous(x: Array) -> Array:
    """`x`, or a copy of it whose elements are one after the other."""
    return x if x.flags.c_contiguous else cupy.ascontiguousarray(x)


def by_value(packed: bytes | bytearray) -> Any:
    """What a kernel takes as a struct by value: these bytes. What is written to a bytearray later, it takes then."""
    return np.frombuffer(packed, np.dtype(("V", len(packed)))).reshape(())
