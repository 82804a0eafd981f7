"""A layer with a known error, to see that a check notices it."""

from __future__ import annotations

import numpy as np

from anyarray_linear import Device, Linear


class Spoiled(Linear):
    """A layer that adds `error` to one element of one output; `(name, index, error)`."""

    spoil: tuple = ("", (), 0.0)

    def _spoiled(self, name, x):
        if x is None or name != self.spoil[0]:
            return x
        device = Device.of(x)
        host = np.array(device.to_numpy(x))
        host[self.spoil[1]] += self.spoil[2]
        return device.asarray(host)

    def forward(self, X):
        Z, cache = super().forward(X)
        return self._spoiled("Z", Z), cache

    def gradients(self, dZ, cache, *, needs_dX=True):
        dX, gradients = super().gradients(dZ, cache, needs_dX=needs_dX)
        return self._spoiled("dX", dX), {p: self._spoiled(f"d{p}", g) for p, g in gradients.items()}
