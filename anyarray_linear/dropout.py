"""Dropout: in training, elements are set to zero at random and the others scaled up, so that no unit can rely on another.

Forward
-------
Each element is kept with probability `1 - rate` (Srivastava et al., 2014; scaled in training, as everywhere today):

    Z_i = K_i X_i / (1 - rate),  K_i in {0, 1}            E[Z_i] = X_i,  so that inference does nothing: Z = X

Backward
--------
`X_i` acts on the loss through `Z_i` alone, and `dZ_i/dX_i = K_i / (1 - rate)`:

    dX_i = K_i dZ_i / (1 - rate)

The mask
--------
`K` is a function of the seed, of the step (how many forward passes came before) and of the element's position. No random
state is carried along: a run that goes on from a file has the masks of one that never stopped, and every array library and
device gives the same ones, bit for bit. All arithmetic is on unsigned 32-bit integers, modulo 2^32:

    hash(x):   x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97;  x ^= x >> 15
    key:       a = 0;  for word in (seed mod 2^32, seed >> 32, step mod 2^32, step >> 32):  a = hash((a ^ word) + 0x9E3779B9)
               b = hash(a + 0x9E3779B9)               a rank r > 0 of a group has r as a fifth word
    element i: x = i + a                                  i counts in C order, modulo 2^32
               x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97
               x ^= b
               x ^= x >> 16;  x *= 0x21F0AAAD;  x ^= x >> 15;  x *= 0x735A2D97
               K_i = (x >> 8) >= round(rate 2^24)

The hash is one of the best of two multiplications that are known (C. Wellons, "Hash function prospector", 2018 to 2022), and
each element goes through two of its kind, with a key before each. For one seed, every step has another `b`, so the masks of
two steps are no shifted copies of each other. Both factors are below 2^31, so that signed 64-bit integers never overflow
where a library has no unsigned ones (torch).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from typing import Any, Self

from array_api_compat import is_torch_array

from .arrays.checks import check_float, check_shape, describe
from .arrays.numbers import real
from .arrays.place import Array, Namespace, device_of, place_of
from .initializers import layer_seed

FACTORS = 0x21F0AAAD, 0x735A2D97
GOLDEN = 0x9E3779B9
WORD = 0xFFFFFFFF

_counting = threading.Lock()  # one for all layers: it is held for an addition, and layers are to be copied and pickled


class Dropout:
    """In training `Z = K X / (1 - rate)`, with each element of `K` 0 with probability `rate`, else 1; in inference `Z = X`.

    rate: from 0 to below 1, in steps of 2^-24. seed: an int, a NumPy `SeedSequence` or `Generator` (which hands each layer
    its next child), or `None`. Layers of one int seed have the same masks, so give several of them different ones.

    `forward` is training and `layer(X)` inference. The mask is that of the seed and of the number of forward passes before,
    the same on every backend; both are the layer's `state()`, so that files and checkpoints go on exactly. The attribute
    `seed` is an int, and `step` that number; either may be assigned.

    `forward` may run in many threads: no two get the same mask, but which gets which is not said. Traced by `jax.jit` it is
    traced with one mask for good; trace `layer(X)` instead.

    Raises `TypeError` or `ValueError` for a rate or seed that is not as above.

    >>> import numpy as np
    >>> layer, X = Dropout(0.5, seed=0), np.ones(8)
    >>> Z, cache = layer.forward(X)
    >>> Z, layer.gradients(X, cache)[0]
    (array([2., 2., 0., 2., 2., 2., 2., 2.]), array([2., 2., 0., 2., 2., 2., 2., 2.]))
    >>> layer(X)
    array([1., 1., 1., 1., 1., 1., 1., 1.])
    """

    stream: int = 0
    """Which of several streams of masks: in a group, `fit` gives each rank the one of its number."""

    def __init__(self, rate: float, seed: Any = None) -> None:
        self.rate = real("rate", rate, below=1.0)
        self.seed = _seed_number(seed)
        self.step = 0

    def forward(self, X: Array) -> tuple[Array, dict[str, Array]]:
        """`Z`, of the shape, dtype and device of `X`, and the cache: the mask `K`. `TypeError` for an `X` of integers."""
        check_float("X", X)
        step = count_pass(self)
        Z, K = place_of(X).run(dropped, X, self.rate, *mask_key(self.seed, step, self.stream))
        return Z, {"K": K}

    def gradients(
        self, dZ: Array, cache: Mapping[str, Array], *, needs_dX: bool = True
    ) -> tuple[Array | None, dict[str, Array]]:
        """`(dX, {})`, or `(None, {})` without `needs_dX`; raises for a `dZ` that does not fit the cache."""
        if not isinstance(cache, Mapping) or "K" not in cache:
            raise TypeError(f'cache is {describe(cache)} without "K"; pass the second result of this layer\'s forward')
        K = cache["K"]
        check_float("dZ", dZ)
        check_shape("dZ", dZ, tuple(K.shape), "the shape of Z")
        if not needs_dX:
            return None, {}
        return place_of(dZ).run(dropped_gradient, dZ, K, self.rate), {}

    def backward(
        self, dZ: Array, cache: Mapping[str, Array], *, accumulate: bool = False, needs_dX: bool = True
    ) -> Array | None:
        """`dX`; there are no parameters, so nothing is stored."""
        return self.gradients(dZ, cache, needs_dX=needs_dX)[0]

    def parameters(self) -> dict[str, Array]:
        """`{}`."""
        return {}

    def state(self) -> dict[str, int]:
        """`{"seed": ..., "step": ...}`: with both, another layer goes on with the masks that this one would have."""
        return {"seed": self.seed, "step": self.step}

    def config(self) -> dict[str, Any]:
        """`{"rate": rate}`."""
        return {"rate": self.rate}

    def to(self, device: Any = None, dtype: Any = None) -> Self:
        """A layer that goes on as this one would; it computes where its input is."""
        layer = object.__new__(type(self))
        layer.__dict__.update(self.__dict__)
        return layer

    def __call__(self, X: Array) -> Array:
        """`X` itself: nothing is dropped in inference."""
        check_float("X", X)
        return X

    def __repr__(self) -> str:
        return f"Dropout({self.rate})"


def _seed_number(seed: Any) -> int:
    """The seed as an int below 2^63, which files can hold: an int of that size itself, and a draw from any other seed."""
    child = layer_seed(seed)
    if isinstance(child.entropy, int) and seed is not None and not child.spawn_key and child.entropy < 1 << 63:
        return child.entropy
    low, high = (int(word) for word in child.generate_state(2))
    return low | (high >> 1) << 32


def count_pass(layer: Dropout, by: int = 1) -> int:
    """How many forward passes of the layer came before; from now on, so many more."""
    with _counting:
        step = layer.step
        layer.step = step + by
    return step


def threshold(rate: float) -> int:
    """What the upper 24 bits of an element's word have to reach for the element to be kept."""
    return round(rate * (1 << 24))


