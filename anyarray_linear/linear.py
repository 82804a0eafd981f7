"""The linear layer, and the derivation of its backward pass.

Forward
-------
A batch of N rows `X` (N, in), weights `W` (out, in) and a bias `b` (1, out) give `Z` (N, out):

    Z_ij = sum_k X_ik W_jk + b_j                         Z  = X W^T + b

Backward
--------
The loss L is a number; its derivative by every element of `Z` arrives as `dZ` (N, out), `dZ_ij = dL/dZ_ij`. One chain
rule per operand says through which elements of `Z` it acts on the loss:

`W_jk` multiplies feature k of every row i and lands in column j, `dZ_ij/dW_jk = X_ik`:

    dL/dW_jk = sum_i dZ_ij X_ik                          dW = dZ^T X            (out, N)(N, in)  = (out, in)

`b_j` is added to column j of every row i, `dZ_ij/db_j = 1`:

    dL/db_j  = sum_i dZ_ij                               db = 1^T dZ            (1, N)(N, out)   = (1, out)

`X_ik` multiplies `W_jk` in every column j of its own row i, `dZ_ij/dX_ik = W_jk`:

    dL/dX_ik = sum_j dZ_ij W_jk                          dX = dZ W              (N, out)(out, in) = (N, in)

Sums run over the batch and are not averaged: a loss that is a mean has divided already.

Three ways to remember them
---------------------------
- *Match the dimensions.* `dW` is (out, in); from `dZ` (N, out) and `X` (N, in) only `dZ^T X` has that shape.
- *Multiply by the mirror, transposed.* In the product `X W^T`, the gradient of one factor is `dZ` times the other one.
- *A shared bias pools the batch.* One `b` serves all N rows, so its gradient gathers what all N rows say.

Any number of batch axes is the same mathematics with N their product: `X` is reshaped to two axes, and `Z` back.

What backward needs from forward is `X`, and it travels in the cache that `forward` returns, not on the layer. So one layer
may run in many threads at once, and many times in one graph; a container keeps the caches and hands them back in reverse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from .arrays.checks import check_alike, check_array, check_float, check_shape, describe
from .arrays.device import Device
from .arrays.memory import explained_memory
from .arrays.numbers import whole
from .arrays.pickling import pin, unpin
from .arrays.place import Array, Namespace, Place, computing_on, device_of, place_of
from .arrays.selection import select_device
from .initializers import draw_parameters
from .protocol import store_gradients


class LinearGradients(NamedTuple):
    """The gradients of a linear layer; `None` for one that was not asked for."""

    dX: Array | None
    dW: Array
    db: Array | None


def linear_forward(X: Array, W: Array, b: Array | None = None) -> Array:
    """The affine map `Z = X W^T + b`.

    X: `(..., in_features)`, any number of batch axes, none included. W: `(out_features, in_features)`.
    b: `(1, out_features)` or `None`. All float32, all float64, or all float16 on CuPy and torch; on one device.

    Returns `Z`, `(..., out_features)`, a new array of the same namespace, dtype and device.

    Raises `TypeError` for something that is no array, or of another namespace or dtype than `W`; `ValueError` for a shape
    that does not fit or another device.

    >>> import numpy as np
    >>> linear_forward(np.asarray([1.0, 2.0]), np.asarray([[3.0, 4.0]]), np.asarray([[0.5]]))
    array([11.5])
    """
    place = place_of(W)
    if not _forward_fits(place, X, W, b):
        _check_forward(X, W, b)
    if X.ndim == 2:
        return place.run(affine, X, W, b)
    with place.entered() as xp:
        Z = place.run(affine, _rows(xp, X), W, b)
        return xp.reshape(Z, (*X.shape[:-1], W.shape[0]))


def affine(xp: Namespace, X: Array, W: Array, b: Array | None) -> Array:
    """`Z = X W^T + b` for an `X` of rows."""
    Z = X @ W.T
    if b is not None:
        Z += b  # in place: Z was made on the line above, and a second (N, out) array costs a pass over memory
    return Z


def linear_backward(dZ: Array, X: Array, W: Array, *, bias: bool = True, needs_dX: bool = True) -> LinearGradients:
    """The gradients `dX = dZ W`, `dW = dZ^T X` and `db`, the batch sum of `dZ`; derived at the top of this module.

    dZ: `(..., out_features)`, the gradient of the loss by `Z`. X: `(..., in_features)` and W: `(out_features, in_features)`,
    as given to `linear_forward`. Without `bias`, `db` is `None`; without `needs_dX`, `dX` is `None` and costs nothing.

    Returns `LinearGradients(dX, dW, db)` with the shapes of `X`, `W` and `(1, out_features)`.

    Raises `TypeError` and `ValueError` as `linear_forward`, and `ValueError` for a `dZ` whose shape is not that of `Z`.

    >>> import numpy as np
    >>> X, W, dZ = np.asarray([[1.0, 2.0]]), np.asarray([[3.0, 4.0]]), np.asarray([[10.0]])
    >>> linear_backward(dZ, X, W)
    LinearGradients(dX=array([[30., 40.]]), dW=array([[10., 20.]]), db=array([[10.]]))
    """
    return LinearGradients(*_gradients(dZ, X, W, bias, needs_dX))


def _gradients(dZ: Array, X: Array, W: Array, bias: bool, needs_dX: bool) -> tuple[Array | None, Array, Array | None]:
    place = place_of(W)
    if not _backward_fits(place, dZ, X, W):
        _check_backward(dZ, X, W)
    if X.ndim == 2:
        return place.run(affine_gradients, dZ, X, W, bias, needs_dX)  # type: ignore[no-any-return]
    with place.entered() as xp:
        dX, dW, db = place.run(affine_gradients, _rows(xp, dZ), _rows(xp, X), W, bias, needs_dX)
        return xp.reshape(dX, X.shape) if needs_dX else None, dW, db


def _input_gradient(dZ: Array, X: Array, W: Array) -> Array:
    """`dX` alone, for a layer whose own gradients nobody wants."""
    place = place_of(W)
    if not _backward_fits(place, dZ, X, W):
        _check_backward(dZ, X, W)
    with place.entered() as xp:
        return xp.reshape(place.run(input_gradient, _rows(xp, dZ), W), X.shape)


def input_gradient(xp: Namespace, dZ: Array, W: Array) -> Array:
    """`dX = dZ W` for a `dZ` of rows."""
    return dZ @ W


def affine_gradients(
    xp: Namespace, dZ: Array, X: Array, W: Array, bias: bool, needs_dX: bool
) -> tuple[Array | None, Array, Array | None]:
    """`dX = dZ W`, `dW = dZ^T X` and `db = 1^T dZ` for a `dZ` and an `X` of rows."""
    dX = dZ @ W if needs_dX else None
    dW = dZ.T @ X
    # a product with a row of ones, not a sum: a BLAS adds in blocks, so it is the more accurate of the two over many rows,
    # and a sum along the strided axis is the slower one
    db = xp.ones((1, dZ.shape[0]), dtype=W.dtype, device=device_of(W)) @ dZ if bias else None
    return dX, dW, db


def _rows(xp: Any, X: Array) -> Array:
    """`X` with its batch axes as one: a single 2-D product is what every BLAS does best."""
    return X if X.ndim == 2 else xp.reshape(X, (math.prod(X.shape[:-1]), X.shape[-1]))


def _forward_fits(place: Place, X: Array, W: Array, b: Array | None) -> bool:
    """Whether a look tells that these may meet, `place` being that of `W`; where it says no, `_check_forward` says why."""
    return (
        place.computes
        and place_of(X) is place
        and len(shape := W.shape) == 2
        and X.shape[-1:] == shape[1:]
        and 0 not in shape
        and (b is None or (place_of(b) is place and b.shape == (1, shape[0])))
    )


def _backward_fits(place: Place, dZ: Array, X: Array, W: Array) -> bool:
    return (
        place.computes
        and place_of(X) is place
        and place_of(dZ) is place
        and len(shape := W.shape) == 2
        and X.shape[-1:] == shape[1:]
        and 0 not in shape
        and dZ.shape == (*X.shape[:-1], shape[0])
    )


def _check_forward(X: Array, W: Array, b: Array | None) -> None:
    _check_parameters(W, b)
    check_alike("W", W, "X", X)
    if X.ndim == 0 or X.shape[-1] != W.shape[1]:
        raise ValueError(
            f"X has shape {tuple(X.shape)} but its last axis must be in_features = {W.shape[1]}; "
            "the batch axes come first"
        )


def _check_backward(dZ: Array, X: Array, W: Array) -> None:
    _check_forward(X, W, None)
    check_alike("W", W, "dZ", dZ)
    check_shape("dZ", dZ, (*X.shape[:-1], W.shape[0]), "the shape of Z for this X and W")


def _check_parameters(W: Array, b: Array | None) -> None:
    check_float("W", W)
    if W.ndim != 2 or 0 in W.shape:
        raise ValueError(f"W has shape {tuple(W.shape)} but must be (out_features, in_features), neither of them 0")
    if b is not None:
        check_alike("W", W, "b", b)
        check_shape("b", b, (1, W.shape[0]), "(1, out_features) of W")


def _safe_to_share(x: Array) -> Array:
    """`x`, or a copy of it where it is a view: an optimizer may own what it is a view of, and write there at each step."""
    if getattr(x, "base", None) is None:
        return x
    with computing_on(x) as xp:
        return xp.asarray(x, copy=True)


class Linear:
    """A linear (fully connected) layer with a hand-derived backward pass.

    in_features, out_features: sizes of the last axis of `X` and `Z`.
    bias: whether there is a `b`.
    init: `"he_normal"` (for ReLU networks), `"he_uniform"`, `"xavier_normal"`, `"xavier_uniform"`, `"lecun_normal"`,
    `"pytorch"`, `"zeros"`, or a function `(rng, shape) -> ndarray`. The bias starts at zero except for `"pytorch"`.
    dtype: a name or dtype; by default the namespace's own default (NumPy and CuPy: float64, torch: float32).
    device: a `Device` or what `select_device` takes; by default NumPy on the CPU.
    seed: an int, a NumPy `SeedSequence` or `Generator` (which hands each layer its next child), or `None`.

    `W` is `(out_features, in_features)`, `b` is `(1, out_features)` or `None`; `dW` and `db` are what `backward` stored, at
    first `None`. Any of them may be assigned.

    Raises `TypeError` or `ValueError` for an argument that is not as above, before anything is drawn.

    >>> import numpy as np
    >>> layer = Linear(3, 4, seed=0)
    >>> Z, cache = layer.forward(np.ones((2, 3)))
    >>> dX = layer.backward(np.ones((2, 4)), cache)
    >>> Z.shape, dX.shape, layer.dW.shape, layer.db.shape
    ((2, 4), (2, 3), (4, 3), (1, 4))
    """

    W: Array
    b: Array | None
    dW: Array | None
    db: Array | None
    trainable = True
    """Assign `False` to freeze the layer: no product for its gradients, no update."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        init: Any = "he_normal",
        dtype: Any = None,
        device: Any = None,
        seed: Any = None,
    ) -> None:
        shape = whole("out_features", out_features), whole("in_features", in_features)
        place = select_device("cpu" if device is None else device)
        dtype = place.dtype(dtype)
        with explained_memory(place, 'make the layer smaller, use another device, or dtype="float32"'):
            W, b = draw_parameters(init, shape, bias=bias, seed=seed)
            self._set(place.asarray(W, dtype=dtype), None if b is None else place.asarray(b, dtype=dtype))

    @classmethod
    def from_arrays(cls, W: Array, b: Array | None = None) -> Self:
        """A layer around the caller's own arrays, of any namespace and device, without copying them.

        W: `(out_features, in_features)`. b: `(out_features,)`, `(1, out_features)` or `None`.
        The arrays are never written to: an optimizer's first step copies them.

        Raises `TypeError` and `ValueError` as `linear_forward`, and `ValueError` for a torch tensor that requires grad.

        >>> import numpy as np
        >>> Linear.from_arrays(np.eye(2), np.asarray([1.0, 2.0]))(np.zeros(2))
        array([1., 2.])
        """
        for name, x in (("W", W), ("b", b)):
            if getattr(x, "requires_grad", False):
                raise ValueError(f"{name} is a torch tensor that requires grad, and this layer has its own backward; "
                                 f"pass {name}.detach()")
        check_array("W", W)
        if b is not None:
            check_array("b", b)
            if b.ndim == 1:
                with computing_on(b) as xp:
                    b = xp.reshape(b, (1, b.shape[0]))
        _check_parameters(W, b)
        layer = cls.__new__(cls)
        layer._set(W, b)
        return layer

    def _set(self, W: Array, b: Array | None) -> None:
        self.W, self.b = W, b
        self.dW = self.db = None

    @property
    def in_features(self) -> int:
        """The size of the last axis of `X`."""
        return int(self.W.shape[1])

    @property
    def out_features(self) -> int:
        """The size of the last axis of `Z`."""
        return int(self.W.shape[0])

    @property
    def dtype(self) -> Any:
        """The dtype of the weights, and of every array the layer takes and returns."""
        return self.W.dtype

    @property
    def device(self) -> Device:
        """Where the weights are."""
        return Device.of(self.W)

    def forward(self, X: Array) -> tuple[Array, dict[str, Array]]:
        """`Z = X W^T + b`, `(..., out_features)`, for `X` `(..., in_features)`; and the cache `{"X": X}`, not a copy.

        Raises as `linear_forward`. Stores nothing: safe in many threads at once.
        """
        return linear_forward(X, self.W, self.b), {"X": X}

    def gradients(
        self, dZ: Array, cache: Mapping[str, Array], *, needs_dX: bool = True
    ) -> tuple[Array | None, dict[str, Array]]:
        """`(dX, {"W": dW, "b": db})` for `dZ` `(..., out_features)` and the cache of one forward; stores nothing.

        Raises as `linear_backward`, and `TypeError` for a cache that is not one of a `Linear`.
        """
        if not (type(cache) is dict or isinstance(cache, Mapping)) or "X" not in cache:
            raise TypeError(f'cache is {describe(cache)} without "X"; pass the second result of this layer\'s forward')
        if not self.trainable:
            return _input_gradient(dZ, cache["X"], self.W) if needs_dX else None, {}
        dX, dW, db = _gradients(dZ, cache["X"], self.W, self.b is not None, needs_dX)
        return dX, {"W": dW} if db is None else {"W": dW, "b": db}

    def backward(
        self, dZ: Array, cache: Mapping[str, Array], *, accumulate: bool = False, needs_dX: bool = True
    ) -> Array | None:
        """`dX`, having stored `dW` and `db` on the layer, or added to what is stored there with `accumulate`.

        Raises as `gradients`; nothing is stored then.
        """
        dX, gradients = self.gradients(dZ, cache, needs_dX=needs_dX)
        if accumulate:
            store_gradients(self, gradients, accumulate=True)
        else:
            for p, gradient in gradients.items():
                setattr(self, f"d{p}", gradient)
        return dX

    def parameters(self) -> dict[str, Array]:
        """`{"W": W, "b": b}`, without `b` where there is none."""
        return {"W": self.W} if self.b is None else {"W": self.W, "b": self.b}

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """A new layer with these weights on another device or in another dtype; no gradients come along.

        Arrays that are right already are not copied, unless an optimizer could change them: training either layer leaves
        the other as it is.

        Raises `TypeError` for a dtype that layers do not compute in there, and as `select_device`.
        """
        place = self.device if device is None else select_device(device)
        dtype = place.dtype(self.dtype if dtype is None else dtype)
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__)
        layer._set(*(None if x is None else place.asarray(_safe_to_share(x), dtype=dtype) for x in (self.W, self.b)))
        return layer

    def __call__(self, X: Array) -> Array:
        """`Z` for inference: no cache."""
        return linear_forward(X, self.W, self.b)

    def __repr__(self) -> str:
        bias = "" if self.b is not None else ", bias=False"
        return f"Linear({self.in_features}, {self.out_features}{bias}, dtype={self.W.dtype}, device={self.device})"

    # pickle and deepcopy keep a layer on its device, which CuPy's own pickling does not
    def __getstate__(self) -> dict[str, Any]:
        return {name: pin(value) for name, value in self.__dict__.items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: unpin(value) for name, value in state.items()})
