"""The curves of a training, for the report and for `curves.png`: loss and accuracy by epoch, and what is behind them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..protocol import leaves
from ._charts import Chart, Series, by_epoch

Rows = Sequence[dict[str, Any]]


def _of(rows: Rows, *keys: str) -> list[tuple[float, float]]:
    """What is under the `keys` (one within the other) by epoch, where it is."""
    points = []
    for row in rows:
        value: Any = row
        for key in keys:
            value = (value or {}).get(key)
        if value is not None:
            points.append((row["epoch"], value))
    return points


def learning(rows: Rows, chosen: int | None = None) -> list[Chart]:
    """Loss and, of classes, accuracy; `chosen`: the epoch whose weights the model has."""

    def both(key: str) -> list[Series]:
        return [Series("training", _of(rows, key)), Series("validation", _of(rows, f"validation_{key}"))]

    dotted = " The dotted line is the epoch whose weights the model has." if chosen is not None else ""
    mean = "Training: the mean over the epoch, while the weights change."
    charts = [by_epoch("Loss", both("loss"), log=True, chosen=chosen, note=mean + dotted)]
    if any("accuracy" in row for row in rows):
        charts.append(by_epoch("Accuracy", both("accuracy"), percent=True, chosen=chosen, note="Both after the epoch."))
    return charts


def seconds(rows: Rows) -> Chart:
    """How long each epoch took."""
    return by_epoch("Seconds per epoch", [Series("seconds", _of(rows, "seconds"))], from_zero=True)


def norms(model: Any, rows: Rows, count: int) -> list[Chart]:
    """The lengths of the layers' parameters and gradients; these of the loss on the first `count` training samples."""
    layers = [(name, f"{name}: {type(layer).__name__} {layer.in_features} to {layer.out_features}")
              for name, layer in leaves(model) if layer.parameters()]  # fmt: skip

    def of(key: str) -> list[Series]:
        return [Series(title, _of(rows, key, name)) for name, title in layers]

    batch = f"After each epoch, of the loss on one batch that stays the same: the first {count} training samples."
    return [
        by_epoch("Norm of weights and bias", of("weight_norms"), log=True),
        by_epoch("Norm of their gradient", of("gradient_norms"), log=True, note=batch),
    ]
