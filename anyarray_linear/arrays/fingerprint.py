"""The fingerprint of data: tells other data from the same, wherever it is and in whatever dtype it came."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .device import Device
from .place import Array, computing_on

NUMBERS = 1 << 24  # of the data at most that are looked at
AT_ONCE = 1 << 20  # of them that are on the host at a time


def fingerprint(x: Array, dtype: str, rows: np.ndarray[Any, Any] | None = None, *, numbers: int | None = None) -> str:
    """The SHA-256 of the shape of `x` and of its values in `dtype`, which are read where they are, a part at a time.

    Of large data, not all are looked at but rows spread evenly over them, the first and the last included.

    Args:
        x: an array of any namespace, device and real dtype; axis 0 is its rows.
        dtype: the name of the dtype that counts: values that are equal in it are the same.
        rows: on the host, the numbers of the rows that are meant; `None` means all.
        numbers: how many values are looked at, `NUMBERS` by default; but always 16 rows, if there are so many.
    """
    import hashlib

    count, width = x.shape[0] if rows is None else len(rows), max(1, math.prod(x.shape[1:]))
    found = hashlib.sha256(repr((count, *x.shape[1:])).encode())
    most = max(16, (NUMBERS if numbers is None else numbers) // width)
    if most < count:
        spread = np.linspace(0, count - 1, most).astype(int)
        rows = spread if rows is None else rows[spread]
    at_once = max(1, AT_ONCE // width)
    stop = count if rows is None else len(rows)
    for i in range(0, stop, at_once):
        these = slice(i, min(i + at_once, stop))
        part = x[these, ...] if rows is None else _taken(x, rows[these])
        with np.errstate(all="ignore"):  # NaN and infinity are told elsewhere
            found.update(np.ascontiguousarray(Device.of(part).to_numpy(part).astype(dtype)).data)
    return found.hexdigest()


def _taken(x: Array, rows: np.ndarray[Any, Any]) -> Array:
    if isinstance(x, np.ndarray):
        return x[rows]
    with computing_on(x) as xp:
        return xp.take(x, Device.of(x).asarray(rows), axis=0)
