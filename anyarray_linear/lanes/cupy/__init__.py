"""The CuPy lane: as few kernels as the mathematics allows, no wait for the device, and no copy to or from the host.

What a small step costs on a GPU is the number of kernels that it launches. So each formula that the portable definition
spells as several array operations is one kernel here. Kernels compute in float32 for float16 arrays, sum in a fixed order
(no atomics: equal inputs give equal bits), and are launched on the current device and stream, which the callers make that of
the arrays. They hold no memory between calls, so any number of threads and streams may use them at once.
"""

from ...activations import activation, activation_gradient
from ...dropout import dropped, dropped_gradient
from ...guard import booked, judged
from ...linear import affine, affine_gradients, input_gradient
from ...losses import cross_entropy, cross_entropy_gradient, squared_error, squared_error_gradient
from ...normalization import normalized, normalized_gradients, normalized_input_gradient
from ...optimizers import apply_update
from ...scaling import scale_judged
from ...step import training_step, training_step_on_rows
from . import activations, captured, dropout, guard, losses, normalization, products, update

OPERATIONS = {
    affine: products.forward,
    affine_gradients: products.backward,
    input_gradient: products.input_gradient,
    activation: activations.activation,
    activation_gradient: activations.activation_gradient,
    dropped: dropout.dropped,
    dropped_gradient: dropout.dropped_gradient,
    normalized: normalization.normalized,
    normalized_gradients: normalization.normalized_gradients,
    normalized_input_gradient: normalization.normalized_input_gradient,
    cross_entropy: losses.cross_entropy,
    cross_entropy_gradient: losses.cross_entropy_gradient,
    squared_error: losses.squared_error,
    squared_error_gradient: losses.squared_error_gradient,
    apply_update: update.apply,
    judged: guard.judged,
    booked: guard.booked,
    scale_judged: guard.scale_judged,
    training_step: captured.step,
    training_step_on_rows: captured.step_on_rows,
}
"""The portable operations, and their faster equals for CuPy arrays."""
