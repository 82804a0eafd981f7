"""The compiled forward pass, for `predict`, `evaluate` and validation: taken where it is faster than NumPy's, and pays.

Products take as long either way, as they are the same BLAS's. What is faster is what NumPy does in many passes over memory:
most activations, and layer normalisation. So what would be saved is known beforehand, from sizes alone, and equal calls have
equal bits. It has to be worth loading the code, and more where that is not compiled yet.
"""

from __future__ import annotations

import ctypes
from struct import Struct
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np

from ...arrays.place import Array, Namespace
from ...normalization import LayerNorm
from ...protocol import outputs
from ...sequential import Sequential
from ...step import TrainingStep
from . import layout as at
from .building import Declined, is_at_hand
from .program import Host, Program, Stage, containers_of, layers_of, settings_of, stages_of, takes_all, width_of
from .running import Runner, name_of
from .steps import plan_for

SAVED = {at.SIGMOID: 5e-9, at.SILU: 5e-9, at.GELU_TANH: 1e-9, at.GELU: 30e-9}
"""Seconds per element that an activation takes less than in NumPy, on one core: of the least that was measured, in float32
and float64. ReLU and tanh are as fast there."""
NORM = 3e-9
"""As much for layer normalisation."""
AT_RISK = 1e-12
"""Seconds per multiplication that a product may take longer, some twentieth of its time."""
LOADING = 0.1
"""Seconds that have to be saved in all: some three times what loading the code takes."""
COMPILING = 10.0
"""As many, where the code has to be compiled first, for two to seven seconds."""
_KEPT = 2
"""Numbers of rows for which programs are kept: a batch, and the last one of the data."""
_LARGE = 1 << 26
"""Bytes from which on they are not."""

_put_arrays = cast(Any, Struct("6q")).pack_into


class Forward:
    """The programs of one model. Raises `Declined` where there is none."""

    def __init__(self, model: Any) -> None:
        self.layers, self.inner = model.layers, [found for layer in model.layers for found in containers_of(layer)]
        layers = layers_of(model)
        self.watched = [(layer, layer.W, layer.b) for layer in layers if layer.parameters() and hasattr(layer, "b")]
        self.settings = settings_of(layers)
        self.width = width_of(layers)
        self.whole = takes_all(layers)
        self.stages = stages_of(model, self.width, training=False)
        parameters = [W for layer in layers for W in layer.parameters().values()]
        if not parameters:
            raise Declined("a model without parameters is not compiled")
        self.dtype = parameters[0].dtype
        if not all(type(W) is np.ndarray and W.dtype == self.dtype and W.flags.aligned for W in parameters):
            raise Declined("layers of several dtypes are not compiled")
        if self.dtype.name not in ("float32", "float64") or not self.dtype.isnative:
            raise Declined(f"{self.dtype} is not compiled")
        self.saved = sum(map(_saved, self.stages))
        """Seconds in a row."""
        self.runner: Runner | None = None
        self.idle: dict[int, list[Program]] = {}
        """By the number of rows, programs that no thread is at."""

    def still_holds(self, model: Any) -> bool:
        """Whether the model is what this was made for."""
        if model.layers is not self.layers or any(container.layers is not layers for container, layers in self.inner):
            return False
        if any(getattr(layer, name) != value for layer, name, value in self.settings):
            return False
        return all(layer.W is W and layer.b is b for layer, W, b in self.watched)

    def pays(self, xp: Namespace, saved: float, step: TrainingStep | None) -> bool:
        """Whether it is worth it. In a training it is as soon as its steps are compiled, whatever the model: after products
        of NumPy's own, the threads of OpenBLAS would spin on the cores that the next steps are for. It goes by nothing else,
        since a training that goes on from a file is to have the bits of one that never stopped."""
        if step is not None:
            return plan_for(xp, step) is not None
        return saved >= COMPILING or is_at_hand(name_of(self.dtype, self.whole))

    def __call__(self, X: Host) -> Host:
        """`Z`, a new array."""
        if self.runner is None:
            self.runner = Runner(self.dtype, whole=self.whole)
        shape, size = (*X.shape[:-1], self.stages[-1].out), X.itemsize
        X = X.reshape(-1, self.width)
        apart, rest = divmod(X.strides[0], size)
        if X.strides[1] != size or rest or apart < self.width or self.stages[0].layer is None or not X.flags.aligned:
            X, apart = np.ascontiguousarray(X) if X.flags.aligned else X.copy(), self.width
        if len(self.idle) >= _KEPT and len(X) not in self.idle:
            self.idle = {}
        idle = self.idle.setdefault(len(X), [])
        try:
            program = idle.pop()
        except IndexError:  # the first, or other threads have them all
            program = Program(self.stages, self.dtype, self.runner.threads, len(X))
            self.runner.prepare(program)
        _put_arrays(program.control, 8 * at.X, id(X), apart, 0, 0, 0, len(X))
        self.runner.run(program)
        Z = np.empty(shape, self.dtype)
        ctypes.memmove(Z.ctypes.data, program.output, Z.nbytes)
        if len(X) * sum(stage.out for stage in self.stages) * size < _LARGE:
            idle.append(program)
        return Z


def _saved(stage: Stage) -> float:
    """Seconds that a row of a stage takes less."""
    if type(stage.layer) is LayerNorm:
        return float(stage.out * (SAVED.get(stage.kind, 0.0) + NORM))
    products = 0 if stage.layer is None else stage.width * stage.out
    return float(stage.out * SAVED.get(stage.kind, 0.0) - products * AT_RISK)


_forwards: WeakKeyDictionary[Sequential, Forward | None] = WeakKeyDictionary()  # no value refers to its key


def _forward_of(model: Sequential) -> Forward | None:
    """The programs of a model as it is now; `None` where it is not one that is compiled."""
    forward = _forwards.get(model)
    if forward is None or not forward.still_holds(model):
        try:
            forward = _forwards[model] = Forward(model)
        except Declined:
            forward = None
    return forward


def compiled_outputs(xp: Namespace, model: Any, X: Array, rows: float, step: TrainingStep | None = None) -> Array:
    """`outputs`, compiled."""
    if type(model) is Sequential and type(X) is np.ndarray and X.ndim and X.size:
        forward = _forwards.get(model) or _forward_of(model)
        if forward is not None and X.shape[-1] == forward.width:
            saved = forward.saved * rows * (X.size // (X.shape[0] * forward.width))  # with more axes, a row is several
            if saved >= LOADING or step is not None:  # else it need not be looked at any closer
                forward = _forward_of(model)
                if forward is not None and X.dtype == forward.dtype and forward.pays(xp, saved, step):
                    try:
                        return forward(X)
                    except Declined:
                        forward.saved = 0.0
    return outputs(xp, model, X, rows, step)
