"""From the options of `train` to data, model, loss and optimizer; and the scaling of the data, which the model takes in."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import typer

from ..activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ..arrays.device import Device
from ..datasets import load_data, load_digits, split
from ..distributed.group import Group
from ..linear import Linear
from ..losses import MeanSquaredError, SoftmaxCrossEntropy
from ..optimizers import SGD, Adam, AdamW
from ..schedules import cosine, linear_warmup, step_decay
from ..sequential import Sequential

Host = np.ndarray[Any, Any]

LR = {"sgd": 0.05, "adam": 2e-3, "adamw": 2e-3}
_ACTIVATIONS: dict[str, tuple[Callable[[], Any], str]] = {  # with the initializer that was made for it
    "relu": (ReLU, "he_normal"),
    "silu": (SiLU, "he_normal"),
    "gelu": (GELU, "he_normal"),
    "tanh": (Tanh, "xavier_normal"),
    "sigmoid": (Sigmoid, "xavier_normal"),
}


def bad(name: str, message: str) -> typer.BadParameter:
    """The error to raise about the option `--name`."""
    return typer.BadParameter(message, param_hint=f"--{name.replace('_', '-')}")


class Scaling(NamedTuple):
    """`(x - shift) * factor` column by column, in float64."""

    shift: Host
    factor: Host

    def __call__(self, x: Host) -> Host:
        scaled: Host = (x.astype(np.float64) - self.shift) * self.factor
        return scaled


class RawSquaredError(MeanSquaredError):
    """The squared error of a scaled target, told in the raw target's units; the gradient stays that of the scaled one."""

    def __init__(self, unit: float) -> None:
        self.unit = unit

    def forward(self, Z: Any, target: Any) -> tuple[Any, dict[str, Any]]:
        loss, cache = super().forward(Z, target)
        return loss * self.unit**2, cache


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
    device = group.device(options.device)
    dtype = device.dtype(options.dtype)
    _optimizer(options, steps_per_epoch=1)  # its numbers are checked before the data is read

    X, y, classes, features = _data(options)
    rows = _rows(y, options)
    parts = {name: (X[of_part], y[of_part]) for name, of_part in rows.items()}
    X, y = parts["train"]
    x_scaling = y_scaling = None
    unit = 1.0
    if options.data is not None and options.standardize:
        x_scaling = _scaling(X, options, features)
        if classes is None:
            # one unit for all targets, so that the loss is the raw one but for a factor
            shift = _scaling(y, options, None, is_target=True).shift
            unit = float(np.sqrt(np.mean((y - shift) ** 2))) or 1.0
            y_scaling = Scaling(shift, np.asarray(1 / unit))

    activation, init = _ACTIVATIONS[options.activation]
    outputs = len(classes) if classes is not None else math.prod(y.shape[1:])
    seed = np.random.SeedSequence(options.seed)
    layers: list[Any] = []
    for n_in, n_out in itertools.pairwise([X.shape[1], *sizes, outputs]):
        layers += [Linear(n_in, n_out, init=init, dtype=dtype, device=device, seed=seed), activation()]
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


def _data(options: Any) -> tuple[Host, Host, tuple[str, ...] | None, tuple[str, ...] | None]:
    if options.data is None:
        for name in ("target", "task"):
            if getattr(options, name) is not None:
                raise bad(name, "it is about the file of --data, and none was given")
        return *load_digits(), tuple("0123456789"), None
    X, y, classes, features = load_data(options.data, target=options.target, task=options.task)
    if classes is not None and (y == y[0]).all():
        raise ValueError(f"{options.data}: every sample is of the class {classes[y[0]]!r}; give samples of two or more")
    return X, y, classes, features


def _rows(y: Host, options: Any) -> dict[str, Host]:
    """Which samples each part has; the test's are taken first, so they are the same whatever is used for validation."""
    parts, rows = {}, np.arange(len(y))
    for name in ("test", "validation"):
        if fraction := getattr(options, name):
            rows, _, parts[name], _ = split(rows, y[rows], test=fraction, seed=options.seed)
    return dict(reversed({**parts, "train": rows}.items()))


def _scaling(x: Host, options: Any, names: tuple[str, ...] | None, is_target: bool = False) -> Scaling:
    """To mean 0 and variance 1; a column that never varies goes to 0, so that the model ignores it."""

    def name(column: int) -> str:
        return f"the column {names[column]!r}" if names else "the target" if is_target else f"column {column}"

    wide = x.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, spread = wide.mean(axis=0), wide.std(axis=0)
    huge = ~np.isfinite(mean + spread)
    if huge.any():
        column = int(np.flatnonzero(huge)[0])
        most = np.abs(wide).max(axis=0)
        raise ValueError(
            f"{options.data}: {name(column)} has values up to {np.atleast_1d(most)[column]:.3g}, whose variance overflows; "
            "divide it by a constant"
        )
    varies = x.max(axis=0) > x.min(axis=0)
    lost = varies & (np.abs(mean) * np.finfo(options.dtype).eps > 0.01 * spread)
    if lost.any():
        column = int(np.flatnonzero(lost)[0])
        what = name(column)
        m, s = np.atleast_1d(mean)[column], np.atleast_1d(spread)[column]
        raise ValueError(
            f"{options.data}: {what} varies by {s:.2g} around {m:.6g}, too little to be seen in {options.dtype}; "
            "subtract a constant from it, or use --dtype float64"
        )
    with np.errstate(divide="ignore"):
        return Scaling(mean, np.where(varies, 1 / spread, 0.0))
