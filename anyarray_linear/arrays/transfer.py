"""How an array gets from one device to another: a function per route, and `route`, which finds the one to go.

A route takes the array, the device it is on, the device where it shall be, and its dtype there: the name of one, or a
dtype of any namespace; `None` keeps the array's own.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cards, dtypes
from .place import Array

if TYPE_CHECKING:
    from .device import Device

CPU, CUDA = 1, 2  # as DLPack numbers kinds of devices


def dlpack_place(x: Any) -> tuple[int, int]:
    """Where `x` is, as DLPack numbers it: kind and index."""
    kind, index = x.__dlpack_device__()
    return int(kind), int(index)


def route(x: Array, here: Device, there: Device) -> Callable[[Array, Device, Device, Any], Array]:
    """The function that brings `x` from the device `here` to `there`."""
    if here == there:
        return cast
    if here.kind == there.kind:
        return {"cuda": between_cards, "torch": within_torch, "jax": within_jax}.get(here.kind, over_the_host)
    return over_one_card if _is_on_card(x, there) else over_the_host


def cast(x: Array, here: Device, there: Device, dtype: Any) -> Array:
    """On one device: another dtype, if it is another."""
    wanted = dtypes.wanted(x, there, dtype)
    if x.dtype == wanted:  # and so in the machine's byte order, which every other namespace has anyway
        return x
    with there:
        return there.xp.astype(x, wanted)


def over_one_card(x: Array, here: Device, there: Device, dtype: Any) -> Array:
    """Between two libraries on one CUDA device: the same memory."""
    return cast(there.from_dlpack(x), there, there, dtype)


def between_cards(x: Array, here: Device, there: Device, dtype: Any) -> Array:
    """Between CUDA devices, in CuPy. Their streams do not wait for each other; events make them, without the host."""
    wanted = dtypes.wanted(x, there, dtype)
    cuda = cards.load_cupy().cuda
    with here:
        x = x if x.flags.c_contiguous else x.copy()  # here, or the copy below would do it behind the event's back
        theirs, ready = cuda.get_current_stream(), cuda.Event(disable_timing=True)
        ready.record(theirs)
    with there:
        ours, done = cuda.get_current_stream(), cuda.Event(disable_timing=True)
        ours.wait_event(ready)
        moved = x.copy()
        done.record(ours)
    with here:
        theirs.wait_event(done)  # what is written to x, or to its memory, from now on comes after the copy
    return cast(moved, there, there, wanted)


def within_torch(x: Array, here: Device, there: Device, dtype: Any) -> Array:
    """Between two devices of torch."""
    wanted = dtypes.wanted(x, there, dtype)
    return cast(x.to(there.native), there, there, wanted)


def within_jax(x: Array, here: Device, there: Device, dtype: Any) -> Array:
    """Between two devices of JAX."""
    wanted = dtypes.wanted(x, there, dtype)
    return cast(import_module("jax").device_put(x, there.native), there, there, wanted)


def over_the_host(x: Array, here: Device, there: Device, dtype: Any) -> Array:
    """Between libraries that share no device, or devices that share no library: as a NumPy array."""
    host = to_host(x, here)
    name = dtypes.name_of(x.dtype if dtype is None else dtype)
    if dtype is None and name in ("int64", "uint64") and dtypes.lacks(there, name):
        if host.size and not (host.min() >= -(2**31) and host.max() < 2**31):
            raise TypeError(f"x holds {name} values beyond int32, and {there} has no {name}")
        name = "int32"
    wanted = dtypes.named(there, name)
    # cast here if that leaves fewer bytes to transfer, else there; in the machine's byte order in any case
    is_smaller = name != "bfloat16" and np.dtype(name).itemsize < host.itemsize
    host = host.astype(name if is_smaller else host.dtype.newbyteorder("="), copy=False)
    with there:
        return {"torch": _into_torch, "jax": _into_jax}.get(there.kind, _into)(host, there, wanted)


def _into(host: np.ndarray[Any, Any], there: Device, wanted: Any) -> Array:
    if there.kind in ("cpu", "cuda"):  # the current device, which is `there`
        return there.xp.asarray(host, dtype=wanted)
    return there.xp.asarray(host, dtype=wanted, device=there.native)


def _into_torch(host: np.ndarray[Any, Any], there: Device, wanted: Any) -> Array:
    """It shares the memory, and knows neither read-only arrays, nor negative strides, nor those of a record's fields."""
    if not host.flags.writeable or any(stride < 0 or stride % host.itemsize for stride in host.strides):
        host = host.copy()
    return there.xp.asarray(host).to(there.native, dtype=wanted)


def _into_jax(host: np.ndarray[Any, Any], there: Device, wanted: Any) -> Array:
    """It may share the memory, and takes it for immutable."""
    return _into(host.copy(), there, wanted)


def to_host(x: Array, here: Device) -> np.ndarray[Any, Any]:
    """The array `x`, which is on the device `here`, as a NumPy array; without a copy where memory can be shared."""
    if here.kind == "cuda":
        with here:
            return np.asarray(x.get())
    if here.kind == "torch":
        x = x.detach().cpu()
        # NumPy has no bfloat16, and float32 has all of its values
        return np.asarray((x.float() if dtypes.name_of(x.dtype) == "bfloat16" else x).numpy())
    if here.kind == "array_api_strict":
        x = x.to_device(here.xp.Device("CPU_DEVICE"))
    return np.asarray(x)


def _is_on_card(x: Array, there: Device) -> bool:
    """Whether `x`, of another library, is in the memory of the CUDA device `there`."""
    is_card = there.kind == "cuda" or (there.kind == "torch" and there.native.type == "cuda")
    return is_card and hasattr(x, "__dlpack_device__") and dlpack_place(x) == there.dlpack_place
