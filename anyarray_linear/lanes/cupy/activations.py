"""Activations: one kernel each way, and the bias in the one before them where nobody asked to see the sum."""

from __future__ import annotations

import functools
import struct
from typing import Any

import cupy

from ...activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ...activations import activation as portable
from ...activations import activation_gradient as portable_gradient
from ...arrays.place import Array, Namespace
from .kernels import THREADS, TYPES, blocks, by_value, contiguous, kernel

_SIGMOID = "const A E = exp(-abs(x)), S = (x >= A(0) ? A(1) : E) / (A(1) + E);"
_TANH = "const A a = A(0.7978845608028654), c = A(0.044715);"

_PHI = "(A(0.5) * erfc(-x * A(0.7071067811865476)))"

# Z = f(X), and dX = dZ f'(X), of one element: x and g, and z where the derivative is written in terms of the output
_FORWARD: dict[Any, str] = {
    ReLU: "z = x < A(0) ? A(0) : x;",  # a NaN stays one
    Tanh: "z = tanh(x);",
    Sigmoid: f"{_SIGMOID} z = S;",
    SiLU: f"{_SIGMOID} z = x * S;",
    GELU: f"z = x * {_PHI};",
    "tanh": f"{_TANH} z = A(0.5) * x * (A(1) + tanh(a * x * (A(1) + c * (x * x))));",
}
_BACKWARD: dict[Any, str] = {
    ReLU: "dx = x <= A(0) ? A(0) : g;",
    Tanh: "dx = g * (A(1) - x * x);",
    Sigmoid: "dx = g * x * (A(1) - x);",
    SiLU: f"{_SIGMOID} dx = g * S * (A(1) + x * (A(1) - S));",
    GELU: f"""
        const A near = max(min(x, A(40)), A(-40));  // phi is 0 from there on; a NaN is one in erfc too
        dx = g * ({_PHI} + near * (A(0.3989422804014327) * exp(A(-0.5) * near * near)));
    """,
    "tanh": _TANH + """
        const A xx = x * x, s = xx > A(256) ? A(256) : xx;  // as in the portable definition
        const A t = tanh(a * x * (A(1) + c * s)), du = a * (A(1) + A(3) * c * s);
        dx = g * A(0.5) * (A(1) + t + x * (A(1) - t * t) * du);
    """,
}  # fmt: skip

_ACTIVATION = """
KERNEL activation(const T* X, T* Z, long long size)
{
    for (long long i = INDEX; i < size; i += STRIDE) {
        const A x = A(X[i]);
        A z;
        FORMULA
        Z[i] = T(z);
    }
}
"""
_GRADIENT = """
KERNEL gradient(const T* dZ, const T* kept, T* dX, long long size)
{
    for (long long i = INDEX; i < size; i += STRIDE) {
        const A g = A(dZ[i]), x = A(kept[i]);
        A dx;
        FORMULA
        dX[i] = T(dx);
    }
}
"""
_BIAS = """
struct Sizes { long long size; int columns, hop; };

// The column of an element is found once per thread; a stride further on, it is `hop` columns further on.
KERNEL bias(T* Z, const T* b, T* out, const Sizes s)
{
    int column = int(unsigned(INDEX) % unsigned(s.columns));
    for (long long i = INDEX; i < s.size; i += STRIDE) {
        const T sum = T(A(Z[i]) + A(b[column]));
#ifdef FORMULA
        const A x = A(sum);
        A z;
        FORMULA
        if (out != Z) Z[i] = sum;
        out[i] = T(z);
#else
        Z[i] = sum;
#endif
        column += s.hop;
        if (column >= s.columns) column -= s.columns;
    }
}
"""


@functools.cache
def _compiled(name: str, source: str, formula: str, dtype: str) -> Any:
    line = " ".join(line.partition("//")[0] for line in formula.splitlines())
    return kernel(name, source, dtype, f"#define FORMULA {line}\n" if line else "")


@functools.cache
def _forward(kind: Any, dtype: str) -> Any:
    return _compiled("activation", _ACTIVATION, _FORWARD[kind], dtype)


@functools.cache
def _backward(kind: Any, dtype: str) -> Any:
    return _compiled("gradient", _GRADIENT, _BACKWARD[kind], dtype)


@functools.cache
def _bias(kind: Any, dtype: str) -> Any:
    return _compiled("bias", _BIAS, "" if kind is None else _FORWARD[kind], dtype)


def is_known(layer: Any) -> bool:
    """Whether there are kernels for this activation: for its very type, since a subclass may have a formula of its own."""
    return type(layer) in _FORWARD


def _form(layer: Any) -> Any:
    """What the kernels of a known activation are found by: its class, or the name of its other form."""
    return "tanh" if type(layer) is GELU and layer.approximate == "tanh" else type(layer)


def needs_sum(layer: Any) -> bool:
    """Whether the derivative of this activation is written in terms of its input."""
    return type(layer) in (SiLU, GELU)


def activation(xp: Namespace, layer: Any, X: Array) -> Array:
    """`Z = f(X)`."""
    if X.dtype.char not in TYPES or not is_known(layer):
        return portable(xp, layer, X)
    X = contiguous(X)
    Z, size = cupy.ndarray(X.shape, X.dtype), X.size
    if size:
        _forward(_form(layer), X.dtype.char)((blocks(size),), (THREADS,), (X, Z, size))
    return Z


def activation_gradient(xp: Namespace, layer: Any, dZ: Array, kept: Array) -> Array:
    """`dX = dZ f'(X)`."""
    if dZ.dtype.char not in TYPES or not is_known(layer):
        return portable_gradient(xp, layer, dZ, kept)
    dZ, kept = contiguous(dZ), contiguous(kept)
    dX, size = cupy.ndarray(dZ.shape, dZ.dtype), dZ.size
    if size:
        _backward(_form(layer), dZ.dtype.char)((blocks(size),), (THREADS,), (dZ, kept, dX, size))
    return dX


@functools.lru_cache(maxsize=4096)
def _sizes(size: int, columns: int) -> tuple[tuple[int], Any]:
    grid = blocks(size)
    return (grid,), by_value(struct.pack("qii", size, columns, grid * THREADS % columns))


def add_bias(Z: Array, b: Array, layer: Any = None) -> Array:
    """`Z + b` in `Z`, which is contiguous, `(N, out)`; with a `layer` that `is_known`, its activation of that.

    The activation is a new array where its derivative needs the sum, and else takes its place.
    """
    if Z.size:
        out = Z if layer is None or not needs_sum(layer) else cupy.ndarray(Z.shape, Z.dtype)
        grid, sizes = _sizes(Z.size, Z.shape[1])
        kind = None if layer is None else _form(layer)
        _bias(kind, Z.dtype.char)(grid, (THREADS,), (Z, contiguous(b), out, sizes))
        return out
    return Z
