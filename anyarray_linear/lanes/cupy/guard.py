"""The guard of `fit`: one kernel looks at the loss and all gradients, one keeps the books, in place and on the device."""

from __future__ import annotations

import itertools
import operator
import weakref
from collections.abc import Iterable

import cupy
import numpy as np

from ...arrays.place import Array, Namespace
from ...guard import Guard
from ...guard import judged as judged_portably
from .kernels import THREADS, TYPES, contiguous, kernel
from .tables import COUNT, SOURCE, tables

BOOKS_SOURCE = """
struct Books { double total; long long rows, bad, fatal, looked_bad, apply; };
"""

_LOOK = SOURCE + BOOKS_SOURCE + """
KERNEL look(const Table x, Books* books)
{
    bool good = true;
    EACH_ELEMENT(x)
        const A value = A(x.x[k][i]);
        good = good && value - value == A(0);  // it is NaN for NaN and infinity
    END
    if (!good) books->looked_bad = 1;  // whoever writes, it is the same number
}
"""

_JUDGE = BOOKS_SOURCE + """
struct Judged { long long step, count, allowed; };

KERNEL judge(Books* books, const T* value, const Judged* there, long long step, long long count, long long allowed)
{
    if (threadIdx.x) return;
    const Judged now = there ? *there : Judged{step, count, allowed};
    Books b = *books;
    const bool finite = b.looked_bad == 0, going = b.fatal == 0;
    b.looked_bad = 0;
    b.bad += going && !finite;
    if (going && b.bad > now.allowed) b.fatal = now.step;
    b.apply = finite && b.fatal == 0;
    if (b.apply) {
        b.total += double(A(*value)) * now.count;
        b.rows += now.count;
    }
    *books = b;
}
"""


class Books:
    """The sums and counts of a guard on one device, which kernels bring up to date where they are.

    apply: whether the last step that was judged may be applied, a 0-d bool.
    """

    def __init__(self) -> None:
        self.memory = cupy.zeros(6, np.int64)
        numbers = [self.memory[i] for i in range(6)]
        self.views = numbers[0].view(np.float64), *numbers[1:4]
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


_books: weakref.WeakKeyDictionary[Guard, Books] = weakref.WeakKeyDictionary()


def books_of(guard: Guard) -> Books:
    """The books of a guard, on the current device and up to date."""
    books = _books.get(guard)
    if books is None:
        with cupy.cuda.using_allocator(cupy.get_default_memory_pool().malloc):  # they outlive any graph
            books = _books[guard] = Books()
    books.adopt(guard)
    return books


def judged(xp: Namespace, guard: Guard, step: int, value: Array, gradients: Iterable[Array], rows: int) -> Array:
    """Whether this step may be applied, a 0-d bool; brings the guard's sums and counts up to date."""
    arrays = [value, *gradients]
    dtype, device = value.dtype, value.data.device_id
    if dtype.char not in TYPES or any(x.dtype != dtype or x.data.device_id != device for x in arrays):
        return judged_portably(xp, guard, step, value, arrays[1:], rows)
    return judge(books_of(guard), arrays, step, rows, guard.allowed)


def judge(books: Books, arrays: list[Array], step: int, rows: int, allowed: int, there: int = 0) -> Array:
    """Look at a loss and its gradients, and enter the step.

    there: the address of `step`, `rows` and `allowed` on the device, which are then taken instead.
    """
    arrays = [contiguous(x) for x in arrays]
    sizes = tuple([x.size for x in arrays])
    starts = tuple(itertools.accumulate(sizes[:-1], initial=0))
    dtype = arrays[0].dtype.char
    look = kernel("look", _LOOK, dtype)
    for i, table in enumerate(tables(starts, sizes)):
        part = arrays[i * COUNT : (i + 1) * COUNT]
        look((table.blocks,), (THREADS,), (table.filled(part), books.memory))
    kernel("judge", _JUDGE, dtype)((1,), (32,), (books.memory, arrays[0], there, step, rows, allowed))
    return books.apply