def mask_key(seed: int, step: int, stream: int = 0) -> tuple[int, int]:
    """`(a, b)`: what the words of one mask are made with; a `stream` other than 0 is one more word of the key.

    >>> [hex(word) for word in mask_key(0, 0)]
    ['0x7f889c4e', '0x423477d0']
    """
    a = 0
    for word in (seed & WORD, seed >> 32, step & WORD, step >> 32, *([stream] if stream else [])):
        a = _hashed((a ^ word) + GOLDEN & WORD)
    return a, _hashed(a + GOLDEN & WORD)


def _hashed(x: int) -> int:
    x ^= x >> 16
    x = x * FACTORS[0] & WORD
    x ^= x >> 15
    x = x * FACTORS[1] & WORD
    return x ^ x >> 15


def keep_mask(xp: Namespace, like: Array, rate: float, a: int, b: int) -> Array:
    """`K` of the shape of `like` and where that is, in bool: which elements are kept."""
    signed = is_torch_array(like)
    word = xp.int64 if signed else xp.uint32

    def constant(value: int) -> Any:
        # JAX takes no Python int of 32 bits beside an array of words, and for others a Python int costs no transfer
        return value if value < 1 << 31 or signed or not xp.__name__.startswith("jax") else xp.asarray(value, dtype=word)

    def cut(x: Array) -> Array:
        return x & WORD if signed else x

    x = xp.arange(math.prod(like.shape), dtype=word, device=device_of(like))
    x = cut(x + constant(a))
    x = _half(x, cut)
    x = _half(x ^ constant(b), cut)
    return xp.reshape(x >> 8 >= threshold(rate), like.shape)


def _half(x: Array, cut: Any) -> Array:
    """The two multiplications of the hash, each after a shift."""
    x = cut((x ^ x >> 16) * FACTORS[0])
    return cut((x ^ x >> 15) * FACTORS[1])


def dropped(xp: Namespace, X: Array, rate: float, a: int, b: int) -> tuple[Array, Array]:
    """`Z = K X / (1 - rate)`, and the mask `K`."""
    K = keep_mask(xp, X, rate, a, b)
    return dropped_gradient(xp, X, K, rate), K


def dropped_gradient(xp: Namespace, dZ: Array, K: Array, rate: float) -> Array:
    """`dX = K dZ / (1 - rate)`: what forward does, too."""
    return xp.where(K, dZ * (1 / (1 - rate)), 0.0)  # not dZ * K, which makes a NaN of an infinite dZ
