"""The compiled step: when it is taken, what is checked before each one, and what is handed to the portable definition."""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager, nullcontext
from struct import Struct
from typing import Any, cast

import numpy as np

from ...arrays.place import Array, Namespace
from ...averages import shares, weights_of_rows
from ...binding import flat_of
from ...dropout import count_pass
from ...guard import Guard
from ...optimizers import Rule
from ...protocol import trained
from ...step import TrainingStep, loss_and_gradients, training_step, training_step_on_rows
from . import layout as at
from .blas import numpy_alone
from .building import Declined
from .program import (
    Host,
    Program,
    Stage,
    containers_of,
    layers_of,
    loss_kind,
    rule_of,
    settings_of,
    stages_of,
    takes_all,
    width_of,
)
from .running import Runner, put_rule

PATIENCE = 100
"""Steps that a small model takes before code is compiled or loaded for it, a large one fewer. Counted by the optimizer, so
that a training that goes on from a file has the bits of one that never stopped."""
_LARGE = 20_000
_ALONE = 1 << 21
"""Rows times weights of the steps before it that NumPy takes without BLAS threads: a second one would save less than 0.1 ms
a step, and where other programs have the cores, each product would wait for it, 10 to 40 ms (`benchmarks.estimators`)."""
_KEPT = 4
"""Programs kept, for as many batch sizes and kinds of target."""

_CALLED = "forward", "gradients", "backward", "step", "update"
"""What a step calls of layers, loss and optimizer; to watch one, say, people put a function of their own in its place."""

_WORDS = (1 << 64) - 1
_INT64 = np.dtype(np.int64)
_put_arrays, _put_key = (cast(Any, Struct(form)).pack_into for form in ("6q", "QQq"))


