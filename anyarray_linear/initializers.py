"""Initial weights, drawn on the host in float64, so that one seed gives bit-identical weights on every backend.

No random numbers exist in the Array API standard, and no two libraries draw the same ones from one seed. So all are drawn
by a NumPy `Generator` on the host, then cast and transferred. `W` and `b` have a stream each (children 0 and 1 of the
layer's seed), so changing a layer's size or init shifts no other numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.random import Generator, SeedSequence

Initializer = Callable[["Generator", tuple[int, int]], Any]


def _normal(gain: float, fans: Callable[[int, int], float]) -> Initializer:
    """Normal with variance `gain / fans(out_features, in_features)`."""

    def draw(rng: Generator, shape: tuple[int, int]) -> Any:
        return rng.standard_normal(shape) * math.sqrt(gain / fans(*shape))

    return draw


def _uniform(gain: float, fans: Callable[[int, int], float]) -> Initializer:
    """Uniform on `[-a, a]` with the same variance, which is `a**2 / 3`."""

    def draw(rng: Generator, shape: tuple[int, int]) -> Any:
        bound = math.sqrt(3 * gain / fans(*shape))
        return rng.uniform(-bound, bound, shape)

    return draw


def _fan_in(out_features: int, in_features: int) -> float:
    return in_features


def _fan_mean(out_features: int, in_features: int) -> float:
    return (in_features + out_features) / 2


INITIALIZERS: dict[str, Initializer] = {
    # He et al. (2015), "Delving deep into rectifiers": a ReLU halves the second moment, the factor 2 restores it
    "he_normal": _normal(2, _fan_in),
    "he_uniform": _uniform(2, _fan_in),
    # Glorot and Bengio (2010), "Understanding the difficulty of training deep feedforward neural networks"
    "xavier_normal": _normal(1, _fan_mean),
    "xavier_uniform": _uniform(1, _fan_mean),
    # LeCun et al. (1998), "Efficient BackProp"
    "lecun_normal": _normal(1, _fan_in),
    # torch.nn.Linear.reset_parameters: kaiming_uniform_(a=sqrt(5)), which is uniform on +-1/sqrt(in_features)
    "pytorch": _uniform(1 / 3, _fan_in),
    "zeros": lambda rng, shape: np.zeros(shape),
}


def initializer(init: str | Initializer) -> Initializer:
    """The function `(rng, shape) -> ndarray` that a name stands for, or `init` itself if it is one already."""
    if callable(init):
        return init
    if not isinstance(init, str):
        raise TypeError(f"init is a {type(init).__name__}; give a name or a function (rng, shape) -> ndarray")
    try:
        return INITIALIZERS[init]
    except KeyError:
        raise ValueError(f"init is {init!r}; the names are {', '.join(INITIALIZERS)}") from None


def layer_seed(seed: int | SeedSequence | Generator | None) -> SeedSequence:
    """The seed of one layer. A `Generator` or `SeedSequence` hands out its next child, an int always the same seed."""
    from numpy.random import Generator, SeedSequence

    if isinstance(seed, Generator):
        sequence = getattr(seed.bit_generator, "seed_seq", None)
        if sequence is None or not hasattr(sequence, "spawn"):  # as of a RandomState
            raise TypeError(
                f"seed is a Generator over a {type(seed.bit_generator).__name__} that hands out no children, as it was made "
                "without a SeedSequence; give numpy.random.default_rng(number)"
            )
        return sequence.spawn(1)[0]  # type: ignore[no-any-return]
    if isinstance(seed, SeedSequence):
        return seed.spawn(1)[0]
    if seed is None:
        return SeedSequence()
    try:
        number = None if isinstance(seed, (bool, np.bool_)) else operator.index(seed)
    except TypeError:
        number = None
    if number is None or number < 0:
        raise (TypeError if number is None else ValueError)(
            f"seed is {seed!r}; give an int >= 0, a numpy SeedSequence or Generator, or None"
        )
    return SeedSequence(number)


def draw_parameters(
    init: str | Initializer, shape: tuple[int, int], *, bias: bool, seed: int | SeedSequence | Generator | None
) -> tuple[Any, Any]:
    """Float64 host arrays `W` of `shape` `(out_features, in_features)`, and `b` of `(1, out_features)` or `None`."""
    draw = initializer(init)
    for_W, for_b = (np.random.default_rng(child) for child in layer_seed(seed).spawn(2))
    W = np.asarray(draw(for_W, shape))
    if W.dtype.kind not in "fiub":
        raise TypeError(f"init returned an array of {W.dtype}; weights are real numbers")
    W = W.astype(np.float64, copy=False)
    if W.shape != shape:
        raise ValueError(f"init returned an array of shape {W.shape}; it must have {shape}, (out_features, in_features)")
    if not bias:
        return W, None
    out_features, in_features = shape
    if init == "pytorch":  # the only one of these that draws the bias too
        bound = 1 / math.sqrt(in_features)
        return W, for_b.uniform(-bound, bound, (1, out_features))
    return W, np.zeros((1, out_features))
