"""A training to its end, and one that is stopped half way and resumed: the same weights, bit for bit."""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from anyarray_linear import Adam, Linear, ReLU, Sequential, SoftmaxCrossEntropy, evaluate, fit, select_device
from anyarray_linear.datasets import load_digits, split

from .answering import IS_STAND_IN, tell


def _trained(epochs: list[int], folder: Path, dtype: str) -> tuple[Any, float, float]:
    """A model trained up to each of `epochs`, from its last checkpoint on; the seconds, and the accuracy on the test."""
    device = select_device("cuda:0")
    X, y, X_test, y_test = split(*load_digits(), seed=0)
    X, y = device.asarray(X, dtype=dtype), device.asarray(y)
    loss, began = SoftmaxCrossEntropy(), time.perf_counter()
    for last in epochs:
        inner, outer = (Linear(*sizes, dtype=dtype, device=device, seed=0) for sizes in ((64, 128), (128, 10)))
        options: dict[str, Any] = {"checkpoint": folder, "resume": True, "progress": False}
        model = Sequential(inner, ReLU(), outer)
        fit(model, X, y, loss=loss, optimizer=Adam(2e-3), epochs=last, seed=0, **options)
    device.synchronize()
    return model, time.perf_counter() - began, evaluate(model, X_test, y_test, loss=loss)["accuracy"]


def main() -> None:
    """Tell how both ended."""
    for dtype in ("float16", "float32", "float64"):
        epochs = 2 if IS_STAND_IN else 20
        with TemporaryDirectory() as one, TemporaryDirectory() as other:
            whole, seconds, accuracy = _trained([epochs], Path(one), dtype)
            resumed, _, _ = _trained([epochs // 2, epochs], Path(other), dtype)
        pairs = zip(whole.parameters().values(), resumed.parameters().values(), strict=True)
        same = all(np.array_equal(a.get(), b.get()) for a, b in pairs)
        found: dict[str, Any] = {"dtype": dtype, "epochs": epochs, "accuracy": accuracy, "resumed_bit_for_bit": same}
        if not IS_STAND_IN:
            found["seconds"] = seconds
        if not same:
            found["wrong"] = "a resumed training does not end with the weights of one that was not stopped"
        if accuracy < (0.5 if IS_STAND_IN else 0.9):
            found["wrong"] = f"only {accuracy:.1%} of the digits are told after {epochs} epochs"
        tell(**found)


if __name__ == "__main__":
    main()
