"""Whether a layer gives the same on every device, to rounding."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from ..arrays import doctor
from ..arrays.checks import check_array, check_shape, describe
from ..arrays.device import Device
from ..arrays.place import Array, dtype_name, is_array
from ..arrays.selection import DeviceUnavailableError, select_device
from ..linear import Linear
from .bounds import (
    _host,
    _host_products,
    _in_tf32,
    _Product,
)


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


