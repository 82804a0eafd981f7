"""The proof that a captured step does what the eager one does: on the user's own model, batch and card, before it is used.

A step is taken eagerly, and its result kept on the host. Then parameters, moments and books are put back, the step is
recorded, and its first replay starts from the same. If it leaves the same bits, it is proved. If not, since cuBLAS may form
a product in another order: each gradient must be within the rounding errors that two ways of computing it can have
(`rounding`), and what the replay made of its gradients must be, to the bit, what the eager update makes of them. Whatever
goes wrong, the eager result stands.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import cupy
import numpy as np

from ...arrays.place import Array
from ...step import TrainingStep, loss_and_gradients
from .guard import books_of, judge, scaling_of
from .recording import Recording
from .rounding import gradient_errors
from .update import numbers, update

Host = np.ndarray[Any, Any]


class Batch(Protocol):
    """Rows of `X` and `y`."""

    X: Array
    y: Array
    order: Array | None
    start: int
    rows: int


def is_ready(step: TrainingStep) -> bool:
    """Whether the optimizer has buffers, which an eager step makes."""
    bound = step.optimizer.bound
    return bound is not None and bound.flat is not None and bound.is_as_left(step.optimizer.moment_names)


def both_ways(step: TrainingStep, batch: Batch, eagerly: Callable[[], Array]) -> tuple[Array, Recording | None, str]:
    """Take a step eagerly and by a new graph: the loss, and the graph if the two agree, or why it is not to be had."""
    optimizer, guard = step.optimizer, step.guard
    flat = optimizer.bound.flat
    books = None if guard is None else books_of(guard)
    values = numbers(optimizer, optimizer.scalars(optimizer.learning_rate(), optimizer.steps + 1))
    scaling = None if step.loss_scale is None else scaling_of(step.loss_scale)
    live = [flat.W, *flat.moments, *([] if flat.master is None else [flat.master])]
    live += [kept.memory for kept in (books, scaling) if kept is not None]
    before = [x.get() for x in live]
    value = eagerly()
    if optimizer.bound.flat is not flat:
        return value, None, "the optimizer's buffers were made anew in a step"
    if books is not None and guard is not None:
        books.adopt(guard)
    if scaling is not None and step.loss_scale is not None:
        scaling.adopt(step.loss_scale)
    after = [x.get() for x in live]  # which waits: from here on nothing is under way
    step.whole = False
    good = False
    try:
        recording = Recording(flat, books, scaling, batch.X, batch.y, batch.rows)
        with recording.stream, cupy.cuda.using_allocator(recording.pool.malloc):
            loss = cupy.zeros((), value.dtype)
        with recording.stream:
            _put(live, before)
            recording.put(step, values, batch.X, batch.y, batch.order, batch.start, loss)
            left = recording.record(step)
            _put(live, before)
            recording.put(step, values, batch.X, batch.y, batch.order, batch.start, loss)
            recording.graph.launch(recording.stream)
            recording.stream.synchronize()
            replayed = [x.get() for x in live]
            why = ""
            if not _same_bits([*replayed, loss.get()], [*after, value.get()]):
                with cupy.cuda.using_allocator(cupy.cuda.MemoryPool().malloc):
                    why = _difference(step, recording, left, values, live, before, replayed)
        good = not why
        return value, recording if good else None, why
    except Exception as error:  # noqa: BLE001 - of the driver, of a library, of memory: the eager result stands
        return value, None, f"{type(error).__name__}: {error}"
    finally:
        if not good:
            _put(live, after)
        cupy.cuda.get_current_stream().synchronize()
        step.whole = True


def _put(arrays: list[Array], values: list[Host]) -> None:
    for x, value in zip(arrays, values, strict=True):
        x.set(value)


def _same_bits(these: list[Host], those: list[Host]) -> bool:
    return all(x.tobytes() == y.tobytes() for x, y in zip(these, those, strict=True))


def _difference(
    step: TrainingStep, recording: Recording, left: tuple[Array, dict[str, Array]], values: tuple[float, ...],
    live: list[Array], before: list[Host], replayed: list[Host],
) -> str:  # fmt: skip
    """What of a replay differs from the eager step by more than rounding, if anything; leaves what the replay did."""
    if recording.scaling is not None:
        return "the float16 step has other bits in a graph than eagerly, and how far apart the two may be is not worked out"
    flat, books, (loss, gradients) = recording.flat, recording.books, left
    computed = {name: dW.get() for name, dW in gradients.items()}
    in_order = [gradients[name] for name in flat.views]
    _put(live, before)
    where = None
    if books is not None and step.guard is not None:
        where = judge(books, [loss, *in_order], step.number + 1, step.rows or recording.rows, step.guard.allowed)
    update(flat, step.optimizer, in_order, values, where)
    if not _same_bits([x.get() for x in live], replayed):
        return "the update of the graph's first replay is not that of the eager step"
    _put(live, before)
    eager_loss, eager = loss_and_gradients(step.model, step.loss, recording.X, recording.y, None)
    errors = gradient_errors(step.model, step.loss, recording.X.get(), recording.y.get(), flat.W.data.device_id)
    pairs = [("the loss", loss.get(), eager_loss.get(), errors.pop(""))]
    pairs += [(f"the gradient of {name}", computed[name], dW.get(), errors[name]) for name, dW in eager.items()]
    _put(live, replayed)
    for name, mine, theirs, error in pairs:
        off = np.abs(mine.astype(np.float64) - theirs.astype(np.float64))
        if not (off <= 2 * error).all():  # and not where it is NaN
            return f"{name} of the graph's first replay is off by up to {np.nanmax(off):.3g}, more than rounding can make it"
    return ""
