"""Exponential, tanh, sigmoid and normal distribution as polynomials: loops over them become vector instructions.

Each is within a few units in the last place of the exact value, and a NaN stays one. The reduction of the exponential and
its polynomials are those of the Cephes library (Moshier, 1989), after Cody and Waite (*Software Manual for the Elementary
Functions*, 1980); erf is W. J. Cody's ("Rational Chebyshev approximation for the error function", 1969).
"""

from __future__ import annotations

from math import fabs

from numba import njit, types
from numba.extending import overload

from .machine import FLOAT64, INLINE, SUMS, bits, either, from_bits, number


def decay(x):
    """`exp(x)` for `x <= 0`."""
    raise NotImplementedError


@overload(decay, jit_options=INLINE)
def _decay(x):
    if x == types.float32:

        def single(x):
            one = number(x, 1.0)
            low = number(x, -87.33654)
            y = either(x < low, low, x)
            shifted = y * number(x, 1.44269504) + number(x, 12582912.0)  # rounds to a whole n, in the lowest bits
            n = shifted - number(x, 12582912.0)
            r = y - n * number(x, 0.693359375)
            r = r - n * number(x, -2.12194440e-4)
            p = number(x, 1.9875691500e-4) * r + number(x, 1.3981999507e-3)
            p = p * r + number(x, 8.3334519073e-3)
            p = p * r + number(x, 4.1665795894e-2)
            p = p * r + number(x, 1.6666665459e-1)
            p = p * r + number(x, 5.0000001201e-1)
            p = p * (r * r) + r + one
            power = from_bits((bits(shifted) << 23) + bits(one), x)
            return either(x < low, number(x, 0.0), p * power)

        return single

    def double(x):
        one = number(x, 1.0)
        low = number(x, -708.3964)
        y = either(x < low, low, x)
        shifted = y * 1.4426950408889634 + 6755399441055744.0
        n = shifted - 6755399441055744.0
        r = y - n * 6.93145751953125e-1
        r = r - n * 1.42860682030941723212e-6
        rr = r * r
        p = r * ((1.26177193074810590878e-4 * rr + 3.02994407707441961300e-2) * rr + 9.99999999999999999910e-1)
        q = ((3.00198505138664455042e-6 * rr + 2.52448340349684104192e-3) * rr + 2.27265548208155028766e-1) * rr + 2.0
        power = from_bits((bits(shifted) << 52) + bits(one), x)
        return either(x < low, 0.0, (one + 2.0 * (p / (q - p))) * power)

    return double


def tanh(x):
    """`tanh x`."""
    raise NotImplementedError


@overload(tanh, jit_options=INLINE)
def _tanh(x):
    if x == types.float32:

        def single(x):
            one = number(x, 1.0)
            a = fabs(x)
            e = decay(number(x, -2.0) * a)
            far = (one - e) / (one + e)
            z = x * x
            p = number(x, -5.70498872745e-3) * z + number(x, 2.06390887954e-2)
            p = p * z + number(x, -5.37397155531e-2)
            p = p * z + number(x, 1.33314422036e-1)
            p = p * z + number(x, -3.33332819422e-1)
            near = x + x * z * p
            signed = either(x > number(x, 0.0), far, -far)
            return either(a < number(x, 0.625), near, signed)

        return single

    def double(x):
        a = fabs(x)
        e = decay(-2.0 * a)
        far = (1.0 - e) / (1.0 + e)
        z = x * x
        p = (-9.64399179425052238628e-1 * z - 9.92877231001918586564e1) * z - 1.61468768441708447952e3
        q = ((z + 1.12811678491632931402e2) * z + 2.23548839060100448583e3) * z + 4.84406305325125486048e3
        near = x + x * z * (p / q)
        signed = either(x > 0.0, far, -far)
        return either(a < 0.625, near, signed)

    return double


@njit(**INLINE)
def sigmoid(x):
    """`1 / (1 + exp(-x))`, by way of `exp(-|x|)`, which cannot overflow."""
    one = number(x, 1.0)
    e = decay(-fabs(x))
    return either(x >= number(x, 0.0), one, e) / (one + e)


@njit(**INLINE)
def normal_cdf(x):
    """`Phi(x) = (1 + erf(x / sqrt 2)) / 2`; nothing cancels for negative `x`."""
    one, half = number(x, 1.0), number(x, 0.5)
    r = x * number(x, 0.7071067811865476)
    a = fabs(r)
    z = r * r
    p = number(x, 1.85777706184603153e-1) * z + number(x, 3.16112374387056560e00)
    p = p * z + number(x, 1.13864154151050156e02)
    p = p * z + number(x, 3.77485237685302021e02)
    p = p * z + number(x, 3.20937758913846947e03)
    q = z + number(x, 2.36012909523441209e01)
    q = q * z + number(x, 2.44024637934444173e02)
    q = q * z + number(x, 1.28261652607737228e03)
    q = q * z + number(x, 2.84423683343917062e03)
    near = half + half * r * (p / q)
    y = either(a > number(x, 30.0), number(x, 30.0), a)  # erfc is 0 from there on, and no square overflows
    p = number(x, 2.15311535474403846e-8) * y + number(x, 5.64188496988670089e-1)
    p = p * y + number(x, 8.88314979438837594e0)
    p = p * y + number(x, 6.61191906371416295e01)
    p = p * y + number(x, 2.98635138197400131e02)
    p = p * y + number(x, 8.81952221241769090e02)
    p = p * y + number(x, 1.71204761263407058e03)
    p = p * y + number(x, 2.05107837782607147e03)
    p = p * y + number(x, 1.23033935479799725e03)
    q = y + number(x, 1.57449261107098347e01)
    q = q * y + number(x, 1.17693950891312499e02)
    q = q * y + number(x, 5.37181101862009858e02)
    q = q * y + number(x, 1.62138957456669019e03)
    q = q * y + number(x, 3.29079923573345963e03)
    q = q * y + number(x, 4.36261909014324716e03)
    q = q * y + number(x, 3.43936767414372164e03)
    q = q * y + number(x, 1.23033935480374942e03)
    tail = half * decay(-(y * y)) * (p / q)  # beyond y = 4 of less relative, but no less absolute accuracy
    far = either(x < number(x, 0.0), tail, one - tail)
    return either(a < number(x, 0.46875), near, far)


@njit(**INLINE)
def wide(x):
    """In float64: numba's `float` leaves a float32 number what it is."""
    return number(FLOAT64, x)


@njit(**SUMS)
def total_of(x, count, zero):
    s = zero
    for j in range(count):
        s += x[j]
    return s


@njit(**SUMS)
def squares(x, count):
    s = 0.0
    for j in range(count):
        s += wide(x[j]) * wide(x[j])
    return s
