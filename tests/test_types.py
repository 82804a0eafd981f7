"""Types: parts of a user's own fit where ours do, by mypy as well as at run time; what is none is refused by both.

`mypy --strict` goes over this page too (`.ci/run lint`): an `ignore` that is not needed, because mypy accepts what is wrong, is
an error there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from anyarray_linear import Layer, Linear, Loss, Optimizer, Sequential, TrainingStep, evaluate, fit
from anyarray_linear.losses import MeanSquaredError
from anyarray_linear.optimizers import SGD

Floats = np.ndarray[Any, np.dtype[np.float64]]
X = np.linspace(-1, 1, 32).reshape(-1, 1)


class Absolute:
    """A loss of one's own, whose arguments have names of their own."""

    def forward(self, outputs: Floats, wanted: Floats) -> tuple[Floats, Floats]:
        difference = outputs - wanted
        return np.asarray(np.abs(difference).mean()), np.sign(difference) / difference.size

    def backward(self, signs: Floats) -> Floats:
        return signs


class Descent:
    """An update rule of one's own."""

    steps = 0

    def step(self, model: Layer, gradients: Mapping[str, Floats] | None = None, *, where: Any = None) -> None:
        assert gradients is not None
        if where is None or where:
            for name, layer in model.leaves() if isinstance(model, Sequential) else [("", model)]:
                for p, W in layer.parameters().items():
                    setattr(layer, p, W - 0.2 * gradients[f"{name}.{p}".lstrip(".")])
        self.steps += 1

    def learning_rate(self, number: int | None = None) -> float:
        return 0.2

    def state_dict(self) -> dict[str, Any]:
        return {"rule": "Descent", "steps": self.steps, "hyperparameters": {}, "moments": {}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.steps = state["steps"]


class Halved:
    """A layer of one's own, without parameters."""

    def forward(self, x: Floats) -> tuple[Floats, None]:
        return x / 2, None

    def gradients(self, dy: Floats, kept: None, *, needs_dX: bool = True) -> tuple[Floats | None, dict[str, Floats]]:
        return dy / 2 if needs_dX else None, {}

    def backward(self, dy: Floats, kept: None, *, accumulate: bool = False, needs_dX: bool = True) -> Floats | None:
        return self.gradients(dy, kept, needs_dX=needs_dX)[0]

    def parameters(self) -> dict[str, Floats]:
        return {}

    def to(self, device: Any = None, dtype: Any = None) -> Halved:
        return self

    def __call__(self, x: Floats) -> Floats:
        return x / 2


def test_parts_of_ones_own_train() -> None:
    loss: Loss = Absolute()
    optimizer: Optimizer = Descent()
    model = Sequential(Halved(), Linear(1, 1, seed=0))
    first = float(TrainingStep(model, loss, optimizer)(X, 3 * X))
    history = fit(model, X, 3 * X, loss=Absolute(), optimizer=Descent(), epochs=30, batch_size=8, progress=False)
    assert history.rows[-1]["loss"] < first / 4
    assert evaluate(model, X, 3 * X, loss=Absolute())["loss"] < first / 4


def test_ours_are_what_they_are_said_to_be() -> None:
    loss: Loss = MeanSquaredError()
    optimizer: Optimizer = SGD(0.1)
    layer: Layer = Linear(1, 1)
    container: Layer = Sequential(layer)
    assert isinstance(loss, Loss)
    assert isinstance(optimizer, Optimizer)
    assert isinstance(container, Layer)


def test_what_is_none_is_refused() -> None:
    model = Linear(1, 1)
    with pytest.raises(TypeError, match=r"loss is a \w+ Descent"):
        fit(model, X, X, loss=Descent(), optimizer=SGD(0.1), epochs=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="optimizer is a float"):
        fit(model, X, X, loss=Absolute(), optimizer=0.1, epochs=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model is a numpy array"):
        fit(X, X, X, loss=Absolute(), optimizer=SGD(0.1), epochs=0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="loss is the class MeanSquaredError"):
        evaluate(model, X, X, loss=MeanSquaredError)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="no parameters"):
        TrainingStep(Halved(), Absolute(), SGD(0.1))
    with pytest.raises(TypeError, match="loss is a str"):
        TrainingStep(model, "mse", SGD(0.1))  # type: ignore[arg-type]
