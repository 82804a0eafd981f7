"""From the options of `train` to data, model, loss and optimizer; and the scaling of the data, which the model takes in."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ..arrays.device import Device
from ..arrays.selection import select_device
from ..datasets import Reading
from ..distributed.group import Group
from ..linear import Linear
from ..losses import MeanSquaredError, SoftmaxCrossEntropy
from ..optimizers import SGD, Adam, AdamW
from ..schedules import cosine, linear_warmup, step_decay
from ..sequential import Sequential
from ._common import bad
from ._data import Scaling, read, rows_of_parts, scaling_of

Host = np.ndarray[Any, Any]

LR = {"sgd": 0.05, "adam": 2e-3, "adamw": 2e-3}
_ACTIVATIONS: dict[str, Callable[[], Any]] = {"relu": ReLU, "silu": SiLU, "gelu": GELU, "tanh": Tanh, "sigmoid": Sigmoid}


class RawSquaredError(MeanSquaredError):
    """The squared error of a scaled target, told in the raw target's units; the gradient stays that of the scaled one."""

    def __init__(self, unit: float) -> None:
        self.unit = unit

    def forward(self, Z: Any, target: Any, weights: Any = None) -> tuple[Any, dict[str, Any]]:
        loss, cache = super().forward(Z, target, weights)
        return loss * self.unit**2, cache

    def scores(self, parts: Any, rows: Any) -> dict[str, float]:
        return {name: x if name == "r2" else x * self.unit for name, x in super().scores(parts, rows).items()}


@dataclasses.dataclass
class Run:
    """What is trained on what, and how."""

    model: Sequential
    parts: dict[str, tuple[Host, Host]]
    """Raw `(X, y)` on the host: `train`, and `validation` and `test` where they were asked for."""
    rows: dict[str, Host]
    """Which samples of the data each part has, counted from 0."""
    loss: Any
    optimizer: Any
    device: Device
    classes: tuple[str, ...] | None
    features: tuple[str, ...] | None
    x_scaling: Scaling | None
    y_scaling: Scaling | None
    is_digits: bool
    reading: Reading

    def scaled(self, name: str) -> tuple[Host, Host]:
        """A part as the model sees it in training."""
        X, y = self.parts[name]
        return self.x_scaling(X) if self.x_scaling else X, self.y_scaling(y) if self.y_scaling else y

    def for_raw_data(self) -> Sequential:
        """The trained model with the scaling in it.

        A layer on scaled features is a layer on raw ones, `((X - m) s) W^T + b = X (W s)^T + (b - m (W s)^T)`, and scaling
        the last layer's outputs back is one too. Computed in float64 on the host.
        """
        if self.x_scaling is None:
            return self.model
        model = self.model.to("cpu", "float64")
        first, last = _ends(model)
        first.W = first.W * self.x_scaling.factor
        first.b = first.b - self.x_scaling.shift @ first.W.T
        if self.y_scaling is not None:
            last.W, last.b = last.W / self.y_scaling.factor, last.b / self.y_scaling.factor + self.y_scaling.shift
        return model.to(self.device, _ends(self.model)[0].dtype)


def _ends(model: Sequential) -> tuple[Any, Any]:
    return model[0], model[-1]


def prepare(options: Any, group: Group | None = None) -> Run:
    """Everything that training needs; what is wrong with the options or the data raises here."""
    group = Group() if group is None else group
    sizes = _sizes(options.hidden)
    for name in ("test", "validation"):
        if not 0 <= getattr(options, name) < 1:
            raise bad(name, f"{getattr(options, name)} is no fraction of the samples; give one from 0 to below 1")
    if options.early_stopping is not None and options.validation == 0:
        raise bad("early_stopping", "it watches the loss on validation, and --validation is 0; give a fraction, such as 0.1")
    device = group.device(options.device)
    dtype = device.dtype(options.dtype)
    if options.tf32:
        if options.dtype != "float32":
            raise bad("tf32", f"it is for float32 products, and --dtype is {options.dtype}; leave one of them out")
        select_device(device, tf32=True)
    _optimizer(options, steps_per_epoch=1)  # its numbers are checked before the data is read

    reading = read(options, quiet=group.rank > 0)
    X, y, classes, features = reading.data
    rows = rows_of_parts(y, options)
    parts = {name: (X[of_part], y[of_part]) for name, of_part in rows.items()}
    X, y = parts["train"]
    x_scaling = y_scaling = None
    unit = 1.0
    if options.data is not None and options.standardize:
        x_scaling = scaling_of(X, options, features)
        if classes is None:
            # one unit for all targets, so that the loss is the raw one but for a factor
            shift = scaling_of(y, options, None, is_target=True).shift
            unit = float(np.sqrt(np.mean((y - shift) ** 2))) or 1.0
            y_scaling = Scaling(shift, np.asarray(1 / unit))

    activation = _ACTIVATIONS[options.activation]
    outputs = len(classes) if classes is not None else math.prod(y.shape[1:])
    seed = np.random.SeedSequence(options.seed)
    layers: list[Any] = []
    for n_in, n_out in itertools.pairwise([X.shape[1], *sizes, outputs]):
        layers += [Linear(n_in, n_out, init=options.init, dtype=dtype, device=device, seed=seed), activation()]
    return Run(
        model=Sequential(*layers[:-1]),
        parts=parts,
        rows=rows,
        loss=SoftmaxCrossEntropy() if classes is not None else RawSquaredError(unit),
        optimizer=_optimizer(options, math.ceil(len(X) / options.batch_size)),
        device=device,
        classes=classes,
        features=features,
        x_scaling=x_scaling,
        y_scaling=y_scaling,
        is_digits=options.data is None,
        reading=reading,
    )


def _sizes(text: str) -> list[int]:
    if text.strip().lower() == "none":
        return []
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = [0]
    if not 0 < min(sizes) <= max(sizes) < 2**31:
        raise bad("hidden", f'{text!r:.80} is no list of sizes; give numbers from 1 to 2^31 - 1, such as 128,64, or "none"')
    return sizes


def _optimizer(options: Any, steps_per_epoch: int) -> Any:
    given: dict[str, Any] = {"clip_norm": options.clip_norm}
    if options.optimizer == "sgd":
        given["momentum"] = 0.9
    if options.weight_decay is not None:
        given["weight_decay"] = options.weight_decay
    lr, steps = options.lr, options.epochs * steps_per_epoch
    kind: Any = {"sgd": SGD, "adam": Adam, "adamw": AdamW}[options.optimizer]
    optimizer = kind(lr, **given)  # which checks the rate; of a schedule it would see it at its first step only
    if options.schedule == "cosine":
        optimizer.lr = cosine(lr, steps)
    elif options.schedule == "step":
        optimizer.lr = step_decay(lr, math.ceil(steps / 3), 0.1)
    elif options.schedule == "warmup":
        optimizer.lr = linear_warmup(lr, steps_per_epoch)
    return optimizer
