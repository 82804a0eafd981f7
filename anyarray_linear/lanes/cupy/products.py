"""Products: one call of cuBLAS each, eagerly and while a stream is captured into a CUDA graph.

CuPy's `@` does more than ask for a product, forms some of them in float16, and refuses while a stream is captured. So
products are asked for by `cublasGemmEx` itself: eagerly through CuPy's own binding, the cheapest way there; under capture by
its address in the library that CuPy has loaded, since the binding looks for a capture. Both use a handle of this lane's own,
per thread and device. Under capture it has a workspace of the graph's own: cuBLAS must not allocate then.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import numpy as np
from cupy_backends.cuda.libs import cublas

from ...arrays.place import Array, Namespace
from ...arrays.tf32 import in_tf32
from .activations import add_bias

_BEST_ALGORITHM = -1
_FLOAT32, _FLOAT64, _IN_TF32 = 68, 70, 77  # cublasComputeType_t
_FULL_SUMS = 16  # cublasMath_t: no sums in float16 where a product is split
_LARGEST = 2**31 - 1  # sizes are ints
_SUCCESS = 0

_numbers = np.asarray([1.0, 0.0], np.float32), np.asarray([1.0, 0.0])  # alpha and beta, as the host holds them
_ALPHA32, _ALPHA64 = (x.ctypes.data for x in _numbers)
# by a dtype's character: cudaDataType_t, the sums' type, where alpha and beta are, and the size of an element
_KINDS = {
    "e": (2, _FLOAT32, _ALPHA32, _ALPHA32 + 4, 2),
    "f": (0, _FLOAT32, _ALPHA32, _ALPHA32 + 4, 4),
    "d": (1, _FLOAT64, _ALPHA64, _ALPHA64 + 8, 8),
}


class _Handle:
    """A cuBLAS handle of one thread for one device, destroyed with the thread."""

    def __init__(self) -> None:
        self.ptr = cublas.create()
        cublas.setMathMode(self.ptr, _FULL_SUMS)
        self.gemm: Callable[..., Any] = cublas.gemmEx

    def __del__(self, destroy: Any = cublas.destroy) -> None:
        with contextlib.suppress(Exception):  # the device may be gone at exit
            destroy(self.ptr)


class _Handles(threading.local):
    def __init__(self) -> None:
        self.of: dict[int, _Handle] = {}


_handles = _Handles()


def _handle(device: int) -> _Handle:
    try:
        return _handles.of[device]
    except KeyError:
        return _handles.of.setdefault(device, _Handle())


@functools.cache
def _library() -> Any:
    """The cuBLAS that CuPy itself has loaded, for the functions that CuPy guards."""
    library, P, I = ctypes.CDLL(cublas.__file__), ctypes.c_void_p, ctypes.c_int
    library.cublasGemmEx.argtypes = [P, I, I, I, I, I, P, P, I, I, P, I, I, P, P, I, I, I, I]
    library.cublasSetStream_v2.argtypes = [P, P]
    library.cublasSetWorkspace_v2.argtypes = [P, P, ctypes.c_size_t]
    return library


def _checked(name: str, status: int) -> None:
    if status != _SUCCESS:
        raise RuntimeError(f"{name} of cuBLAS failed with status {status}")


def _gemm_by_address(*arguments: Any) -> None:
    _checked("cublasGemmEx", _library().cublasGemmEx(*arguments))


def workspace() -> Array:
    """Memory for products under capture, on the current device: as much as cuBLAS takes by itself.

    With less it forms some products by other algorithms than eagerly, which are slower and leave other bits (seen on an H100
    with 31 MiB; not with 32 or more).
    """
    major = int(cupy.cuda.Device().compute_capability[:-1])
    return cupy.empty((32 if major >= 9 else 4) << 20, np.uint8)


@contextlib.contextmanager
def capturable(stream: Any, memory: Array) -> Iterator[None]:
    """A context in which this thread's products go to `stream`, which may be captured, with `memory` to work in."""
    library, handle = _library(), _handle(memory.data.device_id)
    # in this order: setting the stream puts the default workspace back
    _checked("cublasSetStream", library.cublasSetStream_v2(handle.ptr, stream.ptr))
    _checked("cublasSetWorkspace", library.cublasSetWorkspace_v2(handle.ptr, memory.data.ptr, memory.nbytes))
    handle.gemm = _gemm_by_address
    try:
        yield
    finally:
        handle.gemm = cublas.gemmEx  # which sets the stream at each call, and with it the default workspace


