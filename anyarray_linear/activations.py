"""Activations: elementwise functions with their derivatives, as layers without parameters.

Each derivative is written in terms of what costs least to keep: of the output where the function can be undone
(`ReLU`, `Tanh`, `Sigmoid`; the output is the next layer's input and is kept anyway), else of the input.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from .arrays.checks import check_alike, check_float, check_shape, describe
from .arrays.dtypes import wide
from .arrays.place import Array, Namespace, Place, place_of
from .erf import normal_cdf


class _Activation:
    """An elementwise `Z = f(X)` and its `dX = dZ f'(X)`; a subclass says which, and what its cache is called."""

    _kept = "Z"  # whether the derivative is written in terms of "Z" or of "X"

    def _function(self, xp: Namespace, X: Array) -> Array:
        raise NotImplementedError

    def _derivative(self, xp: Namespace, dZ: Array, kept: Array) -> Array:
        """`dZ f'(X)`, from `dZ` and what was kept."""
        raise NotImplementedError

    def forward(self, X: Array) -> tuple[Array, dict[str, Array]]:
        """`Z = f(X)`, of the shape, dtype and device of `X`, and the cache. `TypeError` for an `X` of integers."""
        Z = self(X)
        return Z, {self._kept: Z if self._kept == "Z" else X}

    def gradients(
        self, dZ: Array, cache: Mapping[str, Array], *, needs_dX: bool = True
    ) -> tuple[Array | None, dict[str, Array]]:
        """`(dX, {})`, or `(None, {})` without `needs_dX`; raises for a `dZ` that does not fit the cache."""
        if not (type(cache) is dict or isinstance(cache, Mapping)) or self._kept not in cache:
            raise TypeError(
                f'cache is {describe(cache)} without "{self._kept}"; pass the second result of this layer\'s forward'
            )
        kept = cache[self._kept]
        place = place_of(kept)
        if place_of(dZ) is not place or dZ.shape != kept.shape:
            check_alike(self._kept, kept, "dZ", dZ)
            check_shape("dZ", dZ, tuple(kept.shape), "the shape of Z")
        if not needs_dX:
            return None, {}
        dX = place.run(activation_gradient, self, dZ, kept)
        return dX if kept.ndim else _array_of(place, dX), {}

    def backward(
        self, dZ: Array, cache: Mapping[str, Array], *, accumulate: bool = False, needs_dX: bool = True
    ) -> Array | None:
        """`dX`; there are no parameters, so nothing is stored."""
        return self.gradients(dZ, cache, needs_dX=needs_dX)[0]

    def parameters(self) -> dict[str, Array]:
        """`{}`."""
        return {}

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """The activation itself: it holds nothing."""
        return self

    def __call__(self, X: Array) -> Array:
        """`Z = f(X)`: no cache."""
        place = place_of(X)
        if not place.computes:
            check_float("X", X)
        Z = place.run(activation, self, X)
        return Z if X.ndim else _array_of(place, Z)

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _array_of(place: Place, x: Any) -> Array:
    """`x` as an array: of 0-d arrays NumPy makes scalars."""
    with place.entered() as xp:
        return xp.asarray(x)


def activation(xp: Namespace, layer: _Activation, X: Array) -> Array:
    """`Z = f(X)`."""
    return layer._function(xp, X)


def activation_gradient(xp: Namespace, layer: _Activation, dZ: Array, kept: Array) -> Array:
    """`dX = dZ f'(X)`."""
    return layer._derivative(xp, dZ, kept)


class ReLU(_Activation):
    """`Z = max(X, 0)`, with derivative 0 at 0 as everywhere in the field; a NaN stays one.

    >>> import numpy as np
    >>> ReLU()(np.asarray([-1.0, 2.0]))
    array([0., 2.])
    """

    def _function(self, xp: Namespace, X: Array) -> Array:
        return xp.maximum(X, 0.0)

    def _derivative(self, xp: Namespace, dZ: Array, Z: Array) -> Array:
        return xp.where(Z <= 0, 0.0, dZ)  # not dZ * (Z > 0), which makes a NaN of an infinite dZ


class Tanh(_Activation):
    """`Z = tanh X`, `dX = dZ (1 - Z^2)`.

    >>> import numpy as np
    >>> Tanh()(np.asarray([0.0]))
    array([0.])
    """

    def _function(self, xp: Namespace, X: Array) -> Array:
        return xp.tanh(X)

    def _derivative(self, xp: Namespace, dZ: Array, Z: Array) -> Array:
        return dZ * (1.0 - Z * Z)


def _sigmoid(xp: Namespace, X: Array) -> Array:
    """`1 / (1 + exp(-X))`, by way of `exp(-|X|)`, which cannot overflow."""
    E = xp.exp(-xp.abs(X))
    return xp.where(X >= 0, 1.0, E) / (1.0 + E)


class Sigmoid(_Activation):
    """`Z = 1 / (1 + exp(-X))`, `dX = dZ Z (1 - Z)`.

    >>> import numpy as np
    >>> Sigmoid()(np.asarray([0.0, -1000.0]))
    array([0.5, 0. ])
    """

    def _function(self, xp: Namespace, X: Array) -> Array:
        return _sigmoid(xp, X)

    def _derivative(self, xp: Namespace, dZ: Array, Z: Array) -> Array:
        return dZ * Z * (1.0 - Z)


class SiLU(_Activation):
    """`Z = X S` with `S = sigmoid(X)`, `dX = dZ S (1 + X (1 - S))` (Hendrycks and Gimpel, 2016).

    >>> import numpy as np
    >>> SiLU()(np.asarray([0.0]))
    array([0.])
    """

    _kept = "X"

    def _function(self, xp: Namespace, X: Array) -> Array:
        return X * _sigmoid(xp, X)

    def _derivative(self, xp: Namespace, dZ: Array, X: Array) -> Array:
        S = _sigmoid(xp, X)
        return dZ * S * (1.0 + X * (1.0 - S))


class GELU(_Activation):
    """`Z = X Phi(X)`, with `Phi(X) = (1 + erf(X / sqrt 2)) / 2` (Hendrycks and Gimpel, 2016), and its derivative
    `dX = dZ (Phi(X) + X phi(X))`, `phi(X) = exp(-X^2 / 2) / sqrt(2 pi)`.

    approximate: `"none"`, or `"tanh"` for `Z = X/2 (1 + tanh U)` with `U = sqrt(2/pi) (X + 0.044715 X^3)`, which is within
    5e-4 of it and cheaper where there is no lane for `erf`. Both as PyTorch's.

    Raises `ValueError` for another `approximate`.

    >>> import numpy as np
    >>> GELU()(np.asarray([0.0, 1.0])), GELU(approximate="tanh")(np.asarray([0.0, 1.0]))
    (array([0.        , 0.84134475]), array([0.        , 0.84119199]))
    """

    _kept = "X"
    _a, _c = math.sqrt(2 / math.pi), 0.044715

    def __init__(self, approximate: str = "none") -> None:
        if approximate not in ("none", "tanh"):
            raise ValueError(f'approximate is {approximate!r}; it is "none", the exact GELU, or "tanh"')
        self.approximate = approximate

    def _function(self, xp: Namespace, X: Array) -> Array:
        X_wide = wide(xp, X)  # polynomials leave the range of float16, and 1 + tanh U its precision
        if self.approximate == "tanh":
            near = _within(xp, X_wide, 16.0)  # from far before that on tanh U is 1, and no square overflows
            Z = 0.5 * X_wide * (1.0 + xp.tanh(self._a * near * (1.0 + self._c * (near * near))))
        else:
            Z = X_wide * normal_cdf(xp, X_wide)
        return xp.astype(Z, X.dtype, copy=False)

    def _derivative(self, xp: Namespace, dZ: Array, X: Array) -> Array:
        X_wide = wide(xp, X)
        if self.approximate == "tanh":
            near = _within(xp, X_wide, 16.0)
            S = near * near
            T = xp.tanh(self._a * near * (1.0 + self._c * S))
            dU = self._a * (1.0 + 3.0 * self._c * S)
            slope = 0.5 * (1.0 + T + near * (1.0 - T * T) * dU)
            return xp.astype(dZ * slope, X.dtype, copy=False)
        near = _within(xp, X_wide, 40.0)  # phi is 0 from there on, and no square overflows
        slope = normal_cdf(xp, X_wide) + near * (xp.exp(-0.5 * near * near) * (1 / math.sqrt(2 * math.pi)))
        return xp.astype(dZ * slope, X.dtype, copy=False)

    def __repr__(self) -> str:
        return "GELU()" if self.approximate == "none" else f"GELU(approximate={self.approximate!r})"


def _within(xp: Namespace, X: Array, most: float) -> Array:
    """`X`, cut off at `-most` and `most`; a NaN stays one."""
    return xp.maximum(xp.minimum(X, most), -most)
