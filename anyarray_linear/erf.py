"""The error function in Array API operations: the standard has none.

`erf x = 2/sqrt(pi) int_0^x exp(-t^2) dt`, by the rational approximations of W. J. Cody, "Rational Chebyshev approximations
for the error function", Math. Comp. 23 (1969), with the coefficients of his program CALERF (netlib, 1990), to 18 digits:

    |x| <= 0.46875           erf x  = x R1(x^2)
    0.46875 < |x| <= 4       erfc x = exp(-x^2) R2(x)
    4 < x                    erfc x = exp(-x^2) / x (1/sqrt(pi) + R3(1/x^2) / x^2)

All three are evaluated everywhere, each at arguments cut to its own range, and chosen from: the standard has no other way.
"""

from __future__ import annotations

import math

from .arrays.place import Array, Namespace

# from the highest power down; Cody's A and B, C and D, P and Q
R1 = (
    (1.85777706184603153e-1, 3.16112374387056560, 1.13864154151050156e2, 3.77485237685302021e2, 3.20937758913846947e3),
    (1.0, 2.36012909523441209e1, 2.44024637934444173e2, 1.28261652607737228e3, 2.84423683343917062e3),
)
R2 = (
    (
        *(2.15311535474403846e-8, 5.64188496988670089e-1, 8.88314979438837594, 6.61191906371416295e1, 2.98635138197400131e2),
        *(8.81952221241769090e2, 1.71204761263407058e3, 2.05107837782607147e3, 1.23033935479799725e3),
    ),
    (
        *(1.0, 1.57449261107098347e1, 1.17693950891312499e2, 5.37181101862009858e2, 1.62138957456669019e3),
        *(3.29079923573345963e3, 4.36261909014324716e3, 3.43936767414372164e3, 1.23033935480374942e3),
    ),
)
R3 = (
    (
        *(-1.63153871373020978e-2, -3.05326634961232344e-1, -3.60344899949804439e-1, -1.25781726111229246e-1),
        *(-1.60837851487422766e-2, -6.58749161529837803e-4),
    ),
    (
        *(1.0, 2.56852019228982242, 1.87295284992346725, 5.27905102951428412e-1),
        *(6.05183413124413191e-2, 2.33520497626869185e-3),
    ),
)
SMALL, MIDDLE, LARGEST = 0.46875, 4.0, 27.5
"""Where one approximation ends and the next begins, and from where on erfc is 0 in float64."""


def _ratio(coefficients: tuple[tuple[float, ...], tuple[float, ...]], x: Array) -> Array:
    """The quotient of two polynomials in `x`, by Horner's rule."""
    values = []
    for first, *rest in coefficients:
        value = first * x + rest[0]
        for c in rest[1:]:
            value = value * x + c
        values.append(value)
    return values[0] / values[1]


def erf(xp: Namespace, X: Array) -> Array:
    """`erf X`, of the shape and dtype (float32 or float64) of `X`, to a few units in the last place.

    >>> import numpy as np
    >>> bool(abs(erf(np, np.asarray([0.5, -2.0])) - [math.erf(0.5), math.erf(-2.0)]).max() < 4e-16)
    True
    """
    small, near, far = _parts(xp, X)
    return xp.where(small, near, xp.where(X < 0, far - 1.0, 1.0 - far))


def normal_cdf(xp: Namespace, X: Array) -> Array:
    """`Phi(X) = (1 + erf(X / sqrt 2)) / 2`, the share of a normal distribution below `X`; nothing cancels for negative `X`.

    >>> import numpy as np
    >>> float(normal_cdf(np, np.asarray([0.0]))[0])
    0.5
    """
    small, near, far = _parts(xp, X * math.sqrt(0.5))
    return 0.5 * xp.where(small, 1.0 + near, xp.where(X < 0, far, 2.0 - far))


def _parts(xp: Namespace, X: Array) -> tuple[Array, Array, Array]:
    """Where `|X|` is small, `erf X` there, and `erfc |X|` elsewhere."""
    Y = xp.minimum(xp.abs(X), LARGEST)
    small = Y <= SMALL
    S = xp.where(small, X, 0.0)
    near = S * _ratio(R1, S * S)
    middle = _ratio(R2, xp.minimum(Y, MIDDLE))
    Y_far = xp.maximum(Y, MIDDLE)
    T = 1.0 / (Y_far * Y_far)
    outer = (1 / math.sqrt(math.pi) + T * _ratio(R3, T)) / Y_far
    return small, near, xp.exp(-Y * Y) * xp.where(Y <= MIDDLE, middle, outer)
