"""The CuPy lane: as few kernels as the mathematics allows, no wait for the device, and no copy to or from the host.

What a small step costs on a GPU is the number of kernels that it launches. So each formula that the portable definition
spells as several array operations is one kernel here. Kernels compute in float32 for float16 arrays, sum in a fixed order
(no atomics: equal inputs give equal bits), and are launched on the current device and stream, which the callers make that of
the arrays. They hold no memory between calls, so any number of threads and streams may use them at once.
"""

from .activations import activation, activation_gradient
from .guard import judged
from .losses import cross_entropy, cross_entropy_gradient, squared_error
from .products import backward, forward
from .update import apply

__all__ = [
    "activation", "activation_gradient", "apply", "backward", "cross_entropy", "cross_entropy_gradient", "forward", "judged",
    "squared_error",
]  # fmt: skip
