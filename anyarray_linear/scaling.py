"""Loss scaling: what keeps float16 gradients from underflowing, decided on the device.

The smallest float16 is 6e-8, and most gradients of a network are smaller than those of its loss. So the gradient of the loss
is formed in float32, multiplied by a scale, and only then rounded to float16; the way back through the layers is linear, so
each parameter's gradient comes out multiplied by it, and the optimizer divides, in float32. Where that was too much, a
gradient is infinite: the step is called off and the scale halved. After many good steps it is doubled (Micikevicius et al.,
2017). The scale is a power of two, which changes no bit of a number that it neither overflows nor underflows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from .arrays.device import Device
from .arrays.dtypes import wide
from .arrays.numbers import real, whole
from .arrays.place import Array, Namespace, place_of
from .protocol import stored_gradients

LARGEST = 2.0**126
"""No scale is larger: its reciprocal is a normal number still."""


class Verdict(NamedTuple):
    """What `LossScale.judge` finds of a step, all 0-d arrays on the device.

    apply: whether loss and gradients are finite. overflow: whether only the gradients are not, and a smaller scale may cure
    it: such a step is called off, but it is not a bad one. scale: by what the gradients are too large.
    """

    apply: Array
    overflow: Array
    scale: Array


class LossScale:
    """The scale of a float16 model's loss, which finds its own size. `TrainingStep` and `fit` have one without being asked.

    initial: the scale at first. growth: what it is multiplied by after `interval` good steps in a row. backoff: what it is
    multiplied by when gradients overflow. floor: its smallest value; gradients that overflow there are bad. All but
    `interval` are powers of two. The defaults are those of PyTorch's `GradScaler`, the floor aside.

    scale, good: the scale, and the good steps in a row since it last changed: Python numbers before the first step, and 0-d
    arrays on the model's device from then on; `read()` gives them as numbers, and waits for the device.

    In a loop by hand, `scaled` stands for the two calls of the loss, and `step` for that of the optimizer:

    >>> import numpy as np
    >>> from anyarray_linear import SGD, Linear, LossScale, MeanSquaredError
    >>> model, loss, optimizer, scale = Linear(1, 1, seed=0), MeanSquaredError(), SGD(0.5), LossScale()
    >>> X = np.linspace(-1, 1, 8).reshape(-1, 1)
    >>> for _ in range(50):
    ...     Z, cache = model.forward(X)
    ...     value, dZ = scale.scaled(loss, Z, 3 * X)
    ...     _, gradients = model.gradients(dZ, cache, needs_dX=False)
    ...     scale.step(optimizer, model, gradients)
    >>> float(value) < 1e-6, scale.read()
    (True, (65536.0, 50))

    Raises `ValueError` for numbers out of range.
    """

    def __init__(
        self,
        initial: float = 2.0**16,
        *,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        floor: float = 1.0,
    ) -> None:
        self.floor = _power_of_two("floor", floor, 2.0**-100, LARGEST)
        self.initial = _power_of_two("initial", initial, self.floor, LARGEST)
        self.growth = _power_of_two("growth", growth, 2.0, 2.0**24)
        self.backoff = _power_of_two("backoff", backoff, 2.0**-24, 0.5)
        self.interval = whole("interval", interval)
        self.scale: Any = self.initial
        self.good: Any = 0

    def scaled(self, loss: Any, Z: Array, target: Array, weights: Array | None = None) -> tuple[Array, Array]:
        """The loss of outputs `Z`, a 0-d array, and its gradient by `Z`, times the scale and in the dtype of `Z`.

        loss, target, weights: as for `loss.forward`. For a float16 `Z` the loss is computed, and returned, in float32.
        """
        value, dZ = value_and_gradient(loss, Z, target, weights)
        return value, self.times(dZ, Z.dtype)

    def times(self, dZ: Array, dtype: Any) -> Array:
        """`dZ` times the scale, rounded to `dtype` only then."""
        self._move_to(dZ)
        with place_of(dZ).entered() as xp:
            return xp.astype(dZ * xp.astype(self.scale, dZ.dtype, copy=False), dtype, copy=False)

    def step(self, optimizer: Any, model: Any, grads: Mapping[str, Array] | None = None) -> None:
        """`optimizer.step(model, grads)` with scaled gradients: called off where any is not finite. The scale learns of it.

        Raises as `optimizer.step` does, before anything is changed.
        """
        gradients = stored_gradients(model) if grads is None else grads
        if hasattr(optimizer, "bind"):  # which raises for what does not fit; an optimizer of the user's own may have none
            optimizer.bind(model, gradients)
        verdict = self.judge(None, gradients.values())
        optimizer.step(model, gradients, where=verdict.apply, scale=verdict.scale)

    def judge(self, value: Array | None, gradients: Iterable[Array]) -> Verdict:
        """Whether a step may be applied, by its loss, if given, and its scaled gradients; brings the scale up to date.

        Raises `ValueError` where there are no gradients.
        """
        gradients = list(gradients)
        if not gradients:
            raise ValueError("there are no gradients, so no parameters to update; set trainable = True on layers to train")
        place = self._move_to(gradients[0])
        with place.without_graph(), place.entered():
            verdict: Verdict = place.run(scale_judged, self, value, gradients)
        return verdict

    def _move_to(self, x: Array) -> Any:
        """Have scale and count where `x` is; returns the place of `x`."""
        here, place = place_of(self.scale), place_of(x)
        if here.xp is not place.xp or here.device != place.device:
            scale, good = self.read()
            with place.entered() as xp:
                self.scale = xp.full((), scale, dtype=xp.float32, device=place.device)
                self.good = xp.full((), good, dtype=xp.int32, device=place.device)
        return place

    def read(self) -> tuple[float, int]:
        """`(scale, good)` as Python numbers, which waits for the device."""
        scale, good = (Device.of(x).to_numpy(x) if hasattr(x, "dtype") else x for x in (self.scale, self.good))
        return float(scale), int(good)

    def state_dict(self) -> dict[str, Any]:
        """`{"scale", "good"}` as Python numbers, which waits for the device."""
        return dict(zip(("scale", "good"), self.read(), strict=True))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Raises `ValueError` for what it cannot have given, and changes nothing then."""
        if not isinstance(state, Mapping) or not {"scale", "good"} <= state.keys():
            raise ValueError(f"state is {state!r:.80}; pass what state_dict gave")
        scale, good = state["scale"], state["good"]
        scale = _power_of_two("the loaded scale", scale, min(self.floor, LARGEST), LARGEST)
        if isinstance(good, bool) or not isinstance(good, int) or not 0 <= good < 2**31:
            raise ValueError(f"the loaded count of good steps is {good!r:.60}; it must be an int >= 0")
        self.scale, self.good = scale, good

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **self.state_dict()}

    def __repr__(self) -> str:
        defaults = {"initial": 2.0**16, "growth": 2.0, "backoff": 0.5, "interval": 2000, "floor": 1.0}
        options = (f"{name}={getattr(self, name)}" for name, usual in defaults.items() if getattr(self, name) != usual)
        return f"LossScale({', '.join(options)})"


