"""Is a result right, to rounding? Answered with the theory of rounding errors instead of tuned tolerances.

Every output of a linear layer is a matrix product, and the computed product differs from the exact one, element by
element, by at most `gamma_n = n u / (1 - n u)` times the product of the absolute values; `n` is the number of terms summed
and `u` the unit roundoff (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., 2002, ch. 3). With
`S_Z = |X| |W|^T + |b|` and so on:

    |Z  - Z_exact|  <= gamma_{in+1} (|X| |W|^T + |b|)         |dX - dX_exact| <= gamma_out |dZ| |W|
    |dW - dW_exact| <= gamma_N |dZ|^T |X|                     |db - db_exact| <= gamma_N 1^T |dZ|

This *hard limit* holds in any order of summation, with or without fused multiply-add, for any values. Rounding errors of
random data mostly cancel, so for those `4 sqrt(n + 2) u` in place of `gamma_n` is the *sharp gate* (Higham and Mary,
"A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). It is for seeded random data
only: structured data, such as one constant summed 65,536 times, breaks it legitimately. Details that the bounds include:

- float16: products are summed in float32, so `u = 2^-24` there, and each result is rounded to float16 (`2^-11`) once, or
  twice where a bias is added. That is nearly all of both bounds, and one rounding does not cancel with others: correct
  float16 results come near to 100 % of the sharp gate, where float32 and float64 stay below half;
- TF32 (CuPy with `CUPY_TF32=1`): the operands of float32 products keep 11 bits. The hard limit allows for them being cut
  off (`2^-10` each), the sharp gate takes `u = 2^-11`. Whether it is on is asked of CuPy;
- underflow, gradual or flushed to zero, as GPUs and XLA do it: an absolute term, far below anything else unless values are
  near the smallest normal number;
- overflow: where the product of absolute values leaves the range of the dtype, nothing is proven and the bound is `inf`;
- the reference's own rounding. It is computed from the same rounded inputs in float64, for float64 results in NumPy's
  `longdouble` (64 bits of precision on x86-64), and its bound by the same formula is added. Where `longdouble` is no
  wider than float64 (Windows, macOS on ARM), this doubles the bounds of float64 results.

>>> import numpy as np
>>> from anyarray_linear import Linear
>>> rng = np.random.default_rng(0)
>>> layer, X, dZ = Linear(20, 10, seed=0), rng.standard_normal((8, 20)), rng.standard_normal((8, 10))
>>> for result in assert_equivalent(layer, X, dZ, devices=["cpu"], sharp=True):
...     print(result.output, result.shape, result.sharp_share < 0.5)
Z (8, 10) True
dX (8, 20) True
dW (10, 20) True
db (1, 10) True
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .arrays import cards, doctor
from .arrays.checks import check_array, check_shape, describe
from .arrays.device import Device
from .arrays.place import Array, computing_on, dtype_name, is_array
from .arrays.selection import DeviceUnavailableError, select_device
from .linear import Linear
from .protocol import leaves, parameters, restore_states, snapshot

__all__ = [
    "Agreement",
    "adjoint_check",
    "assert_equivalent",
    "compare",
    "gamma",
    "gradcheck",
    "linear_error_bounds",
    "linear_reference",
    "unit_roundoff",
    "usable_devices",
]

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


def _in_tf32(place: Device, dtype: str) -> bool:
    """Whether products of that dtype are formed in TF32 there."""
    return dtype == "float32" and place.index is not None and cards.float32_products(place.index) == "TF32"


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
            c = growth(2**-11) if sharp else (1 + c) * (1 + 2**-10) ** 2 - 1
        c = (1 + c) * (1 + unit_roundoff("float16")) ** self.roundings - 1
        # the scale itself is a sum in float64: with this factor it is no less than the exact one
        c = (c + growth(self.wide_u)) * (1 + 2 * gamma(self.terms, 2**-53))
        with np.errstate(all="ignore"):
            bound = c * self.scale + self.underflow
            return np.where(self.scale + bound < float(np.finfo(self.dtype).max), bound, math.inf)


def _products(X: Host, W: Host, b: Host | None, dZ: Host | None, *, tf32: bool = False) -> dict[str, _Product]:
    """The products that a linear layer computes, by the names of its outputs, for operands on the host."""
    (out_features, in_features), batch = W.shape, X.shape[:-1]
    X_rows = X.reshape(math.prod(batch), in_features)
    products = {"Z": _Product((*batch, out_features), X_rows, W.T, b, tf32=tf32)}
    if dZ is not None:
        dZ_rows = dZ.reshape(math.prod(batch), out_features)
        ones = np.ones((1, len(dZ_rows)), dtype=dZ.dtype)
        products["dX"] = _Product(X.shape, dZ_rows, W, tf32=tf32)
        products["dW"] = _Product(W.shape, dZ_rows.T, X_rows, tf32=tf32)
        products["db"] = _Product((1, out_features), ones, dZ_rows, tf32=tf32)
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
    tf32: whether float32 products are formed in TF32. Returns `{"Z": ...}`, and with `dZ` also `"dX"`, `"dW"` and `"db"`:
    NumPy float64 arrays of the outputs' shapes; `inf` where overflow is possible.

    >>> import numpy as np
    >>> X, W = np.ones((1, 3), dtype="float32"), np.ones((1, 3), dtype="float32")
    >>> round(linear_error_bounds(X, W)["Z"].item() / (3 * 3 * 2**-24), 4)      # n u times |X||W|^T
    1.0
    """
    return {name: product.bound(sharp=sharp) for name, product in _host_products(X, W, b, dZ, tf32=tf32).items()}


