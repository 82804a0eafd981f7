"""Gradients before an update: divided by their scale, and clipped by their norm."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from .arrays.dtypes import wide
from .arrays.place import Array, Namespace, computing_on, dtype_name, place_of


def unscaled(xp: Namespace, dW: Array, scale: Array | None) -> Array:
    """The gradient that is `scale` times too large; of float16, in float32, where dividing by a power of two is exact."""
    dW = wide(xp, dW)
    return dW if scale is None else dW * xp.astype(1.0 / scale, dW.dtype, copy=False)


def clipped(gradients: Mapping[str, Array], clip_norm: float) -> dict[str, Array]:
    """The gradients, scaled so that the norm over all of them together is at most `clip_norm`.

    As `torch.nn.utils.clip_grad_norm_`, its 1e-6 included; the norm stays on the device (Pascanu et al., 2013).

    >>> import numpy as np
    >>> clipped({"W": np.asarray([3.0, 4.0])}, 1.0)["W"].round(3)
    array([0.6, 0.8])
    """
    first = next(iter(gradients.values()))
    with computing_on(first) as xp:
        exact = [wide(xp, dW) for dW in gradients.values()]  # the squares of float16 overflow at a norm of 256
        down: Any = _down(xp, exact)
        if down is None:
            down = 1.0
        else:  # all of what follows with the gradients as small as that
            exact = [dW * down for dW in exact]
        norm = xp.sqrt(sum(xp.sum(dW * dW) for dW in exact))
        scale = xp.minimum(clip_norm / (norm + 1e-6 * down), 1.0 / down)
        return {name: xp.astype(dW * xp.astype(scale, dW.dtype, copy=False), first.dtype, copy=False)
                for name, dW in zip(gradients, exact, strict=True)}  # fmt: skip


def _down(xp: Namespace, gradients: list[Array]) -> Array | None:
    """What to multiply the gradients by so that their squares do not overflow; `None` where it is known to be 1.

    It is 1 or a power of 2, which changes no bit of the norm (Blue, 1978).
    """
    big, factor = _RANGE[dtype_name(gradients[0].dtype)]
    largest = functools.reduce(xp.maximum, (xp.maximum(xp.max(dW), -xp.min(dW)) for dW in gradients))
    if place_of(gradients[0]).reads_freely and largest <= big:
        return None
    return xp.where(largest > big, xp.full_like(largest, factor), xp.full_like(largest, 1.0))


_RANGE = {"float32": (2.0**50, 2.0**-78), "float64": (2.0**400, 2.0**-624)}
"""From where on gradients are scaled down, and by what: the largest numbers come down to that bound."""
