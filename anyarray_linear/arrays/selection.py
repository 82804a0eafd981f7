"""Which device a user means: by name, by `ANYARRAY_DEVICE`, or the card with the most room.

What this module promises:

- a CUDA device that `select_device` hands out has proved that it works (see `doctor`), it was not merely counted;
- an explicit request for CUDA never ends on the CPU: it raises `DeviceUnavailableError`, which says what to do.
"""

from __future__ import annotations

import copyreg
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from . import cards
from . import tf32 as tf32_setting
from .checks import describe
from .device import Device, cpu_device, cuda_device
from .doctor import count, examine, once
from .operations import lanes_are_on
from .place import FLOAT_DTYPES


class DeviceUnavailableError(RuntimeError):
    """A device that was asked for by name cannot be used; the message says why and what to do about it."""


def select_device(spec: str | Device = "auto", *, tf32: bool | None = None) -> Device:
    """The device that `spec` names.

    Args:
        spec: `"auto"`: what the environment variable `ANYARRAY_DEVICE` names, else the working CUDA device with most free
            memory, chosen once per process, else the CPU; `"cpu"`; `"cuda"`, the current CUDA device; `"cuda:1"`; or a
            `Device`, returned as it is.
        tf32: `True`: from now on, whatever this library multiplies of float32 arrays on that CUDA device is multiplied in
            TF32, with 11 bits of each factor: in this process, in all its threads, until `False` is asked for. `None`
            changes nothing; at first it is off, unless `CUPY_TF32=1` is in the environment. `Device.tf32` says how it is.

    Returns:
        A device that works: a CUDA device has run a kernel and a matrix product in this process. `.reason` says in one
        sentence why it is this one.

    Raises:
        ValueError: an unknown spec.
        DeviceUnavailableError: a CUDA device that was asked for, by `ANYARRAY_DEVICE` too, cannot be used. The message
            says what to do. It never falls back to the CPU. Nor does `tf32=True`: the device chosen is no CUDA device, or
            one without TF32.

    >>> select_device("cpu").reason
    'it was asked for'
    """
    device = _selected(spec)
    if tf32 is not None:
        _ask(device, tf32)
    return device


def _ask(device: Device, tf32: bool) -> None:
    """Have products of float32 arrays formed in TF32 there, or not."""
    if not isinstance(tf32, bool):
        raise TypeError(f"tf32 is {tf32!r:.60}; it must be True, False, or None, which changes nothing")
    if device.kind == "torch":
        own = f"torch.backends.cuda.matmul.allow_tf32 = {tf32}"
        raise ValueError(f"tf32 is for CuPy's arrays, and those on {device} are torch's, which has its own switch: {own}")
    if device.kind == "jax":
        own = f'jax.config.update("jax_default_matmul_precision", "{"tensorfloat32" if tf32 else "highest"}")'
        raise ValueError(f"tf32 is for CuPy's arrays, and those on {device} are JAX's, which has its own switch: {own}")
    if device.index is None:
        if tf32:
            raise DeviceUnavailableError(f"TF32 is of CUDA devices, and {device} is none ({device.reason}); leave tf32 out")
        return
    if tf32 and not tf32_setting.has_tf32(device.index):
        raise DeviceUnavailableError(
            f"{device} ({device.name}) has no TF32: cards have it from compute capability {tf32_setting.CAPABLE}.0 on; "
            "leave tf32 out"
        )
    tf32_setting.ask(device.index, tf32)
    if not lanes_are_on.get() and (unheard := tf32_setting.unheard()):
        warnings.warn(unheard, RuntimeWarning, stacklevel=3)


