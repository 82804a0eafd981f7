"""Callbacks that come with the library: functions `f(model, row)` that `fit` calls after each epoch; true stops."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..arrays.numbers import real, whole
from ..files.models import load_model, read_metadata
from ..protocol import restore, snapshot
from .history import Row


class EarlyStopping:
    """A callback that stops training once a score has not improved for `patience` epochs, and goes back to the best one.

    patience: how many epochs in a row may pass without a better score. monitor: a column of the history's rows; lower is
    better, but for names that end in `accuracy` or `r2`. min_delta: by how much more than this a better score is better.
    restore_best: whether the model is left with weights and states of its best epoch, also where all epochs were trained.

    `best` is the best score, `best_epoch` its epoch, `waited` how many epochs ago that was. One object is for one training.
    Resumed with `fit(resume=True)`, it goes on counting; the weights of an earlier best epoch are read from the folder.

    Raises `ValueError` in the first epoch for a column that there is not.

    >>> import numpy as np
    >>> from anyarray_linear import SGD, Linear, MeanSquaredError, fit
    >>> X = np.linspace(-1, 1, 64).reshape(-1, 1)
    >>> stopping = EarlyStopping(2, min_delta=1e-6)
    >>> history = fit(
    ...     Linear(1, 1, seed=0), X, 3 * X, loss=MeanSquaredError(), optimizer=SGD(0.5), epochs=100, validation=0.25,
    ...     callbacks=[stopping], progress=False)
    >>> len(history.rows) == stopping.best_epoch + 2 < 100
    True
    """

    def __init__(
        self, patience: int, *, monitor: str = "validation_loss", min_delta: float = 0.0, restore_best: bool = True
    ) -> None:
        self.patience, self.min_delta = whole("patience", patience), real("min_delta", min_delta)
        if not isinstance(monitor, str):
            raise TypeError(f'monitor is {monitor!r}; give the name of a column, such as "validation_loss"')
        self.monitor, self.restore_best = monitor, bool(restore_best)
        self.sign = -1.0 if monitor.endswith(("accuracy", "r2")) else 1.0
        self.best, self.best_epoch, self.waited = math.nan, 0, 0
        self._weights: Any = None

    def __call__(self, model: Any, row: Row) -> bool:
        """Whether to stop after this epoch; then the best weights are back in `model`."""
        if self._is_best(row) and self.restore_best:
            self._weights = snapshot(model)
        if self.waited < self.patience:
            return False
        self.finish(model)
        return True

    def _is_best(self, row: Row) -> bool:
        """Take note of an epoch, and say whether it is the best one yet."""
        if self.monitor not in row:
            missing = "; give fit a validation=" if self.monitor.startswith("validation_") else ""
            raise ValueError(f"monitor is {self.monitor!r}, but the rows have {', '.join(row)}{missing}")
        score = row[self.monitor]
        is_better = math.isnan(self.best) or self.sign * (self.best - score) > self.min_delta
        if is_better and not math.isnan(score):
            self.best, self.best_epoch, self.waited = score, row["epoch"], 0
            return True
        self.waited += 1
        return False

    def finish(self, model: Any) -> None:
        """Put the weights of the best epoch back; `fit` calls it at the end of a training that was not interrupted."""
        if self.restore_best and self._weights is not None and self.waited:
            restore(model, self._weights)

    def resume(self, model: Any, rows: Sequence[Row], folder: str | os.PathLike[str]) -> None:
        """Go on from where the training in `folder` was, with these rows; `fit` calls it when it has loaded a checkpoint.
        """
        for row in rows:
            self._is_best(row)
        if not self.restore_best or not self.best_epoch:
            return
        now = snapshot(model)
        if self.waited:
            self._weights, path = None, Path(folder) / "best.safetensors"
            try:
                if (epoch := read_metadata(path).get("epoch")) != self.best_epoch:
                    raise ValueError(f"{path} has those of epoch {epoch}, the best by another measure")
                load_model(path, into=model)
                self._weights = snapshot(model)
            except (OSError, ValueError) as error:
                text = f"the weights of epoch {self.best_epoch} cannot be had back: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            restore(model, now)
        else:
            self._weights = now

    def __repr__(self) -> str:
        return f"EarlyStopping({self.patience}, monitor={self.monitor!r})"
