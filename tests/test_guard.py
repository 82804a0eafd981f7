"""The guard calls off a step for one bad number anywhere in loss or gradients, and for nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from anyarray_linear import SGD, Linear, NonFiniteError, ReLU, Sequential, SoftmaxCrossEntropy, fit, lanes
from anyarray_linear.arrays.place import place_of
from anyarray_linear.guard import Guard, all_finite

BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf], ids=str)
SHAPES = ((1, 5), (5, 3), (257, 300), (3,))  # the third beyond the blocks that lanes work in


def verdict(backend, value, gradients, allowed=0, step=1):
    """Whether the step is applied, and the guard."""
    guard = Guard(backend.device, None, allowed)
    value, gradients = backend.asarray(value, "float32"), [backend.asarray(dW, "float32") for dW in gradients]
    where = guard.judge(step, value, gradients, 4)
    return where is None or bool(backend.to_numpy(where)), guard


def ones():
    return [np.ones(shape, np.float32) for shape in SHAPES]


@BAD
@pytest.mark.parametrize("which", range(len(SHAPES)))
def test_one_bad_element_in_one_gradient_calls_the_step_off(backend, which, bad):
    for at in (0, -1, ones()[which].size // 2):
        gradients = ones()
        gradients[which].flat[at] = bad
        applied, guard = verdict(backend, 0.5, gradients, step=7)
        assert not applied
        assert guard.read() == (0.0, 0, 1, 7)


def test_one_bad_element_among_so_many_that_a_thread_looks_at_several_calls_the_step_off(backend):
    for at in (0, 700_000, -1):
        dW = np.ones(1_100_000, np.float32)
        dW[at] = np.nan
        assert not verdict(backend, 0.5, [np.ones(3), dW])[0]


@BAD
def test_a_bad_loss_calls_the_step_off(backend, bad):
    applied, guard = verdict(backend, bad, ones())
    assert not applied
    assert guard.read() == (0.0, 0, 1, 1)


@pytest.mark.filterwarnings("ignore:.*encountered in reduce:RuntimeWarning")  # NumPy says so, too
def test_numbers_whose_sum_overflows_are_finite(backend):
    gradients = [np.full(shape, 3e38, np.float32) for shape in SHAPES]
    applied, guard = verdict(backend, 0.5, gradients)
    assert applied
    assert guard.read() == (2.0, 4, 0, 0)


@pytest.mark.filterwarnings("ignore:.*encountered in reduce:RuntimeWarning")
def test_infinities_that_cancel_out_are_seen(backend):
    gradients = ones()
    gradients[2][0, 0], gradients[2][-1, -1] = np.inf, -np.inf
    assert not verdict(backend, 0.5, gradients)[0]


def test_as_many_bad_steps_as_are_allowed_are_passed_over_and_the_next_ends_all(backend):
    guard = Guard(backend.device, None, 2)
    good, bad = backend.asarray(0.5, "float32"), backend.asarray(np.nan, "float32")
    applied = []
    for step, value in enumerate((good, bad, bad, good, bad, good), 1):
        where = guard.judge(step, value, [backend.asarray([1.0], "float32")], 4)
        applied.append(where is None or bool(backend.to_numpy(where)))
    assert applied == [True, False, False, True, False, False]
    assert guard.read() == (4.0, 8, 3, 5)


@BAD
@pytest.mark.parametrize("switch", [lanes.off, None], ids=["portable", "lane"])
def test_one_element_in_many_is_enough_for_all_finite(bad, switch):
    x = np.ones(10_001, np.float32)
    place = place_of(x)
    for at in (0, 5000, -1):
        y = x.copy()
        y[at] = bad
        if switch is None:
            assert (place.run(all_finite, x), place.run(all_finite, y)) == (True, False)
        else:
            with switch():
                assert (place.run(all_finite, x), place.run(all_finite, y)) == (True, False)


class OneBad(Linear):
    """A layer whose gradient has one NaN in its third backward pass."""

    passes = 0

    def gradients(self, dZ, cache, *, needs_dX=True):
        dX, grads = super().gradients(dZ, cache, needs_dX=needs_dX)
        self.passes += 1
        if self.passes == 3:
            where = np.zeros(tuple(grads["W"].shape))
            where[1, 1] = np.nan
            grads["W"] = grads["W"] + self.device.asarray(where, dtype=self.dtype)
        return dX, grads


def test_fit_ends_with_the_weights_from_before_the_step_and_its_number(backend):
    rng = np.random.default_rng(0)
    X, y = backend.asarray(rng.normal(size=(40, 3)), "float32"), backend.asarray(rng.integers(0, 2, 40))
    model = Sequential(Linear(3, 4, seed=0), ReLU(), Linear(4, 2, seed=1)).to(backend.device, "float32")
    twin = Sequential(model[0].to(), ReLU(), model[2].to())
    with backend.computing():
        bad = OneBad.from_arrays(twin[2].W, twin[2].b)
    options = {"loss": SoftmaxCrossEntropy(), "batch_size": 8, "progress": False, "seed": 0}
    with pytest.raises(NonFiniteError) as ended:
        fit(Sequential(twin[0], ReLU(), bad), X, y, optimizer=SGD(0.1), epochs=2, **options)
    assert ended.value.step == 3
    counted = []

    class TwoSteps:
        def is_set(self):
            counted.append(None)
            return len(counted) == 2

    fit(model, X, y, optimizer=SGD(0.1), epochs=1, stop=TwoSteps(), **options)
    for ours, expected in ((twin[0].W, model[0].W), (bad.W, model[2].W)):
        np.testing.assert_array_equal(backend.to_numpy(ours), backend.to_numpy(expected))