def _power_of_two(name: str, value: Any, low: float, high: float) -> float:
    number = real(name, value)
    if math.frexp(number)[0] != 0.5 or not low <= number <= high:
        raise ValueError(
            f"{name} is {value!r}; it must be a power of two, by which to multiply is exact, from {low:g} to {high:g}"
        )
    return number


def is_half(x: Array) -> bool:
    """Whether `x` is float16, and so needs a scale in training."""
    return place_of(x).dtype_name == "float16"


def value_and_gradient(loss: Any, Z: Array, target: Array, weights: Array | None) -> tuple[Array, Array]:
    """The loss and its gradient by `Z`; of a float16 `Z`, both in float32."""
    if is_half(Z):
        with place_of(Z).entered() as xp:
            Z, target, weights = (x if x is None else wide(xp, x) for x in (Z, target, weights))
    value, cache = loss.forward(Z, target) if weights is None else loss.forward(Z, target, weights)
    return value, loss.backward(cache)


def scale_judged(xp: Namespace, scale: LossScale, value: Array | None, gradients: list[Array]) -> Verdict:
    """The verdict on a step, and the scale and count of good steps after it, all on the device."""
    known = xp.isfinite(scale.scale if value is None else value)
    finite = known
    for gradient in gradients:
        finite = finite & xp.all(xp.isfinite(gradient))
    before, good = scale.scale, xp.where(finite, scale.good + 1, 0)
    grown, shrunk = before * scale.growth, before * scale.backoff
    grows = good >= scale.interval
    larger = xp.where(grows & (grown <= LARGEST), grown, before)
    smaller = xp.where(known, xp.where(shrunk > scale.floor, shrunk, scale.floor), before)
    scale.scale = xp.where(finite, larger, smaller)
    scale.good = xp.astype(xp.where(grows, 0, good), xp.int32, copy=False)
    return Verdict(finite, known & ~finite & (before > scale.floor), before)
