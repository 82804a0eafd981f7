"""The state that is equal on all ranks: sent from one to the others, and told from another by its digest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.place import is_array
from ..protocol import join, leaves, parameters, state_of, states


def sendable(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights, states and optimizer on the host, to be sent."""
    rule = optimizer.state_dict()
    moments = {name: {m: Device.of(x).to_numpy(x) for m, x in own.items()} for name, own in rule["moments"].items()}
    weights = {name: Device.of(W).to_numpy(W) for name, W in parameters(model).items()}
    return {"weights": weights, "states": sendable_states(model), "optimizer": {**rule, "moments": moments}}


def sendable_states(model: Any) -> dict[str, Any]:
    """The states of the layers, on the host."""
    return {name: Device.of(x).to_numpy(x) if is_array(x) else x for name, x in states(model).items()}


def adopt(model: Any, optimizer: Any, sent: Mapping[str, Any]) -> None:
    """Be what `sendable` saw elsewhere."""
    optimizer.load_state_dict(sent["optimizer"])
    for name, layer in leaves(model):
        for p, W in layer.parameters().items():
            setattr(layer, p, Device.of(W).asarray(sent["weights"][join(name, p)], dtype=W.dtype))
    adopt_states(model, sent["states"])


def adopt_states(model: Any, sent: Mapping[str, Any]) -> None:
    """Have the states that `sendable_states` saw elsewhere."""
    for name, layer in leaves(model):
        for s, here in state_of(layer).items():
            value = sent[join(name, s)]
            setattr(layer, s, Device.of(here).asarray(value, dtype=here.dtype) if is_array(here) else value)


def settings(x: Any) -> str:
    """What tells one loss from another of its class: its `repr`, and what it shows of numbers and texts."""
    shown = {name: value for name, value in sorted(getattr(x, "__dict__", {}).items()) if not name.startswith("_")}
    # machines differ in the last bits of what they compute
    numbers = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in shown.items() if isinstance(v, (int, float, str))}
    text, kind = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x)), type(x).__name__
    return (text if kind in text else f"{kind}, a {text}") + (f" with {numbers}" if numbers else "")


def digest(model: Any, optimizer: Any, *more: Any) -> str:
    """The SHA-256 of weights, states, optimizer and whatever else has to be equal on all ranks."""
    import hashlib

    state = sendable(model, optimizer)
    found = hashlib.sha256(repr((state["optimizer"]["steps"], more)).encode())
    for name, s in state["states"].items():
        found.update(repr((name, None if isinstance(s, np.ndarray) else s)).encode())
        if isinstance(s, np.ndarray):
            found.update(np.ascontiguousarray(s).data)
    for name, W in state["weights"].items():
        for x in (W, *state["optimizer"]["moments"].get(name, {}).values()):
            found.update(np.ascontiguousarray(x).data)
    return found.hexdigest()
