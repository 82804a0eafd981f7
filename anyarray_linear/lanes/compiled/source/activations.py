"""Activations and their slopes, on a tile: the formulas of `activations`."""

from __future__ import annotations

from numba import njit

from .. import layout as at
from .elementary import decay, normal_cdf, sigmoid, tanh
from .machine import INLINE, PLAIN, either, number, pointer, rarely, size_of


@njit(**INLINE)
def relu(z):
    return either(z <= number(z, 0.0), number(z, 0.0), z)


@njit(**INLINE)
def silu(z):
    return z * sigmoid(z)


@njit(**INLINE)
def gelu_tanh(z):
    u = number(z, 0.7978845608028654) * z * (number(z, 1.0) + number(z, 0.044715) * (z * z))
    return number(z, 0.5) * z * (number(z, 1.0) + tanh(u))


@njit(**INLINE)
def gelu(z):
    return z * normal_cdf(z)


@njit(**INLINE)
def silu_slope(x):
    s, one = sigmoid(x), number(x, 1.0)
    return s * (one + x * (one - s))


@njit(**INLINE)
def gelu_tanh_slope(x):
    one, top = number(x, 1.0), number(x, 256.0)
    xx = x * x
    s = either(xx > top, top, xx)
    t = tanh(number(x, 0.7978845608028654) * x * (one + number(x, 0.044715) * s))
    du = number(x, 0.7978845608028654) * (one + number(x, 3 * 0.044715) * s)
    return number(x, 0.5) * (one + t + x * (one - t * t) * du)


@njit(**INLINE)
def gelu_slope(x):
    far = number(x, 40.0)  # the density is 0 from there on, and no square overflows
    near = either(x > far, far, either(x < -far, -far, x))
    return normal_cdf(x) + near * (decay(number(x, -0.5) * (near * near)) * number(x, 0.3989422804014327))


@njit(**PLAIN)
def activate(kind, before, b, after, count, like):
    """`after = f(before + b)`; `before` becomes `before + b` where the two are not one."""
    Z, B = pointer(before, like), pointer(b, like)
    if kind == at.NONE:
        for j in range(count):
            Z[j] = Z[j] + B[j]
    elif kind == at.RELU:
        for j in range(count):
            Z[j] = relu(Z[j] + B[j])
    else:
        activate_smoothly(kind, before, b, after, count, like)


@rarely
def activate_smoothly(kind, before, b, after, count, like):
    Z, b, F = pointer(before, like), pointer(b, like), pointer(after, like)
    if kind == at.TANH:
        for j in range(count):
            Z[j] = tanh(Z[j] + b[j])
    elif kind == at.SIGMOID:
        for j in range(count):
            Z[j] = sigmoid(Z[j] + b[j])
    elif kind == at.SILU:
        for j in range(count):
            z = Z[j] + b[j]
            Z[j] = z
            F[j] = silu(z)
    elif kind == at.GELU_TANH:
        for j in range(count):
            z = Z[j] + b[j]
            Z[j] = z
            F[j] = gelu_tanh(z)
    elif kind == at.GELU:
        for j in range(count):
            z = Z[j] + b[j]
            Z[j] = z
            F[j] = gelu(z)


@njit(**PLAIN)
def mask(kind, gradient, kept, count, like):
    """`dX = dZ f'` in place, from what was kept: the output of an activation, or its input."""
    D, K = pointer(gradient, like), pointer(kept, like)
    if kind == at.RELU:
        for j in range(count):
            D[j] = either(K[j] <= number(like, 0.0), number(like, 0.0), D[j])
    else:
        mask_smoothly(kind, gradient, kept, count, like)


@rarely
def mask_smoothly(kind, gradient, kept, count, like):
    D, K, one = pointer(gradient, like), pointer(kept, like), number(like, 1.0)
    if kind == at.TANH:
        for j in range(count):
            D[j] = D[j] * (one - K[j] * K[j])
    elif kind == at.SIGMOID:
        for j in range(count):
            D[j] = D[j] * K[j] * (one - K[j])
    elif kind == at.SILU:
        for j in range(count):
            D[j] = D[j] * silu_slope(K[j])
    elif kind == at.GELU_TANH:
        for j in range(count):
            D[j] = D[j] * gelu_tanh_slope(K[j])
    elif kind == at.GELU:
        for j in range(count):
            D[j] = D[j] * gelu_slope(K[j])


@njit(**PLAIN)
def activation(op, c, tile, like):
    source, target, zeros, count, kind, chunk = op[4], op[5], op[6], op[7], op[8], op[9]
    if source == 0:
        source = c[at.X]
    size = size_of(like)
    start = tile * chunk
    stop = min(start + chunk, count)
    S, T = pointer(source, like), pointer(target, like)
    for j in range(start, stop):
        T[j] = S[j]
    after = op[10]
    for first in range(start, stop, 1024):  # as many zeros as there are
        activate(kind, target + first * size, zeros, after + first * size, min(1024, stop - first), like)


@njit(**PLAIN)
def activation_gradient(op, tile, like):
    gradient, kept, count, kind, chunk = op[4], op[5], op[6], op[7], op[8]
    start = tile * chunk
    size = size_of(like)
    mask(kind, gradient + start * size, kept + start * size, min(chunk, count - start), like)
