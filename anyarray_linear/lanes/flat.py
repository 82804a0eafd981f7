"""The flat buffers of an optimizer: all parameters of a model in one array, and each moment in another.

Lanes that update in place need arrays of their own to write to, since a user's arrays are never written. In one piece they
also take one call, or one kernel, for the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..arrays.place import Array, Namespace
from ..optimizers import Places


class Flat:
    """All parameters of a model in one buffer of the optimizer's own, `layer.W` a view of it, and so with each moment.

    align: every parameter starts at a multiple of so many elements; what is between them is zero.
    """

    def __init__(self, xp: Namespace, optimizer: Any, places: Places, align: int = 1) -> None:
        values = {name: getattr(layer, p) for name, (layer, p) in places.items()}
        self.slices: dict[str, slice] = {}
        size = 0
        for name, W in values.items():
            self.slices[name] = slice(size, size + W.size)
            size += -(-W.size // align) * align
        self.W, self.views = self._joined(xp, values, size)
        moments, self.moments = optimizer._moments, []
        for m in optimizer.moment_names:
            flat, views = self._joined(xp, {name: moments[name][m] for name in values}, size)
            self.moments.append(flat)
            for name, view in views.items():
                moments[name] = {**moments[name], m: view}
        self._adopted = dict(moments)

    def _joined(self, xp: Namespace, arrays: Mapping[str, Array], size: int) -> tuple[Array, dict[str, Array]]:
        """One array with a copy of all, and the view of it that stands for each."""
        flat = xp.zeros(size, dtype=next(iter(arrays.values())).dtype)
        views = {name: flat[self.slices[name]].reshape(x.shape) for name, x in arrays.items()}
        for name, x in arrays.items():
            views[name][...] = x
        return flat, views

    def adopt(self, xp: Namespace, optimizer: Any, places: Places) -> bool:
        """Make each `layer.W` a view of the buffer; one that the user has assigned is copied in first.

        False if that cannot be, and the buffers have to be made anew: a parameter has another shape or dtype, or is itself
        a part of the buffer, or the moments are no longer those in the buffers.
        """
        if any(optimizer._moments[name] is not moments for name, moments in self._adopted.items()):
            return False
        assigned = [(layer, p, view) for (layer, p), view in zip(places.values(), self.views.values(), strict=True)
                    if getattr(layer, p) is not view]
        for layer, p, view in assigned:
            W = getattr(layer, p)
            if W.shape != view.shape or W.dtype != view.dtype or xp.may_share_memory(W, self.W):
                return False
        for layer, p, view in assigned:
            view[...] = getattr(layer, p)
            setattr(layer, p, view)
        return True


def flat_of(xp: Namespace, optimizer: Any, places: Places, align: int = 1) -> Flat:
    """The optimizer's buffers, made at its first step, with every parameter of the model in them."""
    flat: Flat | None = getattr(optimizer, "_flat", None)
    if flat is None or not flat.adopt(xp, optimizer, places):
        flat = optimizer._flat = Flat(xp, optimizer, places, align)
        for name, (layer, p) in places.items():
            setattr(layer, p, flat.views[name])
    return flat
