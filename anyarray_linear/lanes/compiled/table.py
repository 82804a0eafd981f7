"""A table of operations on memory, which compiled code works through: the memory, the operations, and who waits for whom."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import layout as at

CHUNK = 1 << 14
"""Elements of an update's tile: with its moments what fits the second-level cache."""
DATA = object.__basicsize__
"""Where a NumPy array object has the address of its data: the first thing after what every object has, in NumPy's binary
interface since its beginning. Read by compiled code, it costs nothing; `ndarray.ctypes.data` costs over a microsecond."""


class Table:
    """Operations, their memory, and what compiled code is told: `control` and `numbers`, as `layout` says.

    dtype: that of the arrays. threads: how many there may be.
    """

    def __init__(self, dtype: Any, threads: int) -> None:
        self.dtype, self.threads = dtype, threads
        self.kept: list[Any] = []
        """What has to live as long as this does."""
        self.operations: list[list[int]] = []
        self.tickets = self.after = 0
        self.largest = self.work = 0  # multiplications in a tile, and in all
        self.control = np.zeros(at.CONTROL, np.int64)
        self.numbers = np.zeros(at.COUNT, np.float64)
        self.address = self.control.ctypes.data

    def array(self, elements: int, dtype: Any = None, *, zero: bool = False) -> int:
        """The address of memory for so many elements, at the start of a cache line."""
        dtype = self.dtype if dtype is None else dtype
        raw = (np.zeros if zero else np.empty)(max(1, elements) * dtype.itemsize + 64, np.uint8)
        self.kept.append(raw)
        return -(-raw.ctypes.data // 64) * 64

    def add(self, code: int, tiles: int, *fields: int) -> None:
        """An operation that may run beside those since the last `barrier`."""
        self.operations.append([code, self.tickets, tiles, self.after, *fields])
        self.tickets += tiles

    def barrier(self) -> None:
        """What is added from now on needs all that was added so far."""
        self.after = self.tickets

    def chunks(self, elements: int, chunk: int) -> tuple[int, int]:
        """`(tiles, elements of a tile)`."""
        if elements < 4 * chunk:
            chunk = max(1, elements)
        return -(-elements // chunk), chunk

    def seal(self) -> None:
        """No operation is added any more."""
        self.table = np.zeros((len(self.operations), at.FIELDS), np.int64)
        for row, operation in zip(self.table, self.operations, strict=True):
            row[: len(operation)] = operation
        c = self.control
        c[at.TOTAL], c[at.OPERATIONS], c[at.NUMBERS] = self.tickets, self.table.ctypes.data, self.numbers.ctypes.data
        self.parallel = self.threads > 1 and any(operation[at.TILES] > 1 for operation in self.operations)
