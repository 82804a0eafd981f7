"""The operations of a training step on one tile each: the formulas of `linear`, `activations`, `losses` and `optimizers`.

Arrays are given by their addresses; `like` is a number of the dtype of them all.
"""

from __future__ import annotations

from math import log, log1p, sqrt

import numpy as np
from numba import njit

from .. import layout as at
from .elementary import BARE, decay, normal_cdf, sigmoid, tanh
from .elementary import OPTIONS as INLINE
from .machine import either, number, pointer, product, size_of

PLAIN = {**BARE, "fastmath": {"contract"}}
SUMS = {**BARE, "fastmath": {"contract", "reassoc"}}  # sums in vectors: the same order each time
FLOAT64 = np.float64(0)
INT64 = np.int64(0)


@njit(**INLINE)
def part(tile, parts, total, unit):
    """The first element of this of so many parts, in multiples of `unit`."""
    units = (total + unit - 1) // unit
    return min(units * tile // parts * unit, total)


@njit(**INLINE)
def wide(x):
    """In float64: numba's `float` leaves a float32 number what it is."""
    return number(FLOAT64, x)


# activations


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
    Z, b, F = pointer(before, like), pointer(b, like), pointer(after, like)
    if kind == at.NONE:
        for j in range(count):
            Z[j] = Z[j] + b[j]
    elif kind == at.RELU:
        for j in range(count):
            Z[j] = relu(Z[j] + b[j])
    elif kind == at.TANH:
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
    D, K, one = pointer(gradient, like), pointer(kept, like), number(like, 1.0)
    if kind == at.RELU:
        for j in range(count):
            D[j] = either(K[j] <= number(like, 0.0), number(like, 0.0), D[j])
    elif kind == at.TANH:
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


# the layer


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
        like, number(like, wide(more)), dW + (a * width + c0) * size, width,
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


# losses


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


@njit(**SUMS)
def total_of(x, count, zero):
    s = zero
    for j in range(count):
        s += x[j]
    return s


@njit(**PLAIN)
def cross_entropy(kind, Z, D, target, c, r0, r1, classes, weights, factor, like):
    """The sum of the rows' losses, and `D = (softmax(Z) - T) factor`."""
    size, loss = size_of(like), 0.0
    ids, T, w = pointer(target, INT64), pointer(target, like), pointer(weights, like)
    zero = number(like, 0.0)
    for r in range(r0, r1):
        z, d = pointer(Z + r * classes * size, like), pointer(D + r * classes * size, like)
        top = largest(z, classes)
        for j in range(classes):
            d[j] = z[j] - top
        share = wide(w[r]) if weights else factor
        if kind == at.IDS:
            if ids[r] < 0 or ids[r] >= classes:
                c[at.FLAGS] = 1
                return 0.0
            loss -= share * d[ids[r]]
        else:
            for j in range(classes):
                t = T[r * classes + j]
                if t != zero:
                    loss -= share * (wide(t) * d[j])
    d = pointer(D + r0 * classes * size, like)
    for j in range((r1 - r0) * classes):
        d[j] = decay(d[j])
    for r in range(r0, r1):
        d = pointer(D + r * classes * size, like)
        share = wide(w[r]) if weights else factor
        s = total_of(d, classes, zero)
        if kind == at.IDS:
            loss += share * log(wide(s))
            scale, minus = number(like, share) / s, number(like, share)
            for j in range(classes):
                d[j] = d[j] * scale
            d[ids[r]] = d[ids[r]] - minus
        else:
            t = pointer(target + r * classes * size, like)
            whole, minus = total_of(t, classes, zero), number(like, share)
            loss += share * (wide(whole) * log(wide(s)))
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
    """The sum of the rows' binary cross-entropies, and `D = (sigmoid(Z) - T) factor`, with `positive` weights of ones."""
    size, loss, w, p = size_of(like), 0.0, pointer(weights, like), pointer(positive, like)
    one, zero = number(like, 1.0), number(like, 0.0)
    for r in range(r0, r1):
        place = r * classes * size
        z, d, t = pointer(Z + place, like), pointer(D + place, like), pointer(target + place, like)
        share = wide(w[r]) if weights else factor
        minus = number(like, share)
        row = 0.0
        for j in range(classes):
            extra = (p[j] - one) * t[j] if positive else zero
            rest = log1p(wide(decay(-abs(z[j])))) + wide(either(z[j] < zero, -z[j], zero))
            row += wide((one - t[j]) * z[j]) + wide(one + extra) * rest
            d[j] = ((one + extra) * (sigmoid(z[j]) - one) + (one - t[j])) * minus
        loss += share * row
    return loss


@njit(**PLAIN)
def loss(op, c, tile, like):
    Z, D, target, rows, classes, kind, chunk, partial = op[4], op[5], op[6], op[7], op[8], op[9], op[10], op[11]
    weights, positive, elements = op[12], op[13], op[14]
    if target == 0:
        target = c[at.Y]
    r0, r1 = tile * chunk, min((tile + 1) * chunk, rows)
    sums, factor = pointer(partial, FLOAT64), 1.0 / elements
    if kind == at.SQUARED:
        sums[tile] = squared_error(Z, D, target, r0, r1, classes, weights, factor, like)
    elif kind == at.BINARY:
        sums[tile] = binary(Z, D, target, r0, r1, classes, weights, factor, positive, like)
    else:
        sums[tile] = cross_entropy(kind, Z, D, target, c, r0, r1, classes, weights, factor, like)


# the guard, clipping and the rules


@njit(**SUMS)
def squares(x, count):
    s = 0.0
    for j in range(count):
        s += wide(x[j]) * wide(x[j])
    return s


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


@njit(**PLAIN)
def take(op, c, tile, like):
    """Rows of the data, in the order of the epoch, next to each other."""
    X, y, rows, width, y_width, ids, chunk = op[4], op[5], op[6], op[7], op[8], op[9], op[10]
    order = pointer(c[at.ORDER], INT64)
    size = size_of(like)
    for r in range(tile * chunk, min((tile + 1) * chunk, rows)):
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
