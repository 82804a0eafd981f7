"""The optimizer's update: one kernel for all parameters and moments, in place; clipping takes one more.

What changes from step to step (the rate, the corrections, the largest norm) reaches the kernel by value, or, in a captured
step, from the device, where it was put before the graph is launched.

Of float16 parameters, it is the float32 masters that are updated; moments are float32 too.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import cupy

from ...arrays.place import Array, Namespace
from ...binding import Binding, Flat, flat_of
from ...optimizers import SGD, Adam, AdamW, apply_update
from .kernels import ACCUMULATOR, THREADS, TYPES, contiguous, kernel
from .tables import COUNT, SOURCE, tables

NUMBERS = 9
"""Numbers that a step has: the largest norm, and up to eight of its rule."""

_SCALED = """
// The squares of a block are summed in units of a power of two near its largest element, so that none of them overflows, and
// scaling gradients by a power of two changes no bit. What underflows then is nothing beside the rest.
#define LIMIT (sizeof(A) == 4 ? 100 : 1000)

__device__ A block_top(A x)
{
    __shared__ A tops[THREADS];
    tops[threadIdx.x] = x;
    for (int n = THREADS / 2; n > 0; n /= 2) {
        __syncthreads();
        if (threadIdx.x < n && tops[threadIdx.x + n] > tops[threadIdx.x]) tops[threadIdx.x] = tops[threadIdx.x + n];
    }
    __syncthreads();
    return tops[0];
}

__device__ A power(int exponent) { return A(ldexp(A(1), exponent)); }
"""

_SQUARES = SOURCE + _SCALED + """
KERNEL squares(const Table dW, A* partial, const float* scale)
{
    const A by = scale ? A(1) / A(*scale) : A(1);
    A top = 0;
    EACH_ELEMENT(dW)
        const A size = abs(A(dW.x[k][i]) * by);
        if (size > top) top = size;
    END
    top = block_top(top);
    int unit = top > A(0) && top - top == A(0) ? int(ilogb(top)) : 0;
    unit = unit > LIMIT ? LIMIT : unit < -LIMIT ? -LIMIT : unit;
    const A shrink = power(-unit);
    A total = 0;
    EACH_ELEMENT(dW)
        const A g = A(dW.x[k][i]) * by * shrink;
        total += g * g;
    END
    total = block_sum(total);
    if (threadIdx.x == 0) {
        partial[2 * blockIdx.x] = total;
        partial[2 * blockIdx.x + 1] = A(unit);
    }
}
"""

_UPDATE = SOURCE + _SCALED + f"""
struct Numbers {{ double clip_norm, of[{NUMBERS - 1}]; }};
struct Step {{
    Table dW;
    T* W;
    A *M, *V, *master;  // null: the parameters are their own
    const float* scale;  // null: the gradients are as large as they should be
    const bool* where;
    const A* partial;
    long long partials;
    const Numbers* there;  // null: they are here
    Numbers here;
}};
""" + """
KERNEL update(const Step s)
{
    if (s.where && !*s.where) return;
    const Numbers numbers = s.there ? *s.there : s.here;
    const double* const of = numbers.of;
    A scale = 1, half = 1, rest = 1;  // gradients are scaled by all three: two halves of a power of two, and what it leaves
    if (s.partials) {  // every block adds up the same numbers in the same order
        A top = -LIMIT;
        for (long long i = threadIdx.x; i < s.partials; i += THREADS)
            if (s.partial[2 * i + 1] > top) top = s.partial[2 * i + 1];
        const int unit = int(block_top(top));
        A squares = 0;
        for (long long i = threadIdx.x; i < s.partials; i += THREADS)
            squares += s.partial[2 * i] * power(2 * (int(s.partial[2 * i + 1]) - unit));
        const A norm = sqrt(block_sum(squares)) + A(1e-6) * power(-unit);
        scale = A(numbers.clip_norm) / norm;
        if (scale > power(unit)) scale = 1;
        else half = power(-unit / 2), rest = power(-unit - (-unit / 2));
    }
    const A by = s.scale ? A(1) / A(*s.scale) : A(1);
    NAMES
    EACH_ELEMENT(s.dW)
        A w = A(s.W[n]), g = A(s.dW.x[k][i]) * by;
        if (s.master && A(T(s.master[n])) == w) w = s.master[n];  // else somebody assigned it
        if (s.partials) g = g * half * scale * rest;
        RULE
        if (s.master) s.master[n] = w;
        s.W[n] = T(w);
    END
}
"""

_SGD = (
    "const A lr = of[0], momentum = of[1], nesterov = of[2], decay = of[3];",
    """
    if (decay != A(0)) g += decay * w;
    if (momentum != A(0)) {
        const A v = momentum * A(s.M[n]) + g;
        s.M[n] = v;
        g = nesterov != A(0) ? g + momentum * v : v;
    }
    w -= lr * g;
    """,
)
_ADAM = (
    "const A rate = of[0], beta1 = of[1], rest1 = of[2], beta2 = of[3], rest2 = of[4], eps = of[5], decay = of[6], "
    "shrink = of[7];",
    """
    w *= shrink;
    if (decay != A(0)) g += decay * w;
    const A m = beta1 * A(s.M[n]) + rest1 * g, v = beta2 * A(s.V[n]) + rest2 * (g * g);
    s.M[n] = m;
    s.V[n] = v;
    w -= rate * (m / (sqrt(v) + eps));
    """,
)


_RULES: dict[type, tuple[str, str]] = {SGD: _SGD, Adam: _ADAM, AdamW: _ADAM}


def is_known(optimizer: Any) -> bool:
    """Whether there is a kernel for this rule: for its very type, since a subclass may have a formula of its own."""
    return type(optimizer) in _RULES


def numbers(optimizer: Any, by: tuple[float, ...]) -> tuple[float, ...]:
    """The `NUMBERS` of a step, `by` what the optimizer's `scalars` gives."""
    found = optimizer.clip_norm or 0.0, *by
    return (*found, *(0.0,) * (NUMBERS - len(found)))


