"""TF32: whether products of float32 arrays keep all bits of their factors on a CUDA device, or 11 of 24, which is faster.

It is a setting of a device, for the whole process and all its threads, as `CUPY_TF32` is one of all devices: arrays, models
and files do not carry it, so nothing that is moved, pickled or saved brings it along. `select_device("cuda", tf32=True)` is
how to ask for it; what was not asked for is as CuPy has it, which is float32 unless `CUPY_TF32=1` is in the environment.

This library's products heed it. CuPy's own, `A @ B`, heed `CUPY_TF32` alone, and they are what is computed by without lanes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

import numpy as np

from .operations import lanes_are_on

CAPABLE = 8
"""The first major compute capability with TF32."""

_asked: dict[int, bool] = {}  # by device, what `ask` was told
_known: dict[int, bool] = {}  # by device, what holds there


def in_tf32(index: int) -> bool:
    """Whether the lanes form products of float32 arrays in TF32 on this CUDA device."""
    try:
        return _known[index]
    except KeyError:
        return _known.setdefault(index, _asked.get(index, of_cupy(index)))


def of_cupy(index: int) -> bool:
    """Whether CuPy's own `A @ B` does, as `CUPY_TF32` says; CuPy looks at it at its first product, and only then."""
    linalg = import_module("cupy._core._routines_linalg")
    with import_module("cupy").cuda.Device(index):
        return has_tf32(index) and bool(linalg.get_compute_type(np.dtype("float32")) == linalg.COMPUTE_TYPE_TF32)


def has_tf32(index: int) -> bool:
    """Whether this CUDA device can."""
    return int(import_module("cupy").cuda.runtime.getDeviceProperties(index)["major"]) >= CAPABLE


def products_are_in_tf32(index: int) -> bool:
    """Whether products of float32 arrays are formed in TF32 there now: by the lanes, or without them by CuPy."""
    return in_tf32(index) if lanes_are_on.get() else of_cupy(index)


def why(index: int) -> str:
    """By whose word it is as it is."""
    return f"tf32={_asked[index]} was asked for" if lanes_are_on.get() and index in _asked else "CUPY_TF32 is set"


def ask(index: int, on: bool) -> None:
    """From now on, products of float32 arrays are formed in TF32 on this CUDA device, or are not."""
    _asked[index] = _known[index] = on


def unheard() -> str:
    """What to say, without lanes, of devices of which something was asked that CuPy does not do; mostly nothing."""
    return "; ".join(
        f"without lanes, float32 products on cuda:{index} are CuPy's own, which are formed in "
        f"{'float32' if on else 'TF32'}, though {'TF32' if on else 'float32'} was asked for: CuPy heeds CUPY_TF32, "
        f"read when Python starts (set it to {int(on)}), or take the lanes again (ANYARRAY_LANES=1)"
        for index, on in _asked.items()
        if on != of_cupy(index)
    )


@contextmanager
def restored() -> Iterator[None]:
    """A context that leaves all devices as they were asked for before it."""
    before = dict(_asked)
    try:
        yield
    finally:
        _asked.clear()
        _known.clear()
        _asked.update(before)
