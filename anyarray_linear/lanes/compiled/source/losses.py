"""Losses and their gradients in one pass, on a tile: the formulas of `losses`."""

from __future__ import annotations

from math import log, log1p

from numba import njit

from .. import layout as at
from .elementary import decay, sigmoid, squares, total_of, wide
from .machine import FLOAT64, INT64, PLAIN, either, number, pointer, size_of


@njit(**PLAIN)
def largest(Z, count):
    a = b = c = d = Z[0]
    for j in range(0, count - 3, 4):
        a = either(Z[j] > a, Z[j], a)
        b = either(Z[j + 1] > b, Z[j + 1], b)
        c = either(Z[j + 2] > c, Z[j + 2], c)
        d = either(Z[j + 3] > d, Z[j + 3], d)
    for j in range(count - count % 4, count):
        a = either(Z[j] > a, Z[j], a)
    return max(max(a, b), max(c, d))


@njit(**PLAIN)
def cross_entropy(kind, Z, D, target, c, r0, r1, classes, factor, like):
    """The sum of the rows' losses, and `D = (softmax(Z) - T) factor`."""
    size, loss = size_of(like), 0.0
    ids, T = pointer(target, INT64), pointer(target, like)
    zero = number(like, 0.0)
    for r in range(r0, r1):
        z, d = pointer(Z + r * classes * size, like), pointer(D + r * classes * size, like)
        top = largest(z, classes)
        for j in range(classes):
            d[j] = z[j] - top
        if kind == at.IDS:
            if ids[r] < 0 or ids[r] >= classes:
                c[at.FLAGS] = 1
                return 0.0
            loss -= factor * d[ids[r]]
        else:
            for j in range(classes):
                t = T[r * classes + j]
                if t != zero:
                    loss -= factor * (wide(t) * d[j])
    d = pointer(D + r0 * classes * size, like)
    for j in range((r1 - r0) * classes):
        d[j] = decay(d[j])
    for r in range(r0, r1):
        d = pointer(D + r * classes * size, like)
        s = total_of(d, classes, zero)
        if kind == at.IDS:
            loss += factor * log(wide(s))
            scale, minus = number(like, factor) / s, number(like, factor)
            for j in range(classes):
                d[j] = d[j] * scale
            d[ids[r]] = d[ids[r]] - minus
        else:
            t = pointer(target + r * classes * size, like)
            whole, minus = total_of(t, classes, zero), number(like, factor)
            loss += factor * (wide(whole) * log(wide(s)))
            scale = whole / s
            for j in range(classes):
                d[j] = (d[j] * scale - t[j]) * minus
    return loss


@njit(**PLAIN)
def squared_error(Z, D, target, r0, r1, classes, weights, factor, like):
    """The sum of the rows' squared errors, and `D = 2 (Z - target) factor`."""
    size, loss, w = size_of(like), 0.0, pointer(weights, like)
    for r in range(r0, r1):
        place = r * classes * size
        z, d, t = pointer(Z + place, like), pointer(D + place, like), pointer(target + place, like)
        share = wide(w[r]) if weights else factor
        twice = number(like, 2 * share)
        for j in range(classes):
            d[j] = z[j] - t[j]
        loss += share * squares(d, classes)
        for j in range(classes):
            d[j] = d[j] * twice
    return loss


@njit(**PLAIN)
def binary(Z, D, target, r0, r1, classes, weights, factor, positive, like):
    """The sum of the rows' binary cross-entropies, and `D = (sigmoid(Z) (1 - T + p T) - p T) factor`."""
    size, loss, w, p = size_of(like), 0.0, pointer(weights, like), pointer(positive, like)
    one, zero = number(like, 1.0), number(like, 0.0)
    for r in range(r0, r1):
        place = r * classes * size
        z, d, t = pointer(Z + place, like), pointer(D + place, like), pointer(target + place, like)
        share = wide(w[r]) if weights else factor
        minus = number(like, share)
        row = 0.0
        for j in range(classes):
            pt = p[j] * t[j] if positive else t[j]
            rest = log1p(wide(decay(-abs(z[j]))))
            above, below = either(z[j] > zero, z[j], zero), either(z[j] < zero, -z[j], zero)
            row += wide(pt) * (wide(below) + rest) + wide(one - t[j]) * (wide(above) + rest)
            d[j] = (sigmoid(z[j]) * (one - t[j] + pt) - pt) * minus
        loss += share * row
    return loss


@njit(**PLAIN)
def loss(op, c, tile, like):
    Z, D, target, rows, classes, kind, chunk, partial, positive = (
        op[4], op[5], op[6], op[7], op[8], op[9], op[10], op[11], op[12]
    )  # fmt: skip
    if target == 0:
        target = c[at.Y]
    weights, factor = c[at.WEIGHTS], pointer(c[at.NUMBERS], FLOAT64)[at.FACTOR]
    r0, r1 = tile * chunk, min((tile + 1) * chunk, rows)
    sums = pointer(partial, FLOAT64)
    if kind == at.SQUARED:
        sums[tile] = squared_error(Z, D, target, r0, r1, classes, weights, factor, like)
    elif kind == at.BINARY:
        sums[tile] = binary(Z, D, target, r0, r1, classes, weights, factor, positive, like)
    else:
        sums[tile] = cross_entropy(kind, Z, D, target, c, r0, r1, classes, factor, like)
