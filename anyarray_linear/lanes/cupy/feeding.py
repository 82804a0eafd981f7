"""Batches from the host, one ahead: copied by way of pinned memory on a stream of their own, while the step before computes.

Nobody waits: the copy waits on the device for what is under way there when its memory is taken, the step for its copy. Only
where the host is `BEHIND` batches ahead of the device does it wait, lest all data end up in pinned memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import cupy
import cupyx
import numpy as np

from ...arrays.place import Array

BEHIND = 8
"""Batches that may be on their way."""

HostBatch = tuple[np.ndarray[Any, Any], ...]


def fed(batches: Iterable[HostBatch], dtypes: tuple[Any, ...], index: int) -> Iterator[tuple[Array, ...]]:
    """The batches as arrays of these dtypes on device `index`, for work on its current stream."""
    device = cupy.cuda.Device(index)
    with device:
        copies = cupy.cuda.Stream(non_blocking=True)
    under_way: deque[tuple[Any, list[Any]]] = deque()  # pinned memory is kept until its copy is done
    ahead: tuple[list[Array], Any] | None = None
    for batch in batches:
        with device:
            there, done = _sent(batch, dtypes, copies, under_way)
            arrived = None if ahead is None else _arrived(*ahead)
        ahead = there, done
        if arrived is not None:
            yield arrived
    if ahead is not None:
        with device:
            arrived = _arrived(*ahead)
        yield arrived


def _sent(
    batch: HostBatch, dtypes: tuple[Any, ...], copies: Any, under_way: deque[tuple[Any, list[Any]]]
) -> tuple[list[Array], Any]:
    """The arrays that a batch will be in, and the event of its arrival."""
    if len(under_way) >= BEHIND and not under_way[0][0].done:
        under_way[0][0].synchronize()
    while under_way and under_way[0][0].done:
        under_way.popleft()
    pinned = [cupyx.empty_pinned(x.shape, dtype) for x, dtype in zip(batch, dtypes, strict=True)]
    for page, x in zip(pinned, batch, strict=True):
        np.copyto(page, x, casting="unsafe")
    there = [cupy.empty(x.shape, dtype) for x, dtype in zip(batch, dtypes, strict=True)]
    # for whoever had this memory before
    copies.wait_event(cupy.cuda.get_current_stream().record(cupy.cuda.Event(disable_timing=True)))
    for page, x in zip(pinned, there, strict=True):
        if x.nbytes:
            x.data.copy_from_host_async(page.ctypes.data, x.nbytes, copies)
    done = copies.record(cupy.cuda.Event(disable_timing=True))
    under_way.append((done, pinned))
    return there, done


def _arrived(there: list[Array], done: Any) -> tuple[Array, ...]:
    cupy.cuda.get_current_stream().wait_event(done)
    return tuple(there)
