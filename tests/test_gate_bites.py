"""An error of 1e-4 of an element's own scale does not pass the sharp gate: any element, any output, any backend."""

from __future__ import annotations

import numpy as np
import pytest
from spoiled import Spoiled

from anyarray_linear import Linear
from anyarray_linear.testing import assert_equivalent, compare, linear_error_bounds, linear_reference

RNG = np.random.default_rng(0)
X, W, b, dZ = (RNG.standard_normal(shape).astype(np.float32) for shape in ((48, 512), (24, 512), (1, 24), (48, 24)))
SCALE = linear_reference(*map(np.abs, (X, W, b, dZ)))
GATE = linear_error_bounds(X, W, b, dZ, sharp=True)


@pytest.mark.parametrize("output", ["Z", "dX", "dW", "db"])
def test_an_error_of_1e_4_of_its_scale_in_one_element_fails(backend, output):
    shape = SCALE[output].shape
    rng = np.random.default_rng(1)
    elements = [(0, 0), (shape[0] - 1, shape[1] - 1), *(tuple(map(int, rng.integers(shape))) for _ in range(4))]
    for element in elements:
        layer = Spoiled.from_arrays(backend.asarray(W), backend.asarray(b))
        layer.spoil = (output, element, 1e-4 * SCALE[output][element])
        where = rf"^{output}\[{element[0]}, {element[1]}\] on .*; 1 of \d+ elements are over it$"
        with pytest.raises(AssertionError, match=where):
            assert_equivalent(layer, X, dZ, [backend.device], sharp=True)


def test_the_same_error_in_every_other_element_would_fail_too(backend):
    # by arithmetic: the injected error, less the worst that the correct result is off, is over the gate everywhere
    correct = Linear.from_arrays(backend.asarray(W), backend.asarray(b))
    for agreement in compare(correct, X, dZ, backend.device, sharp=True):
        gate = GATE[agreement.output]
        assert np.all(1e-4 * SCALE[agreement.output] > gate * (1 + agreement.sharp_share))
