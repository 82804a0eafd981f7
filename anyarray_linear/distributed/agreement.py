"""The state that is equal on all ranks: sent from one to the others, and told from another by its digest."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..arrays.device import Device
from ..arrays.place import is_array
from ..protocol import parameters, restore, states


def sendable(model: Any, optimizer: Any) -> dict[str, Any]:
    """Weights, the layers' states and the optimizer's on the host, to be sent."""
    rule = optimizer.state_dict()
    moments = {name: {m: _host(x) for m, x in own.items()} for name, own in rule["moments"].items()}
    weights = {name: _host(x) for name, x in {**parameters(model), **states(model)}.items()}
    return {"weights": weights, "optimizer": {**rule, "moments": moments}}


def take_over(model: Any, optimizer: Any, sent: Mapping[str, Any]) -> None:
    """Be what `sendable` saw elsewhere."""
    optimizer.load_state_dict(sent["optimizer"])
    restore(model, sent["weights"])


def _host(x: Any) -> Any:
    return Device.of(x).to_numpy(x) if is_array(x) else x


def settings(x: Any) -> str:
    """What tells one loss from another of its class: its `repr`, and what it shows of numbers and texts."""
    shown = {name: value for name, value in sorted(getattr(x, "__dict__", {}).items()) if not name.startswith("_")}
    # machines differ in the last bits of what they compute
    numbers = {k: f"{v:.9g}" if isinstance(v, float) else v for k, v in shown.items() if isinstance(v, (int, float, str))}
    text, kind = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(x)), type(x).__name__
    return (text if kind in text else f"{kind}, a {text}") + (f" with {numbers}" if numbers else "")


def digest(model: Any, optimizer: Any, *more: Any) -> str:
    """The SHA-256 of weights, optimizer and whatever else has to be equal on all ranks."""
    import hashlib

    rule = optimizer.state_dict()
    found = hashlib.sha256(repr((rule["steps"], more)).encode())
    for name, W in parameters(model).items():  # a layer's state may be of its rank's rows
        for x in (W, *rule["moments"].get(name, {}).values()):
            found.update(np.ascontiguousarray(_host(x)).data)
    return found.hexdigest()
