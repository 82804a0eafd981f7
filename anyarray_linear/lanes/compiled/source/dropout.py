"""Dropout on a tile: the mask of `dropout`, bit for bit, made where it is used."""

from __future__ import annotations

from numba import njit

from ....dropout import FACTORS, GOLDEN, WORD
from .. import layout as at
from .machine import FLOAT64, INT64, PLAIN, either, from_bits, kept, number, pointer

_FIRST, _SECOND = FACTORS


@njit(**PLAIN)
def hashed(x):
    x = (x ^ x >> 16) * _FIRST & WORD
    x = (x ^ x >> 15) * _SECOND & WORD
    return x ^ x >> 15


@njit(**PLAIN)
def drop(op, c, tile, like):
    """`Z = K X / (1 - rate)`, which is what backward does, too."""
    source, target, count, chunk, key, threshold, factor = op[4], op[5], op[6], op[7], op[8], op[9], op[10]
    if source == 0:
        source = c[at.X]
    words = pointer(key, INT64)  # the seed, the step and the stream
    a = 0
    for k in range(5 if words[2] else 4):
        word = words[2] if k == 4 else words[k // 2] >> 32 * (k % 2) & WORD
        a = hashed((a ^ word) + GOLDEN & WORD)
    b = hashed(a + GOLDEN & WORD)
    start = tile * chunk
    X, Z = pointer(source, like), pointer(target, like)
    scale, zero = number(like, from_bits(factor, FLOAT64)), number(like, 0.0)
    stop = min(start + chunk, count)
    if source == target:  # a loop of its own: what may overlap is not made of vector instructions
        for i in range(start, stop):
            Z[i] = either(kept(i, a, b, threshold), Z[i] * scale, zero)
    else:
        for i in range(start, stop):
            Z[i] = either(kept(i, a, b, threshold), X[i] * scale, zero)
