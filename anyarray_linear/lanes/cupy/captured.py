"""The captured step: a whole training step as one launch of a CUDA graph, once it has proved itself.

What is taken: models of this library's own layers and losses, with the options that are known here, its own optimizers,
whole batches of one shape in the model's dtype, on the model's device. The first step with a shape of batch runs eagerly;
the second one is run twice, eagerly and by a new graph, and only if the two agree is the graph launched from then on
(`proof`). What is not taken runs by the portable definition, and `TrainingStep.how` says why. A graph that fails, or is
found to differ, is dropped with a warning, the eager result is kept, and no other is tried. `ANYARRAY_CAPTURE=0` in the
environment turns it off.

What the user changes in between is noticed: numbers (rates, betas, the norm) go to the device at every step; an assigned
parameter is copied in; anything else that a graph has in it (layers, their options, buffers, shapes) makes a new graph.
"""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from ...activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ...arrays.place import Array, Namespace, place_of
from ...arrays.tf32 import in_tf32
from ...binary import BinaryCrossEntropy
from ...binding import Binding, flat_of
from ...guard import Guard
from ...linear import Linear
from ...losses import MeanSquaredError, SoftmaxCrossEntropy
from ...scaling import LossScale
from ...sequential import Sequential
from ...step import TrainingStep, loss_and_gradients, training_step
from . import proof
from .kernels import TYPES
from .recording import Recording, can_take
from .update import is_known, numbers

ON = os.environ.get("ANYARRAY_CAPTURE", "1") != "0"
"""Whether steps are captured."""

MOST = 8
"""Graphs that one `TrainingStep` makes, one after the other, before it takes it that shapes keep changing."""

_LAYERS: dict[type, set[str]] = {
    Sequential: {"layers", "_structure"},
    Linear: {"W", "b", "dW", "db"},
    ReLU: set(), Tanh: set(), Sigmoid: set(), SiLU: set(), GELU: {"approximate"},
}  # fmt: skip
"""The layers that can be captured, with the attributes that are known of them."""
_LOSSES = (SoftmaxCrossEntropy, MeanSquaredError, BinaryCrossEntropy)


class _Batch:
    """What a step is given: a batch, or rows of all data."""

    __slots__ = ("X", "order", "rows", "start", "y")

    def __init__(self, X: Array, y: Array, order: Array | None, start: int, rows: int) -> None:
        self.X, self.y, self.order, self.start, self.rows = X, y, order, start, rows


