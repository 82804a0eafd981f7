"""Learning-rate schedules: functions `step -> float`, with steps counted from 0. Any function of that kind is one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

from .arrays.numbers import check_number, check_positive

Schedule = Callable[[int], float]


def linear_warmup(lr: float, steps: int) -> Schedule:
    """From `lr / steps` at step 0 in equal increments to `lr` at step `steps - 1`, and `lr` from then on.

    >>> [linear_warmup(1.0, 4)(step) for step in range(6)]
    [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    """
    check_positive("lr", lr)
    check_positive("steps", steps)
    return partial(_warmed_up, lr, steps)  # and no lambda: an optimizer with a schedule can be pickled


def _warmed_up(lr: float, steps: int, step: int) -> float:
    return float(lr * min(1.0, (step + 1) / steps))


def cosine(lr: float, steps: int, *, warmup: int = 0, final: float = 0.0) -> Schedule:
    """A linear warm-up over `warmup` steps, then half a cosine from `lr` to `final` at step `steps`, and `final` on.

    Without warm-up it is PyTorch's `CosineAnnealingLR(T_max=steps, eta_min=final)` up to step `steps`
    (Loshchilov and Hutter, 2016, "SGDR").

    >>> [round(cosine(1.0, 4)(step), 3) for step in range(6)]
    [1.0, 0.854, 0.5, 0.146, 0.0, 0.0]
    """
    check_positive("lr", lr)
    check_positive("steps", steps)
    check_number("final", final)
    check_number("warmup", warmup)
    if not 0 <= warmup < steps:
        raise ValueError(f"warmup is {warmup!r}; it must be from 0 to below steps = {steps!r}")
    return partial(_cosine, lr, steps, warmup, final)


def _cosine(lr: float, steps: int, warmup: int, final: float, step: int) -> float:
    if step < warmup:
        return _warmed_up(lr, warmup, step)
    progress = min(1.0, (step - warmup) / (steps - warmup))
    return float(final + (lr - final) * (1 + math.cos(math.pi * progress)) / 2)


def step_decay(lr: float, every: int, factor: float) -> Schedule:
    """`lr` times `factor` for every `every` steps done: PyTorch's `StepLR(step_size=every, gamma=factor)`.

    >>> [step_decay(1.0, 2, 0.5)(step) for step in range(5)]
    [1.0, 1.0, 0.5, 0.5, 0.25]
    """
    check_positive("lr", lr)
    check_positive("every", every)
    check_positive("factor", factor)
    return partial(_decayed, lr, every, factor)


def _decayed(lr: float, every: int, factor: float, step: int) -> float:
    try:
        return float(lr * float(factor) ** (step // every))
    except OverflowError:  # the optimizer refuses such a rate, and says so
        return math.inf
