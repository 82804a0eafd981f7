"""A training step as a CUDA graph: what is in it, and how it is recorded.

A graph does again, at each launch, exactly what was asked of a stream while it was recorded. So whatever changes from step
to step is read from the device: one kernel before the graph puts it there, all in one struct (`State`). The graph itself
takes the rows of the batch, runs the layers, the loss and the way back, judges and updates, and delivers the loss where it
is wanted.

Everything that the graph works in belongs to it: a stream of its own while it is recorded, a memory pool, which is kept as
long as the graph, and a workspace for cuBLAS.
"""

from __future__ import annotations

import functools
import gc
import struct
from collections.abc import Sequence
from typing import Any

import cupy
import numpy as np

from ...arrays.place import Array
from ...binding import Flat
from ...linear import Linear
from ...sequential import Sequential
from ...step import TrainingStep
from .activations import add_bias, is_known, needs_sum
from .guard import Books, Scaling, enter, judge, judge_scale
from .kernels import THREADS, TYPES, blocks, by_value, kernel
from .products import capturable, gemm, workspace
from .update import NUMBERS, update

_STATE = struct.Struct(f"{NUMBERS}d9q")
_JUDGED_AT = 8 * (NUMBERS + 6)  # where step, count and allowed are
_STATE_SOURCE = f"""
struct State {{ double numbers[{NUMBERS}]; long long X, y, order, of, start, loss, step, count, allowed; }};
#define WORDS (sizeof(State) / 8)
"""

_STAGE = _STATE_SOURCE + """
KERNEL stage(long long* there, const State here)
{
    const int i = threadIdx.x;
    if (i < WORDS) there[i] = ((const long long*)&here)[i];
}
"""

_TAKE = _STATE_SOURCE + """
struct Sizes { long long rows, columns; int shift, of_y; };

// `1 << shift` neighbours share a row
KERNEL take(const State* state, E* out, const Sizes s)
{
    const E* from = (const E*)(s.of_y ? state->y : state->X);
    const long long* order = (const long long*)state->order;
    const int width = 1 << s.shift, neighbour = int(INDEX & (width - 1));
    for (long long row = INDEX >> s.shift; row < s.rows; row += STRIDE >> s.shift) {
        const long long n = state->start + row;
        long long chosen = order ? order[n] : n;
        if (chosen < 0 || chosen >= state->of) {  // counted round, as `take` of CuPy does
            chosen %= state->of;
            if (chosen < 0) chosen += state->of;
        }
        for (long long j = neighbour; j < s.columns; j += width) out[row * s.columns + j] = from[chosen * s.columns + j];
    }
}
"""

_DELIVER = _STATE_SOURCE + """
KERNEL deliver(const State* state, const T* loss)
{
    if (threadIdx.x == 0) *(T*)state->loss = *loss;
}
"""

_ELEMENTS = {1: "unsigned char", 2: "unsigned short", 4: "unsigned int", 8: "unsigned long long"}


def forward(model: Any, X: Array) -> tuple[Array, Any]:
    """`model.forward(X)`, with bias and activation as one kernel where the one follows the other."""
    if type(model) is not Sequential:
        return model.forward(X)  # type: ignore[no-any-return]
    caches: list[Any] = []
    layers = iter(range(len(model.layers)))
    for i in layers:
        layer, after = model.layers[i], model.layers[i + 1] if i + 1 < len(model.layers) else None
        if type(layer) is Linear and layer.b is not None and after is not None and is_known(after) and X.ndim == 2:
            Z = gemm(X, layer.W, B_T=True)
            caches.append({"X": X})
            X = add_bias(Z, layer.b, after)
            caches.append({"X": Z} if needs_sum(after) else {"Z": X})
            next(layers)
        else:
            X, cache = forward(layer, X)
            caches.append(cache)
    return X, caches


