"""The CuPy lane: as few kernels as the mathematics allows, no wait for the device, and no copy to or from the host.

What a small step costs on a GPU is the number of kernels that it launches. So each formula that the portable definition
spells as several array operations is one kernel here. Kernels compute in float32 for float16 arrays, sum in a fixed order
(no atomics: equal inputs give equal bits), and are launched on the current device and stream, which the callers make that of
the arrays. They hold no memory between calls, so any number of threads and streams may use them at once.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import cupy
import numpy as np

from ..activations import GELU, ReLU, Sigmoid, SiLU, Tanh, _activation, _activation_gradient
from ..arrays.place import Array, Namespace
from ..guard import judged as judged_portably
from ..losses import _reciprocal
from ..optimizers import SGD, Adam, AdamW, Places, _apply
from .flat import flat_of

THREADS = 256
"""Threads per block of the kernels below."""
BLOCKS = 1024
"""Blocks at most; each thread then goes through the data in strides."""
ONE_BLOCK = 1 << 14
"""A loss over up to so many elements is one kernel of one block; over more, the blocks' sums are added by a second one."""

TF32 = os.environ.get("CUPY_TF32", "0") not in ("", "0")
"""Whether CuPy rounds the factors of float32 products to 11 bits. CuPy, too, looks only once."""


# ----------------------------------------------------------------------------------------------------------------------
# kernels

