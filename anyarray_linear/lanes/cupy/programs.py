"""Every kernel that this lane can launch, in every dtype and kind: to compile them ahead, with a card or without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import activations, guard, losses, update
from .kernels import TYPES, kernel


def raw() -> Iterator[tuple[str, str, Any]]:
    """What it is, the dtype's character, and the `RawKernel`, which is not compiled yet. Some programs come twice."""
    for dtype in TYPES:
        for kind in activations._FORWARD:
            what = getattr(kind, "__name__", kind)
            yield what, dtype, activations._forward(kind, dtype)
            yield f"{what} gradient", dtype, activations._backward(kind, dtype)
            yield f"bias and {what}", dtype, activations._bias(kind, dtype)
        yield "bias", dtype, activations._bias(None, dtype)
        for ids in (None, *map(np.dtype, losses._IDS)):
            what = "cross entropy of rows" if ids is None else f"cross entropy of {ids}"
            yield what, dtype, losses._cross_entropy("cross_entropy", losses._CROSS_ENTROPY, dtype, ids)
            source = losses._CROSS_ENTROPY_GRADIENT
            yield f"{what}, gradient", dtype, losses._cross_entropy("cross_entropy_gradient", source, dtype, ids)
        yield "squared error", dtype, kernel("squared_error", losses._SQUARED_ERROR, dtype)
        yield "finish", dtype, kernel("finish", losses._FINISH, dtype)
        for rule in update._RULES:
            yield rule.__name__, dtype, update._kernel(rule, dtype)
        yield "squares", dtype, kernel("squares", update._SQUARES, dtype)
        yield "look", dtype, kernel("look", guard._LOOK, dtype)


def elementwise() -> Iterator[tuple[str, Any, tuple[str, ...]]]:
    """What it is, the `ElementwiseKernel`, of which CuPy makes a program per layout, and its arguments that are numbers."""
    yield "judge", guard._judge, ("step", "count", "allowed")