class Recording:
    """The graph of one training step for batches of one shape, with all that it works in.

    flat: the optimizer's buffers. books: those of the guard, or `None`. scaling: that of a float16 model's loss, or `None`.
    X and y are like those that batches come from.
    """

    def __init__(self, flat: Flat, books: Books | None, scaling: Scaling | None, X: Array, y: Array, rows: int) -> None:
        self.flat, self.books, self.scaling, self.rows = flat, books, scaling, rows
        self.dtype = flat.W.dtype
        self.pool = cupy.cuda.MemoryPool()
        self.stream = cupy.cuda.Stream(non_blocking=True)
        with self.stream, cupy.cuda.using_allocator(self.pool.malloc):
            self.state = cupy.zeros(_STATE.size // 8, np.int64)
            self.X = cupy.empty((rows, *X.shape[1:]), X.dtype)
            self.y = cupy.empty((rows, *y.shape[1:]), y.dtype)
            self.workspace = workspace()
        self.stage = kernel("stage", _STAGE, self.dtype.char)
        self.packed = bytearray(_STATE.size)
        self.by_value = by_value(self.packed)
        self.graph: Any = None

    def put(
        self, step: TrainingStep, numbers: Sequence[float], X: Array, y: Array, order: Array | None, start: int, loss: Array
    ) -> None:
        """Put on the device what the next launch reads."""
        guard = step.guard
        count, allowed = (step.rows or self.rows, guard.allowed) if guard is not None else (0, 0)
        _STATE.pack_into(
            self.packed, 0, *numbers, X.data.ptr, y.data.ptr, 0 if order is None else order.data.ptr, X.shape[0], start,
            loss.data.ptr, step.number + 1, count, allowed,
        )  # fmt: skip
        self.stage((1,), (32,), (self.state, self.by_value))

    def ask(self, step: TrainingStep) -> tuple[Array, dict[str, Array]]:
        """Ask for the whole step, as the graph has it: the loss and the gradients."""
        there = self.state.data.ptr
        _take(self.state, self.X, False)
        _take(self.state, self.y, True)
        Z, caches = forward(step.model, self.X)
        if step.loss_scale is None:
            value, cache = step.loss.forward(Z, self.y)
            dZ = step.loss.backward(cache)
        else:
            value, dZ = step.loss_scale.scaled(step.loss, Z, self.y)
        _, gradients = step.model.gradients(dZ, caches, needs_dX=False)
        in_order = [gradients[name] for name in self.flat.views]
        where = scale = verdict = None
        if self.scaling is not None and step.loss_scale is not None:
            verdict = judge_scale(self.scaling, step.loss_scale, value, in_order)
            where, scale = verdict.apply, verdict.scale
            if self.books is not None:
                where = enter(self.books, value, verdict, 0, 0, 0, there + _JUDGED_AT)
        elif self.books is not None:
            where = judge(self.books, [value, *in_order], 0, 0, 0, there + _JUDGED_AT)
        update(self.flat, step.optimizer, in_order, (0.0,) * NUMBERS, where, there, scale)
        kernel("deliver", _DELIVER, value.dtype.char)((1,), (32,), (self.state, value))
        return value, gradients

    def record(self, step: TrainingStep) -> tuple[Array, dict[str, Array]]:
        """Run the step once, which compiles all kernels, then record it. What it reads was put there.

        Returns the loss and gradients that each launch leaves, until the next one.
        """
        rehearsal = cupy.cuda.MemoryPool()  # the graph's own is new to it, so that nothing is in pieces there
        with self.stream, cupy.cuda.using_allocator(rehearsal.malloc):
            self.ask(step)
            self.stream.synchronize()
        rehearsal.free_all_blocks()
        collects = gc.isenabled()
        gc.disable()  # what is collected may wait for the device as it goes, which ends a capture
        try:
            with (
                self.stream,
                cupy.cuda.using_allocator(self.pool.malloc),
                capturable(self.stream, self.workspace),
            ):
                # relaxed: memory may be allocated, here and by other threads
                self.stream.begin_capture(cupy.cuda.runtime.streamCaptureModeRelaxed)
                try:
                    left = self.ask(step)
                finally:
                    graph = self.stream.end_capture()
        finally:
            if collects:
                gc.enable()
        self.graph = graph
        return left


@functools.cache
def _sizes(rows: int, columns: int, of_y: bool) -> tuple[int, Any]:
    shift = min(8, (columns - 1).bit_length() if columns else 0)
    return blocks(rows << shift), by_value(struct.pack("qqii", rows, columns, shift, of_y))


def _taker(size: int) -> Any:
    return kernel("take", _TAKE, "f", f"#define E {_ELEMENTS[size]}\n")


def _take(state: Array, out: Array, of_y: bool) -> None:
    grid, sizes = _sizes(out.shape[0], out.size // out.shape[0], of_y)
    _taker(out.dtype.itemsize)((grid,), (THREADS,), (state, out, sizes))


def can_take(x: Array, dtype: Any) -> bool:
    """Whether rows of `x` can be taken inside a graph, as a batch of this dtype or as integers."""
    return x.flags.c_contiguous and (x.dtype == dtype or x.dtype.kind in "iu") and dtype.char in TYPES
