"""A value together with a bound on the error of computing it: what any implementation may differ by, and no more.

The bounds are those of `anyarray_linear.testing` (Higham 2002, ch. 3), carried from operation to operation: an operand that is
off by `e` moves the result by what the operation makes of `e`, and each operation adds its own roundings. The value itself
is computed in float64; its own roundings are added to the bound, so for float64 results the bound is doubled, not lost.
"""

from __future__ import annotations

import numpy as np

from anyarray_linear.testing import gamma, unit_roundoff

# No library promises a bound for its exp and tanh. This is what the bounds of activations take for granted: errors of up to 16
# units in the last place of a value that is at most 1 in size.
ULPS = 16


class Rounded:
    """`value`, which an implementation in `dtype` has to within `error`; numbers that are given are exact."""

    def __init__(self, value, error=0.0, dtype="float32"):
        self.value, self.dtype = np.asarray(value, dtype=np.float64), dtype
        self.error = np.broadcast_to(np.asarray(error, dtype=np.float64), self.value.shape)
        self.u = unit_roundoff(dtype)

    @property
    def most(self):
        return np.abs(self.value) + self.error

    def _made(self, value, carried, size, n=1):
        """A result of `n` roundings of sums of the given `size`, and in float16 of a float32 sum rounded once."""
        sums_in = unit_roundoff("float32") if self.dtype == "float16" else self.u
        own = gamma(n, sums_in) + (self.u * 2 if self.dtype == "float16" else 0) + gamma(n, 2**-53)
        smallest = float(np.finfo(self.dtype).smallest_normal) * (n + 1)
        return Rounded(value, (carried + own * size + smallest) * (1 + 1e-6), self.dtype)

    def __matmul__(self, other):
        carried = self.most @ other.error + self.error @ np.abs(other.value)
        return self._made(self.value @ other.value, carried, self.most @ other.most, self.value.shape[-1] + 1)

    def __add__(self, other):
        return self._made(self.value + other.value, self.error + other.error, self.most + other.most)

    def __sub__(self, other):
        return self + Rounded(-other.value, other.error, other.dtype)

    def __mul__(self, other):
        carried = self.most * other.error + self.error * np.abs(other.value)
        return self._made(self.value * other.value, carried, self.most * other.most, 2)

    @property
    def T(self):
        return Rounded(self.value.T, self.error.T, self.dtype)

    def relu(self):
        return Rounded(np.maximum(self.value, 0), self.error, self.dtype)

    def smooth(self, function, slope):
        """An activation whose derivative is at most `slope` in size, and whose value at most `1 + |X|`."""
        return self._made(function(self.value), slope * self.error, (1 + self.most) * ULPS)

    def share(self, computed):
        """The worst error of `computed`, as a share of the bound."""
        computed = np.asarray(computed, dtype=np.float64)
        assert computed.shape == self.value.shape
        return float((np.abs(computed - self.value) / self.error).max())