class Agreement(NamedTuple):
    """How one output of a layer on one device compares with the reference."""

    device: str
    dtype: str
    output: str
    """`"Z"`, `"dX"`, `"dW"` or `"db"`."""
    shape: tuple[int, ...]
    share: float
    """The worst error, as a share of the hard limit."""
    sharp_share: float
    """The worst error, as a share of the sharp gate."""
    complaint: str
    """What is wrong, in one line; empty if nothing is."""


def usable_devices(dtype: Any = "float32") -> list[Device]:
    """The CPU and every CUDA device that works, of those where layers compute in `dtype`."""
    name, devices = dtype if isinstance(dtype, str) else dtype_name(dtype), []
    if name != "float16":  # NumPy sums float16 products in float16
        devices.append(select_device("cpu"))
    for index in range(doctor.count()):
        with contextlib.suppress(DeviceUnavailableError):
            devices.append(select_device(f"cuda:{index}"))
    return devices


def compare(layer: Linear, X: Array, dZ: Array, device: Any = None, *, sharp: bool = False) -> list[Agreement]:
    """Every output of `layer` for `X` and `dZ`, computed on `device`, against the float64 reference.

    layer, X, dZ, sharp: as in `assert_equivalent`. device: a `Device` or what `select_device` takes; by default the
    layer's own. Nothing is raised for a wrong, missing or unknown result: each `Agreement` has its `complaint`.
    """
    _check_operands(layer, X, dZ)
    place = layer.device if device is None else select_device(device)
    layer = layer.to(place)
    dtype = dtype_name(layer.dtype)
    tf32 = _in_tf32(place, dtype)
    expected = _host_products(X, layer.W, layer.b, dZ, tf32=tf32)
    if layer.b is None:
        del expected["db"]
    Z, cache = layer.forward(place.asarray(X, dtype))
    dX, gradients = layer.gradients(place.asarray(dZ, dtype), cache)
    outputs = {"Z": Z, "dX": dX, **{f"d{p}": gradient for p, gradient in gradients.items()}}
    found = [_agreement(name, outputs.pop(name, None), expected[name], place, sharp) for name in expected]
    unknown = [f"{name} on {place} ({dtype}) is no output of a layer with these parameters" for name in outputs]
    return found + [
        Agreement(str(place), dtype, name, (), math.inf, math.inf, complaint)
        for name, complaint in zip(outputs, unknown, strict=True)
    ]


def _check_operands(layer: Any, X: Array, dZ: Array | None = None) -> None:
    """Raise unless `layer` is a `Linear`, and `X` and `dZ` are arrays that fit it and say something."""
    if not isinstance(layer, Linear):
        raise TypeError(
            f"layer is a {type(layer).__name__}, but the bounds are those of a Linear; "
            "check each Linear of a container by itself, and anything else with gradcheck"
        )
    given = {"X": X, "dZ": dZ, "W": layer.W, "b": layer.b}
    for name, x in given.items():
        if x is None:
            continue
        check_array(name, x)
        if name == "X" and (x.ndim == 0 or x.shape[-1] != layer.in_features):
            raise ValueError(f"X has shape {tuple(x.shape)} but its last axis must be in_features = {layer.in_features}")
        if name == "dZ":
            check_shape(name, x, (*X.shape[:-1], layer.out_features), "the shape of Z for this X")
        _check_finite(name, x, dtype_name(layer.dtype))