class Plan:
    """All that is kept for one step between its calls: buffers and programs."""

    def __init__(self, xp: Namespace, step: TrainingStep) -> None:
        model, optimizer = step.model, step.optimizer
        self.model, self.loss, self.guard = model, step.loss, step.guard
        self.rule, self.loss_kind = rule_of(optimizer), loss_kind(step.loss)
        self.bound = optimizer.bind(model)
        self.flat = flat_of(xp, self.bound)
        self.dtype = self.flat.W.dtype
        if self.dtype.name not in ("float32", "float64") or not self.dtype.isnative:
            raise Declined(f"{self.dtype.name} is not compiled")
        self.positive = getattr(step.loss, "positive_weights", None)
        self.layers = layers_of(model)
        thawed = {id(layer) for _, layer in self.bound.leaves}
        if not any(layer.parameters() and id(layer) in thawed for layer in self.layers):
            raise Declined("a model without trained parameters is not compiled")
        self.width = width_of(self.layers)
        self.stages: list[Stage] = stages_of(model, self.width)
        parts = *self.layers, *(container for container, _ in containers_of(model)), step.loss, optimizer
        for own, name in itertools.product(parts, _CALLED):
            if callable(vars(own).get(name)):
                raise Declined(f"what was assigned to {type(own).__name__}.{name} is not compiled")
        self.frozen = {id(layer) for layer in self.layers} - thawed
        arrays = [W for layer in self.layers for W in layer.parameters().values()]
        if any(W.dtype != self.dtype for W in arrays):
            raise Declined("layers of several dtypes are not compiled")
        if not all(W.flags.c_contiguous for W in arrays):  # a frozen one; of the others there are copies
            raise Declined("a parameter that is not contiguous is not compiled")
        self.out = self.stages[-1].out
        if self.positive is not None and len(self.positive) != self.out:
            raise Declined("weights of labels that are not as many as the outputs are not compiled")
        self.watch(step)
        self.runner = Runner(self.dtype, whole=takes_all(self.layers))
        self.gradients = np.zeros(self.flat.W.size, self.dtype)
        self.programs: dict[Any, Program] = {}

    def still_holds(self, xp: Namespace, step: TrainingStep) -> bool:
        """Whether model, optimizer and loss are what this was made for; parameters that were assigned are copied in."""
        if self.is_as_left(step):
            return True
        if not self.is_of(step):
            return False
        bound = step.optimizer.bind(step.model)
        if flat_of(xp, bound) is not self.flat or bound.leaves != self.bound.leaves:
            return False
        if layers_of(step.model) != self.layers or not self.is_set_as_before():
            return False
        if rule_of(step.optimizer) != self.rule or getattr(step.loss, "positive_weights", None) != self.positive:
            return False
        if any(layer.W is not W or layer.b is not b for layer, W, b, _ in self.watched if id(layer) in self.frozen):
            return False
        self.bound = bound
        self.watch(step)
        return True

    def is_of(self, step: TrainingStep) -> bool:
        """Whether the step has the parts still that this was made of, whatever was assigned in them."""
        return (
            step.model is self.model and step.loss is self.loss and step.guard is self.guard
            and step.gradients is loss_and_gradients
        )  # fmt: skip

    def watch(self, step: TrainingStep) -> None:
        """What is looked at before each step."""
        self.watched = [
            (layer, layer.W, layer.b, getattr(layer, "trainable", True)) for layer in self.layers if layer.parameters()
        ]
        self.moments = {name: dict(own) for name, own in self.bound.moments.items()}
        self.settings = settings_of(self.layers)
        self.containers = containers_of(step.model)

    def is_as_left(self, step: TrainingStep) -> bool:
        """Whether nothing was assigned since: a glance at every attribute that matters."""
        if not self.is_of(step):
            return False
        optimizer = step.optimizer
        if optimizer.bound is not self.bound or optimizer.moment_names != self.bound.moment_names:
            return False
        if getattr(step.loss, "positive_weights", None) is not self.positive:
            return False
        try:
            if self.bound.moments != self.moments:  # which looks whether they are the same arrays, and faster than a loop
                return False
        except (RuntimeError, TypeError, ValueError):  # of arrays that are not, it asks which elements are equal
            return False
        for container, layers in self.containers:
            if container.layers is not layers:
                return False
        for layer, W, b, trainable in self.watched:
            if layer.W is not W or layer.b is not b or getattr(layer, "trainable", True) is not trainable:
                return False
        return self.is_set_as_before()

    def is_set_as_before(self) -> bool:
        """Whether all numbers of layers that are compiled in are what they were."""
        return not self.settings or all(getattr(layer, name) == value for layer, name, value in self.settings)

    def take(
        self, xp: Namespace, step: TrainingStep, X: Host, y: Host, weights: Host | None, order: Host | None, rows: int
    ) -> Array | None:
        """The loss of a step, which is done; `None` where the portable definition has to say what is wrong, or is needed."""
        if rows == 0:
            return None
        flat = X.ndim == 2
        shape = (len(X), self.out) if flat else (*X.shape[:-1], self.out)  # of Z; with an order, of all rows
        counts = None
        if weights is None and (self.loss_kind != at.IDS or step.loss.is_plain):
            kind, target = self._target(shape, y)
            factor = 1 / (rows if self.loss_kind == at.IDS else rows * self.out)
        else:
            kind, target, counts, factor = self._weighted(xp, step.loss, shape, y, weights)
        if target is None:
            return None
        optimizer, guard = step.optimizer, step.guard
        clip = optimizer.clip_norm
        looks = guard is not None or clip is not None
        key = rows, kind, order is not None, looks
        program = self.programs.get(key)
        if program is None:
            while len(self.programs) >= _KEPT:
                del self.programs[next(iter(self.programs))]
            width = 1 if kind == at.IDS else self.out
            program = self.programs[key] = Program(
                self.stages, self.dtype, self.runner.threads, rows, target=kind, target_width=width,
                positive=None if self.positive is None else np.asarray(self.positive, self.dtype),
                gather=order is not None, looks=looks, flat=self.flat, gradients=self.gradients, rule=self.rule,
            )  # fmt: skip
            self.runner.prepare(program)
        numbers = program.numbers
        by = optimizer.scalars(optimizer.learning_rate(), optimizer.steps + 1)
        put_rule(numbers, by)
        if looks:
            numbers[at.CLIP : at.CLOSED + 1] = clip or 0.0, guard is not None, guard is not None and guard.fatal != 0
        if not flat:
            X = X.reshape(-1, self.width)
        apart = self.width
        if not X.flags.c_contiguous:
            apart, rest = divmod(X.strides[0], X.itemsize)
            if X.strides[1] != X.itemsize or rest or apart < self.width or self.stages[0].layer is None:
                X, apart = np.ascontiguousarray(X), self.width  # a product takes rows that are apart, an activation does not
        order_id, counts_id = 0 if order is None else id(order), 0 if counts is None else id(counts)
        _put_arrays(program.control, 8 * at.X, id(X), apart, id(target), order_id, counts_id, len(X))
        numbers[at.FACTOR] = factor
        for place, layer in enumerate(program.dropouts):
            _put_key(program.keys, 24 * place, layer.seed & _WORDS, count_pass(layer) & _WORDS, layer.stream)
        step.whole = False
        helpers = self.runner.run(program)
        if program.control[at.FLAGS]:
            for layer in program.dropouts:  # the definition will count these passes itself
                count_pass(layer, -1)
            step.whole = True
            return None
        value = numbers.item(at.VALUE)
        if guard is not None:
            guard.decide(step.number + 1, value, numbers[at.FINITE] == 1.0, step.rows or rows)
        if optimizer.bound is self.bound:  # updated in place: nothing was assigned
            optimizer.steps += 1
        else:
            optimizer.stepped(step.model, self.bound)
        step.whole = True
        step.how = self.runner.told[helpers]
        return np.asarray(value, self.dtype)

    def gathers(self, step: TrainingStep) -> bool:
        """Whether compiled code can take the rows of the target itself."""
        return self.loss_kind != at.IDS or bool(step.loss.is_plain)

    def _target(self, shape: tuple[int, ...], y: Host) -> tuple[int, Host | None]:
        """The kind of target and `y` as compiled code takes it; `None` where it does not fit an output of that shape."""
        if type(y) is not np.ndarray or not y.dtype.isnative:
            return 0, None
        if self.loss_kind == at.IDS:
            if y.dtype is _INT64 and y.shape == shape[:-1] and y.flags.c_contiguous:
                return at.IDS, y
            if y.dtype.kind in "iu" and y.shape == shape[:-1]:
                return at.IDS, np.ascontiguousarray(y, np.int64)
            if y.shape == shape and (y.dtype == self.dtype or y.dtype.kind in "iu"):
                return at.ROWS, np.ascontiguousarray(y, self.dtype)
            return 0, None
        column = len(shape) == 2 and shape[1] == 1 and y.shape == shape[:1]
        if (y.dtype == self.dtype or y.dtype.kind in "biu") and (y.shape == shape or column):
            return self.loss_kind, np.ascontiguousarray(y, self.dtype)
        return 0, None

    def _weighted(
        self, xp: Namespace, loss: Any, shape: tuple[int, ...], y: Host, weights: Host | None
    ) -> tuple[int, Host | None, Host | None, float]:
        """As `_target`, where not all count alike; also how much each row counts, or if `None` the factor of all."""
        kind, target = self._target(shape, y)
        if target is None or (weights is not None and (type(weights) is not np.ndarray or weights.dtype != self.dtype)):
            return 0, None, None, 0.0
        Z = np.broadcast_to(self.dtype.type(0), shape)  # its shape and dtype are all that matters
        if self.loss_kind != at.IDS:
            V = shares(xp, Z, weights_of_rows(Z, weights, Z.ndim))
            if V.shape[-1] != 1:  # a weight for each element
                return 0, None, None, 0.0
            return kind, target, np.ascontiguousarray(np.broadcast_to(V, (*shape[:-1], 1))), 0.0
        if kind == at.IDS:
            loss.check_ids(y, self.out, loss.ignore_id)
        elif loss.ignore_id is not None:
            return 0, None, None, 0.0
        V, S = loss.targets(Z, y, weights)
        return at.ROWS, np.ascontiguousarray(V, self.dtype), None, 1 / float(S) if S else math.nan


