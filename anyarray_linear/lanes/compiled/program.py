"""A model, a loss and a rule as a table of operations on memory: what the compiled functions work through.

The table is made once for a model and a batch size. Where a product is large it is cut into tiles for the threads, by its
features and never along its sums, so every number is formed in one place and in one order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ...binary import BinaryCrossEntropy
from ...dropout import Dropout, threshold
from ...linear import Linear
from ...losses import MeanSquaredError, SoftmaxCrossEntropy
from ...normalization import LayerNorm
from ...optimizers import SGD, Adam, AdamW
from ...sequential import Sequential
from . import layout as at
from .building import Declined
from .table import CHUNK, Table

Host = np.ndarray[Any, Any]

WORTH_CUTTING = 1 << 20
"""Multiplications in a product from which on it is worth having threads: some 10 us, where handing out a tile costs one."""
WORTH_SHARING = 1 << 17
"""Multiplications from which on a product is cut where threads are at work for a larger one anyway."""
ROWS = 1 << 13
"""Elements of a loss's tile."""
_ACTIVATIONS = {ReLU: at.RELU, Tanh: at.TANH, Sigmoid: at.SIGMOID, SiLU: at.SILU}
_LOSSES = {SoftmaxCrossEntropy: at.IDS, MeanSquaredError: at.SQUARED, BinaryCrossEntropy: at.BINARY}
_SETTINGS = "eps", "rate", "approximate"
_KEEPS_OUTPUT = at.NONE, at.RELU, at.TANH, at.SIGMOID


def layers_of(model: Any) -> list[Any]:
    """The layers of `model` in the order of its computation, a shared one at each of its positions."""
    if type(model) is Sequential:
        return [leaf for layer in model.layers for leaf in layers_of(layer)]
    return [model]


def containers_of(model: Any) -> list[tuple[Sequential, Any]]:
    """Every container in `model`, with its layers."""
    if type(model) is not Sequential:
        return []
    return [(model, model.layers), *(found for layer in model.layers for found in containers_of(layer))]


def settings_of(layers: Sequence[Any]) -> list[tuple[Any, str, Any]]:
    """The numbers of layers that are compiled in, each with its layer and attribute."""
    return [(layer, name, getattr(layer, name)) for layer in layers for name in _SETTINGS if hasattr(layer, name)]


def kind_of(layer: Any) -> int | None:
    """The number of an activation; `None` for what is none."""
    if type(layer) is GELU:
        return at.GELU_TANH if layer.approximate == "tanh" else at.GELU
    return _ACTIVATIONS.get(type(layer))


def takes_all(layers: Sequence[Any]) -> bool:
    """Whether a model of these layers takes the code of all of them, and not only that of `Linear` and `ReLU`."""
    return any(type(layer) not in (Linear, ReLU) for layer in layers)


class Stage(NamedTuple):
    """A layer with parameters and the activation after it, or an activation alone, or a dropout."""

    layer: Any
    """A `Linear` or `LayerNorm`, or none."""
    kind: int
    width: int
    """Features of its input."""
    out: int
    dropout: Any = None


def width_of(layers: Sequence[Any]) -> int:
    """How many features the first of these layers that says so takes; 0 if none does."""
    return next((int(W.shape[-1]) for layer in layers if (W := layer.parameters().get("W")) is not None), 0)


