"""The check of a whole training step: right ones pass on every backend, and it sees what would be wrong with one."""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear import SGD, Device, MeanSquaredError, TrainingStep
from anyarray_linear.testing import check_step, steps


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_step_is_within_what_rounding_can_make(backend, dtype):
    device = Device.of(backend.asarray(np.ones(1, "float32")))
    if dtype == "float16" and device.kind not in ("cuda", "torch"):
        pytest.skip("has no float16")
    found = check_step(device, dtype)
    assert found.complaint == ""
    assert 0 < found.share < 1
    assert (found.device, found.dtype) == (str(device), dtype)


@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 300, 1), (300, 1, 40), (33, 65, 17)], ids=str)
def test_steps_of_any_shape_are_within_it(shape):
    rows, in_features, out_features = shape
    assert check_step(rows=rows, in_features=in_features, out_features=out_features, seed=3).complaint == ""


class Skipping(TrainingStep):
    """Takes all steps but the last one."""

    def __call__(self, X, y, weights=None):
        return super().__call__(X, y) if self.number < steps.STEPS - 1 else None


class Twice(TrainingStep):
    """Takes the last step twice."""

    def __call__(self, X, y, weights=None):
        for _ in range(2 if self.number == steps.STEPS - 1 else 1):
            super().__call__(X, y)


class Spoiling(TrainingStep):
    """One element of the weights is off by some thirty roundings."""

    def __call__(self, X, y, weights=None):
        super().__call__(X, y)
        W = self.model.W.copy()
        W[3, 4] += 2.0**-18
        self.model.W = W


class NotANumber(TrainingStep):
    def __call__(self, X, y, weights=None):
        super().__call__(X, y)
        b = self.model.b.copy()
        b[0, 0] = np.nan
        self.model.b = b


@pytest.mark.parametrize("fault", [Skipping, Twice, Spoiling, NotANumber])
def test_a_wrong_step_is_seen(fault, monkeypatch):
    monkeypatch.setattr(steps, "TrainingStep", fault)
    found = check_step("cpu", "float32")
    assert "cpu (float32) is off by" in found.complaint
    assert not found.share <= 1


def test_another_rule_or_loss_is_seen(monkeypatch):
    monkeypatch.setattr(steps, "SGD", lambda lr: SGD(0.9999 * lr))
    assert check_step().complaint
    monkeypatch.setattr(steps, "SGD", SGD)
    assert not check_step().complaint

    class Doubled(MeanSquaredError):
        def backward(self, cache):
            return 2 * super().backward(cache)

    monkeypatch.setattr(steps, "MeanSquaredError", Doubled)
    assert check_step().complaint


@pytest.mark.parametrize("backend", ["cupy:0", "cupy:1"], indirect=True)
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_on_cupy_the_step_that_is_checked_is_the_captured_one(backend, dtype):
    assert check_step(backend.name.replace("cupy", "cuda"), dtype).how == "captured"
