"""An architecture as JSON: which layers a model has, and which of them are one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ..arrays.device import Device
from ..linear import Linear
from ..protocol import join
from ..sequential import Sequential
from .sealed import CheckpointError, Host

_ACTIVATIONS = {kind.__name__: kind for kind in (ReLU, Tanh, Sigmoid, SiLU, GELU)}


def architecture_of(model: Any) -> dict[str, Any]:
    """What `built` builds the model from; a layer that stands at several positions is `same_as` at all but the first."""
    first: dict[int, str] = {}

    def described(layer: Any, path: str) -> dict[str, Any]:
        if type(layer) is Sequential:
            return {"type": "Sequential", "layers": [described(inner, join(path, str(i))) for i, inner in enumerate(layer)]}
        if first.setdefault(id(layer), path) != path:
            return {"same_as": first[id(layer)]}
        kind = type(layer).__name__
        if type(layer) is Linear:
            sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
            return {"type": kind, **sizes, "bias": layer.b is not None}
        return {"type": kind, **vars(layer)} if _ACTIVATIONS.get(kind) is type(layer) else {"type": kind, "custom": True}

    return described(model, "")


def built(spec: Mapping[str, Any], path: str, weights: Mapping[str, Host], place: Device, made: dict[str, Any]) -> Any:
    """The model of a file on `place`; `made` has the layers so far by their position."""
    if "same_as" in spec:
        return made[spec["same_as"]]
    kind = spec["type"]
    layer: Any
    if kind == "Sequential":
        inner = enumerate(spec["layers"])
        return Sequential(*(built(each, join(path, str(i)), weights, place, made) for i, each in inner))
    if kind == "Linear":
        sizes, W = (spec["out_features"], spec["in_features"]), weights[join(path, "weight")]
        if W.shape != sizes:
            raise CheckpointError(f"{join(path, 'weight')} has shape {W.shape}, but the layer is {shown(spec)}")
        dtype = place.dtype(W.dtype.name)
        arrays = [W, weights[join(path, "bias")]] if spec["bias"] else [W]
        layer = Linear.from_arrays(*(place.asarray(x, dtype) for x in arrays))
    elif kind in _ACTIVATIONS and not spec.get("custom"):
        layer = _ACTIVATIONS[kind](**{name: value for name, value in spec.items() if name != "type"})
    else:
        raise CheckpointError(
            f"layer {path or 'of the file'} is {shown(spec)}, which only the code that defines it can build; "
            "build the model and fill it: load_model(path, into=model)"
        )
    made[path] = layer
    return layer


def described_size(spec: Mapping[str, Any], path: str, sizes: dict[str, float]) -> float:
    """The most bytes that the tensors of an architecture have; infinite where only the caller's code knows.

    sizes: those of the layers so far by their position.
    """
    if "same_as" in spec:
        return sizes[spec["same_as"]]
    if spec["type"] == "Sequential":
        inner = enumerate(spec["layers"])
        return math.fsum(described_size(each, join(path, str(i)), sizes) for i, each in inner)
    sizes[path] = math.inf if spec.get("custom") else 0
    if spec["type"] == "Linear":
        sizes[path] = 8 * (spec["in_features"] + 1) * float(spec["out_features"])
    return sizes[path]


def first_difference(theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str) -> str:
    """Where two architectures differ first, in words, or `""`."""
    if theirs.get("type") == ours.get("type") == "Sequential" and len(theirs["layers"]) == len(ours["layers"]):
        inner = enumerate(zip(theirs["layers"], ours["layers"], strict=True))
        return next(filter(None, (first_difference(a, b, join(path, str(i))) for i, (a, b) in inner)), "")
    if theirs == ours:
        return ""
    return f"{f'layer {path}' if path else 'it'} is {shown(theirs)} in the file and {shown(ours)} here"


def shown(spec: Mapping[str, Any]) -> str:
    if "same_as" in spec:
        return f"the layer at {spec['same_as']} again"
    if "layers" in spec:
        return f"a Sequential of {len(spec['layers'])}"
    return f"{spec.get('type')}({', '.join(f'{k}={v}' for k, v in spec.items() if k not in ('type', 'custom'))})"