def stages_of(model: Any, width: int, *, training: bool = True) -> list[Stage]:
    """The stages of a model for inputs of so many features; dropouts in training only. Raises `Declined`."""
    stages: list[Stage] = []
    for layer in layers_of(model):
        kind = kind_of(layer)
        if type(layer) in (Linear, LayerNorm):
            out, b = int(layer.W.shape[0]), layer.b
            shapes = ((out, width), (1, out)) if type(layer) is Linear else ((width,), (width,))
            if layer.W.shape != shapes[0] or (b is not None and b.shape != shapes[1]):
                raise Declined("layers that do not fit each other, or of parameters that do not, are not compiled")
            stages.append(Stage(layer, at.NONE, width, out))
            width = out
        elif type(layer) is Dropout:
            if training:
                stages.append(Stage(None, at.NONE, width, width, layer))
        elif kind is None:
            raise Declined(f"{type(layer).__name__} is not compiled")
        elif stages and stages[-1].layer is not None and stages[-1].kind == at.NONE:
            stages[-1] = stages[-1]._replace(kind=kind)
        else:
            stages.append(Stage(None, kind, width, width))
    if not stages:
        raise Declined("a model without layers is not compiled")
    return stages


def rule_of(optimizer: Any) -> int:
    """The number of an optimizer's rule. Raises `Declined`."""
    if type(optimizer) in (Adam, AdamW):
        return at.ADAM
    if type(optimizer) is SGD:
        return at.MOMENTUM if optimizer.momentum else at.PLAIN
    raise Declined(f"the rule {type(optimizer).__name__} is not compiled")


def loss_kind(loss: Any) -> int:
    """The number of a loss with class ids, or with rows for one that has no ids. Raises `Declined`."""
    kind = _LOSSES.get(type(loss))
    if kind is not None:
        return kind
    raise Declined(f"the loss {type(loss).__name__} is not compiled")


