"""Every kernel that this lane can launch, in every dtype and kind: to compile them ahead, with a card or without."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from . import activations, dropout, guard, losses, normalization, recording, update
from .kernels import TYPES, kernel


def raw() -> Iterator[tuple[str, str, Any]]:
    """What it is, the dtype's character, and the `RawKernel`, which is not compiled yet. Some programs come twice."""
    for dtype in TYPES:
        for kind in activations._FORWARD:
            name = getattr(kind, "__name__", kind)
            yield name, dtype, activations._forward(kind, dtype)
            yield f"{name} gradient", dtype, activations._backward(kind, dtype)
            yield f"bias and {name}", dtype, activations._bias(kind, dtype)
        yield "bias", dtype, activations._bias(None, dtype)
        for ids in (None, *map(np.dtype, losses._IDS)):
            what = "cross entropy of rows" if ids is None else f"cross entropy of {ids}"
            yield what, dtype, losses._cross_entropy("cross_entropy", losses._CROSS_ENTROPY, dtype, ids)
            source = losses._CROSS_ENTROPY_GRADIENT
            yield f"{what}, gradient", dtype, losses._cross_entropy("cross_entropy_gradient", source, dtype, ids)
        yield "squared error", dtype, kernel("squared_error", losses._SQUARED_ERROR, dtype)
        yield "squared error, gradient", dtype, kernel("scaled", losses._SCALED, dtype)
        yield "finish", dtype, kernel("finish", losses._FINISH, dtype)
        yield "dropout", dtype, kernel("drop", dropout._DROP, dtype)
        yield "dropout, gradient", dtype, kernel("drop_gradient", dropout._GRADIENT, dtype)
        yield "normalization", dtype, kernel("normalize", normalization._NORMALIZE, dtype)
        yield "normalization, gradient", dtype, kernel("normalize_gradient", normalization._GRADIENT, dtype)
        yield "normalization, parameters", dtype, kernel("column_sums", normalization._COLUMN_SUMS, dtype)
        yield "normalization, parts", dtype, kernel("add_parts", normalization._ADD_PARTS, dtype)
        for rule in update._RULES:
            yield rule.__name__, dtype, update._kernel(rule, dtype)
        yield "squares", dtype, kernel("squares", update._SQUARES, dtype)
        yield "look", dtype, kernel("look", guard._LOOK, dtype)
        yield "judge", dtype, kernel("judge", guard._JUDGE, dtype)
        yield "judge of a scale", dtype, kernel("judge_scale", guard._SCALE, dtype)
        yield "stage", dtype, kernel("stage", recording._STAGE, dtype)
        yield "deliver", dtype, kernel("deliver", recording._DELIVER, dtype)
    for size in recording._ELEMENTS:
        yield f"take rows of {size}-byte elements", "f", recording._taker(size)