_HEAD = """
typedef %(T)s T;
typedef %(A)s A;
#define THREADS %(threads)d

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
_TYPES = {"e": ("__half", "float"), "f": ("float", "float"), "d": ("double", "double")}
_ACCUMULATOR = {"e": np.float32, "f": np.float32, "d": np.float64}


@functools.cache
def _kernel(name: str, source: str, dtype: str, target: str = "") -> Any:
    """The kernel `name` of `source` for arrays of a dtype; CuPy compiles it once per device and keeps it on disk."""
    T, A = _TYPES[dtype]
    include = "#include <cuda_fp16.h>\n" if dtype == "e" else ""
    code = include + target + _HEAD % {"T": T, "A": A, "threads": THREADS} + source
    # without fused multiply-adds, the optimizers give the very bits of the portable definition
    return cupy.RawKernel(code, name, options=("--fmad=false",))


def _blocks(size: int) -> int:
    return max(1, min(BLOCKS, -(-size // THREADS)))


def _contiguous(x: Array) -> Array:
    return x if x.flags.c_contiguous else cupy.ascontiguousarray(x)


# ----------------------------------------------------------------------------------------------------------------------
# the layer

_ones: dict[tuple[int, str, int], Array] = {}


def ones_row(count: int, dtype: Any) -> Array:
    """A row of ones on the current device, `(1, count)`; only to be read, and never given to the user.

    Rows are kept in powers of two and never dropped: memory that another stream still reads must not go back to the pool.
    """
    capacity = 1 << max(10, (count - 1).bit_length())
    key = cupy.cuda.runtime.getDevice(), dtype.char, capacity
    row = _ones.get(key)
    if row is None:
        row = cupy.ones((1, capacity), dtype)
        cupy.cuda.get_current_stream().synchronize()  # once: from now on any stream may read it
        _ones[key] = row
    return row[:, :count]


def backward(
    xp: Namespace, dZ: Array, X: Array, W: Array, bias: bool, needs_dX: bool
) -> tuple[Array | None, Array, Array | None]:
    """`dX = dZ W`, `dW = dZ^T X` and `db = 1^T dZ`."""
    return dZ @ W if needs_dX else None, dZ.T @ X, _batch_sum(dZ) if bias else None


def _batch_sum(dZ: Array) -> Array:
    if dZ.shape[1] != 1 and not (TF32 and dZ.dtype.char == "f"):
        return ones_row(dZ.shape[0], dZ.dtype) @ dZ
    # TF32 would round dZ, and a product that is one number CuPy forms by a multiplication and a sum
    return cupy.sum(dZ, axis=0, keepdims=True, dtype=_ACCUMULATOR[dZ.dtype.char]).astype(dZ.dtype, copy=False)


# ----------------------------------------------------------------------------------------------------------------------
# activations: one kernel each way. CuPy has the forward of ReLU and Tanh as one already

_WIDE = """
template <typename T> struct Wide { typedef T type; };
template <> struct Wide<float16> { typedef float type; };
"""


def _elementwise(inputs: str, output: str, code: str, name: str) -> Any:
    return cupy.ElementwiseKernel(inputs, output, f"typedef Wide<T>::type A; {code}", f"anyarray_{name}", preamble=_WIDE)


_SIGMOID = "const A x = X, E = exp(-abs(x)), S = (x >= A(0) ? A(1) : E) / (A(1) + E);"
_TANH_U = f"const A a = {GELU._a!r}, c = {GELU._c!r};"

_FORWARD = {
    Sigmoid: _elementwise("T X", "T Z", f"{_SIGMOID} Z = T(S);", "sigmoid"),
    SiLU: _elementwise("T X", "T Z", f"{_SIGMOID} Z = T(x * S);", "silu"),
    GELU: _elementwise(
        "T X", "T Z", f"{_TANH_U} const A x = X; Z = T(A(0.5) * x * (A(1) + tanh(a * x * (A(1) + c * (x * x)))));", "gelu"
    ),
}
_BACKWARD = {
    ReLU: _elementwise("T dZ, T Z", "T dX", "dX = A(Z) <= A(0) ? T(0) : dZ;", "relu_gradient"),
    Tanh: _elementwise("T dZ, T Z", "T dX", "const A z = Z; dX = T(A(dZ) * (A(1) - z * z));", "tanh_gradient"),
    Sigmoid: _elementwise("T dZ, T Z", "T dX", "const A z = Z; dX = T(A(dZ) * z * (A(1) - z));", "sigmoid_gradient"),
    SiLU: _elementwise("T dZ, T X", "T dX", f"{_SIGMOID} dX = T(A(dZ) * S * (A(1) + x * (A(1) - S)));", "silu_gradient"),
    GELU: _elementwise(
        "T dZ, T X", "T dX",
        _TANH_U + """
        const A x = X, xx = x * x, s = xx > A(256) ? A(256) : xx;
        const A t = tanh(a * x * (A(1) + c * s)), dU = a * (A(1) + A(3) * c * s);
        dX = T(A(dZ) * A(0.5) * (A(1) + t + x * (A(1) - t * t) * dU));
        """,
        "gelu_gradient",
    ),
}  # fmt: skip


def activation(xp: Namespace, layer: Any, X: Array) -> Array:
    """`Z = f(X)`."""
    kernel = _FORWARD.get(type(layer))
    return _activation(xp, layer, X) if kernel is None else kernel(X)


def activation_gradient(xp: Namespace, layer: Any, dZ: Array, kept: Array) -> Array:
    """`dX = dZ f'(X)`."""
    kernel = _BACKWARD.get(type(layer))
    return _activation_gradient(xp, layer, dZ, kept) if kernel is None else kernel(dZ, kept)


# ----------------------------------------------------------------------------------------------------------------------
# losses

_CROSS_ENTROPY = """
// `width` neighbours in a warp share a row, width a power of two. Every thread makes every round, with or without a row:
// a shuffle takes the whole warp.
__device__ A shared_sum(A x, int width)
{
    for (int o = width / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
    return x;
}

extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy(
    const T* Z, const TARGET* target, T* P, A* partial, T* loss, long long rows, long long classes, int width, A factor)
{
    const int neighbour = threadIdx.x % width;
    const long long stride = (long long)gridDim.x * THREADS / width;
    const long long mine = ((long long)blockIdx.x * THREADS + threadIdx.x) / width;
    A total = 0;
    for (long long first = 0; first < rows; first += stride) {
        const bool here = first + mine < rows;
        const long long row = here ? first + mine : 0, end = here ? classes : 0;
        const T* z = Z + row * classes;
        A top = A(z[0]);  // a NaN need not get here: it is in the sum, too
        for (long long j = neighbour; j < end; j += width) top = max(top, A(z[j]));
        for (int o = width / 2; o > 0; o /= 2) top = max(top, __shfl_xor_sync(0xffffffffu, top, o));
        A S = 0;
        for (long long j = neighbour; j < end; j += width) S += exp(A(z[j]) - top);
        S = shared_sum(S, width);
        A term = 0;
#ifdef IDS
        const long long id = (long long)target[row];
        if (neighbour == 0) term = id < 0 || id >= classes ? A(__int_as_float(0x7fc00000)) : log(S) - (A(z[id]) - top);
#else
        for (long long j = neighbour; j < end; j += width) {
            const A t = A(target[row * classes + j]);
            term += t * (log(S) - (t == A(0) ? A(0) : A(z[j]) - top));
        }
#endif
        if (here) total += term;
        for (long long j = neighbour; j < end; j += width) P[row * classes + j] = T(exp(A(z[j]) - top) / S);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) {
        if (gridDim.x == 1) *loss = T(total * factor);
        else partial[blockIdx.x] = total;
    }
}

#ifndef IDS
extern "C" __global__ void __launch_bounds__(THREADS) cross_entropy_gradient(
    const T* P, const T* target, T* dZ, long long rows, long long classes, int width, A factor)
{
    const int neighbour = threadIdx.x % width;
    const long long stride = (long long)gridDim.x * THREADS / width;
    const long long mine = ((long long)blockIdx.x * THREADS + threadIdx.x) / width;
    for (long long first = 0; first < rows; first += stride) {
        const bool here = first + mine < rows;
        const long long start = here ? (first + mine) * classes : 0, end = here ? classes : 0;
        A sum = 0;
        for (long long j = neighbour; j < end; j += width) sum += A(target[start + j]);
        sum = shared_sum(sum, width);
        for (long long j = neighbour; j < end; j += width)
            dZ[start + j] = T((A(P[start + j]) * sum - A(target[start + j])) * factor);
    }
}
#endif
"""

_SQUARED_ERROR = """
extern "C" __global__ void __launch_bounds__(THREADS) squared_error(
    const T* Z, const T* target, T* D, A* partial, T* loss, long long size, A factor)
{
    A total = 0;
    for (long long i = (long long)blockIdx.x * THREADS + threadIdx.x; i < size; i += (long long)gridDim.x * THREADS) {
        const T d = T(A(Z[i]) - A(target[i]));
        D[i] = d;
        total += A(d) * A(d);
    }
    total = block_sum(total);
    if (threadIdx.x == 0) {
        if (gridDim.x == 1) *loss = T(total * factor);
        else partial[blockIdx.x] = total;
    }
}
"""

_FINISH = """
extern "C" __global__ void __launch_bounds__(THREADS) finish(const A* partial, T* loss, int count, A factor)
{
    A total = 0;
    for (int i = threadIdx.x; i < count; i += THREADS) total += partial[i];
    total = block_sum(total);
    if (threadIdx.x == 0) *loss = T(total * factor);
}
"""

_IDS = {
    "int8": "signed char", "int16": "short", "int32": "int", "int64": "long long",
    "uint8": "unsigned char", "uint16": "unsigned short", "uint32": "unsigned int", "uint64": "unsigned long long",
}  # fmt: skip

_ids_gradient = cupy.ElementwiseKernel(
    "T P, raw I ids, int64 classes, float64 factor",
    "T dZ",
    """
    typedef Wide<T>::type A;
    const long long id = (long long)ids[i / classes];
    const A t = id < 0 || id >= classes ? A(__int_as_float(0x7fc00000)) : A(i % classes == id);
    dZ = T((A(P) - t) * A(factor));
    """,
    "anyarray_cross_entropy_gradient",
    preamble=_WIDE,
)


def _summed(kernel: Any, arguments: Sequence[Any], sizes: Sequence[Any], elements: int, blocks: int, x: Array,
            factor: float) -> Array:  # fmt: skip
    """Run a loss kernel, and where it has several blocks the one that adds up their sums; the 0-d loss."""
    loss = cupy.empty((), x.dtype)
    wide = _ACCUMULATOR[x.dtype.char]
    if blocks == 1 or elements <= ONE_BLOCK:
        kernel((1,), (THREADS,), (*arguments, None, loss, *sizes, wide(factor)))
        return loss
    partial = cupy.empty(blocks, wide)
    kernel((blocks,), (THREADS,), (*arguments, partial, loss, *sizes, wide(factor)))
    finish = _kernel("finish", _FINISH, x.dtype.char)
    finish((1,), (THREADS,), (partial, loss, np.int32(blocks), wide(factor)))
    return loss


def _row_layout(Z: Array) -> tuple[int, int, int]:
    """`(rows, classes, width)`: a thread takes about four classes, and at most a warp shares a row."""
    classes = Z.shape[-1]
    return Z.size // classes, classes, min(32, 1 << (-(-classes // 4) - 1).bit_length())


def cross_entropy(xp: Namespace, Z: Array, target: Array, ids: bool) -> tuple[Array, dict[str, Array]]:
    """The loss, and the cache `{"P": softmax, "T": target}`."""
    if not ids:
        target = target.astype(Z.dtype, copy=False)
    Z, target = _contiguous(Z), _contiguous(target)
    rows, classes, width = _row_layout(Z)
    P = cupy.empty(Z.shape, Z.dtype)
    kind = f"#define IDS\n#define TARGET {_IDS[target.dtype.name]}\n" if ids else "#define TARGET T\n"
    kernel = _kernel("cross_entropy", _CROSS_ENTROPY, Z.dtype.char, kind)
    sizes = np.int64(rows), np.int64(classes), np.int32(width)
    loss = _summed(kernel, (Z, target, P), sizes, Z.size, _blocks(rows * width), Z, _reciprocal(rows))
    return loss, {"P": P, "T": target}


def cross_entropy_gradient(xp: Namespace, P: Array, T: Array) -> Array:
    """`dZ = (P - T) / N`, with `T` class ids or rows."""
    rows, classes, width = _row_layout(P)
    if T.ndim < P.ndim:
        return _ids_gradient(P, T, classes, _reciprocal(rows))
    P, T, dZ = _contiguous(P), _contiguous(T), cupy.empty(P.shape, P.dtype)
    kernel = _kernel("cross_entropy_gradient", _CROSS_ENTROPY, P.dtype.char, "#define TARGET T\n")
    factor = _ACCUMULATOR[P.dtype.char](_reciprocal(rows))
    kernel((_blocks(rows * width),), (THREADS,), (P, T, dZ, np.int64(rows), np.int64(classes), np.int32(width), factor))
    return dZ


def squared_error(xp: Namespace, Z: Array, target: Array) -> tuple[Array, Array]:
    """`mean D^2`, and `D = Z - target`."""
    D = cupy.empty(Z.shape, Z.dtype)
    kernel = _kernel("squared_error", _SQUARED_ERROR, Z.dtype.char)
    arguments = _contiguous(Z), _contiguous(target), D
    return _summed(kernel, arguments, (np.int64(Z.size),), Z.size, _blocks(Z.size), Z, _reciprocal(Z.size)), D


# ----------------------------------------------------------------------------------------------------------------------
# the optimizer: gradients stay where they are, and kernels are handed a table of pointers to them, by value

COUNT = 64  # pointers in a table: 1.5 KiB of the 4 KiB of arguments that a kernel can have
_TABLE = np.dtype([("x", np.uint64, COUNT), ("start", np.int64, COUNT), ("size", np.int64, COUNT)])
_TABLE_SOURCE = f"""
struct Table {{ const T* x[{COUNT}]; long long start[{COUNT}], size[{COUNT}]; }};
#define INDEX ((long long)blockIdx.x * THREADS + threadIdx.x)
#define STRIDE ((long long)gridDim.x * THREADS)
"""

_SQUARES = _TABLE_SOURCE + """
extern "C" __global__ void __launch_bounds__(THREADS) squares(const Table dW, int count, A* partial)
{
    A total = 0;
    for (int k = 0; k < count; k++)
        for (long long i = INDEX; i < dW.size[k]; i += STRIDE) {
            const A g = A(dW.x[k][i]);
            total += g * g;
        }
    total = block_sum(total);
    if (threadIdx.x == 0) partial[blockIdx.x] = total;
}
"""

_UPDATE = _TABLE_SOURCE + """
extern "C" __global__ void __launch_bounds__(THREADS) update(
    const Table dW, int count, T* W, T* M, T* V, const bool* where, const A* partial, int partials, A clip_norm, %s)
{
    if (where && !*where) return;
    A scale = 1;
    if (partials) {  // every block adds up the same numbers in the same order
        A squares = 0;
        for (int i = threadIdx.x; i < partials; i += THREADS) squares += partial[i];
        scale = clip_norm / (sqrt(block_sum(squares)) + A(1e-6));
        if (scale > A(1)) scale = 1;
    }
    for (int k = 0; k < count; k++)
        for (long long i = INDEX; i < dW.size[k]; i += STRIDE) {
            const long long j = dW.start[k] + i;
            A w = A(W[j]), g = A(dW.x[k][i]) * scale;
            %s
            W[j] = T(w);
        }
}
"""

_SGD = _UPDATE % (
    "A lr, A momentum, bool nesterov, A decay",
    """
    if (decay != A(0)) g += decay * w;
    if (momentum != A(0)) {
        const A v = momentum * A(M[j]) + g;
        M[j] = T(v);
        g = nesterov ? g + momentum * v : v;
    }
    w -= lr * g;
    """,
)

_ADAM = _UPDATE % (
    "A rate, A beta1, A rest1, A beta2, A rest2, A eps, A decay, A shrink",
    """
    w *= shrink;
    if (decay != A(0)) g += decay * w;
    const A m = beta1 * A(M[j]) + rest1 * g, v = beta2 * A(V[j]) + rest2 * (g * g);
    M[j] = T(m);
    V[j] = T(v);
    w -= rate * (m / (sqrt(v) + eps));
    """,
)


def _sgd(optimizer: SGD, lr: float) -> tuple[Any, ...]:
    return lr, optimizer.momentum, optimizer.nesterov, optimizer.weight_decay


def _adam(optimizer: Adam, lr: float) -> tuple[Any, ...]:
    (beta1, beta2), t = optimizer.betas, optimizer.steps
    decoupled, root = isinstance(optimizer, AdamW), math.sqrt(1 - beta2**t)
    return (
        lr * root / (1 - beta1**t), beta1, 1 - beta1, beta2, 1 - beta2, optimizer.eps * root,
        0.0 if decoupled else optimizer.weight_decay, 1 - lr * optimizer.weight_decay if decoupled else 1.0,
    )  # fmt: skip


_RULES: dict[type, tuple[str, Any]] = {SGD: (_SGD, _sgd), Adam: (_ADAM, _adam), AdamW: (_ADAM, _adam)}


def _tables(arrays: Sequence[Array], starts: Sequence[int]) -> list[tuple[Any, Any, int]]:
    """`(table, count, blocks)` for each `COUNT` arrays; the caller keeps the arrays alive until the kernel is launched."""
    tables = []
    for i in range(0, len(arrays), COUNT):
        part, table = arrays[i : i + COUNT], np.zeros((), _TABLE)
        sizes = [x.size for x in part]
        table["x"][: len(part)] = [x.data.ptr for x in part]
        table["start"][: len(part)] = starts[i : i + COUNT]
        table["size"][: len(part)] = sizes
        tables.append((table, np.int32(len(part)), _blocks(max(sizes))))
    return tables


def apply(
    xp: Namespace,
    optimizer: Any,
    places: Places,
    gradients: Mapping[str, Array],
    lr: float,
    where: Array | None,
) -> None:
    """Update all parameters and moments in place by one kernel; clipping takes one more."""
    rule = _RULES.get(type(optimizer))
    dtype = next(iter(gradients.values())).dtype
    if rule is None or dtype.char not in _TYPES:  # somebody's own rule or layer
        return _apply(xp, optimizer, places, gradients, lr, where)
    flat = flat_of(xp, optimizer, places, align=256 // dtype.itemsize)  # what cuBLAS likes operands to start at
    source, hyperparameters = rule
    wide = _ACCUMULATOR[dtype.char]
    scalars = [np.bool_(x) if isinstance(x, bool) else wide(x) for x in hyperparameters(optimizer, lr)]
    arrays = [_contiguous(gradients[name]) for name in flat.views]
    tables = _tables(arrays, [part.start for part in flat.slices.values()])
    partial, partials, clip_norm = None, 0, 0.0
    if optimizer.clip_norm is not None:
        clip_norm, partials = optimizer.clip_norm, sum(blocks for _, _, blocks in tables)
        partial, first = cupy.empty(partials, wide), 0
        squares = _kernel("squares", _SQUARES, dtype.char)
        for table, count, blocks in tables:
            squares((blocks,), (THREADS,), (table, count, partial[first:]))
            first += blocks
    update = _kernel("update", source, dtype.char)
    moments = [*flat.moments, None, None][:2]
    for table, count, blocks in tables:
        clip = partial, np.int32(partials), wide(clip_norm)
        update((blocks,), (THREADS,), (table, count, flat.W, *moments, where, *clip, *scalars))
    return None


# ----------------------------------------------------------------------------------------------------------------------
# the guard of `fit`

_LOOK = _TABLE_SOURCE + """
extern "C" __global__ void __launch_bounds__(THREADS) look(const Table x, int count, long long* last_bad, long long step)
{
    bool good = true;
    for (int k = 0; k < count; k++)
        for (long long i = INDEX; i < x.size[k]; i += STRIDE) {
            const A value = A(x.x[k][i]);
            good = good && value - value == A(0);  // it is NaN for NaN and infinity
        }
    if (!good) *last_bad = step;  // whoever writes, it is the same number
}
"""

_judge = cupy.ElementwiseKernel(
    "T value, int64 last_bad, int64 step, float64 total, int64 rows, int64 bad, int64 fatal, int64 count, int64 allowed",
    "bool apply, float64 new_total, int64 new_rows, int64 new_bad, int64 new_fatal",
    """
    const bool finite = last_bad != step, going = fatal == 0;
    new_bad = bad + (going && !finite);
    new_fatal = going && new_bad > allowed ? step : fatal;
    apply = finite && new_fatal == 0;
    new_total = total + (apply ? double(value) * count : 0.0);
    new_rows = rows + (apply ? count : 0);
    """,
    "anyarray_judge",
)


def judged(xp: Namespace, guard: Any, step: int, value: Array, gradients: Iterable[Array], rows: int) -> Array:
    """Whether this step may be applied: one kernel looks at the loss and all gradients, one keeps the books."""
    arrays = [value, *gradients]
    if value.dtype.char not in _TYPES or any(x.dtype != value.dtype or x.device != value.device for x in arrays):
        return judged_portably(xp, guard, step, value, arrays[1:], rows)
    arrays = [_contiguous(x) for x in arrays]
    if guard.last_bad is None:
        guard.last_bad = cupy.zeros((), np.int64)
    look = _kernel("look", _LOOK, value.dtype.char)
    for table, count, blocks in _tables(arrays, [0] * len(arrays)):
        look((blocks,), (THREADS,), (table, count, guard.last_bad, np.int64(step)))
    apply, guard.total, guard.rows, guard.bad, guard.fatal = _judge(
        value, guard.last_bad, step, guard.total, guard.rows, guard.bad, guard.fatal, rows, guard.allowed
    )
    return apply
