"""One training step: forward, loss, backward, guard and update, as one operation.

`training_step` says what a step is. A lane may replace it whole: compiled for NumPy, captured as a CUDA graph for CuPy. What
a lane cannot take, it hands to the definition here, and `TrainingStep.how` says so and why.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .arrays.checks import check_array
from .arrays.operations import lanes_are_on
from .arrays.place import NOWHERE, Array, Namespace, Place, is_array, place_of
from .guard import Guard
from .losses import Loss
from .protocol import Layer, Optimizer, check_loss, check_model, check_optimizer, leaves, parameters, state_of
from .scaling import LossScale, is_half

Gradients = dict[str, Array]


def loss_and_gradients(
    model: Any, loss: Any, X: Array, y: Array, weights: Array | None, scale: LossScale | None = None
) -> tuple[Array, Gradients]:
    """The loss of a batch, a 0-d array, and its gradient by every parameter; with a scale, gradients are so much larger."""
    Z, caches = model.forward(X)
    if scale is None:
        value, cache = loss.forward(Z, y) if weights is None else loss.forward(Z, y, weights)
        dZ = loss.backward(cache)
    else:
        value, dZ = scale.scaled(loss, Z, y, weights)
    _, gradients = model.gradients(dZ, caches, needs_dX=False)
    return value, gradients


def training_step(xp: Namespace, step: TrainingStep, X: Array, y: Array, weights: Array | None) -> Array:
    """The definition of a step: loss and gradients, whether they may be applied, and the update; returns the loss."""
    scale = step.loss_scale
    kept = [] if step.guard is None and scale is None else _array_states(step.model)
    # what is only for float16 is only handed on there: a guard or optimizer of the user's own need not know it
    scaled: tuple[Any, ...] = () if scale is None else (scale,)
    value, gradients = step.gradients(step.model, step.loss, X, y, weights, *scaled)
    where, how = None, {}
    step.whole = False
    if scale is not None:
        verdict = scale.judge(value, gradients.values())
        where, how, scaled = verdict.apply, {"scale": verdict.scale}, (verdict,)
    if step.guard is not None:
        where = step.guard.judge(step.number + 1, value, gradients.values(), step.rows or X.shape[0], *scaled)
    step.optimizer.step(step.model, gradients, where=where, **how)
    if where is not None:
        for layer, s, before in kept:  # what is called off changes no running mean either
            now = getattr(layer, s)
            if now is not before:
                with place_of(now).entered() as here:
                    setattr(layer, s, here.where(where, now, before))
    step.whole = True
    return value


def _array_states(model: Any) -> list[tuple[Any, str, Array]]:
    """The layer, attribute and array of each state that is an array."""
    return [(layer, s, x) for _, layer in leaves(model) for s, x in state_of(layer).items() if is_array(x)]


def training_step_on_rows(
    xp: Namespace, step: TrainingStep, X: Array, y: Array, order: Array | None, start: int, stop: int, weights: Array | None
) -> Array:
    """A step on the rows `order[start:stop]` of `X`, `y` and `weights`; without `order`, on `X[start:stop]`."""

    def rows(x: Array) -> Array:
        return x[start:stop, ...] if order is None else xp.take(x, order[start:stop], axis=0)

    return place_of(X).run(training_step, step, rows(X), rows(y), None if weights is None else rows(weights))


class TrainingStep:
    """A whole training step as one operation: `step(X, y)` trains `model` once and returns the loss from before the update.

    model, loss, optimizer: as for a loop written by hand, which does the same in five lines. An optimizer belongs to the
    first model it steps. loss_scale: how a float16 model's gradients are scaled; a new `LossScale()` by default. Models of
    other dtypes need none and have none.

    `how` says by what the last step ran: `"portable"`, `"compiled"` or `"captured"`, and why by nothing faster.

    Raises `TypeError` for a model without parameters, and for a `loss_scale` that is none.

    >>> import numpy as np
    >>> from anyarray_linear import SGD, Linear, MeanSquaredError
    >>> X = np.linspace(-1, 1, 8).reshape(-1, 1)
    >>> step = TrainingStep(Linear(1, 1, seed=0), MeanSquaredError(), SGD(0.5))
    >>> losses = [float(step(X, 3 * X + 1)) for _ in range(50)]
    >>> losses[0] > 1, losses[-1] < 1e-6
    (True, True)
    """

    def __init__(
        self,
        model: Layer,
        loss: Loss,
        optimizer: Optimizer,
        *,
        guard: Guard | None = None,
        gradients: Callable[..., tuple[Array, Gradients]] = loss_and_gradients,
        loss_scale: LossScale | None = None,
    ) -> None:
        check_model(model)
        check_loss(loss)
        check_optimizer(optimizer)
        if not parameters(model):
            raise TypeError(f"model is {model!r:.80}, which has no parameters to train")
        if loss_scale is not None and not isinstance(loss_scale, LossScale):
            raise TypeError(f"loss_scale is {loss_scale!r:.60}; give a LossScale, such as LossScale(2.0**10), or None")
        self.model: Any = model  # lanes look for what theirs have besides
        self.loss: Any = loss
        self.optimizer: Any = optimizer
        self.guard, self.gradients = guard, gradients
        half = is_half(next(iter(parameters(model).values())))
        self.loss_scale = (LossScale() if loss_scale is None else loss_scale) if half else None
        """What scales the gradients of a float16 model; `None` for others."""
        self.number = 0
        """How many steps were taken; a guard counts by it."""
        self.rows: int | None = None
        """How many rows the batch counts for, where that is not what the step is given: a rank's share of it."""
        self.whole = True
        """Whether model, optimizer and guard agree: not while an update is under way, which an interrupt may cut in half."""
        self.how = "portable"
        self.kept: dict[str, Any] = {}
        """A lane's own: buffers, a graph, compiled code."""

    @property
    def place(self) -> Place:
        """Where the model is, and in what dtype."""
        return place_of(next(iter(parameters(self.model).values())))

    def __call__(self, X: Array, y: Array, weights: Array | None = None) -> Array:
        """Train once on a batch and return its loss, a 0-d array on the model's device that the caller may keep.

        The loss of a float16 model is float32.

        X: `(..., in_features)`, of the model's namespace, device and dtype. y: what the loss takes. weights: one per sample.

        Raises `TypeError` or `ValueError`, before anything is changed, for what does not fit.
        """
        place = place_of(X)
        if place is NOWHERE:
            check_array("X", X)
        self._how_without_lanes()
        value = place.run(training_step, self, X, y, weights)
        self.number += 1
        return value

    def on_rows(
        self, X: Array, y: Array, order: Array | None, start: int, stop: int, weights: Array | None = None
    ) -> Array:
        """As `step(X[order[start:stop]], y[order[start:stop]])`, where a lane may gather the rows itself.

        X, y, weights: all samples, where the model is. order: integers on the same device, or `None`: rows as they come.
        """
        self._how_without_lanes()
        value = place_of(X).run(training_step_on_rows, self, X, y, order, start, stop, weights)
        self.number += 1
        return value

    def _how_without_lanes(self) -> None:
        if not lanes_are_on.get():
            self.how = "portable: lanes are switched off"

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "kept": {}}

    def __repr__(self) -> str:
        return f"TrainingStep({self.model!r}, {self.loss!r}, {self.optimizer!r})"