class Captured:
    """A graph that has proved itself, and what it was made for."""

    def __init__(self, recording: Recording, step: TrainingStep, batch: _Batch) -> None:
        flat = recording.flat
        self.recording, self.flat, self.graph, self.rows = recording, flat, recording.graph, batch.rows
        self.dtype, self.device = flat.W.dtype, flat.W.data.device_id
        self.in_tf32 = _is_in_tf32(flat.W)
        self.X_like = batch.X.dtype, batch.X.shape[1:]
        self.y_like = batch.y.dtype, batch.y.shape[1:]
        self.model, self.loss, self.optimizer, self.guard = step.model, step.loss, step.optimizer, step.guard
        self.loss_scale = step.loss_scale
        self.loss_dtype = self.dtype if step.loss_scale is None else np.dtype(np.float32)
        self.bound = step.optimizer.bound
        self.clips, self.moment_names = step.optimizer.clip_norm is not None, step.optimizer.moment_names
        self.watched = _watched(step)
        assert self.bound is not None
        self.views = [(layer, p, flat.views[name]) for name, (layer, p) in self.bound.slots.items()]
        self._watch_moments(self.bound)
        self.how = _how("captured", flat.W)
        self.stream: Any = None
        self.event = cupy.cuda.Event(disable_timing=True)

    def takes(self, batch: _Batch) -> bool:
        """Whether the graph is for such a batch."""
        X, y, order = batch.X, batch.y, batch.order
        return (
            batch.rows == self.rows and type(y) is cupy.ndarray
            and X.dtype == self.X_like[0] and X.shape[1:] == self.X_like[1] and X.data.device_id == self.device
            and y.dtype == self.y_like[0] and y.shape[1:] == self.y_like[1] and y.data.device_id == self.device
            and X.flags.c_contiguous and y.flags.c_contiguous
            and (order is None or _is_order(order, self.device))
            and batch.start >= 0 and batch.start + batch.rows <= (X if order is None else order).shape[0]
            and y.shape[0] == X.shape[0]
        )  # fmt: skip

    def is_current(self, step: TrainingStep) -> bool:
        """Whether nothing that the graph has in it was changed since; parameters that were assigned are copied in."""
        optimizer = self.optimizer
        if (
            step.model is not self.model or step.loss is not self.loss or step.optimizer is not optimizer
            or step.guard is not self.guard or step.loss_scale is not self.loss_scale
            or step.gradients is not loss_and_gradients
            or _is_in_tf32(self.flat.W) is not self.in_tf32
            or (optimizer.clip_norm is not None) is not self.clips or optimizer.moment_names != self.moment_names
        ):  # fmt: skip
            return False
        for own, name, value in self.watched:
            if own.get(name) is not value:
                return False
        bound = optimizer.bound
        if (
            bound is self.bound
            and bound.flat is self.flat
            and self._is_untouched(bound)
        ):
            return True
        if bound is not self.bound:
            return False
        bound = optimizer.bind(step.model)  # what was assigned fits, or this raises
        optimizer.bound = bound
        if flat_of(cupy, bound, align=256 // self.dtype.itemsize) is not self.flat:
            return False
        bound.remember()
        self.bound = bound
        self._watch_moments(bound)
        return True

    def _watch_moments(self, bound: Binding) -> None:
        self.moments = list(bound.moments.items())
        self.moment_slots = [(own, m) for own in bound.moments.values() for m in bound.kept]
        self.moment_arrays = [own[m] for own, m in self.moment_slots]

    def _is_untouched(self, bound: Binding) -> bool:
        """Whether every parameter and moment is the view of the buffers that it was."""
        for layer, p, view in self.views:
            if getattr(layer, p) is not view:
                return False
        for name, own in self.moments:
            if bound.moments.get(name) is not own:
                return False
        return all(map(operator.is_, [own.get(m) for own, m in self.moment_slots], self.moment_arrays))

    def run(self, step: TrainingStep, batch: _Batch) -> Array:
        """One step, by one launch; the loss."""
        optimizer = self.optimizer
        values = numbers(optimizer, optimizer.scalars(optimizer.learning_rate(), optimizer.steps + 1))
        if self.recording.books is not None and self.guard is not None:
            self.recording.books.adopt(self.guard)
        if self.recording.scaling is not None and self.loss_scale is not None:
            self.recording.scaling.adopt(self.loss_scale)
        stream = cupy.cuda.get_current_stream()
        if stream != self.stream:
            self._go_to(stream)
        loss = cupy.ndarray((), self.loss_dtype)
        self.recording.put(step, values, batch.X, batch.y, batch.order, batch.start, loss)
        self.graph.launch(stream)
        optimizer.steps += 1
        step.how = self.how
        return loss

    def _go_to(self, stream: Any) -> None:
        """From now on work goes to this stream, after what was asked for on the last one."""
        if self.stream is not None:
            self.event.record(self.stream)
            stream.wait_event(self.event)
        self.stream = stream


def _is_in_tf32(x: Array) -> bool:
    """Whether the factors of products of such arrays are rounded to 11 bits."""
    return x.dtype.char == "f" and in_tf32(x.data.device_id)


def _how(way: str, x: Array) -> str:
    """`TrainingStep.how`, for a step with such arrays."""
    return f"{way}; products in TF32" if _is_in_tf32(x) else way


def _is_order(order: Array, device: int) -> bool:
    return (
        type(order) is cupy.ndarray and order.ndim == 1 and order.dtype == np.int64
        and order.flags.c_contiguous and order.data.device_id == device
    )  # fmt: skip


def _watched(step: TrainingStep) -> list[tuple[dict[str, Any], str, Any]]:
    """Whatever a graph has in it of layers and loss besides trained arrays: where it is kept, and what it is."""
    found = [(vars(step.loss), name, value) for name, value in vars(step.loss).items()]
    if step.loss_scale is not None:
        own = vars(step.loss_scale)
        found += [(own, name, own[name]) for name in ("growth", "backoff", "interval", "floor")]
    for layer in _every(step.model):
        own, names = vars(layer), ["trainable"]
        if type(layer) is Sequential:
            names.append("layers")
        elif type(layer) is GELU:
            names.append("approximate")
        elif type(layer) is Linear:  # a frozen layer's arrays are in the graph
            names += ["W", "b"] if not own.get("trainable", True) else ["b"] if layer.b is None else []
        found += [(own, name, own.get(name)) for name in names]
    return found


def _every(model: Any) -> list[Any]:
    """The layers at all positions, depth first, containers included."""
    if type(model) is not Sequential:
        return [model]
    return [model, *(inner for layer in model.layers for inner in _every(layer))]


def why_not(step: TrainingStep, batch: _Batch, weights: Array | None) -> str | None:
    """Why this step cannot be captured; `None` if it can be."""
    X, y = batch.X, batch.y
    for layer in _every(step.model):
        known = _LAYERS.get(type(layer))
        if known is None:
            return f"{type(layer).__name__} is a layer that graphs do not know"
        if unknown := vars(layer).keys() - known - {"trainable"}:
            return f"a {type(layer).__name__} has attributes that graphs do not know: {', '.join(sorted(unknown))}"
    if type(step.loss) not in _LOSSES:
        return f"{type(step.loss).__name__} is a loss that graphs do not know"
    if not all(option is None or (isinstance(option, float) and not option) for option in vars(step.loss).values()):
        return f"{type(step.loss).__name__} has options, or attributes, that graphs do not know"
    if weights is not None:
        return "samples have weights"
    if step.gradients is not loss_and_gradients:
        return "gradients are made in parts, or averaged over ranks"
    if not is_known(step.optimizer):
        return f"{type(step.optimizer).__name__} is a rule that graphs do not know"
    if step.guard is not None and type(step.guard) is not Guard:
        return "the guard is one that graphs do not know"
    place = step.place
    if place.dtype.char not in TYPES:
        return f"the model is {place.dtype_name}"
    if step.loss_scale is not None and type(step.loss_scale) is not LossScale:
        return "the scale of the loss is one that graphs do not know"
    if type(y) is not cupy.ndarray or place_of(X) is not place or y.data.device_id != X.data.device_id:
        return "the batch is not where the model is, or in another dtype"
    if not X.ndim or not y.ndim or not batch.rows or 0 in X.shape or 0 in y.shape:
        return "the batch is a single sample without an axis for it, or empty"
    if not can_take(X, place.dtype) or not can_take(y, place.dtype):
        return "X or y is laid out with gaps, or y is of another dtype"
    if batch.order is not None and not _is_order(batch.order, X.data.device_id):
        return "the order is no row of int64 on the device"
    if batch.start < 0 or batch.start + batch.rows > (X if batch.order is None else batch.order).shape[0]:
        return "the batch is smaller than the others"
    if y.shape[0] != X.shape[0]:
        return "X and y are not of the same rows"
    return None


def _taken(step: TrainingStep, batch: _Batch, weights: Array | None, eagerly: Callable[[], Array]) -> Array:
    """One step: by the graph, where there is one for it; else eagerly, and perhaps by a new graph from the next on."""
    kept = step.kept
    captured: Captured | None = kept.get("captured")
    if captured is not None and weights is None and captured.takes(batch) and ON:
        if captured.is_current(step):
            kept["last"] = None
            return captured.run(step, batch)
        del kept["captured"]
        captured = None
    why = kept.get("failed") if ON else "ANYARRAY_CAPTURE=0 says so"
    why = why or why_not(step, batch, weights)
    if why is None:
        signature = batch.rows, batch.X.shape[1:], batch.X.dtype, batch.y.shape[1:], batch.y.dtype
        seen = kept.setdefault("seen", set())
        is_steady = signature in seen if captured is None else kept.get("last") == signature
        seen.add(signature)
        kept["last"] = signature
        if is_steady and kept.get("graphs", 0) < MOST and proof.is_ready(step):
            return _first(step, batch, eagerly)
        why = (
            f"{MOST} graphs were made already for other kinds of batches" if is_steady and kept.get("graphs", 0) >= MOST
            else "a first step with batches of this shape; after another one it is captured"
        )  # fmt: skip
    value = eagerly()
    step.how = _how(f"portable: {why}", batch.X)
    return value


def _first(step: TrainingStep, batch: _Batch, eagerly: Callable[[], Array]) -> Array:
    """A step both ways, and from then on by the graph if the two agree."""
    kept = step.kept
    kept["graphs"] = kept.get("graphs", 0) + 1
    kept.pop("captured", None)  # its memory, before there is more
    value, recording, why = proof.both_ways(step, batch, eagerly)
    if recording is not None:
        kept["captured"] = Captured(recording, step, batch)
        step.how = kept["captured"].how
        return value
    kept["failed"] = why
    step.how = _how(f"portable: {why}", batch.X)
    warnings.warn(f"training steps are not captured as CUDA graphs: {why}", RuntimeWarning, stacklevel=6)
    return value


def _aligned(x: Array) -> Array:
    """`x` as a graph has it, at an address that cuBLAS reads 16 bytes from at once: elsewhere it sums in another order."""
    return x.copy() if type(x) is cupy.ndarray and x.data.ptr % 16 else x


def step(xp: Namespace, training: TrainingStep, X: Array, y: Array, weights: Array | None) -> Array:
    """A step on a batch."""
    batch = _Batch(X, y, None, 0, X.shape[0] if X.ndim else 0)
    return _taken(training, batch, weights, lambda: training_step(xp, training, _aligned(X), y, weights))


def step_on_rows(
    xp: Namespace,
    training: TrainingStep,
    X: Array,
    y: Array,
    order: Array | None,
    start: int,
    stop: int,
    weights: Array | None,
) -> Array:
    """A step on the rows `order[start:stop]`, which are taken inside the graph."""

    def eagerly() -> Array:
        def rows(x: Array) -> Array:
            return x[start:stop, ...] if order is None else xp.take(x, order[start:stop], axis=0)

        return training_step(xp, training, _aligned(rows(X)), rows(y), None if weights is None else rows(weights))

    return _taken(training, _Batch(X, y, order, start, stop - start), weights, eagerly)