@functools.cache
def _kernel(rule_of: Any, dtype: str) -> Any:
    names, rule = _RULES[rule_of]
    line = " ".join(rule.split())
    return kernel("update", _UPDATE, dtype, f"#define NAMES {names}\n#define RULE {line}\n")


_REST = struct.Struct(f"9Q{NUMBERS}d")


def update(
    flat: Flat,
    optimizer: Any,
    gradients: Sequence[Array],
    values: Sequence[float],
    where: Array | None,
    there: int = 0,
    scale: Array | None = None,
) -> None:
    """Update the buffers of `flat` by the gradients, in its order.

    values: what `numbers` gives. there: the address of such numbers on the device, which are then taken instead.
    scale: by how much the gradients are too large, a 0-d float32 array, a power of two.
    """
    dtype = flat.W.dtype
    gradients = [contiguous(dW) for dW in gradients]
    starts = tuple([part.start for part in flat.slices.values()])
    found = tables(starts, tuple([dW.size for dW in gradients]), _REST.size)
    parts = [gradients[i : i + COUNT] for i in range(0, len(gradients), COUNT)]
    partials, partial = 0, None
    flag, by = (0 if x is None else x.data.ptr for x in (where, scale))
    if optimizer.clip_norm is not None:
        partials = sum(table.blocks for table in found)
        partial = cupy.ndarray((partials, 2), ACCUMULATOR[dtype.char])
        squares, address = kernel("squares", _SQUARES, dtype.char), partial.data.ptr
        for table, part in zip(found, parts, strict=True):
            squares((table.blocks,), (THREADS,), (table.filled(part), address, by))
            address += table.blocks * 2 * partial.itemsize
    rule: Any = type(optimizer)
    work = _kernel(rule, dtype.char)
    sums = 0 if partial is None else partial.data.ptr
    M, V, *_ = *flat.moments, None, None
    for i, (table, part) in enumerate(zip(found, parts, strict=True)):
        start = starts[i * COUNT]  # a table counts from its first array
        own = (0 if x is None else x.data.ptr + start * x.itemsize for x in (flat.W, M, V, flat.master))
        rest = *own, by, flag, sums, partials, there, *values
        work((table.blocks,), (THREADS,), (table.filled(part, _REST, rest),))


def apply(
    xp: Namespace,
    optimizer: Any,
    bound: Binding,
    gradients: Mapping[str, Array],
    by: Any,
    where: Array | None,
    scale: Array | None = None,
) -> None:
    """Update all parameters and moments in place."""
    dtype = bound.place.dtype
    summed = bound.is_half and any(dW.dtype != dtype for dW in gradients.values())  # of parts or ranks, in float32
    if summed or not is_known(optimizer) or dtype.char not in TYPES:  # or somebody's own rule or layer
        return apply_update(xp, optimizer, bound, gradients, by, where, scale)
    flat = flat_of(xp, bound, align=256 // dtype.itemsize)  # what cuBLAS likes operands to start at
    in_order = [gradients[name] for name in flat.views]
    return update(flat, optimizer, in_order, numbers(optimizer, by), where, scale=scale)
