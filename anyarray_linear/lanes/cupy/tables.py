"""Tables of arrays: a kernel that goes through many arrays as if they were one, each thread taking its share of all.

Gradients stay where they are. A kernel is handed their addresses in a table, by value, and counts elements through it: array
`k` begins at the number `start[k]`. A thread takes numbers in ascending order, so it finds its array from the last one on.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Iterable, Sequence
from typing import Any

from ...arrays.place import Array
from .kernels import blocks, by_value

COUNT = 64
"""Arrays in a table: 1.5 KiB of the 4 KiB of arguments that a kernel can have."""

SOURCE = f"""
struct Table {{ const T* x[{COUNT}]; long long start[{COUNT}], size[{COUNT}], count, end; }};

#define EACH_ELEMENT(table) \\
    for (long long n = INDEX, k = 0; n < (table).end; n += STRIDE) {{ \\
        while (k + 1 < (table).count && n >= (table).start[k + 1]) k++; \\
        const long long i = n - (table).start[k]; \\
        if (i >= (table).size[k]) continue;  /* between two arrays */
#define END }}
"""
SIZE = 8 * (3 * COUNT + 2)
"""Bytes of a table; what a kernel takes besides comes after it."""


class Table:
    """Up to `COUNT` arrays by the numbers where they start, and `extra` bytes of the kernel's own behind them.

    count: how many arrays; blocks: how many blocks share the work.
    """

    def __init__(self, starts: Sequence[int], sizes: Sequence[int], extra: int) -> None:
        self.count, end = len(sizes), starts[-1] + sizes[-1]
        self.blocks = blocks(end)
        self._packed = bytearray(SIZE + extra)
        struct.pack_into(f"{self.count}q", self._packed, 8 * COUNT, *starts)
        struct.pack_into(f"{self.count}q", self._packed, 16 * COUNT, *sizes)
        struct.pack_into("2q", self._packed, 24 * COUNT, self.count, end)
        self._addresses = struct.Struct(f"{self.count}Q")

    def filled(self, arrays: Iterable[Array], extra: struct.Struct | None = None, values: Sequence[float] = ()) -> Any:
        """What a kernel takes: the table with these arrays in it, which the caller keeps alive until the launch."""
        packed = self._packed.copy()  # two threads may be at it
        self._addresses.pack_into(packed, 0, *[x.data.ptr for x in arrays])
        if extra is not None:
            extra.pack_into(packed, SIZE, *values)
        return by_value(packed)


@functools.lru_cache(maxsize=256)
def tables(starts: tuple[int, ...], sizes: tuple[int, ...], extra: int = 0) -> list[Table]:
    """A table for each `COUNT` arrays, in which each counts from its first."""
    found = []
    for i in range(0, len(sizes), COUNT):
        part = starts[i : i + COUNT]
        found.append(Table([start - part[0] for start in part], sizes[i : i + COUNT], extra))
    return found