def cut(rows: int, columns: int, depth: int, threads: int) -> tuple[int, int]:
    """In how many parts rows and columns of a product are cut: so that least is read, and no part is thin."""
    if threads == 1 or rows * columns * depth < WORTH_SHARING:
        return 1, 1
    best, choice = math.inf, (1, 1)
    for i in range(1, threads + 1):
        j = -(-threads // i)
        if i > max(1, rows // 16) or j > max(1, columns // 32):
            continue
        read = i * columns + j * rows
        if read < best:
            best, choice = read, (i, j)
    return choice


def bits_of(x: float) -> int:
    """The bits of a float64, which is how a table of integers holds one."""
    return int(np.float64(x).view(np.int64))


class Program(Table):
    """A step, or without a `target` the forward pass alone, for batches of `rows` rows.

    target, target_width: the kind of the target, `layout.IDS` and so on, and the numbers that a row of it has. positive: the
    weights of positive labels. gather: whether rows are taken in an order first. looks: whether gradients are looked at, for
    a guard or to clip them. flat, gradients: the buffers of the parameters and moments, and of the gradients.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        dtype: Any,
        threads: int,
        rows: int,
        *,
        target: int | None = None,
        target_width: int = 1,
        positive: Host | None = None,
        gather: bool = False,
        looks: bool = False,
        flat: Any = None,
        gradients: Host | None = None,
        rule: int = at.PLAIN,
    ) -> None:
        super().__init__(dtype, threads)
        self.rows = rows
        self.kept += [flat, gradients, positive]
        self.positive = 0 if positive is None else positive.ctypes.data
        self.zeros = self.array(max(max(stage.width, stage.out) for stage in stages) + 1024, zero=True)
        self._stages, self._target, self._looks = list(stages), target, looks
        largest = max((stage.width * stage.out for stage in stages if stage.layer is not None), default=0)
        self._parts = threads if rows * largest >= WORTH_CUTTING else 1

        self.dropouts: list[Any] = []
        """The dropouts, in the order in which they drop; a shared one at each of its positions."""
        self.keys = np.zeros((max(1, sum(stage.dropout is not None for stage in stages)), 3), np.int64)
        """For each of them what its masks are made of: the seed, the step and the stream."""
        self._keys: dict[int, int] = {}
        self._normalized: dict[int, tuple[int, int]] = {}

        X, ld = 0, stages[0].width
        y = 0
        if gather:
            X = self.array(rows * stages[0].width)
            y = self.array(rows * target_width, np.dtype(np.int64) if target == at.IDS else dtype)
            take = [X, y, rows, stages[0].width, target_width, int(target == at.IDS)]
            chunk = max(1, ROWS // stages[0].width)
            self.add(at.TAKE, -(-rows // chunk), *take, chunk)
        sources, kept = self._forward(X, ld)
        self.output = self._out
        if target is not None:
            self._train(sources, kept, y, flat, gradients, rule)
        self.seal()

    def parameter(self, x: Host) -> int:
        """The address of a parameter."""
        if not x.flags.c_contiguous:
            raise Declined("a parameter that is not contiguous is not compiled")
        self.kept.append(x)
        return x.ctypes.data

    def product(self, rows: int, columns: int, depth: int) -> tuple[int, int]:
        parts = cut(rows, columns, depth, self._parts)
        tile = -(-rows // parts[0]) * -(-columns // parts[1]) * depth
        self.largest, self.work = max(self.largest, tile), self.work + rows * columns * depth
        return parts

    def _forward(self, X: int, ld: int) -> tuple[list[tuple[int, int]], list[int]]:
        """The operations of the forward pass; each stage's input with its row length, and what its activation kept."""
        sources, kept, n = [], [], self.rows
        for i, stage in enumerate(self._stages):
            self.barrier()
            sources.append((X, ld))
            after = self.array(n * stage.out)
            before = after if stage.kind in _KEEPS_OUTPUT else self.array(n * stage.out)
            if type(stage.layer) is LayerNorm:
                training = self._target is not None
                self._normalized[i] = H, R = (self.array(n * stage.out), self.array(n)) if training else (0, 0)
                W, b = self.parameter(stage.layer.W), self.parameter(stage.layer.b)
                tiles, chunk = self.chunks(n, max(1, ROWS // stage.out))
                self.add(at.NORMALIZE, tiles, X, ld, W, b, before, after, H, R, n, stage.out, stage.kind, chunk,
                         bits_of(stage.layer.eps))  # fmt: skip
            elif stage.dropout is not None:
                self.dropouts.append(stage.dropout)
                self._keys[i] = self.keys.ctypes.data + 24 * (len(self.dropouts) - 1)
                self._drop(i, X, after)
            elif stage.layer is not None:
                b = self.zeros if stage.layer.b is None else self.parameter(stage.layer.b)
                parts = self.product(n, stage.out, stage.width)
                W = self.parameter(stage.layer.W)
                self.add(at.FORWARD, parts[0] * parts[1], X, ld, W, b, before, after, n, stage.width, stage.out,
                         stage.kind, *parts)  # fmt: skip
            else:
                tiles, chunk = self.chunks(n * stage.out, ROWS)
                self.add(at.ACTIVATION, tiles, X, before, self.zeros, n * stage.out, stage.kind, chunk, after)
            kept.append(after if stage.kind in _KEEPS_OUTPUT else before)
            X, ld = after, stage.out
        self._out = X
        self.barrier()
        return sources, kept

    def _drop(self, i: int, source: int, target: int) -> None:
        """What a dropout does, forwards and backwards: the mask is made anew each time, which is faster than to read it."""
        stage = self._stages[i]
        tiles, chunk = self.chunks(self.rows * stage.out, ROWS)
        rate = stage.dropout.rate
        self.add(at.DROP, tiles, source, target, self.rows * stage.out, chunk, self._keys[i], threshold(rate),
                 bits_of(1 / (1 - rate)))  # fmt: skip

    def _normalization_gradient(self, i: int, D: int, other: int, kept: int, grads: tuple[int, int, int] | None) -> None:
        """The gradients of a layer normalisation: by its input, into `other` if that is one, and by its parameters."""
        (H, R), stage, n = self._normalized[i], self._stages[i], self.rows
        if other:
            tiles, chunk = self.chunks(n, max(1, ROWS // stage.out))
            W, kind = self.parameter(stage.layer.W), self._stages[i - 1].kind
            self.add(at.NORMALIZE_INPUT_GRADIENT, tiles, D, W, other, kept, H, R, n, stage.out, kind, chunk)
        if grads is not None:
            parts = max(1, min(self.threads, stage.out // 32)) if n * stage.out >= 4 * ROWS else 1
            self.add(at.NORMALIZE_WEIGHT_GRADIENT, parts, D, H, *grads[:2], n, stage.out, grads[2], parts)

    def _train(
        self, sources: list[tuple[int, int]], kept: list[int], y: int, flat: Any, gradients: Any, rule: int
    ) -> None:
        """The operations from the loss to the update."""
        stages, n, target = self._stages, self.rows, self._target
        classes = stages[-1].out
        chunk = max(1, ROWS // classes)
        tiles = -(-n // chunk)
        partial = self.array(tiles, np.dtype(np.float64))
        widest = max(stage.out for stage in stages)
        D, other = self.array(n * widest), self.array(n * widest)
        self.add(at.LOSS, tiles, self._out, D, y, n, classes, int(target or 0), chunk, partial, self.positive)
        self.barrier()
        judge = [partial, tiles, 0, 0, gradients.ctypes.data, gradients.size]
        if not self._looks:
            self.add(at.JUDGE, 1, *judge)

        def trains(layer: Any) -> bool:
            return layer is not None and bool(getattr(layer, "trainable", True))

        first = next(i for i, stage in enumerate(stages) if trains(stage.layer))
        written: set[int] = set()
        masked = False
        for i in range(len(stages) - 1, first - 1, -1):
            stage = stages[i]
            if stage.kind != at.NONE and not masked:
                tiles, chunk = self.chunks(n * stage.out, ROWS)
                self.add(at.ACTIVATION_GRADIENT, tiles, D, kept[i], n * stage.out, stage.kind, chunk)
                self.barrier()
            masked = False
            layer = stage.layer
            if stage.dropout is not None:
                self._drop(i, D, D)
                self.barrier()
            if layer is None:
                continue
            is_linear, masked = type(layer) is Linear, i > first
            if i > first and is_linear:
                kind = stages[i - 1].kind
                parts = self.product(n, stage.width, stage.out)
                W = self.parameter(layer.W)
                self.add(at.INPUT_GRADIENT, parts[0] * parts[1], D, W, other, kept[i - 1], n, stage.width, stage.out,
                         kind, *parts)  # fmt: skip
            grads = None
            if trains(layer):
                def place(p: Any) -> int:
                    return int(p.ctypes.data - flat.W.ctypes.data + gradients.ctypes.data)

                grads = dW, db, more = place(layer.W), 0 if layer.b is None else place(layer.b), int(id(layer) in written)
                written.add(id(layer))
            if grads is not None and is_linear:
                parts = self.product(stage.out, stage.width, n)
                self.add(at.WEIGHT_GRADIENT, parts[0] * parts[1], D, *sources[i], dW, db, n, stage.width, stage.out,
                         more, *parts)  # fmt: skip
            elif not is_linear:
                self._normalization_gradient(i, D, other if i > first else 0, kept[i - 1], grads)
            D, other = other, D
            self.barrier()
        if self._looks:
            tiles, chunk = self.chunks(gradients.size, CHUNK)
            looks = self.array(2 * tiles, np.dtype(np.float64))
            self.add(at.LOOK, tiles, gradients.ctypes.data, gradients.size, chunk, looks)
            self.barrier()
            judge[2:4] = looks, tiles
            self.add(at.JUDGE, 1, *judge)
            self.barrier()
        tiles, chunk = self.chunks(flat.W.size, CHUNK)
        moments = [moment.ctypes.data for moment in flat.moments] + [0, 0]
        self.kept.append(flat.moments)
        self.add(at.UPDATE, tiles, flat.W.ctypes.data, gradients.ctypes.data, *moments[:2], flat.W.size, rule, chunk)
