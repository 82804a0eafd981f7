"""The guard of `fit`, and the scale of a float16 model's loss: kept in place and on the device.

One kernel looks at the gradients, and at the loss where it is of their dtype; one more decides and keeps the books of each.
"""

from __future__ import annotations

import itertools
import operator
import struct
import weakref
from collections.abc import Iterable

import cupy
import numpy as np

from ...arrays.place import Array, Namespace
from ...guard import Guard
from ...guard import booked as booked_portably
from ...guard import judged as judged_portably
from ...scaling import LARGEST, LossScale, Verdict
from ...scaling import scale_judged as scale_judged_portably
from .kernels import THREADS, TYPES, by_value, contiguous, kernel
from .tables import COUNT, SOURCE, tables

BOOKS_SOURCE = """
struct Books { double total; long long rows, bad, fatal, looked_bad, apply; };
"""

_LOOK = SOURCE + """
KERNEL look(const Table x, long long* bad)
{
    bool good = true;
    EACH_ELEMENT(x)
        const A value = A(x.x[k][i]);
        good = good && value - value == A(0);  // it is NaN for NaN and infinity
    END
    if (!good) *bad = 1;  // whoever writes, it is the same number
}
"""

_JUDGE = BOOKS_SOURCE + """
struct Judged { long long step, count, allowed; };

// apply, excused: what a scale found; null: what was looked at decides
KERNEL judge(
    Books* books, const T* value, const bool* apply, const bool* excused,
    const Judged* there, long long step, long long count, long long allowed)
{
    if (threadIdx.x) return;
    const Judged now = there ? *there : Judged{step, count, allowed};
    Books b = *books;
    const bool finite = apply ? *apply : b.looked_bad == 0, counts = finite || (excused && *excused);
    const bool going = b.fatal == 0;
    b.looked_bad = 0;
    b.bad += going && !counts;
    if (going && b.bad > now.allowed) b.fatal = now.step;
    b.apply = finite && b.fatal == 0;
    if (counts && b.fatal == 0) {
        b.total += double(A(*value)) * now.count;
        b.rows += now.count;
    }
    *books = b;
}
"""

_SCALE = """
struct Scaling { float scale; int good; float before; int unused; long long looked_bad; bool apply, overflow; };
struct Rates { float growth, backoff, floor, largest; long long interval; };

KERNEL judge_scale(Scaling* scaling, const T* value, const Rates r)
{
    if (threadIdx.x) return;
    Scaling s = *scaling;
    const A loss = value ? A(*value) : A(0);
    const bool known = loss - loss == A(0), finite = known && s.looked_bad == 0;
    const int good = finite ? s.good + 1 : 0;
    const bool grows = good >= r.interval;
    const float grown = s.scale * r.growth, shrunk = s.scale * r.backoff;
    s.before = s.scale;
    s.looked_bad = 0;
    s.apply = finite;
    s.overflow = known && !finite && s.scale > r.floor;
    if (finite && grows && grown <= r.largest) s.scale = grown;
    if (known && !finite) s.scale = shrunk > r.floor ? shrunk : r.floor;
    s.good = grows ? 0 : good;
    *scaling = s;
}
"""
_RATES = struct.Struct("4fq")


class Books:
    """The sums and counts of a guard on one device, which kernels bring up to date where they are.

    apply: whether the last step that was judged may be applied, a 0-d bool.
    """

    def __init__(self) -> None:
        self.memory = cupy.zeros(6, np.int64)
        numbers = [self.memory[i] for i in range(6)]
        self.views = numbers[0].view(np.float64), *numbers[1:4]
        self.looked_bad = numbers[4]
        self.apply = numbers[5].reshape(1).view(np.bool_)[0]

    def adopt(self, guard: Guard) -> None:
        """Copy in what the guard has, where that is not in the books already, and have the guard read from here."""
        fields = guard.total, guard.rows, guard.bad, guard.fatal
        if all(map(operator.is_, fields, self.views)):
            return
        for x, view in zip(fields, self.views, strict=True):
            if x is not view:
                view[...] = x
        guard.total, guard.rows, guard.bad, guard.fatal = self.views


class Scaling:
    """The scale of a loss on one device, which a kernel brings up to date where it is.

    verdict: on the last step that was judged.
    """

    def __init__(self) -> None:
        self.memory = cupy.zeros(4, np.int64)
        scale, good, before, _ = self.memory[:2].view(np.float32)
        self.views = scale, good.view(np.int32)
        apply, overflow = self.memory[3:].view(np.bool_)[:2]
        self.verdict = Verdict(apply, overflow, before)
        self.looked_bad = self.memory[2]

    def adopt(self, scale: LossScale) -> None:
        """Copy in what the scale has, where that is not here already, and have it read from here."""
        fields = scale.scale, scale.good
        if all(map(operator.is_, fields, self.views)):
            return
        for x, view in zip(fields, self.views, strict=True):
            if x is not view:
                view[...] = x
        scale.scale, scale.good = self.views


