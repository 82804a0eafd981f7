"""When an estimator's training ends, and which weights it keeps: the rules of MLPClassifier."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any


class Watch:
    """A callback that ends training when nothing improves any more, and keeps the best weights if there is a score.

    Improving is by more than `tol`, over the best epoch so far.

    score: a function that says how good the model is by now, on held-out samples; `None` looks at the loss.
    """

    def __init__(self, score: Callable[[], float] | None, tol: float, patience: int) -> None:
        self.score, self.tol, self.patience = score, tol, patience
        self.best, self.count, self.converged = -math.inf, 0, False
        self.scores: list[float] = []
        self.kept: Any = None

    def __call__(self, model: Any, row: dict[str, Any]) -> bool:
        """Whether to stop."""
        value = -row["loss"] if self.score is None else self.score()
        self.scores.append(value)
        self.count = self.count + 1 if value < self.best + self.tol else 0
        if value > self.best:
            self.best = value
            if self.score is not None:
                self.kept = copy.deepcopy(model)
        self.converged = self.count > self.patience
        return self.converged

    def restore(self, model: Any) -> None:
        """Give `model` the weights of the best epoch."""
        if self.kept is not None:
            take_weights(model, self.kept)


def take_weights(model: Any, other: Any) -> None:
    """Give `model` the weights of `other`, which has the same layers."""
    for (_, layer), (_, kept) in zip(model.leaves(), other.leaves(), strict=True):
        for p, value in kept.parameters().items():
            setattr(layer, p, value)
