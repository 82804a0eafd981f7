"""Layer normalisation on a tile: the formulas of `normalization`, with sums along a row in float64."""

from __future__ import annotations

from math import sqrt

from numba import njit

from .. import layout as at
from .activations import activate, mask
from .elementary import squares, wide
from .layers import part
from .machine import FLOAT64, PLAIN, SUMS, from_bits, number, pointer, size_of


@njit(**SUMS)
def wide_total(x, count):
    s = 0.0
    for j in range(count):
        s += wide(x[j])
    return s


@njit(**SUMS)
def wide_product(x, y, count):
    s = 0.0
    for j in range(count):
        s += wide(x[j]) * wide(y[j])
    return s


@njit(**PLAIN)
def normalize(op, c, tile, like):
    """`Z = H * W + b`, and the activation after it; keeps `H` and `R` where there is room for them."""
    X, ldx, W, b, before, after, H, R = op[4], op[5], op[6], op[7], op[8], op[9], op[10], op[11]
    rows, width, kind, chunk, eps = op[12], op[13], op[14], op[15], from_bits(op[16], FLOAT64)
    if X == 0:
        X, ldx = c[at.X], c[at.LDX]
    size = size_of(like)
    w = pointer(W, like)
    for row in range(tile * chunk, min((tile + 1) * chunk, rows)):
        place = row * width * size
        x, z = pointer(X + row * ldx * size, like), pointer(before + place, like)
        h = pointer(H + place, like) if H else z
        mean = number(like, wide_total(x, width) / width)
        for j in range(width):
            h[j] = x[j] - mean
        r = number(like, 1.0 / sqrt(squares(h, width) / width + eps))
        if H:
            pointer(R, like)[row] = r
            for j in range(width):
                d = h[j] * r
                h[j] = d
                z[j] = d * w[j]
        else:  # a loop of its own: what may overlap is not made of vector instructions
            for j in range(width):
                z[j] = z[j] * r * w[j]
        activate(kind, before + place, b, after + place, width, like)


@njit(**PLAIN)
def weight_gradient(op, tile, like):
    """`dW = 1^T (dZ * H)` and `db = 1^T dZ`, or added to what is there: some columns, all rows."""
    dZ, H, dW, db, rows, width, more, parts = op[4], op[5], op[6], op[7], op[8], op[9], op[10], op[11]
    size = size_of(like)
    c0, c1 = part(tile, parts, width, 16), part(tile + 1, parts, width, 16)
    w, b = pointer(dW, like), pointer(db, like)
    if not more:
        for j in range(c0, c1):
            w[j] = number(like, 0.0)
            b[j] = number(like, 0.0)
    for row in range(rows):
        d, h = pointer(dZ + row * width * size, like), pointer(H + row * width * size, like)
        for j in range(c0, c1):
            w[j] = w[j] + d[j] * h[j]
            b[j] = b[j] + d[j]


@njit(**PLAIN)
def input_gradient(op, tile, like):
    """`dX = R (dH - mean dH - H mean(dH * H))` with `dH = dZ * W`, times the slope of the activation that gave this `X`."""
    dZ, W, dX, kept, H, R = op[4], op[5], op[6], op[7], op[8], op[9]
    rows, width, kind, chunk = op[10], op[11], op[12], op[13]
    size = size_of(like)
    w = pointer(W, like)
    for row in range(tile * chunk, min((tile + 1) * chunk, rows)):
        place = row * width * size
        d, h, x = pointer(dZ + place, like), pointer(H + place, like), pointer(dX + place, like)
        for j in range(width):
            x[j] = d[j] * w[j]
        mean = number(like, wide_total(x, width) / width)
        along = number(like, wide_product(x, h, width) / width)
        r = pointer(R, like)[row]
        for j in range(width):
            x[j] = r * (x[j] - mean - h[j] * along)
        if kind != at.NONE:
            mask(kind, dX + place, kept + place, width, like)