def _check_finite(name: str, x: Array, dtype: str) -> None:
    with np.errstate(over="ignore"):
        finite = np.isfinite(_host(x, dtype)).all()
    if not finite:
        raise ValueError(f"{name} has a value that is NaN or infinite in {dtype}, so nothing is proven; give finite ones")


def _agreement(name: str, x: Array | None, product: _Product, place: Device, sharp: bool) -> Agreement:
    wanted, where = product.value.shape, f"on {place} ({product.dtype})"
    if x is None or not is_array(x):
        complaint = f"{name} {where} is {'missing' if x is None else describe(x)}, but must be an array of shape {wanted}"
        return Agreement(str(place), product.dtype, name, wanted, math.inf, math.inf, complaint)
    found = Device.of(x)
    if tuple(x.shape) != wanted or dtype_name(x.dtype) != product.dtype or found != place:
        was = f"{dtype_name(x.dtype)} of shape {tuple(x.shape)} on {found}"
        complaint = f"{name} {where} is {was}, but must be {product.dtype} of shape {wanted} on {place}"
        return Agreement(str(place), product.dtype, name, wanted, math.inf, math.inf, complaint)
    values = _host(x)
    with np.errstate(all="ignore"):
        error = np.abs(values - product.value).astype(np.float64)
    shares, complaint = [], ""
    for limit, bound in (("hard limit", product.bound(sharp=False)), ("sharp gate", product.bound(sharp=True))):
        with np.errstate(all="ignore"):
            share = np.where(np.isinf(bound), 0.0, error / bound)
        share[np.isnan(share)] = math.inf  # the result is NaN, and nothing overflowed
        shares.append(float(share.max(initial=0.0)))
        if shares[-1] > 1 and (limit == "hard limit" or sharp) and not complaint:
            at = tuple(map(int, np.unravel_index(share.argmax(), share.shape)))
            complaint = (
                f"{name}{list(at)} {where} is {values[at]!s}, but the reference is {float(product.value[at])!r}: off by "
                f"{error[at]:.3g}, {shares[-1]:.3g} times the {limit} of {bound[at]:.3g}; "
                f"{np.count_nonzero(share > 1)} of {share.size} elements are over it"
            )
    return Agreement(str(place), product.dtype, name, wanted, shares[0], shares[1], complaint)


def assert_equivalent(
    layer: Linear, X: Array, dZ: Array, devices: Iterable[Any] | None = None, *, sharp: bool = False
) -> list[Agreement]:
    """Assert that `layer` computes the right `Z`, `dX`, `dW` and `db` on every device, to rounding.

    layer: a `Linear`; it is moved to each device with `to`, in its own dtype. X: `(..., in_features)` and dZ:
    `(..., out_features)`, of any namespace and device; they are rounded to the layer's dtype, and the float64 reference is
    computed from the rounded values. devices: what `select_device` takes, or `Device`s; by default `usable_devices`.
    sharp: hold the results to the sharp gate too, which is for seeded random data.

    Returns one `Agreement` per output and device, which says what share of each bound was used.
    Raises `AssertionError`, which says which output, on which device, where, and by how much; `TypeError` or `ValueError`
    for a layer that is no `Linear`, operands that do not fit it, and NaN or infinity in them, for which there is no bound.
    """
    if isinstance(devices, (str, Device)):
        raise TypeError(f"devices is {str(devices)!r}, which is one; give a list: devices=[{str(devices)!r}]")
    devices = usable_devices(layer.dtype) if devices is None else list(devices)
    if not devices:
        raise ValueError("devices is empty, so nothing would be compared; name at least one")
    found = [agreement for device in devices for agreement in compare(layer, X, dZ, device, sharp=sharp)]
    complaints = [agreement.complaint for agreement in found if agreement.complaint]
    if complaints:
        raise AssertionError("\n".join(complaints))
    return found


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
