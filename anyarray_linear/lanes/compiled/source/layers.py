"""The linear layer on a tile: the products of `linear`, the activation beside them, and rows taken in an order."""

from __future__ import annotations

from numba import njit

from .. import layout as at
from .activations import activate, mask
from .machine import INLINE, INT64, PLAIN, number, pointer, product, size_of


@njit(**INLINE)
def part(tile, parts, total, unit):
    """The first element of this of so many parts, in multiples of `unit`."""
    units = (total + unit - 1) // unit
    return min(units * tile // parts * unit, total)


@njit(**PLAIN)
def forward(op, c, tile, like):
    """`Z = X W^T + b`, and the activation after it."""
    X, ldx, W, b, before, after = op[4], op[5], op[6], op[7], op[8], op[9]
    rows, width, out, kind, row_parts, column_parts = op[10], op[11], op[12], op[13], op[14], op[15]
    if X == 0:
        X, ldx = c[at.X], c[at.LDX]
    size = size_of(like)
    i, j = tile // column_parts, tile % column_parts
    r0, r1 = part(i, row_parts, rows, 8), part(i + 1, row_parts, rows, 8)
    c0, c1 = part(j, column_parts, out, 16), part(j + 1, column_parts, out, 16)
    if r0 == r1 or c0 == c1:
        return
    product(
        c[at.GEMM], c[at.WIDE], 111, 112, r1 - r0, c1 - c0, width, X + r0 * ldx * size, ldx, W + c0 * width * size, width,
        like, number(like, 0.0), before + (r0 * out + c0) * size, out,
    )  # fmt: skip
    for r in range(r0, r1):
        place = (r * out + c0) * size
        activate(kind, before + place, b + c0 * size, after + place, c1 - c0, like)


@njit(**PLAIN)
def weight_gradient(op, c, tile, like):
    """`dW = dZ^T X` and `db = 1^T dZ`, or added to what is there."""
    dZ, X, ldx, dW, db = op[4], op[5], op[6], op[7], op[8]
    rows, width, out, more, out_parts, in_parts = op[9], op[10], op[11], op[12], op[13], op[14]
    if X == 0:
        X, ldx = c[at.X], c[at.LDX]
    size = size_of(like)
    i, j = tile // in_parts, tile % in_parts
    a, b = part(i, out_parts, out, 16), part(i + 1, out_parts, out, 16)
    c0, c1 = part(j, in_parts, width, 16), part(j + 1, in_parts, width, 16)
    if a == b or c0 == c1:
        return
    product(
        c[at.GEMM], c[at.WIDE], 112, 111, b - a, c1 - c0, rows, dZ + a * size, out, X + c0 * size, ldx,
        like, number(like, more), dW + (a * width + c0) * size, width,
    )  # fmt: skip
    if db != 0 and c0 == 0:
        G = pointer(db + a * size, like)
        if not more:
            for j in range(b - a):
                G[j] = number(like, 0.0)
        for r in range(rows):
            D = pointer(dZ + (r * out + a) * size, like)
            for j in range(b - a):
                G[j] = G[j] + D[j]


@njit(**PLAIN)
def input_gradient(op, c, tile, like):
    """`dX = dZ W`, times the slope of the activation that gave this `X`."""
    dZ, W, dX, kept, rows, width, out, kind = op[4], op[5], op[6], op[7], op[8], op[9], op[10], op[11]
    row_parts, column_parts = op[12], op[13]
    size = size_of(like)
    i, j = tile // column_parts, tile % column_parts
    r0, r1 = part(i, row_parts, rows, 8), part(i + 1, row_parts, rows, 8)
    c0, c1 = part(j, column_parts, width, 16), part(j + 1, column_parts, width, 16)
    if r0 == r1 or c0 == c1:
        return
    product(
        c[at.GEMM], c[at.WIDE], 111, 111, r1 - r0, c1 - c0, out, dZ + r0 * out * size, out, W + c0 * size, width,
        like, number(like, 0.0), dX + (r0 * width + c0) * size, width,
    )  # fmt: skip
    if kind != at.NONE:
        for r in range(r0, r1):
            place = (r * width + c0) * size
            mask(kind, dX + place, kept + place, c1 - c0, like)


@njit(**PLAIN)
def take(op, c, tile, like):
    """Rows of the data, in the order of the epoch, next to each other."""
    X, y, rows, width, y_width, ids, chunk = op[4], op[5], op[6], op[7], op[8], op[9], op[10]
    order = pointer(c[at.ORDER], INT64)
    size = size_of(like)
    for r in range(tile * chunk, min((tile + 1) * chunk, rows)):
        if order[r] < 0 or order[r] >= c[at.LENGTH]:
            c[at.FLAGS] = 1
            return
        source, target = pointer(c[at.X] + order[r] * c[at.LDX] * size, like), pointer(X + r * width * size, like)
        for j in range(width):
            target[j] = source[j]
        if ids:
            pointer(y, INT64)[r] = pointer(c[at.Y], INT64)[order[r]]
        else:
            source = pointer(c[at.Y] + order[r] * y_width * size, like)
            target = pointer(y + r * y_width * size, like)
            for j in range(y_width):
                target[j] = source[j]
