"""Schedules: plain functions `step -> float`, checked where their definition fixes the value."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anyarray_linear import SGD, Adam, Linear
from anyarray_linear.schedules import cosine, linear_warmup, step_decay

lrs, counts = st.floats(1e-6, 10), st.integers(1, 200)


@given(lr=lrs, steps=counts)
def test_warmup_rises_in_equal_increments_to_lr_and_stays(lr, steps):
    schedule = linear_warmup(lr, steps)
    values = [schedule(step) for step in range(steps + 3)]
    assert values[0] == pytest.approx(lr / steps)
    assert np.diff(values[:steps]) == pytest.approx([lr / steps] * (steps - 1))
    assert values[steps - 1 :] == [lr] * 4


@given(lr=lrs, steps=st.integers(1, 100), final=st.floats(0, 1))
def test_cosine_goes_from_lr_to_final_symmetrically_and_stays(lr, steps, final):
    schedule = cosine(lr, steps, final=final)
    values = [schedule(step) for step in range(steps + 3)]
    assert values[0] == pytest.approx(lr)
    assert values[steps:] == [final] * 3
    # half a cosine is odd about its middle
    for step in range(steps + 1):
        assert values[step] + values[steps - step] == pytest.approx(lr + final)
    assert schedule(steps / 2) == pytest.approx((lr + final) / 2)
    steps_down = -np.diff(values) * (1 if lr >= final else -1)
    assert np.all(steps_down >= -1e-15)


@given(lr=lrs, warmup=st.integers(1, 50), rest=st.integers(1, 50))
def test_cosine_with_warmup_is_a_warmup_and_then_a_cosine(lr, warmup, rest):
    schedule, final = cosine(lr, warmup + rest, warmup=warmup, final=lr / 10), lr / 10
    rise, fall = linear_warmup(lr, warmup), cosine(lr, rest, final=final)
    assert [schedule(step) for step in range(warmup)] == [rise(step) for step in range(warmup)]
    assert [schedule(warmup + step) for step in range(rest + 2)] == [fall(step) for step in range(rest + 2)]
    assert schedule(warmup - 1) == lr
    assert schedule(warmup) == pytest.approx(lr)
    assert schedule(warmup + rest) == final


@given(lr=lrs, every=st.integers(1, 20), factor=st.floats(0.1, 1))
def test_step_decay_multiplies_once_every_so_many_steps(lr, every, factor):
    schedule = step_decay(lr, every, factor)
    for step in range(4 * every):
        power = step // every
        assert schedule(step) == pytest.approx(lr * math.prod([factor] * power))
    assert schedule(0) == schedule(every - 1) == lr


@pytest.mark.parametrize(
    "schedule",
    [
        cosine(np.float64(0.1), 10, warmup=2, final=np.float32(0.01)),
        linear_warmup(np.float64(0.1), np.int64(5)),
        step_decay(np.float32(0.1), 3, np.float64(0.5)),
        cosine(1, 10),
        linear_warmup(1, 2),
        step_decay(1, 2, 1),
    ],
)
def test_a_rate_is_a_Python_float_whatever_went_in(schedule):
    # a NumPy scalar would turn float32 parameters into float64 ones
    assert all(type(schedule(step)) is float for step in range(12))


@pytest.mark.parametrize("wrong", [0, -1, -0.5, math.nan])
def test_what_must_be_positive_is_refused_by_name(wrong):
    for name, make in {
        "lr": [lambda x: cosine(x, 10), lambda x: linear_warmup(x, 10), lambda x: step_decay(x, 10, 0.5)],
        "steps": [lambda x: cosine(0.1, x), lambda x: linear_warmup(0.1, x)],
        "every": [lambda x: step_decay(0.1, x, 0.5)],
        "factor": [lambda x: step_decay(0.1, 10, x)],
    }.items():
        for call in make:
            with pytest.raises(ValueError, match=f"^{name} is .*greater than 0"):
                call(wrong)


@pytest.mark.parametrize("warmup", [-1, 10, 11])
def test_a_warmup_that_leaves_no_step_for_the_cosine_is_refused(warmup):
    with pytest.raises(ValueError, match=r"^warmup is .*below steps = 10"):
        cosine(0.1, 10, warmup=warmup)


@pytest.mark.parametrize(
    "make",
    [
        lambda: cosine("a", 10), lambda: cosine(1.0, "b"), lambda: cosine(1.0, 10, warmup="c"), lambda: cosine(1.0, 10, final=None),
        lambda: cosine(True, 10), lambda: linear_warmup(None, 3), lambda: linear_warmup(1.0, [3]),
        lambda: step_decay("1", 2, 0.5), lambda: step_decay(1.0, 2, "half"), lambda: step_decay(1.0, {}, 0.5),
    ],
)  # fmt: skip
def test_what_is_no_number_is_refused_by_name(make):
    with pytest.raises(TypeError, match=r"^(lr|steps|warmup|final|every|factor) is .* must be a Python number"):
        make()


def test_a_rate_that_grows_beyond_all_numbers_is_infinite_and_refused_by_the_optimizer():
    assert step_decay(1, 1, 2)(2000) == step_decay(1.0, 1, 2.0)(2000) == math.inf
    optimizer = SGD(step_decay(1.0, 1, 2.0))
    optimizer.steps = 2000
    with pytest.raises(ValueError, match="lr is inf"):
        optimizer.step(Linear(1, 1), {"W": np.ones((1, 1)), "b": np.ones((1, 1))})


@pytest.mark.parametrize("schedule", [cosine(0.1, 10), cosine(0.1, 10, warmup=3), linear_warmup(0.1, 4), step_decay(0.1, 2, 0.5)])
def test_an_optimizer_with_a_schedule_can_be_pickled(schedule):
    copied = pickle.loads(pickle.dumps(Adam(schedule)))
    assert [copied.learning_rate(step) for step in range(12)] == [schedule(step) for step in range(12)]


def test_an_optimizer_asks_a_schedule_for_each_step_counted_from_zero():
    asked = []

    def schedule(step):
        asked.append(step)
        return 2.0**-step

    layer, optimizer = Linear.from_arrays(np.zeros((1, 1))), SGD(schedule)
    for _ in range(4):
        optimizer.step(layer, {"W": np.ones((1, 1))})
    assert asked == [0, 1, 2, 3]
    assert layer.W.item() == -(1 + 0.5 + 0.25 + 0.125)
    assert optimizer.learning_rate() == 2.0**-4
    assert optimizer.learning_rate(1) == 0.5


@pytest.mark.parametrize("rate", [math.nan, -0.1, math.inf, "0.1", None])
def test_a_schedule_that_gives_no_rate_is_refused_before_anything_changes(rate):
    layer, optimizer = Linear.from_arrays(np.ones((1, 1))), SGD(lambda step: rate)
    with pytest.raises((ValueError, TypeError), match=r"^lr is"):
        optimizer.step(layer, {"W": np.ones((1, 1))})
    assert layer.W.item() == 1
    assert optimizer.steps == 0
