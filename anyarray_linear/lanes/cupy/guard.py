"""The guard of `fit`: one kernel looks at the loss and all gradients, one keeps the books."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import cupy
import numpy as np

from ...arrays.place import Array, Namespace
from ...guard import judged as judged_portably
from .kernels import THREADS, TYPES, contiguous, kernel
from .tables import COUNT, SOURCE, tables

_LOOK = SOURCE + """
KERNEL look(const Table x, long long* last_bad, long long step)
{
    bool good = true;
    EACH_ELEMENT(x)
        const A value = A(x.x[k][i]);
        good = good && value - value == A(0);  // it is NaN for NaN and infinity
    END
    if (!good) *last_bad = step;  // whoever writes, it is the same number
}
"""

_judge = cupy.ElementwiseKernel(
    "T value, int64 last_bad, int64 step, float64 total, int64 rows, int64 bad, int64 fatal, int64 count, int64 allowed",
    "bool apply, float64 new_total, int64 new_rows, int64 new_bad, int64 new_fatal",
    """
    const bool finite = last_bad != step, going = fatal == 0;
    new_bad = bad + (going && !finite);
    new_fatal = going && new_bad > allowed ? step : fatal;
    apply = finite && new_fatal == 0;
    new_total = total + (apply ? double(value) * count : 0.0);
    new_rows = rows + (apply ? count : 0);
    """,
    "anyarray_judge",
)


def judged(xp: Namespace, guard: Any, step: int, value: Array, gradients: Iterable[Array], rows: int) -> Array:
    """Whether this step may be applied, a 0-d bool; brings the guard's sums and counts up to date."""
    arrays = [value, *gradients]
    if value.dtype.char not in TYPES or any(x.dtype != value.dtype or x.device != value.device for x in arrays):
        return judged_portably(xp, guard, step, value, arrays[1:], rows)
    if guard.last_bad is None:
        guard.last_bad = cupy.zeros((), np.int64)
    look(arrays, guard.last_bad, step)
    apply, guard.total, guard.rows, guard.bad, guard.fatal = _judge(
        value, guard.last_bad, step, guard.total, guard.rows, guard.bad, guard.fatal, rows, guard.allowed
    )
    return apply


def look(arrays: list[Array], last_bad: Array, step: int) -> None:
    """Set `last_bad` to `step` if any element is NaN or infinite."""
    arrays = [contiguous(x) for x in arrays]
    sizes = tuple([x.size for x in arrays])
    starts = tuple(itertools.accumulate(sizes[:-1], initial=0))
    work = kernel("look", _LOOK, arrays[0].dtype.char)
    for i, table in enumerate(tables(starts, sizes)):
        part = arrays[i * COUNT : (i + 1) * COUNT]
        work((table.blocks,), (THREADS,), (table.filled(part), last_bad, step))
