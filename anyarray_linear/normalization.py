"""Layer normalisation, and the derivation of its backward pass.

Forward
-------
Each row `x` of n features is brought to mean 0 and variance 1, then scaled and shifted (Ba, Kiros and Hinton, 2016):

    m = mean(x),  v = mean((x - m)^2),  r = 1 / sqrt(v + eps)
    h = r (x - m)                                        H: the normalised rows
    z = h * w + b                                        w, b: (features,), the same for every row

Backward
--------
`w_j` multiplies feature j of every row i, `dZ_ij/dw_j = H_ij`, and `b_j` is added there, `dZ_ij/db_j = 1`:

    dL/dw_j = sum_i dZ_ij H_ij                           dW = 1^T (dZ * H)       (features,)
    dL/db_j = sum_i dZ_ij                                db = 1^T dZ             (features,)

`h` reaches the loss through `z = h * w + b`, so `dh = dz * w`. And `x_k` acts on every `h_j` of its row: on its own
directly, and on all of them through `m` and `v`. With `d = x - m`: `dm/dx_k = 1/n`, `dv/dx_k = 2 d_k / n` (the `d` sum to 0,
so nothing comes by way of `m`) and `dr/dv = -r^3 / 2`:

    dh_j/dx_k = r (1[j = k] - 1/n) - d_j r^3 d_k / n = r (1[j = k] - 1/n - h_j h_k / n)

    dx_k = sum_j dh_j dh_j/dx_k                          dx = r (dh - mean(dh) - h mean(dh * h))

So what of `dh` is constant along the row, or along `h`, is taken out: moving `x` that way moves no `h`. Only `H` and `r` are
needed, and they travel in the cache.

Means and variances are formed in float32 for float16 inputs, and the variance from `x - m`: `mean(x^2) - m^2` cancels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Self

from .arrays.checks import check_alike, check_float, check_shape, describe
from .arrays.device import Device
from .arrays.dtypes import wide
from .arrays.memory import explained_memory
from .arrays.numbers import real, whole
from .arrays.pickling import pin, unpin
from .arrays.place import Array, Namespace, computing_on, device_of, place_of
from .arrays.selection import select_device
from .protocol import store_gradients


class LayerNorm:
    """`Z = H * W + b`, where `H` is `X` with each row at mean 0 and variance 1; derived at the top of this module.

    features: the size of the last axis of `X`, over which is normalised. eps: what is added to the variance.
    dtype, device: as for `Linear`. As PyTorch's `LayerNorm(features)`; `W` is its `weight`.

    `W` `(features,)` starts as ones, `b` `(features,)` as zeros; `dW` and `db` are what `backward` stored, at first `None`.

    Raises `TypeError` or `ValueError` for an argument that is not as above.

    >>> import numpy as np
    >>> LayerNorm(2)(np.asarray([[1.0, 3.0], [10.0, 30.0]])).round(3)
    array([[-1.,  1.],
           [-1.,  1.]])
    """

    W: Array
    b: Array
    dW: Array | None
    db: Array | None
    trainable = True
    """Whether its parameters are trained; if not, `gradients` gives none for them, and forms no sum for them."""

    def __init__(self, features: int, eps: float = 1e-5, *, dtype: Any = None, device: Any = None) -> None:
        count = whole("features", features)
        self.eps = real("eps", eps)
        place = select_device("cpu" if device is None else device)
        dtype = place.dtype(dtype)
        with explained_memory(place, "use another device"):
            self.W, self.b = (place.asarray([value] * count, dtype=dtype) for value in (1.0, 0.0))
        self.dW = self.db = None

    @property
    def features(self) -> int:
        """The size of the last axis of `X`."""
        return int(self.W.shape[0])

    @property
    def dtype(self) -> Any:
        """The dtype of the parameters, and of every array the layer takes and returns."""
        return self.W.dtype

    @property
    def device(self) -> Device:
        """Where the parameters are."""
        return Device.of(self.W)

    def forward(self, X: Array) -> tuple[Array, dict[str, Array]]:
        """`Z`, of the shape of `X` `(..., features)`, and the cache: `H`, and `R`, which is `r` for each row.

        Raises `TypeError` and `ValueError` for an `X` that does not fit the layer.
        """
        self._check(X)
        Z, H, R = place_of(X).run(normalized, X, self.W, self.b, self.eps)
        return Z, {"H": H, "R": R}

    def gradients(
        self, dZ: Array, cache: Mapping[str, Array], *, needs_dX: bool = True
    ) -> tuple[Array | None, dict[str, Array]]:
        """`(dX, {"W": dW, "b": db})` for `dZ` `(..., features)` and the cache of one forward; stores nothing."""
        if not isinstance(cache, Mapping) or "H" not in cache or "R" not in cache:
            raise TypeError(f'cache is {describe(cache)} without "H" and "R"; pass the second result of forward')
        H, R = cache["H"], cache["R"]
        check_alike("W", self.W, "dZ", dZ)
        check_shape("dZ", dZ, tuple(H.shape), "the shape of Z")
        check_shape("W", self.W, (H.shape[-1],), "the features of the cache")
        if not self.trainable:
            return place_of(dZ).run(normalized_input_gradient, dZ, H, R, self.W) if needs_dX else None, {}
        dX, dW, db = place_of(dZ).run(normalized_gradients, dZ, H, R, self.W, needs_dX)
        return dX, {"W": dW, "b": db}

    def backward(
        self, dZ: Array, cache: Mapping[str, Array], *, accumulate: bool = False, needs_dX: bool = True
    ) -> Array | None:
        """`dX`, having stored `dW` and `db` on the layer, or added to what is stored there with `accumulate`."""
        dX, gradients = self.gradients(dZ, cache, needs_dX=needs_dX)
        store_gradients(self, gradients, accumulate=accumulate)
        return dX

    def parameters(self) -> dict[str, Array]:
        """`{"W": W, "b": b}`."""
        return {"W": self.W, "b": self.b}

    def config(self) -> dict[str, Any]:
        """`{"features": ..., "eps": ...}`."""
        return {"features": self.features, "eps": self.eps}

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """A new layer with these parameters on another device or in another dtype; no gradients come along."""
        place = self.device if device is None else select_device(device)
        dtype = place.dtype(self.dtype if dtype is None else dtype)
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__)
        for name, x in self.parameters().items():
            with computing_on(x) as xp:  # a copy, as an optimizer may write to the one or the other
                setattr(layer, name, place.asarray(xp.asarray(x, copy=True), dtype=dtype))
        layer.dW = layer.db = None
        return layer

    def __call__(self, X: Array) -> Array:
        """`Z`: no cache."""
        self._check(X)
        return place_of(X).run(normalized, X, self.W, self.b, self.eps)[0]

    def _check(self, X: Array) -> None:
        check_float("X", X)
        check_alike("W", self.W, "X", X)
        if X.ndim == 0 or X.shape[-1] != self.W.shape[0]:
            raise ValueError(f"X has shape {tuple(X.shape)} but its last axis must be features = {self.features}")

    def __repr__(self) -> str:
        eps = "" if self.eps == 1e-5 else f", eps={self.eps}"
        return f"LayerNorm({self.features}{eps}, dtype={self.W.dtype}, device={self.device})"

    # pickle and deepcopy keep a layer on its device, which CuPy's own pickling does not
    def __getstate__(self) -> dict[str, Any]:
        return {name: pin(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: unpin(value) for name, value in state.items()})


def normalized(xp: Namespace, X: Array, W: Array, b: Array, eps: float) -> tuple[Array, Array, Array]:
    """`Z = H * W + b`, `H = R (X - mean)` and `R = 1 / sqrt(variance + eps)`; the latter two in float32 for float16."""
    X_wide = wide(xp, X)
    D = X_wide - xp.mean(X_wide, axis=-1, keepdims=True)
    R = 1.0 / xp.sqrt(xp.mean(D * D, axis=-1, keepdims=True) + eps)
    H = D * R
    return xp.astype(H * wide(xp, W) + wide(xp, b), X.dtype, copy=False), H, R


def normalized_gradients(
    xp: Namespace, dZ: Array, H: Array, R: Array, W: Array, needs_dX: bool
) -> tuple[Array | None, Array, Array]:
    """`dX = R (dH - mean dH - H mean(dH * H))` with `dH = dZ * W`, `dW = 1^T (dZ * H)` and `db = 1^T dZ`."""
    dX = normalized_input_gradient(xp, dZ, H, R, W) if needs_dX else None
    dZ_wide = wide(xp, dZ)
    rows = math.prod(dZ.shape[:-1]), dZ.shape[-1]
    ones = xp.ones((1, rows[0]), dtype=dZ_wide.dtype, device=device_of(dZ))  # a product, as in linear.py
    dW, db = (
        xp.astype(xp.reshape(ones @ xp.reshape(x, rows), (rows[1],)), W.dtype, copy=False) for x in (dZ_wide * H, dZ_wide)
    )
    return dX, dW, db


def normalized_input_gradient(xp: Namespace, dZ: Array, H: Array, R: Array, W: Array) -> Array:
    """`dX = R (dH - mean dH - H mean(dH * H))` with `dH = dZ * W`."""
    dH = wide(xp, dZ) * wide(xp, W)
    along_H = xp.mean(dH * H, axis=-1, keepdims=True)
    return xp.astype(R * (dH - xp.mean(dH, axis=-1, keepdims=True) - H * along_H), dZ.dtype, copy=False)
