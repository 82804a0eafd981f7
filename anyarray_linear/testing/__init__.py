"""Is a result right, to rounding? Answered with the theory of rounding errors instead of tuned tolerances.

Every output of a linear layer is a matrix product, and the computed product differs from the exact one, element by
element, by at most `gamma_n = n u / (1 - n u)` times the product of the absolute values; `n` is the number of terms summed
and `u` the unit roundoff (Higham, *Accuracy and Stability of Numerical Algorithms*, 2nd ed., 2002, ch. 3). With
`S_Z = |X| |W|^T + |b|` and so on:

    |Z  - Z_exact|  <= gamma_{in+1} (|X| |W|^T + |b|)         |dX - dX_exact| <= gamma_out |dZ| |W|
    |dW - dW_exact| <= gamma_N |dZ|^T |X|                     |db - db_exact| <= gamma_N 1^T |dZ|

This *hard limit* holds in any order of summation, with or without fused multiply-add, for any values. Rounding errors of
random data mostly cancel, so for those `4 sqrt(n + 2) u` in place of `gamma_n` is the *sharp gate* (Higham and Mary,
"A new approach to probabilistic rounding error analysis", SIAM J. Sci. Comput. 41, 2019). It is for seeded random data
only: structured data, such as one constant summed 65,536 times, breaks it legitimately. Details that the bounds include:

- float16: products are summed in float32, so `u = 2^-24` there, and each result is rounded to float16 (`2^-11`) once, or
  twice where a bias is added. That is nearly all of both bounds, and one rounding does not cancel with others: correct
  float16 results come near to 100 % of the sharp gate, where float32 and float64 stay below half;
- TF32 (`Device.tf32`): the operands of float32 products keep 11 bits, `u = 2^-11`. Both bounds allow for each being cut off,
  by up to `2 u`; however many are summed, these errors do not grow beyond that. `db` on CuPy is a sum, and is held to
  float32 with TF32 on, too;
- underflow, gradual or flushed to zero, as GPUs and XLA do it: an absolute term, far below anything else unless values are
  near the smallest normal number;
- overflow: where the product of absolute values leaves the range of the dtype, nothing is proven and the bound is `inf`;
- the reference's own rounding. It is computed from the same rounded inputs in float64, for float64 results in NumPy's
  `longdouble` (64 bits of precision on x86-64), and its bound by the same formula is added. Where `longdouble` is no
  wider than float64 (Windows, macOS on ARM), this doubles the bounds of float64 results.

>>> import numpy as np
>>> from anyarray_linear import Linear
>>> rng = np.random.default_rng(0)
>>> layer, X, dZ = Linear(20, 10, seed=0), rng.standard_normal((8, 20)), rng.standard_normal((8, 10))
>>> for result in assert_equivalent(layer, X, dZ, devices=["cpu"], sharp=True):
...     print(result.output, result.shape, result.sharp_share < 0.5)
Z (8, 10) True
dX (8, 20) True
dW (10, 20) True
db (1, 10) True
"""

from .bounds import gamma, linear_error_bounds, linear_reference, unit_roundoff
from .equivalence import Agreement, assert_equivalent, compare, usable_devices
from .gradients import adjoint_check, gradcheck
from .steps import StepAgreement, check_step

__all__ = [
    "Agreement",
    "StepAgreement",
    "adjoint_check",
    "assert_equivalent",
    "check_step",
    "compare",
    "gamma",
    "gradcheck",
    "linear_error_bounds",
    "linear_reference",
    "unit_roundoff",
    "usable_devices",
]
