"""Whether a whole training step does what its definition says, to rounding, by whatever lane it is taken."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np

from ..arrays.device import Device
from ..arrays.selection import select_device
from ..linear import Linear
from ..losses import MeanSquaredError
from ..optimizers import SGD
from ..scaling import LossScale
from ..step import TrainingStep
from .bounds import Host, _host, _host_products, _in_tf32, linear_reference, unit_roundoff

STEPS = 5
"""How many are taken; the last one is looked at. A step that is captured or compiled is so after two of them."""


class StepAgreement(NamedTuple):
    """How the parameters after a training step compare with the exact ones."""

    device: str
    dtype: str
    how: str
    """By what the step ran, as `TrainingStep.how` says it."""
    share: float
    """The worst error, as a share of what rounding can make."""
    complaint: str
    """What is wrong, in one line; empty if nothing is."""


def check_step(
    device: Any = None, dtype: str = "float32", *,
    rows: int = 32, in_features: int = 64, out_features: int = 16, seed: int = 0,
) -> StepAgreement:  # fmt: skip
    """Train a linear layer on random data, and hold its last step to the theory of rounding errors.

    The loss is the mean squared error and the rule `SGD(1.0)`, so the exact step is `W - dW` and `b - db` with
    `dZ = 2 (X W^T + b - Y) / (N out)`. Bounded are, one after the other, the errors of `Z` and `dW` (the hard limit of
    `linear_error_bounds`), what the error of `Z` makes of `dZ` and of `dW`, and the roundings of the difference, of the
    factor and of the update.

    device: a `Device` or what `select_device` takes; `None` is the CPU. dtype: float16, float32 or float64.

    >>> result = check_step()
    >>> result.share < 1, result.complaint
    (True, '')
    """
    place: Device = select_device("cpu" if device is None else device)
    rng = np.random.default_rng(seed)
    widths = in_features, out_features
    X, Y = (rng.standard_normal((rows, width)).astype(dtype) for width in widths)
    layer = Linear(in_features, out_features, init="pytorch", dtype=dtype, device=place, seed=seed)
    step = TrainingStep(layer, MeanSquaredError(), SGD(1.0), loss_scale=LossScale(1.0))  # no step is called off
    for _ in range(STEPS - 1):
        step(place.asarray(X), place.asarray(Y))
    W, b = _host(layer.W).copy(), _host(layer.b).copy()
    X, Y = (rng.standard_normal((rows, width)).astype(dtype) for width in widths)  # a step must not replay the last ones
    step(place.asarray(X), place.asarray(Y))
    exact = _exact_step(X, Y, W, b, tf32=_in_tf32(place, dtype))
    share, complaint = 0.0, ""
    for name, mine in (("W", layer.W), ("b", layer.b)):
        value, bound = exact[name]
        error = np.abs(_host(mine, "float64") - value)
        worst = float(np.max(error / bound))
        if not worst <= 1 and not complaint:
            index = np.unravel_index(np.argmax(np.nan_to_num(error / bound, nan=np.inf)), error.shape)
            at = ", ".join(map(str, index))
            complaint = (
                f"{name}[{at}] on {place} ({dtype}) is off by {error[index]:.3g} after a training step ({step.how}), and "
                f"rounding can make at most {bound[index]:.3g}"
            )
        share = max(share, worst) if worst == worst else float("inf")
    return StepAgreement(str(place), dtype, step.how, share, complaint)


def _exact_step(X: Host, Y: Host, W: Host, b: Host, *, tf32: Collection[str]) -> dict[str, tuple[Host, Host]]:
    """`W` and `b` after the step, and how far each element may be from that."""
    u, tiny = unit_roundoff(W.dtype), float(np.finfo(W.dtype).smallest_normal) * 2
    Z = linear_reference(X, W, b)["Z"]
    D = Z - Y
    D_error = _host_products(X, W, b, None, tf32=tf32)["Z"].bound(sharp=False)
    D_error += u * (np.abs(D) + D_error)
    dZ = 2 * D / D.size
    dZ_error = 2 * D_error / D.size * (1 + 4 * u) + 4 * u * np.abs(dZ) + tiny
    # the largest that dZ can be, rounded up, so that the limit of its products holds for the dZ that there was
    most = ((np.abs(dZ) + dZ_error) * (1 + 4 * u)).astype(W.dtype)
    limits = {name: product.bound(sharp=False) for name, product in _host_products(X, W, b, most, tf32=tf32).items()}
    gradients = {"W": dZ.T @ X.astype(np.float64), "b": dZ.sum(axis=0, keepdims=True)}
    errors = {"W": dZ_error.T @ np.abs(X.astype(np.float64)), "b": dZ_error.sum(axis=0, keepdims=True)}
    found = {}
    for name, before in (("W", W), ("b", b)):
        g, error = gradients[name], errors[name] + limits[f"d{name}"]
        found[name] = before - g, error * (1 + 4 * u) + 4 * u * (np.abs(before) + np.abs(g)) + tiny
    return found