def _laid_out(M: Array, size: int) -> tuple[Array, bool, int]:
    """`M`, or a copy where it must be; whether a BLAS that counts along rows has to transpose it; its leading dimension."""
    rows, columns = M.shape
    down, along = M.strides
    if along == size or columns == 1:
        step = down // size if rows > 1 else columns
        if columns <= step <= _LARGEST and (rows == 1 or down == step * size):
            return M, False, step
    if down == size or rows == 1:
        step = along // size if columns > 1 else rows
        if rows <= step <= _LARGEST and (columns == 1 or along == step * size):
            return M, True, step
    return cupy.ascontiguousarray(M), False, columns


def gemm(A: Array, B: Array, *, A_T: bool = False, B_T: bool = False, exact: bool = False) -> Array:
    """`A B` for `A` `(m, k)` and `B` `(k, n)` of one float dtype on the current device, of any strides.

    A_T, B_T: take the transpose of `A`, of `B`. exact: the factors are not rounded, TF32 or not.
    """
    k, m = A.shape if A_T else A.shape[::-1]
    n = B.shape[0] if B_T else B.shape[1]
    dtype = A.dtype
    if not (m and n and k) or max(m, n, k) > _LARGEST or dtype.char not in _KINDS:
        return cupy.zeros((m, n), dtype) if not k else (A.T if A_T else A) @ (B.T if B_T else B)
    kind, sums, alpha, beta, size = _KINDS[dtype.char]
    if A.flags.c_contiguous:
        A_step = A.shape[1]
    else:
        A, is_transposed, A_step = _laid_out(A, size)
        A_T ^= is_transposed
    if B.flags.c_contiguous:
        B_step = B.shape[1]
    else:
        B, is_transposed, B_step = _laid_out(B, size)
        B_T ^= is_transposed
    C = cupy.ndarray((m, n), dtype)
    memory = C.data
    device = memory.device_id
    if size == 4 and not exact and in_tf32(device):
        sums = _IN_TF32
    handle = _handle(device)
    # cuBLAS counts along columns, so what it is asked for is C^T = B^T A^T
    handle.gemm(
        handle.ptr, B_T, A_T, n, m, k, alpha, B.data.ptr, kind, B_step,
        A.data.ptr, kind, A_step, beta, memory.ptr, kind, n, sums, _BEST_ALGORITHM,
    )  # fmt: skip
    return C


_ones: dict[tuple[int, str, int], Array] = {}
_rows_of_ones: dict[tuple[int, str, int], Array] = {}


def ones_row(count: int, dtype: Any) -> Array:
    """A row of ones on the current device, `(1, count)`; only to be read, and never given to the user."""
    key = cupy.cuda.runtime.getDevice(), dtype.char, count
    try:
        return _rows_of_ones[key]
    except KeyError:
        if len(_rows_of_ones) > 1000:
            _rows_of_ones.clear()
        return _rows_of_ones.setdefault(key, _long_row_of_ones(count, dtype)[:, :count])


def _long_row_of_ones(count: int, dtype: Any) -> Array:
    """Rows are kept in powers of two and never dropped: memory that another stream still reads must not go to the pool."""
    key = cupy.cuda.runtime.getDevice(), dtype.char, 1 << max(10, (count - 1).bit_length())
    row: Array = _ones.get(key)
    if row is None:
        with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):  # not from a pool that goes before the row
            row = cupy.ones((1, key[2]), dtype)
        cupy.cuda.get_current_stream().synchronize()  # once: from now on any stream may read it
        row = _ones.setdefault(key, row)  # another thread may have been faster, and its row is in use
    return row


def forward(xp: Namespace, X: Array, W: Array, b: Array | None) -> Array:
    """`Z = X W^T + b`."""
    Z = gemm(X, W, B_T=True)
    return Z if b is None else add_bias(Z, b)


def backward(
    xp: Namespace, dZ: Array, X: Array, W: Array, bias: bool, needs_dX: bool
) -> tuple[Array | None, Array, Array | None]:
    """`dX = dZ W`, `dW = dZ^T X` and `db = 1^T dZ`, which is a sum: it never rounds `dZ`, TF32 or not."""
    db = gemm(ones_row(dZ.shape[0], dZ.dtype), dZ, exact=True) if bias else None
    return gemm(dZ, W) if needs_dX else None, gemm(dZ, X, A_T=True), db


def input_gradient(xp: Namespace, dZ: Array, W: Array) -> Array:
    """`dX = dZ W`."""
    return gemm(dZ, W)
