"""Whether a hand-written gradient is one: by differences, and by the adjoint identity."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.place import Array, computing_on, dtype_name
from ..linear import Linear
from ..protocol import leaves, parameters, restore_states, snapshot
from .bounds import Host, _host, _host_products, _in_tf32
from .equivalence import _check_finite, _check_operands


def gradcheck(
    layer: Any, X: Array, dZ: Array | None = None, *, rtol: float | None = None, seed: int = 0
) -> dict[str, float]:
    """Assert that the gradients of any layer or container are those of its forward, by central differences in float64.

    Each of `X` and the parameters is moved along a random direction `V`, a step `h` forth and back, and the change of the
    loss `<dZ, Z>` is compared with `<gradient, V>`. A linear layer is linear in each of `X`, `W` and `b`, so its central
    difference has no truncation error, and the first `h` is exact to rounding: 1, or for a `Linear` so large that the step
    changes `Z` by as much as `Z` itself. For other layers `h` is halved from there until halving it once more changes
    neither slope nor curvature, which is how truncation and kinks show themselves: across a kink the one-sided slopes do not
    approach each other as `h` shrinks. So a step that would cross the kink of a ReLU is not taken, and an `X` that lies on
    one, or too near to one for any step, is told. What the rounding of the outputs may make of the slope,
    `u <|dZ|, |Z|> / h` for one rounding each, is allowed for; where it would hide all else, that is told too.

    layer: a layer or container, whose parameters and states are left as they are; its `forward` is what is checked. X: its
    input, on the layer's device. dZ: the gradient of the loss by the output, of its shape; by default random. rtol: the
    allowed error, relative to the norm of the gradient; by default `1e-12` for a `Linear` and `1e-6` for others. seed: of
    the directions.

    Returns the relative error by operand: `{"X": ..., "W": ..., "b": ...}`.
    Raises `AssertionError` for a gradient that is wrong, missing or of another shape; `ValueError` if no step is small
    enough to stay clear of a kink, or large enough to be seen beside the rounding of the outputs.

    >>> import numpy as np
    >>> from anyarray_linear import Linear
    >>> errors = gradcheck(Linear(5, 3, seed=0), np.ones((4, 5)))
    >>> list(errors), max(errors.values()) < 1e-12
    (['X', 'W', 'b'], True)
    """
    rtol = (1e-12 if isinstance(layer, Linear) else 1e-6) if rtol is None else rtol
    _check_finite("X", X, "float64")
    rng, place = np.random.default_rng(seed), Device.of(X)
    layer, X = layer.to(dtype="float64"), place.asarray(X, "float64")
    before = snapshot(layer)
    restore_states(layer, before)
    Z, cache = layer.forward(X)
    dZ = place.asarray(rng.standard_normal(Z.shape) if dZ is None else dZ, "float64")
    dX, gradients = layer.gradients(dZ, cache)
    Z_host, dZ_host, values = _host(Z), _host(dZ), {"X": X, **parameters(layer)}
    found = {"X": dX, **gradients}
    errors, complaints = {}, [f"d{name} is the gradient of no parameter" for name in found if name not in values]
    for name, value in values.items():
        gradient = found.get(name)
        if gradient is None or gradient.shape != value.shape:
            was = "missing" if gradient is None else f"of shape {tuple(gradient.shape)}"
            complaints.append(f"d{name} is {was}, but must have the shape of {name}, {tuple(value.shape)}")
            continue
        V_host = rng.standard_normal(value.shape)
        V = place.asarray(V_host)

        def output(step: float, name: str = name, V: Array = V) -> Host:
            with computing_on(V):
                moved = values[name] + step * V
            restore_states(layer, before)  # what a forward pass changes, such as which mask is the next one's
            if name == "X":
                return _host(layer.forward(moved)[0])
            return _host(_with_parameter(layer, name, moved, X))

        g = _host(gradient)
        h = _step_as_large_as(Z_host, output) if isinstance(layer, Linear) else 1.0
        slope, rounding = _derivative(output, Z_host, dZ_host, h, rtol, float(np.linalg.norm(g)), name)
        claimed, scale = float(np.sum(g * V_host)), max(abs(slope), float(np.linalg.norm(g)), 1e-300)
        errors[name] = abs(slope - claimed) / scale
        if not errors[name] <= rtol + rounding / scale:
            complaints.append(
                f"d{name} gives the slope {claimed!r} along a random direction, but the central difference is {slope!r}: "
                f"off by {errors[name]:.3g} of the gradient's norm, where {rtol + rounding / scale:.3g} is allowed"
            )
    restore_states(layer, before)
    if complaints:
        raise AssertionError("\n".join(complaints))
    return errors


def _with_parameter(layer: Any, name: str, value: Array, X: Array) -> Array:
    """The output for `X` with one parameter replaced for as long as that takes."""
    path, _, p = name.rpartition(".")
    leaf = dict(leaves(layer))[path]
    before = getattr(leaf, p)
    setattr(leaf, p, value)
    try:
        return layer.forward(X)[0]
    finally:
        setattr(leaf, p, before)


def _step_as_large_as(Z: Host, output: Callable[[float], Host]) -> float:
    """A step that changes the output by about as much as the output is; 1 if that does. For functions without a kink."""
    h = 1.0
    while h < 2**60 and np.linalg.norm(output(h) - output(-h)) < np.linalg.norm(Z):
        h *= 2**10
    return h


def _derivative(
    output: Callable[[float], Host], Z: Host, dZ: Host, h: float, rtol: float, gradient_norm: float, name: str
) -> tuple[float, float]:
    """The derivative at 0 of `<dZ, output(t)>`, and its rounding error; `Z` is `output(0)`.

    It is from the largest step, of `h` and its halves, at which the function is smooth.
    """

    def slope_bend_rounding(h: float) -> tuple[float, float, float]:
        ahead, behind = output(h), output(-h)
        slope = float(np.sum(dZ * ((ahead - Z) + (Z - behind)))) / (2 * h)
        bend = float(np.sum(dZ * ((ahead - Z) - (Z - behind)))) / h
        # one rounding of each output: enough for the slope, and in the sum over two steps for the bends' difference, too
        return slope, bend, 8 * 2**-53 * float(np.sum(np.abs(dZ) * (np.abs(ahead) + np.abs(behind)))) / (2 * h)

    slope, bend, rounding = slope_bend_rounding(h)
    for _ in range(22):
        half_slope, half_bend, half_rounding = slope_bend_rounding(h / 2)
        size = max(abs(half_slope), gradient_norm)
        allowed = rtol * size + rounding + half_rounding
        # smooth: the slope stays and the difference of the one-sided slopes halves with h; across a kink it does not
        if abs(slope - half_slope) <= allowed and abs(bend - 2 * half_bend) <= allowed:
            if half_rounding <= max(rtol, 1e-6) * size or half_slope == half_bend == 0:
                return half_slope, half_rounding
            raise ValueError(
                f"no step of {name} is small enough for this layer and large enough for float64: at {h / 2:.1g} the "
                f"rounding of the outputs, up to {float(np.max(np.abs(Z))):.2g}, hides the slope; scale the operands"
            )
        h, slope, bend, rounding = h / 2, half_slope, half_bend, half_rounding
    raise ValueError(
        f"the layer has a kink at this {name} or within {h:.1g} of it: its one-sided slopes stay apart down to such steps; "
        f"move {name} away from it, for example by 1e-3"
    )


def adjoint_check(layer: Linear, X: Array, *, sharp: bool = False, seed: int = 0) -> dict[str, float]:
    """Assert that backward is the adjoint of forward: `<dZ, J V> = <J^T dZ, V>`, in the layer's own dtype and place.

    `J V` is the change of `Z` when `X`, `W` or `b` changes by `V`, which for a linear layer is a forward pass itself:
    `V W^T`, `X V^T` or `V`. Both sides are rounded, so they may differ by what the hard limits of their parts allow.
    It costs three forwards and one backward and needs no float64, so it means something in float32 on a GPU.

    layer: a `Linear`. X: `(..., in_features)`, of its namespace, device and dtype. sharp: allow no more than the root of
    the sum of squares of the sharp gates, for an `X` that is seeded random data. seed: of `dZ` and the directions.

    Returns the share of the allowed difference that was used: `{"X": ..., "W": ..., "b": ...}`.
    Raises `AssertionError` if one is over.
    """
    _check_operands(layer, X)
    dtype, place, rng = dtype_name(layer.dtype), layer.device, np.random.default_rng(seed)
    tf32 = _in_tf32(place, dtype)

    def draw(shape: Iterable[int]) -> tuple[Array, Host]:
        host = rng.standard_normal(tuple(shape)).astype(dtype)
        return place.asarray(host), host

    Z, cache = layer.forward(X)
    dZ, dZ_host = draw(Z.shape)
    dX, gradients = layer.gradients(dZ, cache)
    of_gradients = _host_products(X, layer.W, layer.b, dZ, tf32=tf32)
    from_arrays, zero = type(layer).from_arrays, place.asarray(np.zeros(layer.W.shape, dtype=dtype))
    passes: Mapping[str, Callable[[Array], tuple[Array, Array, Array | None]]] = {
        "X": lambda V: (V, layer.W, None),
        "W": lambda V: (X, V, None),
        "b": lambda V: (X, zero, V),
    }
    shares = {}
    for name, gradient in {"X": dX, **gradients}.items():
        V, V_host = draw(gradient.shape)
        X_for, W_for, b_for = passes[name](V)
        JV = _host(from_arrays(W_for, b_for)(X_for))
        bound_JV = _host_products(X_for, W_for, b_for, None, tf32=tf32)["Z"].bound(sharp=sharp)
        bound_gradient = of_gradients[f"d{name}"].bound(sharp=sharp)
        with np.errstate(all="ignore"):
            forward, backward = _inner(dZ_host, JV), _inner(_host(gradient), V_host)
            parts = np.abs(dZ_host) * bound_JV, np.abs(V_host) * bound_gradient
            allowed = math.sqrt(sum(float(np.sum(x * x)) for x in parts)) if sharp else sum(float(np.sum(x)) for x in parts)
        shares[name] = float(abs(forward - backward) / allowed) if allowed else 0.0
        if not shares[name] <= 1:
            raise AssertionError(
                f"<dZ, J V> is {forward!r} but <d{name}, V> is {backward!r} for a random direction V of {name} on {place} "
                f"({dtype}): {shares[name]:.3g} times what rounding allows"
            )
    return shares


def _inner(x: Host, y: Host) -> float:
    return float(np.sum(x.astype(np.longdouble) * y))
