"""The numbers that people look for: how good the answers are, class by class, and beside one who only knows the targets.

A model that says nothing about a sample is the baseline: it always answers the class that is most frequent in training, or
the mean of the training targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..losses import MeanSquaredError, SoftmaxCrossEntropy

Host = np.ndarray[Any, Any]

PARTS = ("train", "validation", "test")
LABELS = {
    "accuracy": "accuracy",
    "baseline_accuracy": "always the most frequent class",
    "macro_precision": "precision, mean of the classes",
    "macro_recall": "recall, mean of the classes",
    "macro_f1": "F1, mean of the classes",
    "r2": "R²",
    "rmse": "RMSE",
    "mae": "MAE",
    "baseline_rmse": "RMSE of always the mean",
    "loss": "loss",
}
"""What a score is called, in the order in which they are shown."""
_SHARES = ("accuracy", "baseline_accuracy", "macro_precision", "macro_recall", "macro_f1", "precision", "recall", "f1")


def shown(name: str, value: float) -> str:
    """A score as text."""
    return f"{value:.2%}" if name in _SHARES else f"{value:.4g}"


def parts_of(summary: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores in a summary, by the part of the data."""
    return {name: summary[name] for name in PARTS if name in summary}


def scores_of(Z: Host, y: Host, y_train: Host, classes: Sequence[str] | None) -> dict[str, Any]:
    """The scores of outputs `Z` for targets `y`; the baseline knows `y_train`."""
    Z = Z.astype(np.float64)
    return _of_numbers(Z, y, y_train) if classes is None else _of_classes(Z, y, y_train, classes)


def softmax(Z: Host) -> Host:
    """Probabilities from outputs `Z` `(N, classes)`."""
    E = np.exp(Z - Z.max(axis=1, keepdims=True))
    P: Host = E / E.sum(axis=1, keepdims=True)
    return P


def confusion(y: Host, answers: Host, K: int) -> Host:
    """`counts[i, j]`, int64 `(K, K)`: samples of class `i` that were answered `j`."""
    return np.bincount(y * K + answers, minlength=K * K).reshape(K, K)


def _of_classes(Z: Host, y: Host, y_train: Host, classes: Sequence[str]) -> dict[str, Any]:
    loss, _ = SoftmaxCrossEntropy().forward(Z, y)
    K, answers = len(classes), Z.argmax(axis=1)
    hits = (answers == y) & ~np.isnan(Z).any(axis=1)  # the largest of a row with NaN is NaN
    right = np.bincount(y[hits], minlength=K)
    samples, answered = np.bincount(y, minlength=K), np.bincount(answers, minlength=K)
    precision, recall, f1 = _share(right, answered), _share(right, samples), _share(2 * right, answered + samples)
    there = samples + answered > 0  # the others say nothing about this part
    usual = np.bincount(y_train, minlength=K).argmax()
    return {
        "loss": float(loss),
        "accuracy": float(right.sum() / len(y)),
        "baseline_accuracy": float(np.mean(y == usual)),
        "macro_precision": float(precision[there].mean()),
        "macro_recall": float(recall[there].mean()),
        "macro_f1": float(f1[there].mean()),
        "classes": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "samples": int(n)}
            for name, p, r, f, n in zip(classes, precision, recall, f1, samples, strict=True)
        },
    }


def _share(part: Host, whole: Host) -> Host:
    """`part / whole`, and 0 of nothing."""
    return np.divide(part, whole, out=np.zeros(len(part)), where=whole > 0)


def _of_numbers(Z: Host, y: Host, y_train: Host) -> dict[str, Any]:
    """R² is the mean over the targets, if there are several; the others are over all numbers at once."""
    y = y.reshape(len(y), -1).astype(np.float64)
    loss, _ = MeanSquaredError().forward(Z.reshape(y.shape), y)
    error = Z.reshape(y.shape) - y
    spread, missed = ((y - y.mean(axis=0)) ** 2).sum(axis=0), (error**2).sum(axis=0)
    r2 = 1 - np.divide(missed, spread, out=(missed > 0).astype(float), where=spread > 0)  # 1 or 0 where y never varies
    guess = y_train.reshape(len(y_train), -1).astype(np.float64).mean(axis=0)
    return {
        "loss": float(loss),
        "r2": float(r2.mean()),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "mae": float(np.mean(np.abs(error))),
        "baseline_rmse": float(np.sqrt(np.mean((y - guess) ** 2))),
    }
