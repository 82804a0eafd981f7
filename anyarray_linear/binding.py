"""What binds an optimizer to one model: where its parameters are, their moments, and what the user assigned since.

A lane that updates in place needs arrays of its own to write to, since a user's arrays are never written: `Flat` keeps all
parameters of a model in one buffer, `layer.W` a view of it, and so with each moment. An assigned `layer.W` is noticed by
identity and copied in.

Of float16 parameters, the binding keeps float32 *masters* beside the moments, and as one of them: so whatever keeps, moves,
copies, sends or compares moments does so with masters too.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

from .arrays.checks import check_alike, check_shape, describe
from .arrays.device import Device
from .arrays.place import Array, Namespace, Place, computing_on, place_of
from .protocol import join, parameters, trained
from .scaling import is_half

Moments = dict[str, Array]
MASTER = "master"
"""What the float32 weights behind a float16 parameter are called among its moments."""
Slots = Mapping[str, tuple[Any, str]]
"""Where each parameter lives: by its full name, its layer and attribute."""


class Binding:
    """An optimizer's hold on a model, as the model was when the optimizer last looked.

    slots: the layer and attribute of each parameter, by its name. parameters: the arrays as the last step left them.
    place: that of all of them. moments: by parameter and name; `kept` are their names. flat: the buffers of a lane that
    updates in place, if any. is_half: whether the parameters are float16, and so have masters among their moments.
    """

    def __init__(self, model: Any, moment_names: Sequence[str]) -> None:
        self.model, self.moment_names = model, tuple(moment_names)
        self.leaves = trained(model)
        self.slots: Slots = {join(name, p): (layer, p) for name, layer in self.leaves for p in layer.parameters()}
        if not self.slots:
            raise ValueError(f"model is {model!r:.80}, which has no parameters to update")
        self.parameters = self.now()
        self.place: Place = place_of(self.parameters[0])
        first, *others = self.slots
        for name, W in zip(others, self.parameters[1:], strict=True):
            if place_of(W) is not self.place:
                check_alike(first, self.parameters[0], name, W)
        self.is_half = is_half(self.parameters[0])
        self.kept = (*self.moment_names, MASTER) if self.is_half else self.moment_names
        self.wide = self.place  # of moments, and of gradients that were summed in float32
        self.names = set(parameters(model))  # of frozen layers too
        self.moments: dict[str, Moments] = {}
        self.flat: Flat | None = None
        self.is_flat = False  # whether parameters and moments are views of `flat`, all of them
        self.switch_place: Place | None = None  # that of a `where` that was found to be right

    @classmethod
    def first(cls, model: Any, moment_names: Sequence[str], loaded: Mapping[str, Moments]) -> Binding:
        """The first binding to a model: moments are zero, or those of a loaded state, moved to where the parameters are.

        Raises `ValueError` for a state of another model.
        """
        new = cls(model, moment_names)
        every = parameters(model)
        if loaded and not new.slots.keys() <= loaded.keys() <= every.keys():
            raise ValueError(f"the loaded state is for {', '.join(loaded)}, but the model has {', '.join(every)}")
        for name, moments in loaded.items():
            W = every[name]
            there = Device.of(W)
            with computing_on(W) as xp:
                dtype = xp.float32 if new.is_half else W.dtype
            new.moments[name] = {m: there.asarray(x, dtype=dtype) for m, x in moments.items() if m in new.kept}
            for m, moment in new.moments[name].items():
                check_shape(f"the loaded {m} of {name}", moment, tuple(W.shape), "the shape of its parameter")
        new._complete_moments()
        return new

    def anew(self, moment_names: Sequence[str]) -> Binding:
        """The binding to the model as it is now, with these moments and buffers.

        Raises `ValueError` where they do not fit any more: other parameters, or of another shape or place.
        """
        new = Binding(self.model, moment_names)
        new.flat = self.flat
        every = parameters(self.model)
        if every.keys() != self.names:
            were, are = ", ".join(self.slots), ", ".join(every)
            raise ValueError(f"the model's parameters were {were} and now are {are}; make a new optimizer")
        for name, was in zip(self.slots, self.parameters, strict=True):
            W = every[name]
            if self.moment_names and (W.shape != was.shape or place_of(W) is not self.place):
                before, now = (f"{describe(x)}, {place_of(x).dtype_name} of shape {tuple(x.shape)}" for x in (was, W))
                raise ValueError(f"{name} was {before}, and now is {now}; make a new optimizer")
        new.moments = {name: dict(moments) for name, moments in self.moments.items()}
        for name, W in zip(new.slots, new.parameters, strict=True):  # a rule without moments takes any others
            own = new.moments.get(name, {})
            if MASTER in own and not (new.is_half and own[MASTER].shape == W.shape):
                del own[MASTER]
        new._complete_moments()
        return new

    def _complete_moments(self) -> None:
        """Zeros for every moment that is not there yet: at first for all, later for layers that were frozen."""
        for name, W in zip(self.slots, self.parameters, strict=True):
            own = self.moments.setdefault(name, {})
            with self.place.entered() as xp:
                like = xp.astype(W, xp.float32) if self.is_half else W
                own.update({m: xp.zeros_like(like) for m in self.moment_names if m not in own})
                if self.is_half:
                    own.setdefault(MASTER, like)
        if self.is_half:
            self.wide = place_of(like)

    def now(self) -> list[Array]:
        """The parameters, as the layers have them."""
        return [W for _, layer in self.leaves for W in layer.parameters().values()]

    def remember(self) -> None:
        """What the layers have now is what an update left."""
        self.parameters = self.now()

    def is_as_left(self, moment_names: Sequence[str]) -> bool:
        """Whether nothing was assigned since the last step: no parameter, no layer frozen or thawed, no other moments."""
        if trained(self.model) != self.leaves or moment_names != self.moment_names:
            return False
        now = self.now()
        return len(now) == len(self.parameters) and all(map(operator.is_, now, self.parameters))

    def assign(self, new: Mapping[str, tuple[Array, Moments]]) -> None:
        """Give every parameter and its moments their new arrays."""
        self.is_flat = False
        for name, (layer, p) in self.slots.items():
            W, moments = new[name]
            self.moments[name] = {**self.moments[name], **moments}
            setattr(layer, p, W)

    def check(self, gradients: Mapping[str, Array | None]) -> None:
        """Raise unless there is a gradient for each parameter, of its shape and place, and for nothing else."""
        if type(gradients) is dict and len(gradients) == len(self.slots):
            for name, W in zip(self.slots, self.parameters, strict=True):
                dW: Any = gradients.get(name)
                place = place_of(dW)
                if (place is not self.place and place is not self.wide) or dW.shape != W.shape:
                    break
            else:
                return
        self._explain(gradients)

    def _explain(self, gradients: Mapping[str, Array | None]) -> None:
        """Raise the error that says what is wrong with `gradients`, if anything is."""
        if not isinstance(gradients, Mapping):
            raise TypeError(f"grads is a {type(gradients).__name__}; pass the second result of model.gradients")
        missing = [name for name in self.slots if gradients.get(name) is None]
        if missing:
            raise ValueError(
                f"no gradient for {', '.join(missing)}; call model.backward first, or pass model.gradients' result"
            )
        if len(gradients) != len(self.slots):
            unknown = [name for name in gradients if name not in self.slots]
            raise ValueError(f"grads has {', '.join(unknown)}, but the parameters are {', '.join(self.slots)}")
        for name, W in zip(self.slots, self.parameters, strict=True):
            dW = gradients[name]
            if place_of(dW) is not self.wide:
                check_alike(f"the parameter {name}", W, f"the gradient of {name}", dW)
            check_shape(f"the gradient of {name}", dW, tuple(W.shape), "the shape of its parameter")


def up_to_date(xp: Namespace, master: Array, W: Array) -> Array:
    """The master of `W`: where the two do not agree, `W` was assigned, or written to, since the last step."""
    return xp.where(xp.astype(master, W.dtype) == W, master, xp.astype(W, master.dtype))


class Flat:
    """All parameters of a model in one buffer of the optimizer's own, `layer.W` a view of it, and so with each moment.

    W: the buffer of the parameters. moments: those of the moments, in the order of their names. master: that of the masters
    of float16 parameters, or `None`. slices, views: where each parameter is in the buffers, and the view of `W` that stands
    for it.
    align: every parameter starts at a multiple of so many elements; what is between them is zero.
    """

    def __init__(self, xp: Namespace, bound: Binding, align: int = 1) -> None:
        values = {name: getattr(layer, p) for name, (layer, p) in bound.slots.items()}
        self.kept = bound.kept
        self.slices: dict[str, slice] = {}
        size = 0
        for name, W in values.items():
            self.slices[name] = slice(size, size + W.size)
            size += -(-W.size // align) * align
        self.W, self.views = self._joined(xp, values, size)
        self.moments, self._moment_views = [], []
        for m in self.kept:
            flat, views = self._joined(xp, {name: bound.moments[name][m] for name in values}, size)
            self.moments.append(flat)
            self._moment_views.append(views)
        self.master = self.moments.pop() if bound.is_half else None

    def _joined(self, xp: Namespace, arrays: Mapping[str, Array], size: int) -> tuple[Array, dict[str, Array]]:
        """One array with a copy of all, and the view of it that stands for each."""
        flat = xp.zeros(size, dtype=next(iter(arrays.values())).dtype)
        views = {name: flat[self.slices[name]].reshape(x.shape) for name, x in arrays.items()}
        for name, x in arrays.items():
            views[name][...] = x
        return flat, views

    def has_moments_of(self, bound: Binding) -> bool:
        """Whether all moments are the views of the buffers still."""
        if bound.kept != self.kept:
            return False
        for m, views in zip(self.kept, self._moment_views, strict=True):
            for name, view in views.items():
                if bound.moments[name][m] is not view:
                    return False
        return True

    def adopt(self, xp: Namespace, bound: Binding) -> bool:
        """Copy in the parameters that the user has assigned, and make each `layer.W` a view of the buffer again.

        False if that cannot be, and the buffers have to be made anew: other parameters, or one that is itself a part of the
        buffer.
        """
        if bound.slots.keys() != self.slices.keys():
            return False
        assigned = [
            (layer, p, view)
            for (layer, p), view in zip(bound.slots.values(), self.views.values(), strict=True)
            if getattr(layer, p) is not view
        ]
        for layer, p, view in assigned:
            W = getattr(layer, p)
            if W.shape != view.shape or W.dtype != view.dtype or xp.may_share_memory(W, self.W):
                return False
        for layer, p, view in assigned:
            view[...] = getattr(layer, p)
            setattr(layer, p, view)
        return True

    def install(self, bound: Binding) -> None:
        """Make each `layer.W`, and each moment, a view of the buffers."""
        for name, (layer, p) in bound.slots.items():
            setattr(layer, p, self.views[name])
            own = {m: views[name] for m, views in zip(self.kept, self._moment_views, strict=True)}
            bound.moments[name] = {**bound.moments[name], **own}


def flat_of(xp: Namespace, bound: Binding, align: int = 1) -> Flat:
    """The optimizer's buffers, made at its first step, with every parameter of the model in them as it is now."""
    flat = bound.flat
    if flat is None or not (flat.has_moments_of(bound) and (bound.is_flat or flat.adopt(xp, bound))):
        flat = bound.flat = Flat(xp, bound, align)
        flat.install(bound)
    bound.is_flat = True
    return flat
