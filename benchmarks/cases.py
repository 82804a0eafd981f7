"""What is computed: the cases by name, their inputs, and the work that each is at least."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from math import prod
from typing import Any

import numpy as np

Host = np.ndarray[Any, Any]
Call = Callable[[], Any]
Parameters = list[tuple[Host, Host]]
"""`W` and `b` of each layer."""

KINDS = {
    "layer": "Layer, forward and backward",
    "forward": "Layer, forward of three axes; NumPy's product is a batched one",
    "step": "Training step: forward, loss, backward, Adam",
    "optimizer": "Adam alone; its limit is the time of copying 7 arrays of that size on all cores",
}
LR = 1e-7
"""The learning rate of timed steps: see the package's docstring."""
CHECKED_LR, CHECKED_STEPS = 1e-3, 3
DIGITS: dict[str, Any] = {"hidden": 64, "batch_size": 64, "epochs": 20, "lr": 2e-3}

_LAYERS = ((1, 16, 16), (32, 64, 64), (64, 784, 128), (256, 512, 512), (1024, 1024, 1024), (65536, 64, 64))
_STEPS = ((32, 64, 32, 10), (64, 64, 128, 10), (128, 784, 256, 10), (256, 784, 1024, 1024, 10), (64, 1024, 4096, 1024))
CASES: dict[str, dict[str, Any]] = {
    **{f"layer{i}": {"kind": "layer", "batch": [N], "sizes": sizes} for i, (N, *sizes) in enumerate(_LAYERS, 1)},
    "forward1": {"kind": "forward", "batch": [64, 4], "sizes": [256, 256]},
    **{f"step{i}": {"kind": "step", "batch": [N], "sizes": sizes} for i, (N, *sizes) in enumerate(_STEPS, 1)},
    "optimizer1": {"kind": "optimizer", "batch": [], "sizes": [1024, 4096, 1024]},
}
COUNTED_CASES = CASES | {"step6": {"kind": "step", "batch": [32], "sizes": [64, 128, 64, 10]}}
"""The cases on the CPU stand-in for CUDA."""


def drawn(case: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a case, float32 on the host: the arguments of the contestants' method of its kind."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> Host:
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def parameters(n_in: int, n_out: int) -> tuple[Host, Host]:
        return normal(n_out, n_in, scale=math.sqrt(2 / n_in)), normal(1, n_out, scale=0.1)

    kind, batch, sizes = case["kind"], case["batch"], case["sizes"]
    if kind == "optimizer":
        layers = [parameters(*pair) for pair in pairwise(sizes)]
        return {"parameters": layers, "gradients": [(normal(*W.shape), normal(*b.shape)) for W, b in layers]}
    X = normal(*batch, sizes[0])
    if kind == "step":
        layers = [parameters(*pair) for pair in pairwise(sizes)]
        return {"parameters": layers, "X": X, "y": rng.integers(sizes[-1], size=batch)}
    W, b = parameters(*sizes)
    inputs = {"X": X, "W": W, "b": b}
    return inputs if kind == "forward" else inputs | {"dZ": normal(*batch, sizes[1])}


def digits() -> tuple[Host, Host, Host, Host]:
    """The digits of this package, for training and for the test."""
    from anyarray_linear.datasets import load_digits, split

    X, y, X_test, y_test = split(*load_digits(), seed=0)
    return X, y, X_test, y_test


def first_weights(seed: int) -> Parameters:
    """Where both start that learn the digits: drawn as `MLPClassifier` draws for `relu`, weights and biases alike."""
    rng, sizes = np.random.default_rng(seed), (64, DIGITS["hidden"], 10)
    bounds = [(math.sqrt(6 / (n_in + n_out)), n_in, n_out) for n_in, n_out in pairwise(sizes)]
    drawn = [(rng.uniform(-a, a, (n_out, n_in)), rng.uniform(-a, a, (1, n_out))) for a, n_in, n_out in bounds]
    return [(W.astype(np.float32), b.astype(np.float32)) for W, b in drawn]


def work(case: dict[str, Any]) -> dict[str, int]:
    """What a case must compute and move, in float32.

    `flops` of its matrix products; `bytes` that its inputs and outputs have, each counted once; `bytes_besides`, those that
    the limit adds to what its contestant does: bias and its gradient for a layer (`Z` read and written, `dZ` read), for a
    training step the optimizer's (`W`, `dW` and two moments read, all but `dW` written).
    """
    N, sizes = prod(case["batch"]), case["sizes"]
    weights = [n_in * n_out for n_in, n_out in pairwise(sizes)]
    count = sum(weights) + sum(sizes[1:])
    if case["kind"] == "optimizer":
        return {"flops": 0, "bytes": 4 * 7 * count, "bytes_besides": 0}
    if case["kind"] == "step":
        return {
            "flops": N * (6 * sum(weights) - 2 * weights[0]),
            "bytes": 4 * (8 * count + N * sizes[0] + 2 * N * sum(sizes[1:])),
            "bytes_besides": 4 * 7 * count,
        }
    passes = 1 if case["kind"] == "forward" else 2  # a backward pass has a gradient for each array of the forward one
    return {
        "flops": (2 if passes == 1 else 6) * N * weights[0],
        "bytes": 4 * passes * (N * sum(sizes) + count),
        "bytes_besides": 4 * (passes + 1) * N * sizes[1],
    }