def _selected(spec: str | Device) -> Device:
    """As `select_device`."""
    if isinstance(spec, Device):
        return spec
    origin, reason = "device", "it was asked for"
    if not isinstance(spec, str):
        cure = "for the device of an array, give Device.of(the array)"
        raise ValueError(f'device is {describe(spec)}; expected "auto", "cpu", "cuda", "cuda:1" or a Device; {cure}')
    if spec == "auto" and (asked := os.environ.get("ANYARRAY_DEVICE", "")):
        spec, origin, reason = asked, "ANYARRAY_DEVICE", f"ANYARRAY_DEVICE is {asked}"
    if spec == "auto":
        index, reason = roomiest()
        return cpu_device(reason) if index is None else cuda_device(index, reason)
    if spec == "cpu":
        return cpu_device(reason)
    wanted = re.fullmatch(r"cuda(?::(\d+))?", spec)
    if wanted is None:
        cure = f'; a dtype is given by its name: dtype="{spec}"' if spec in (*FLOAT_DTYPES, "float16") else ""
        raise ValueError(f'{origin} is {spec!r}; expected "auto", "cpu", "cuda", "cuda:1" (any number) or a Device{cure}')
    last = examine(int(wanted[1]) if wanted[1] else None)[-1]
    if not last.ok:
        by = " (ANYARRAY_DEVICE)" if origin == "ANYARRAY_DEVICE" else ""
        raise DeviceUnavailableError(f"{spec}{by} cannot be used: {last.found}. {last.cure}") from last.error
    return cuda_device(int(wanted[1]) if wanted[1] else cards.current(), reason)


def roomiest() -> tuple[int | None, str]:
    """The working CUDA device with most free memory, or `None`, and a sentence with the reason.

    Chosen once per process. With several cards this opens a context on each, to ask for its memory; to spare them that,
    name one: `CUDA_VISIBLE_DEVICES`, `ANYARRAY_DEVICE`, or `select_device("cuda:1")`.
    """
    found: tuple[int | None, str] = once("roomiest", _roomiest)
    return found


def _roomiest() -> tuple[int | None, str]:
    if not count():
        return None, f"CUDA cannot be used: {examine()[-1].found}"
    by_room = sorted(range(count()), key=_free_memory, reverse=True)
    for index in by_room:
        last = examine(index)[-1]
        if last.ok:
            if len(by_room) == 1:
                return index, f"cuda:{index} works and is the only CUDA device"
            return index, f"cuda:{index} works and had the most free memory of {len(by_room)} CUDA devices"
    return None, f"CUDA cannot be used: {last.found}"


def _free_memory(index: int) -> int:
    cuda = cards.load_cupy().cuda
    try:
        with cuda.Device(index):
            return int(cuda.runtime.memGetInfo()[0])
    except cuda.runtime.CUDARuntimeError:  # what is wrong with this card its own steps will say
        return -1


_chosen: ContextVar[Device | None] = ContextVar("chosen", default=None)


@contextmanager
def loading_on(spec: str | Device) -> Iterator[None]:
    """A context in which `pickle.load` puts on this device what was pickled on a CUDA device, whichever that was.

    spec: as `select_device` takes it. What was pickled on the CPU stays there.

    >>> import pickle
    >>> from anyarray_linear import Linear
    >>> data = pickle.dumps(Linear(2, 3))  # perhaps of a machine with a GPU
    >>> with loading_on("cpu"):
    ...     layer = pickle.loads(data)
    >>> layer.device
    Device('cpu')
    """
    token = _chosen.set(select_device(spec))
    try:
        yield
    finally:
        _chosen.reset(token)


def stored_device(spec: str) -> Device:
    """The device for what was pickled on `spec`: that one, unless whoever reads says another.

    By `loading_on`; or, where there is no such device here, by `ANYARRAY_DEVICE`. Raises `DeviceUnavailableError`.
    """
    if spec == "cpu":
        return select_device(spec)
    if (chosen := _chosen.get()) is not None:
        return chosen
    try:
        return select_device(spec)
    except DeviceUnavailableError as error:
        if os.environ.get("ANYARRAY_DEVICE"):
            return select_device("auto")
        raise DeviceUnavailableError(
            f"it was pickled on {spec}; to load it elsewhere set ANYARRAY_DEVICE=cpu, or load it inside "
            f'`with anyarray_linear.arrays.selection.loading_on("cpu"):`. {error}'
        ) from error


def _pickled(device: Device) -> Any:
    """As its spec, for the CPU and CUDA: where it is loaded, it has to prove anew that it works."""
    if device.kind in ("cpu", "cuda"):
        return stored_device, (str(device),)
    return Device, (device.kind, 0, device.native, device.reason, device.namespace_name)


copyreg.pickle(Device, _pickled)  # so that `Device` itself need not know how devices are selected
