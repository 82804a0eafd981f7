"""What an estimator trains on: rows of any `X`, sparse ones too, with their targets and weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.sparse import issparse

from ...arrays.device import Device
from ...arrays.place import Array, computing_on
from ...initializers import layer_seed
from ...training import fit
from ...training.data import epoch_order
from ...training.evaluation import predict
from .inputs import Host

_ROWS = 1024
"""How many rows of a sparse matrix are dense at once where outputs are computed."""


@dataclass
class Samples:
    """Rows: `X` where it is, targets and weights (or `None`) on the host."""

    X: Any
    targets: Host
    weights: Host | None = None

    def __len__(self) -> int:
        return len(self.targets)

    def rows(self, rows: Host) -> Samples:
        """Those rows."""
        weights = None if self.weights is None else self.weights[rows]
        if issparse(self.X):
            return Samples(self.X[rows], self.targets[rows], weights)
        with computing_on(self.X) as xp:
            return Samples(xp.take(self.X, Device.of(self.X).asarray(rows), axis=0), self.targets[rows], weights)

    def that_count(self) -> Samples:
        """Without rows of weight 0: then they do what they would if they were not there, and no batch weighs nothing."""
        if self.weights is None or self.weights.all():
            return self
        return self.rows(np.flatnonzero(self.weights))

    def train(self, model: Any, *, batch_size: int, seed: Any, callbacks: Any = (), **options: Any) -> Any:
        """`fit(model, ...)` on these samples; batches of a sparse `X` are made dense one by one, in the same order."""
        dtype = next(iter(model.parameters().values())).dtype
        if issparse(self.X):
            batches = SparseBatches(self, batch_size, layer_seed(seed))
            return fit(model, batches, callbacks=[*callbacks, batches.next_epoch], **options)
        place = Device.of(self.X)
        y = place.asarray(self.targets, dtype if self.targets.dtype.kind == "f" else None)
        weights = None if self.weights is None else place.asarray(self.weights, dtype)
        return fit(
            model, self.X, y, sample_weight=weights, batch_size=batch_size, seed=seed, callbacks=list(callbacks), **options
        )


def outputs(model: Any, X: Any) -> Array:
    """The raw outputs of `model` for `X`, where `X` is."""
    if not issparse(X):
        return predict(model, X)
    return np.concatenate([predict(model, X[i : i + _ROWS].toarray()) for i in range(0, X.shape[0], _ROWS)])


class SparseBatches:
    """Mini-batches of sparse rows, dense one at a time, in the order that `fit` has for dense rows and this seed."""

    def __init__(self, samples: Samples, batch_size: int, seed: Any) -> None:
        self.samples, self.batch_size, self.seed, self.epoch = samples, batch_size, seed, 0

    def __len__(self) -> int:
        return -(-len(self.samples) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Host, ...]]:
        order = epoch_order(self.seed, self.epoch, len(self.samples))
        for i in range(0, len(order), self.batch_size):
            part = self.samples.rows(order[i : i + self.batch_size])
            yield (part.X.toarray(), part.targets, *([] if part.weights is None else [part.weights]))

    def next_epoch(self, model: Any, row: Any) -> None:
        """A callback."""
        self.epoch += 1
