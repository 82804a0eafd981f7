"""An architecture as JSON: which layers a model has, and which of them are one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

from ..activations import GELU, ReLU, Sigmoid, SiLU, Tanh
from ..arrays.device import Device
from ..arrays.place import is_array
from ..dropout import Dropout
from ..linear import Linear
from ..normalization import LayerNorm
from ..protocol import join, leaves, state_of
from ..sequential import Sequential
from .sealed import CheckpointError, Host, as_json

_OURS: dict[str, type] = {kind.__name__: kind for kind in (ReLU, Tanh, Sigmoid, SiLU, GELU, Dropout, LayerNorm)}


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
        config = as_json(f"the config() of {kind}", layer.config()) if callable(getattr(layer, "config", None)) else None
        if _OURS.get(kind) is type(layer):
            options = {name: value for name, value in vars(layer).items() if name != "trainable"}
            return {"type": kind, **(options if config is None else config)}
        return {"type": kind, "custom": True} if config is None else {"type": kind, "custom": True, "config": config}

    return described(model, "")


def built(
    spec: Mapping[str, Any],
    path: str,
    weights: Mapping[str, Host],
    place: Device,
    made: dict[str, Any],
    classes: Mapping[str, type],
) -> Any:
    """The model of a file on `place`; `made` has the layers so far by their position, `classes` the caller's own."""
    if "same_as" in spec:
        return made[spec["same_as"]]
    kind = spec["type"]
    layer: Any
    if kind == "Sequential":
        inner = enumerate(spec["layers"])
        return Sequential(*(built(each, join(path, str(i)), weights, place, made, classes) for i, each in inner))
    if kind == "Linear":
        sizes, W = (spec["out_features"], spec["in_features"]), weights[join(path, "weight")]
        if W.shape != sizes:
            raise CheckpointError(f"{join(path, 'weight')} has shape {W.shape}, but the layer is {shown(spec)}")
        dtype = place.dtype(W.dtype.name)
        arrays = [W, weights[join(path, "bias")]] if spec["bias"] else [W]
        layer = Linear.from_arrays(*(place.asarray(x, dtype) for x in arrays))
    elif kind == "LayerNorm" and not spec.get("custom"):
        W = weights[join(path, "weight")]
        if W.shape != (spec["features"],):
            raise CheckpointError(f"{join(path, 'weight')} has shape {W.shape}, but the layer is {shown(spec)}")
        layer = LayerNorm(spec["features"], spec["eps"], dtype=W.dtype.name, device=place)
        layer.W, layer.b = (place.asarray(weights[join(path, p)], W.dtype.name) for p in ("weight", "bias"))
    elif kind in _OURS and not spec.get("custom"):
        layer = _OURS[kind](**{name: value for name, value in spec.items() if name != "type"})
    elif kind in classes and "config" in spec:
        layer = _filled(classes[kind](**spec["config"]), path, weights, place)
    else:
        given = f"classes=[{kind}]" if "config" in spec else "into=model"
        raise CheckpointError(
            f"layer {path or 'of the file'} is {shown(spec)}, which only the code that defines it can build; "
            f"{'give its class' if 'config' in spec else 'build the model and fill it'}: load_model(path, {given})"
        )
    made[path] = layer
    return layer


def _filled(layer: Any, path: str, weights: Mapping[str, Host], place: Device) -> Any:
    """A layer of the caller's own on `place`, in the dtype and with the arrays that the file has for it."""
    states = (s for s, value in state_of(layer).items() if is_array(value))
    own = {p: weights[join(path, p)] for p in (*layer.parameters(), *states)}
    dtype = next((x.dtype.name for x in own.values() if x.dtype.kind == "f"), None)
    layer = layer.to(place, dtype)
    for p, x in own.items():
        setattr(layer, p, place.asarray(x))
    return layer


def warn_of_what_is_not_kept(model: Any) -> None:
    """Warn of layers of the caller's own with arrays or random generators that no file keeps, as `state()` has them not."""
    for name, layer in leaves(model):
        if type(layer) is Linear or _OURS.get(type(layer).__name__) is type(layer):
            continue
        kept = {*layer.parameters(), *state_of(layer)}
        kept |= {f"d{p}" for p in kept}
        lost = [a for a, x in getattr(layer, "__dict__", {}).items() if a not in kept and (is_array(x) or _is_random(x))]
        if lost:
            entries = ", ".join(f'"{a}": self.{a}' for a in lost)
            warnings.warn(
                f"{', '.join(lost)} of layer {name or 'of the model'}, a {type(layer).__name__}, will be in no file. What "
                f"changes in training is lost then, and a resumed training does not go on exactly; give the layer def state("
                f"self): return {{{entries}}} (arrays, and ints such as the number of draws of a random generator)",
                RuntimeWarning,
                stacklevel=3,
            )


def _is_random(x: Any) -> bool:
    return hasattr(x, "bit_generator") or type(x).__name__ in ("RandomState", "Random")


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
    if spec["type"] == "LayerNorm":
        sizes[path] = 16 * float(spec["features"])
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
