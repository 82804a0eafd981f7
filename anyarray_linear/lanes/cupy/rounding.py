"""How far two ways of computing the gradients of a model can be apart by rounding alone, element by element.

A running error bound (Higham 2002, ch. 3), carried on the host in float64 from layer to layer, forward and back: an operand
that is off by `e` moves the result by what the operation makes of `e`, and each operation adds roundings of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ...activations import ReLU
from ...arrays.tf32 import in_tf32
from ...linear import Linear
from ...losses import MeanSquaredError, SoftmaxCrossEntropy
from ...protocol import join, leaves
from ...sequential import Sequential

Host = np.ndarray[Any, Any]

ULPS = 16
"""Errors of a device's exp, tanh and log, in units of the last place, that are taken for granted."""
STEEPEST, SHARPEST = 1.13, 1.0
"""The largest first and second derivative of the activations other than ReLU."""
_UNITS = {"e": 2.0**-11, "f": 2.0**-24, "d": 2.0**-53}


def _flat(model: Any) -> list[Any]:
    return [leaf for layer in model.layers for leaf in _flat(layer)] if type(model) is Sequential else [model]


def gradient_errors(model: Any, loss: Any, X: Host, y: Host, device: int) -> dict[str, Host]:
    """The largest error of each gradient, by its parameter's name, and of the loss by the name `""`.

    device: the CUDA device that computes them, which may round factors to TF32.
    """
    kind = X.dtype.char
    u, sums_in = _UNITS[kind], _UNITS["f" if kind == "e" else kind]
    factors = 2.0**-10 if kind == "f" and in_tf32(device) else 0.0

    def gamma(n: int) -> float:
        """Roundings of a sum of `n` products, and one of its result."""
        return 1.1 * n * sums_in + 2.2 * factors + (u if kind == "e" else 0.0)

    names = {id(layer): name for name, layer in leaves(model)}
    positions = _flat(model)
    value, error = X.astype(np.float64).reshape(-1, X.shape[-1]), np.zeros((1, 1))
    inputs = []
    for layer in positions:
        inputs.append((value, error))
        if type(layer) is Linear:
            W = layer.W.get().astype(np.float64)
            b = np.zeros((1, W.shape[0])) if layer.b is None else layer.b.get().astype(np.float64)
            size = np.abs(value) @ np.abs(W).T + np.abs(b)
            error = np.broadcast_to(error, value.shape) @ np.abs(W).T + gamma(W.shape[1] + 2) * size
            value = value @ W.T + b
        else:
            steep = 1.0 if type(layer) is ReLU else STEEPEST
            error = steep * error + ULPS * u * (1 + np.abs(value))
            value = layer(value)
    rows, classes = value.shape
    error = np.broadcast_to(error, value.shape)
    off = error.max()
    if type(loss) is SoftmaxCrossEntropy:
        shifted = value - value.max(axis=1, keepdims=True)
        P = np.exp(shifted)
        P /= P.sum(axis=1, keepdims=True)
        T = y.reshape(rows, classes).astype(np.float64) if y.size == value.size else np.eye(classes)[y.reshape(-1)]
        weight = T.sum(axis=1, keepdims=True)
        relative = np.expm1(2 * off) + (classes + ULPS + 2 * np.abs(shifted).max()) * u
        dZ, dZ_error = (P * weight - T) / rows, (P * weight * relative + (P * weight + T) * 4 * u) / rows
        size = (T * (1 + np.abs(shifted) + np.log(classes))).sum() / rows
        loss_error = (T * (error + off)).sum() / rows + (relative + gamma(rows)) * size
    elif type(loss) is MeanSquaredError:
        D = value - y.reshape(value.shape).astype(np.float64)
        dZ, dZ_error = 2 * D / D.size, 2 * (error + 4 * u * np.abs(D)) / D.size
        loss_error = (2 * np.abs(D) * error + error**2).mean() + gamma(D.size) * (D * D).mean()
    else:  # binary cross-entropy, whose slope in each logit is at most 1, and the slope's at most 1/4
        dZ = (1 / (1 + np.exp(-np.clip(value, -700, 700))) - y.reshape(value.shape).astype(np.float64)) / value.size
        dZ_error = (0.25 * error + ULPS * u) / value.size
        loss_error = error.mean() + gamma(value.size) * (1 + np.abs(value)).mean() + ULPS * u
    found: dict[str, Host] = {"": np.asarray(loss_error + 4 * u)}
    for layer, (value, error) in zip(reversed(positions), reversed(inputs), strict=True):
        if type(layer) is Linear:
            W, sizes, most = np.abs(layer.W.get().astype(np.float64)), np.abs(dZ), np.abs(value) + error
            off_W = dZ_error.T @ most + sizes.T @ np.broadcast_to(error, value.shape) + gamma(rows + 1) * (sizes.T @ most)
            off_b = dZ_error.sum(axis=0, keepdims=True) + 1.1 * (rows + 1) * (sums_in + u) * sizes.sum(axis=0, keepdims=True)
            for p, own in (("W", off_W), ("b", off_b)):
                name = join(names[id(layer)], p)
                found[name] = own + found.get(name, 0.0)
            dZ_error = dZ_error @ W + gamma(W.shape[0] + 1) * (sizes @ W)
            dZ = dZ @ layer.W.get().astype(np.float64)
        elif type(layer) is ReLU:
            flips = np.abs(value) <= error
            dZ_error = np.where(flips, np.abs(dZ) + dZ_error, dZ_error * (value > -error))
            dZ = dZ * (value > 0)
        else:
            _, cache = layer.forward(value)
            dZ_error = STEEPEST * dZ_error + np.abs(dZ) * (SHARPEST * error + ULPS * u)
            dZ, _ = layer.gradients(dZ, cache)
    return found
