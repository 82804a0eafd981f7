"""How long the parameters and the gradients of each layer are, to see in training what goes astray."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from ..arrays.place import Array
from ..protocol import join, leaves
from ._run import Run

Host = np.ndarray[Any, Any]

NORM_ROWS = 256
"""Training samples, the first ones, that the gradient norms are of."""


class Norms:
    """After each epoch, how long the parameters of each layer are as one vector, and their gradients on one fixed batch.

    One forward and one backward pass over `NORM_ROWS` samples; the norms are taken on the host, in float64.
    """

    def __init__(self, run: Run, X: Host, y: Host) -> None:
        dtype = run.model[0].dtype  # type: ignore[attr-defined]
        self.loss, self.place = run.loss, run.device
        self.X = run.device.asarray(X[:NORM_ROWS], dtype)
        self.y = run.device.asarray(y[:NORM_ROWS], None if run.classes is not None else dtype)

    def __call__(self, model: Any) -> dict[str, dict[str, float]]:
        """`{"weight_norms": {"0": ..., "2": ...}, "gradient_norms": {...}}`, by the names of the layers."""
        Z, caches = model.forward(self.X)
        _, cache = self.loss.forward(Z, self.y)
        _, gradients = model.gradients(self.loss.backward(cache), caches, needs_dX=False)
        layers = {name: layer.parameters() for name, layer in leaves(model) if layer.parameters()}
        return {
            "weight_norms": {name: self._norm(own.values()) for name, own in layers.items()},
            "gradient_norms": {name: self._norm(gradients[join(name, p)] for p in own) for name, own in layers.items()},
        }

    def _norm(self, arrays: Iterable[Array]) -> float:
        flat = [self.place.to_numpy(x).astype(np.float64).ravel() for x in arrays]
        return float(np.linalg.norm(np.concatenate(flat)))