def patience(step: TrainingStep) -> int:
    """How many steps are taken by the portable definition first."""
    return max(2, PATIENCE // (1 + _size(step) // _LARGE))


def _size(step: TrainingStep) -> int:
    """How many numbers are trained."""
    bound = getattr(step.optimizer, "bound", None)  # none before a first step, which may be that of a training that goes on
    found = bound.parameters if bound else [W for _, layer in trained(step.model) for W in layer.parameters().values()]
    return sum(math.prod(W.shape) for W in found)


def _meanwhile(step: TrainingStep, rows: int) -> AbstractContextManager[None]:
    """What a portable step is taken in: without BLAS threads, if it is one before code is loaded, and small."""
    is_early = "plan" not in step.kept and "portable" not in step.kept
    return numpy_alone() if is_early and 0 < rows * _size(step) < _ALONE else nullcontext()


def plan_for(xp: Namespace, step: TrainingStep) -> Plan | None:
    """The plan of a step; `None` where the portable definition is taken, and `step.how` says why."""
    plan = step.kept.get("plan")
    if plan is None:
        if "portable" in step.kept:  # it was said why
            step.how = step.kept["portable"]
            return None
        if isinstance(step.optimizer, Rule) and step.optimizer.steps < patience(step):  # another is never compiled
            step.how = "portable: compiled code is for steps that are many, and is loaded after the first ones"
            return None
    elif plan.still_holds(xp, step):
        return plan  # type: ignore[no-any-return]
    try:
        if step.gradients is not loss_and_gradients:
            raise Declined("gradients of one's own, of a group or of microbatches, are not compiled")
        if step.guard is not None and type(step.guard) is not Guard:
            raise Declined("a guard of one's own is not compiled")
        plan = step.kept["plan"] = Plan(xp, step)
    except Declined as reason:
        step.how = step.kept["portable"] = f"portable: {reason}"
        return None
    return plan


def _fits(plan: Plan, X: Array) -> bool:
    return type(X) is np.ndarray and X.dtype == plan.dtype and X.ndim > 0 and X.shape[-1] == plan.width


def compiled_step(xp: Namespace, step: TrainingStep, X: Array, y: Array, weights: Array | None) -> Array:
    """`training_step`, compiled."""
    plan = plan_for(xp, step)
    if plan is not None:
        if _fits(plan, X):
            value = plan.take(xp, step, X, y, weights, None, X.size // plan.width)
            if value is not None:
                return value
        step.how = "portable: this batch is not one that is compiled"
    with _meanwhile(step, math.prod(X.shape[:-1])):
        return training_step(xp, step, X, y, weights)


def compiled_step_on_rows(
    xp: Namespace, step: TrainingStep, X: Array, y: Array, order: Array | None, start: int, stop: int, weights: Array | None
) -> Array:
    """`training_step_on_rows`, compiled: the rows are gathered by it too."""
    if order is None or weights is not None:
        return training_step_on_rows(xp, step, X, y, order, start, stop, weights)
    plan = plan_for(xp, step)
    if plan is not None and plan.gathers(step) and _fits(plan, X) and X.ndim == 2 and X.flags.c_contiguous:
        part = order[start:stop]
        wanted = np.int64 if plan.loss_kind == at.IDS and y.ndim == 1 else plan.dtype
        fits = y.dtype == wanted and y.flags.c_contiguous and len(X) == len(y)
        if fits and part.dtype == np.int64 and part.flags.c_contiguous:
            value = plan.take(xp, step, X, y, None, part, len(part))
            if value is not None:
                return value
    with _meanwhile(step, stop - start):
        return training_step_on_rows(xp, step, X, y, order, start, stop, weights)
