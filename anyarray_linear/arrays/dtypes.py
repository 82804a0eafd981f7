"""Dtypes by name: what a namespace calls them, and whether it has them on a device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .place import Array, Namespace, dtype_name

if TYPE_CHECKING:
    from .device import Device


def name_of(dtype: Any) -> str:
    """The name of a dtype that is given as a name, or as a dtype of any namespace and byte order."""
    if isinstance(dtype, (type, np.dtype)):  # np.float32 and jnp.float32 are classes
        return np.dtype(dtype).name
    return dtype if isinstance(dtype, str) else dtype_name(dtype)


def wide(xp: Namespace, x: Array) -> Array:
    """`x`, in float32 if it is float16: sums, squares and exponentials are formed there, and their results rounded once.

    float16 ends at 65,504, has 1 in 2,048 as its smallest step, and loses bits below 6e-5, where a mean over many rows is.
    """
    return xp.astype(x, xp.float32) if dtype_name(x.dtype) == "float16" else x


def lacks(device: Device, name: str) -> bool:
    """Whether arrays on this device cannot have this dtype of the standard, though the namespace knows its name."""
    if device.kind in ("cpu", "cuda") or name not in ("float64", "int64", "uint64", "complex128"):
        return False
    return name not in device.xp.__array_namespace_info__().dtypes(device=device.native)


def named(device: Device, name: str) -> Any:
    """The dtype object of that name; `TypeError` where the namespace lacks it or would silently narrow it."""
    dtype = getattr(device.xp, name, None)
    if dtype is None or lacks(device, name):
        cure = 'enable it with jax.config.update("jax_enable_x64", True), or ' if device.kind == "jax" else ""
        raise TypeError(f'{device} has no {name}; {cure}ask for another with dtype="float32"')
    return dtype


def wanted(x: Array, there: Device, dtype: Any) -> Any:
    """The dtype object that `x` shall have on the device `there`: `dtype`, or for `None` its own; raises as `named` does."""
    return named(there, name_of(x.dtype if dtype is None else dtype))
