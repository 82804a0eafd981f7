"""The bounds of rounding errors, and the references they are measured from: the theory is at the top of the package."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.operations import lanes_are_on
from ..arrays.place import Array, dtype_name

Host = np.ndarray[Any, Any]



def unit_roundoff(dtype: Any) -> float:
    """The largest relative error of rounding to the floating `dtype`: `2^-24` for float32.

    >>> unit_roundoff("float32") == 2**-24
    True
    """
    return float(np.finfo(dtype if isinstance(dtype, (str, type)) else dtype_name(dtype)).eps) / 2


def gamma(n: int, u: float) -> float:
    """`n u / (1 - n u)`, the bound on the relative error of `n` roundings (Higham 2002, lemma 3.1); `inf` where `n u >= 1`.

    >>> gamma(2, 0.25)
    1.0
    """
    return n * u / (1 - n * u) if n * u < 1 else math.inf


TF32 = 2.0**-11
"""The unit roundoff of TF32."""
OUTPUTS = "Z", "dX", "dW", "db"
"""What a linear layer computes, each of it by a product."""


def _in_tf32(place: Device, dtype: str) -> Collection[str]:
    """The outputs whose products are formed in TF32 there. The lanes for CuPy form `db` in float32 in any case."""
    if dtype != "float32" or not place.tf32:
        return ()
    return OUTPUTS[:3] if place.kind == "cuda" and lanes_are_on.get() else OUTPUTS


class _Product:
    """The exact product `A @ B (+ c)` to more than the precision of its operands, and the error that is allowed to it."""

    def __init__(self, shape: tuple[int, ...], A: Host, B: Host, c: Host | None = None, *, tf32: bool = False) -> None:
        self.dtype, self.tf32 = A.dtype.name, tf32
        self.terms = A.shape[1] + (c is not None)
        wide = np.longdouble if self.dtype == "float64" else np.float64
        self.wide_u = unit_roundoff(wide)
        with np.errstate(all="ignore"):
            value = A.astype(wide) @ B.astype(wide)
            A, B = np.abs(A.astype(np.float64)), np.abs(B.astype(np.float64))
            scale = A @ B
            if c is not None:
                value, scale = value + c, scale + np.abs(c.astype(np.float64))
            summed_in = np.finfo("float32" if self.dtype == "float16" else self.dtype)
            underflow = A.sum(1, keepdims=True) + B.sum(0, keepdims=True) + 2 * self.terms + 2
        self.underflow = (underflow * float(summed_in.smallest_normal)).reshape(shape)
        self.value, self.scale = value.reshape(shape), scale.reshape(shape)
        self.roundings = 0  # to float16, after the sum
        if self.dtype == "float16":
            self.roundings = 1 + (c is not None)
            self.underflow += self.roundings * float(np.finfo("float16").smallest_subnormal)

    def bound(self, *, sharp: bool) -> Host:
        """The allowed absolute error of each element."""

        def growth(u: float) -> float:
            return 4 * math.sqrt(self.terms + 2) * u if sharp else gamma(self.terms, u)

        c = growth(unit_roundoff("float32" if self.dtype == "float16" else self.dtype))
        if self.tf32:
            c = (1 + c) * (1 + 2 * TF32) ** 2 - 1  # cut off, or rounded, which is half of it
        c = (1 + c) * (1 + unit_roundoff("float16")) ** self.roundings - 1
        # the scale itself is a sum in float64: with this factor it is no less than the exact one
        c = (c + growth(self.wide_u)) * (1 + 2 * gamma(self.terms, 2**-53))
        with np.errstate(all="ignore"):
            bound = c * self.scale + self.underflow
            return np.where(self.scale + bound < float(np.finfo(self.dtype).max), bound, math.inf)


def _products(
    X: Host, W: Host, b: Host | None, dZ: Host | None, *, tf32: Collection[str] = ()
) -> dict[str, _Product]:
    """The products that a linear layer computes, by the names of its outputs, for operands on the host.

    tf32: the outputs that are formed in TF32.
    """
    (out_features, in_features), batch = W.shape, X.shape[:-1]
    X_rows = X.reshape(math.prod(batch), in_features)
    products = {"Z": _Product((*batch, out_features), X_rows, W.T, b, tf32="Z" in tf32)}
    if dZ is not None:
        dZ_rows = dZ.reshape(math.prod(batch), out_features)
        ones = np.ones((1, len(dZ_rows)), dtype=dZ.dtype)
        products["dX"] = _Product(X.shape, dZ_rows, W, tf32="dX" in tf32)
        products["dW"] = _Product(W.shape, dZ_rows.T, X_rows, tf32="dW" in tf32)
        products["db"] = _Product((1, out_features), ones, dZ_rows, tf32="db" in tf32)
    return products


def _host(x: Array, dtype: Any = None) -> Host:
    """`x`, of any namespace and device, on the host, in the dtype of that name."""
    return Device.of(x).to_numpy(x).astype(dtype or dtype_name(x.dtype), copy=False)


def _host_products(X: Array, W: Array, b: Array | None, dZ: Array | None, **options: Any) -> dict[str, _Product]:
    dtype = dtype_name(W.dtype)
    b = None if b is None else _host(b, dtype)
    return _products(_host(X, dtype), _host(W), b, None if dZ is None else _host(dZ, dtype), **options)


def linear_reference(X: Array, W: Array, b: Array | None = None, dZ: Array | None = None) -> dict[str, Host]:
    """What a linear layer should compute: `{"Z": Z}`, and with `dZ` also `"dX"`, `"dW"` and `"db"`.

    X: `(..., in_features)`, W: `(out_features, in_features)`, b: `(1, out_features)` or `None`, dZ: `(..., out_features)`,
    of any namespace and device; all are rounded to the dtype of `W` first, as the layer gets them. Returns NumPy float64
    arrays.

    >>> import numpy as np
    >>> linear_reference(np.asarray([0.1], dtype="float32"), np.asarray([[1.0]], dtype="float32"))["Z"].item()
    0.10000000149011612
    """
    return {name: product.value.astype(np.float64) for name, product in _host_products(X, W, b, dZ).items()}


def linear_error_bounds(
    X: Array, W: Array, b: Array | None = None, dZ: Array | None = None, *, sharp: bool = False, tf32: bool = False
) -> dict[str, Host]:
    """How far each element of a layer's outputs may be from the exact one; the dtype of `W` says in which precision.

    X, W, b, dZ: as in `linear_reference`. sharp: the sharp gate, for seeded random data, instead of the hard limit.
    tf32: whether all float32 products are formed in TF32, that of `db` too. Returns `{"Z": ...}`, and with `dZ` also `"dX"`,
    `"dW"` and `"db"`: NumPy float64 arrays of the outputs' shapes; `inf` where overflow is possible.

    >>> import numpy as np
    >>> X, W = np.ones((1, 3), dtype="float32"), np.ones((1, 3), dtype="float32")
    >>> round(linear_error_bounds(X, W)["Z"].item() / (3 * 3 * 2**-24), 4)      # n u times |X||W|^T
    1.0
    """
    products = _host_products(X, W, b, dZ, tf32=OUTPUTS if tf32 else ())
    return {name: product.bound(sharp=sharp) for name, product in products.items()}

