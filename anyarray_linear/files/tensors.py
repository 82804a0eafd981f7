"""A model as names and tensors: PyTorch's names and shapes, and back into a model.

`0.weight` is the `W` of layer 0, `0.bias` its `b` as `(out,)`. A shared layer's are there under every position. States that
are arrays are among them; those that are Python ints are in the header, as PyTorch has no names for them.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.memory import explained_memory
from ..arrays.place import Array, dtype_name, is_array
from ..linear import Linear
from ..normalization import LayerNorm
from ..protocol import join, leaves, parameters, state_of, states
from ..sequential import Sequential
from .sealed import CheckpointError, Host, some

CURE = "free some first, or use another device"


def places_of(model: Any) -> dict[str, tuple[Any, str]]:
    """The layer and attribute behind every tensor of a file, by PyTorch's names; a shared layer's at every position."""
    positions = model.positions() if isinstance(model, Sequential) else leaves(model)
    return {join(path, _file_name(layer, p)): (layer, p) for path, layer in positions for p in _arrays_of(layer)}


def _arrays_of(layer: Any) -> list[str]:
    return [*layer.parameters(), *(s for s, value in state_of(layer).items() if is_array(value))]


def _file_name(layer: Any, p: str) -> str:
    return {"W": "weight", "b": "bias"}.get(p, p) if isinstance(layer, (Linear, LayerNorm)) else p


def _file_shape(layer: Any, p: str) -> tuple[int, ...]:
    shape = tuple(getattr(layer, p).shape)
    return shape[1:] if isinstance(layer, Linear) and p == "b" else shape


def shapes_of(model: Any) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of a file, by its name."""
    return {name: _file_shape(layer, p) for name, (layer, p) in places_of(model).items()}


def on_host(x: Array) -> Host:
    """`x` on the host and C-contiguous: safetensors' NumPy writer takes any other array's memory in the wrong order."""
    return np.asarray(Device.of(x).to_numpy(x), order="C")


def weights_of(model: Any, *, repeat_shared: bool = True) -> dict[str, Host]:
    """The tensors of a file; a shared layer's under each of its positions, or under the first one only."""
    places = places_of(model)
    if not repeat_shared:
        first = {(id(layer), p): name for name, (layer, p) in reversed(places.items())}
        places = {name: (layer, p) for name, (layer, p) in places.items() if first[id(layer), p] == name}
    return {name: on_host(getattr(layer, p)).reshape(_file_shape(layer, p)) for name, (layer, p) in places.items()}


def in_dtype(weights: Mapping[str, Host], dtype: str | None) -> dict[str, Host]:
    """The tensors, those of floats in `dtype`, if it is given; `ValueError` for a dtype that files do not have, and for
    numbers that are infinite only there."""
    if dtype is None:
        return dict(weights)
    if dtype not in ("float16", "float32", "float64"):
        raise ValueError(f'dtype is {dtype!r:.60}; it must be "float16", "float32" or "float64"')
    with np.errstate(over="ignore"):
        cast = {name: x.astype(dtype) if x.dtype.kind == "f" else x for name, x in weights.items()}
    lost = [name for name, x in cast.items() if not np.array_equal(np.isfinite(x), np.isfinite(weights[name]))]
    if lost:
        raise ValueError(f"{some(lost)} has numbers that are beyond {dtype}; write it in a wider dtype")
    return cast


def size_of(model: Any) -> int:
    """The bytes of the model's tensors in a file; of float16 as of float32, in which a checkpoint has their masters."""
    tensors = (getattr(layer, p) for layer, p in places_of(model).values())
    return sum(math.prod(W.shape) * max(4, np.dtype(dtype_name(W.dtype)).itemsize) for W in tensors)


def match(path: str | os.PathLike[str], weights: Mapping[str, Host], model: Any) -> list[tuple[Any, str, Host]]:
    """`(layer, attribute, tensor)` for all arrays of `model`; raises if any tensor is missing, unknown or unlike it."""
    places = places_of(model)
    unknown = [name for name in weights if name not in places]
    if unknown:
        raise CheckpointError(f"{path} has {some(unknown)}, but the model has {some(list(places)) or 'no parameters'}")
    names: dict[tuple[int, str], list[str]] = {}
    for name, (layer, p) in places.items():
        names.setdefault((id(layer), p), []).append(name)
    # torch writes a shared tensor once, under whichever of its names
    present = {name: [name for name in (name, *more) if name in weights] for name, *more in names.values()}
    missing = [name for name, found in present.items() if not found]
    if missing:
        raise CheckpointError(f"{path} lacks {some(missing)} of the model")
    matched = []
    for first, *copies in present.values():
        layer, p = places[first]
        check_tensor(path, first, weights[first], dtype_name(getattr(layer, p).dtype), _file_shape(layer, p))
        for other in copies:
            if weights[other].tobytes() != weights[first].tobytes():
                raise CheckpointError(f"{path}: {first} and {other} are one tensor in the model, but differ in the file")
        matched.append((layer, p, weights[first]))
    return matched


def check_tensor(path: str | os.PathLike[str], name: str, x: Host, dtype: str, shape: tuple[int, ...]) -> None:
    if x.shape != shape or x.dtype.name != dtype:
        raise CheckpointError(
            f"{path}: {name} is {x.dtype.name} of shape {x.shape} in the file, but the model needs {dtype} of shape {shape}"
        )


def placed(x: Host, like: Array) -> Array:
    """`x` in the shape of `like` and where that is."""
    return Device.of(like).asarray(x.reshape(tuple(like.shape)))


def placed_all(matched: list[tuple[Any, str, Host]]) -> list[tuple[Any, str, Array]]:
    """The tensors as arrays, all of them before any is assigned, as memory may run out."""
    return [(layer, p, placed(x, getattr(layer, p))) for layer, p, x in matched]


def assign(new: list[tuple[Any, str, Array]]) -> None:
    for layer, p, x in new:
        setattr(layer, p, x)


def numbers_of(model: Any) -> dict[str, dict[str, int]]:
    """What a file's header says of states that are Python ints: `{"state": {full name: int}}`, or nothing."""
    numbers = {name: operator.index(value) for name, value in states(model).items() if not is_array(value)}
    return {"state": numbers} if numbers else {}


def match_numbers(path: str | os.PathLike[str], info: Mapping[str, Any] | None, model: Any) -> list[tuple[Any, str, int]]:
    """`(layer, attribute, int)` for every such state of `model` that the file has; raises for what is no int."""
    found = {} if info is None else info.get("state", {})
    matched = []
    for name, layer in leaves(model):
        for s, value in state_of(layer).items():
            full = join(name, s)
            if not is_array(value) and full in found:
                if type(found[full]) is not int:
                    raise CheckpointError(f"{path}: the state {full} is {found[full]!r:.40}, where an int should be")
                matched.append((layer, s, found[full]))
    return matched


def memory_advice(model: Any) -> AbstractContextManager[None]:
    """A context in which running out of memory says what to change, where the model's parameters are."""
    first = next(iter(parameters(model).values()), np.empty(0))
    return explained_memory(Device.of(first), CURE)
