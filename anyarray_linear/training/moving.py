"""Data of the host for a model elsewhere: moved once where they fit on a card, else batch by batch, on a card one ahead."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.memory import is_out_of_memory
from ..arrays.place import Array, dtype_name

FRACTION = 1 / 4
"""Of what is free on a card, the part that data may take."""
_PART = 1 << 26  # bytes moved at once, so that a memory-mapped file needs little memory on the way


def moved(batches: Iterable[tuple[Array, ...]], device: Device, dtypes: tuple[Any, ...]) -> Iterator[tuple[Array, ...]]:
    """The batches on `device`, in these dtypes; `None` leaves an array its own."""
    batches = iter(batches)
    first = next(batches, None)
    if first is None:
        return
    batches = chain([first], batches)
    if device.kind == "cuda" and all(isinstance(x, np.ndarray) for x in first):
        from ..lanes.cupy.feeding import fed

        assert device.index is not None
        yield from fed(batches, tuple(map(_host_dtype, first, dtypes)), device.index)
    else:
        for batch in batches:
            yield tuple(device.asarray(x, dtype=dtype) for x, dtype in zip(batch, dtypes, strict=True))


def moved_once(arrays: tuple[Array, ...], device: Device, dtypes: tuple[Any, ...]) -> tuple[Array, ...]:
    """The arrays on `device`, a card, in these dtypes; as they are, if they are not on the host or do not fit there well."""
    if device.kind != "cuda" or not all(isinstance(x, np.ndarray) for x in arrays):
        return arrays
    wanted = list(map(_host_dtype, arrays, dtypes))
    size = sum(x.size * dtype.itemsize for x, dtype in zip(arrays, wanted, strict=True))
    if size > device.memory()[0] * FRACTION:
        return arrays
    try:
        return tuple(_in_parts(x, device, dtype) for x, dtype in zip(arrays, wanted, strict=True))
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return arrays


def _host_dtype(x: np.ndarray[Any, Any], dtype: Any) -> np.dtype[Any]:
    return x.dtype.newbyteorder("=") if dtype is None else np.dtype(dtype_name(dtype))


def _in_parts(x: np.ndarray[Any, Any], device: Device, dtype: np.dtype[Any]) -> Array:
    rows = max(1, _PART * len(x) // max(1, x.size * dtype.itemsize))
    with device, device.xp.cuda.using_allocator(None):  # not from a pool, which would keep so much memory after training
        there = device.xp.empty(x.shape, dtype=dtype)
        for start in range(0, len(x), rows):
            with np.errstate(over="ignore"):  # `fit` has looked for what the cast makes infinite
                there[start : start + rows] = device.asarray(x[start : start + rows].astype(dtype))
    return there
