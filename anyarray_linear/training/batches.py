"""Batches that the caller makes: a list of them, a torch `DataLoader`, or any object whose `iter()` starts a new pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from ..arrays.checks import check_array, describe
from ..arrays.device import Device
from ..arrays.place import Array, is_array, place_of
from .data import is_float, loss_dtype

Batch = tuple[Array, Array, Array | None]

_EXAMPLE = (
    "give what can be gone through again each epoch: a list of (X, y), a DataLoader, or an object with "
    "def __iter__(self): yield X, y"
)


class Batches:
    """The batches of `source`, moved to the model's device and cast to its dtype one by one.

    name: what the source is called in messages. takes_ids: whether the model takes integers, which stay as they are.

    Raises `TypeError` for what is no iterable, or can be gone through only once.
    """

    def __init__(self, source: Any, device: Device, dtype: Any, *, takes_ids: bool = False, name: str = "X") -> None:
        try:
            if isinstance(source, (str, bytes, Mapping)):
                raise TypeError
            once = iter(source)
        except TypeError:
            text = f"{name} is {describe(source)}, which is neither an array nor an iterable of batches; {_EXAMPLE}"
            raise TypeError(text) from None
        if once is source:
            raise TypeError(f"{name} is a {type(source).__name__}, which can be gone through only once; {_EXAMPLE}")
        self.source, self.device, self.dtype, self.takes_ids, self.name = source, device, dtype, takes_ids, name

    @property
    def length(self) -> int | None:
        """How many batches a pass has, if the source knows."""
        try:
            return len(self.source)
        except TypeError:
            return None

    def batches(self, start: int = 0) -> Iterator[Batch]:
        """A new pass, from batch `start` on: `(X, y, weights)`, the last of which may be `None`."""
        for number, batch in enumerate(islice(iter(self.source), start, None), start):
            yield self._moved(number, batch)

    def _moved(self, number: int, batch: Any) -> Batch:
        name = f"batch {number} of {self.name}"
        if is_array(batch) or not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            what = f"a {type(batch).__name__} of {len(batch)}" if isinstance(batch, (tuple, list)) else describe(batch)
            raise TypeError(f"{name} is {what}; it must be (X, y), or (X, y, weights)")
        X, y, *more = batch
        for part, x in zip(("X", "y", "weights"), (X, y, *more), strict=False):
            check_array(f"the {part} of {name}", x)
            if x.ndim == 0 or x.shape[0] != X.shape[0] or not X.shape[0]:
                raise ValueError(f"{name} has an X of shape {tuple(X.shape)} but {part} has {tuple(x.shape)}; "
                                 "they must have as many rows, and at least one")
        X_dtype = None if self.takes_ids and place_of(X).integral else self.dtype
        X, exact = self.device.asarray(X, dtype=X_dtype), loss_dtype(self.device, self.dtype)
        y = self.device.asarray(y, dtype=exact if is_float(y) else None)
        return X, y, self.device.asarray(more[0], dtype=exact) if more else None
