"""Pickling that keeps CuPy arrays on their device: CuPy's own puts them on whatever device is current at loading.

Whoever reads a pickle may say that they shall be elsewhere: see `selection.loading_on`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from array_api_compat import is_cupy_array

from .place import Array, computing_on
from .selection import stored_device


class _Pinned:
    """A CuPy array that is pickled through the host together with its device, and deep-copied on its device."""

    def __init__(self, array: Array) -> None:
        self.array = array

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (self.array.get(), f"cuda:{self.array.device.id}")

    def __deepcopy__(self, memo: dict[int, Any]) -> _Pinned:
        with computing_on(self.array):
            return _Pinned(self.array.copy())


def _restore(host: np.ndarray[Any, Any], device: str) -> _Pinned:
    return _Pinned(stored_device(device).asarray(host))


def pin(value: Any) -> Any:
    """`value` as it goes into a pickle or a deep copy."""
    return _Pinned(value) if is_cupy_array(value) else value


def unpin(value: Any) -> Any:
    """`value` as it comes back out."""
    return value.array if isinstance(value, _Pinned) else value
