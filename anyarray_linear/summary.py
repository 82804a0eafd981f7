"""What a model is made of, as a table: its layers, their outputs, parameters, device and bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from .arrays.device import Device
from .arrays.place import dtype_name, is_array
from .protocol import leaves, state_of

_HEAD = ("layer", "", "output", "parameters", "bytes", "device")


def summary(model: Any) -> str:
    """The table of a layer or container, as text; a line per layer, and the sums.

    A layer that stands at several positions counts once. `(frozen)` marks layers whose parameters are not trained. The last
    axis of an output is known of this library's layers, and of others that have `out_features`.
    """
    positions = model.positions() if hasattr(model, "positions") else leaves(model)
    lines, totals = [_HEAD], [0, 0, 0]
    seen: dict[int, str] = {}
    for (name, layer), width in zip(positions, _widths(layer for _, layer in positions), strict=True):
        if id(layer) in seen:
            lines.append((name, f"{type(layer).__name__} (that of {seen[id(layer)]} again)", width, "", "", ""))
            continue
        seen[id(layer)] = name
        arrays = list(layer.parameters().values())
        count = sum(math.prod(W.shape) for W in arrays)
        kept = [*arrays, *(x for x in state_of(layer).values() if is_array(x))]
        size = sum(math.prod(x.shape) * np.dtype(dtype_name(x.dtype)).itemsize for x in kept)
        is_frozen = bool(arrays) and not getattr(layer, "trainable", True)
        totals = [totals[0] + count, totals[1] + size, totals[2] + (count if is_frozen else 0)]
        device = str(Device.of(kept[0])) if kept else ""
        kind = type(layer).__name__ + (" (frozen)" if is_frozen else "")
        lines.append((name, kind, width, f"{count:,}" if count else "", f"{size:,}" if size else "", device))
    frozen = f", {totals[2]:,} of them frozen" if totals[2] else ""
    end = f"{totals[0]:,} parameters{frozen}; {totals[1]:,} bytes"
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    right = {3, 4}  # numbers
    rows = ("  ".join(x.rjust(w) if i in right else x.ljust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
            for line in lines)  # fmt: skip
    return "\n".join([*(row.rstrip() for row in rows), end])


def _widths(layers: Iterator[Any]) -> Iterator[str]:
    """The outputs of layers in a row, as far as they are known."""
    known = "?"
    for layer in layers:
        own = getattr(layer, "out_features", getattr(layer, "features", None))
        if own is not None:
            known = str(own)
        elif layer.parameters() or not type(layer).__module__.startswith(__package__):
            known = "?"  # somebody's own layer
        yield f"(..., {known})"
