"""Whether a step may be applied: decided on the device, where its loss and gradients are, and read once per epoch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .arrays.device import Device
from .arrays.place import Array, place_of
from .scaling import Verdict


class Guard:
    """Decides on the device which steps are applied, and remembers which one ended training.

    A step whose loss or gradients are not finite is called off. After more than `allowed` such steps, so is every later one;
    `fatal` is then that last straw's number, which the host reads once per epoch. A step whose scaled gradients overflowed,
    which a smaller scale will cure, is called off too, but is none of them, and its loss is summed.
    """

    def __init__(self, device: Device, loss_dtype: Any, allowed: int, bad: int = 0) -> None:
        self.allowed, self.device = allowed, device
        self.total: Any = 0.0  # sum of loss times rows over this epoch's steps that were not bad, and the rows
        self.rows: Any = 0
        self.bad: Any = bad
        self.fatal: Any = 0
        self.last_bad: Any = None  # a lane's: the last step that was not finite
        self.accumulator = None
        if device.kind not in ("cpu",):
            info = device.xp.__array_namespace_info__().dtypes(device=None if device.kind == "cuda" else device.native)
            self.accumulator = info.get("float64", info["float32"])

    def start_epoch(self, total: float = 0.0, rows: int = 0) -> None:
        self.total, self.rows = total, rows

    def judge(
        self, step: int, value: Array, gradients: Iterable[Array], rows: int, verdict: Verdict | None = None
    ) -> Array | None:
        """What `optimizer.step` takes as `where`; also adds the loss to the epoch's sum. Steps count from 1.

        verdict: what a `LossScale` finds of the step; the gradients are not looked at again then.
        """
        place = place_of(value)
        if place.reads_freely:
            return self._judge_now(step, value, gradients, rows, verdict)
        with place.entered() as xp:
            if isinstance(self.bad, int):  # the first step: from here on, the counts live on the device
                there = {"device": self.device.native}
                integer = xp.__array_namespace_info__().default_dtypes(**there)["integral"]
                self.bad, self.fatal = (xp.asarray(n, dtype=integer, **there) for n in (self.bad, self.fatal))
            if verdict is not None:
                return place.operation(booked)(xp, self, step, value, verdict.apply, verdict.overflow, rows)
            return place.operation(judged)(xp, self, step, value, gradients, rows)

    def _judge_now(
        self, step: int, value: Array, gradients: Iterable[Array], rows: int, verdict: Verdict | None
    ) -> Array | None:
        place, value = place_of(value), float(value)
        if verdict is not None:
            applied = self.decide(step, value, bool(verdict.apply), rows, excused=bool(verdict.overflow))
        else:
            finite = math.isfinite(value) and not self.fatal and all(place.run(all_finite, dW) for dW in gradients)
            applied = self.decide(step, value, finite, rows)
        return None if applied else place.xp.asarray(False, device=self.device.native)

    def decide(self, step: int, value: float, finite: bool, rows: int, *, excused: bool = False) -> bool:
        """Whether a step with this loss is applied, `finite` if it and all gradients are; keeps the books."""
        if (finite or excused) and not self.fatal:
            self.total += value * rows
            self.rows += rows
            return finite
        if not self.fatal:
            self.bad += 1
            self.fatal = step if self.bad > self.allowed else 0
        return False

    def read(self) -> tuple[float, int, int, int]:
        """`(total, rows, bad, fatal)` as Python numbers: the one wait for the device in an epoch."""
        if isinstance(self.total, float) and isinstance(self.bad, int):
            return self.total, self.rows, self.bad, self.fatal
        total, rows, bad, fatal = (
            float(self.device.to_numpy(x)) if hasattr(x, "dtype") else float(x)
            for x in (self.total, self.rows, self.bad, self.fatal)
        )
        return total, int(rows), int(bad), int(fatal)


def all_finite(xp: Any, x: Array) -> bool:
    """Whether no element is NaN or infinite."""
    # a sum is one pass and nearly always enough to know; it may overflow, though, where no element is infinite
    return math.isfinite(float(xp.sum(x))) or bool(xp.all(xp.isfinite(x)))


def judged(xp: Any, guard: Guard, step: int, value: Array, gradients: Iterable[Array], rows: int) -> Array:
    """Whether this step may be applied, a 0-d bool; brings the guard's sums and counts up to date, all on the device."""
    finite = xp.isfinite(value)
    for gradient in gradients:
        finite = finite & xp.all(xp.isfinite(gradient))
    return booked(xp, guard, step, value, finite, False, rows)


def booked(xp: Any, guard: Guard, step: int, value: Array, finite: Array, excused: Any, rows: int) -> Array:
    """Whether this step may be applied; enters it in the guard's books, excused if it is called off without being bad."""
    going = guard.fatal == 0
    counts = finite | excused
    guard.bad = guard.bad + xp.astype(going & ~counts, guard.bad.dtype)
    guard.fatal = xp.where(going & (guard.bad > guard.allowed), step, guard.fatal)
    going = guard.fatal == 0
    value = xp.astype(value, guard.accumulator) * float(rows)
    guard.total = guard.total + xp.where(counts & going, value, 0.0)
    guard.rows = guard.rows + xp.astype(counts & going, guard.bad.dtype) * rows
    return finite & going