_books: weakref.WeakKeyDictionary[Guard, Books] = weakref.WeakKeyDictionary()
_scalings: weakref.WeakKeyDictionary[LossScale, Scaling] = weakref.WeakKeyDictionary()


def books_of(guard: Guard) -> Books:
    """The books of a guard, on the current device and up to date."""
    books = _books.get(guard)
    if books is None:
        with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):  # they outlive any graph
            books = _books[guard] = Books()
    books.adopt(guard)
    return books


def scaling_of(scale: LossScale) -> Scaling:
    """What a scale has on the current device, up to date."""
    scaling = _scalings.get(scale)
    if scaling is None or scaling.memory.data.device_id != cupy.cuda.runtime.getDevice():
        with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):
            scaling = _scalings[scale] = Scaling()
    scaling.adopt(scale)
    return scaling


def _fit(arrays: list[Array]) -> bool:
    """Whether kernels can take these arrays together."""
    dtype, device = arrays[0].dtype, arrays[0].data.device_id
    return dtype.char in TYPES and all(x.dtype == dtype and x.data.device_id == device for x in arrays)


def judged(xp: Namespace, guard: Guard, step: int, value: Array, gradients: Iterable[Array], rows: int) -> Array:
    """Whether this step may be applied, a 0-d bool; brings the guard's sums and counts up to date."""
    arrays = [value, *gradients]
    if not _fit(arrays):
        return judged_portably(xp, guard, step, value, arrays[1:], rows)
    return judge(books_of(guard), arrays, step, rows, guard.allowed)


def booked(xp: Namespace, guard: Guard, step: int, value: Array, finite: Array, excused: Array, rows: int) -> Array:
    """Whether this step may be applied; enters it in the guard's books."""
    if not _fit([value]):
        return booked_portably(xp, guard, step, value, finite, excused, rows)
    return enter(books_of(guard), value, Verdict(finite, excused, finite), step, rows, guard.allowed)


def scale_judged(xp: Namespace, scale: LossScale, value: Array | None, gradients: list[Array]) -> Verdict:
    """The verdict on a step, and the scale and count of good steps after it."""
    if not (_fit(gradients) and (value is None or _fit([value]))):
        return scale_judged_portably(xp, scale, value, gradients)
    return judge_scale(scaling_of(scale), scale, value, gradients)


def _look(arrays: list[Array], bad: int) -> None:
    """Write to the address `bad` if not all are finite."""
    arrays = [contiguous(x) for x in arrays]
    sizes = tuple([x.size for x in arrays])
    starts = tuple(itertools.accumulate(sizes[:-1], initial=0))
    look = kernel("look", _LOOK, arrays[0].dtype.char)
    for i, table in enumerate(tables(starts, sizes)):
        part = arrays[i * COUNT : (i + 1) * COUNT]
        look((table.blocks,), (THREADS,), (table.filled(part), bad))


def judge(books: Books, arrays: list[Array], step: int, rows: int, allowed: int, there: int = 0) -> Array:
    """Look at a loss and its gradients, and enter the step.

    there: the address of `step`, `rows` and `allowed` on the device, which are then taken instead.
    """
    _look(arrays, books.looked_bad.data.ptr)
    return enter(books, arrays[0], None, step, rows, allowed, there)


def enter(
    books: Books, value: Array, verdict: Verdict | None, step: int, rows: int, allowed: int, there: int = 0
) -> Array:
    """Enter a step with this loss, by the verdict of a scale, or by what was looked at."""
    found = (0, 0) if verdict is None else (verdict.apply.data.ptr, verdict.overflow.data.ptr)
    work = kernel("judge", _JUDGE, value.dtype.char)
    work((1,), (32,), (books.memory, value, *found, there, step, rows, allowed))
    return books.apply


def judge_scale(scaling: Scaling, scale: LossScale, value: Array | None, gradients: list[Array]) -> Verdict:
    """Look at gradients, and at the loss if it is given, and bring the scale up to date."""
    _look(gradients, scaling.looked_bad.data.ptr)
    rates = by_value(_RATES.pack(scale.growth, scale.backoff, scale.floor, LARGEST, scale.interval))
    work = kernel("judge_scale", _SCALE, "f" if value is None else value.dtype.char)
    work((1,), (32,), (scaling.memory, 0 if value is None else value.data.ptr, rates))
    return scaling.verdict
