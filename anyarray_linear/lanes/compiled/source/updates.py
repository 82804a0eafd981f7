"""The guard, clipping and the rules, on a tile: the formulas of `guard` and `optimizers`."""

from __future__ import annotations

from math import sqrt

from numba import njit

from .. import layout as at
from .elementary import squares, wide
from .machine import FLOAT64, PLAIN, SUMS, number, pointer, size_of


@njit(**SUMS)
def oddities(x, count, zero):
    """0 if all are finite, else NaN."""
    s = zero
    for j in range(count):
        s += x[j] - x[j]
    return s


@njit(**PLAIN)
def look(op, tile, like):
    gradient, count, chunk, partial = op[4], op[5], op[6], op[7]
    start = tile * chunk
    x, n = pointer(gradient + start * size_of(like), like), min(chunk, count - start)
    sums = pointer(partial, FLOAT64)
    sums[2 * tile] = squares(x, n)
    sums[2 * tile + 1] = wide(oddities(x, n, number(like, 0.0)))


@njit(**PLAIN)
def careful_norm(x, count):
    """The norm where the sum of the squares is not in the range of float64."""
    top = 0.0
    for j in range(count):
        top = max(top, abs(wide(x[j])))
    s = 0.0
    if top > 0.0:
        for j in range(count):
            s += (wide(x[j]) / top) ** 2
    return top * sqrt(s)


@njit(**PLAIN)
def judge(op, c, like):
    """Sum the loss; say whether the step is applied, and by what the gradients are scaled."""
    partial, count, looks, look_count, gradient, size = op[4], op[5], op[6], op[7], op[8], op[9]
    numbers = pointer(c[at.NUMBERS], FLOAT64)
    sums, value = pointer(partial, FLOAT64), 0.0
    for t in range(count):
        value += sums[t]
    value = wide(number(like, value))
    numbers[at.VALUE] = value
    applied = c[at.FLAGS] == 0 and numbers[at.CLOSED] == 0.0
    scale = 1.0
    if look_count:
        sums, s, odd = pointer(looks, FLOAT64), 0.0, 0.0
        for t in range(look_count):
            s += sums[2 * t]
            odd += sums[2 * t + 1]
        finite = odd == 0.0 and value - value == 0.0
        numbers[at.FINITE] = 1.0 if finite else 0.0
        if numbers[at.GUARDED] != 0.0 and not finite:
            applied = False
        if numbers[at.CLIP] > 0.0:
            norm = sqrt(s)
            if odd == 0.0 and not 1e-150 < norm < 1e150:
                norm = careful_norm(pointer(gradient, like), size)
            scale = numbers[at.CLIP] / (norm + 1e-6)
            scale = 1.0 if scale > 1.0 else scale
    numbers[at.SCALE] = scale
    numbers[at.APPLY] = 1.0 if applied else 0.0


@njit(**PLAIN)
def update(op, c, tile, like):
    parameters, gradients, first, second, count, rule, chunk = op[4], op[5], op[6], op[7], op[8], op[9], op[10]
    h = pointer(c[at.NUMBERS], FLOAT64)
    if h[at.APPLY] == 0.0:
        return
    start = tile * chunk * size_of(like)
    n = min(chunk, count - tile * chunk)
    W, G = pointer(parameters + start, like), pointer(gradients + start, like)
    M, V = pointer(first + start, like), pointer(second + start, like)
    scale, k = number(like, h[at.SCALE]), at.RULE
    if rule == at.ADAM:
        rate, beta1, rest1 = number(like, h[k]), number(like, h[k + 1]), number(like, h[k + 2])
        beta2, rest2, eps = number(like, h[k + 3]), number(like, h[k + 4]), number(like, h[k + 5])
        weight_decay, shrink = number(like, h[k + 6]), number(like, h[k + 7])
        for j in range(n):
            w = W[j] * shrink
            g = G[j] * scale + weight_decay * w
            m = beta1 * M[j] + rest1 * g
            v = beta2 * V[j] + rest2 * (g * g)
            M[j] = m
            V[j] = v
            W[j] = w - rate * (m / (sqrt(v) + eps))
    else:
        lr, momentum, own = number(like, h[k]), number(like, h[k + 1]), number(like, h[k + 2])
        weight_decay, part_of_velocity = number(like, h[k + 3]), number(like, h[k + 4])
        if rule == at.PLAIN:
            for j in range(n):
                W[j] = W[j] - lr * (G[j] * scale + weight_decay * W[j])
        else:
            for j in range(n):
                g = G[j] * scale + weight_decay * W[j]
                v = momentum * M[j] + g
                M[j] = v
                W[j] = W[j] - lr * (own * g + part_of_velocity * v)
