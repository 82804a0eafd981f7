"""float16 models train: float32 masters, and a loss scale that finds its size on the device."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from running_error import Rounded
from tampered import resealed

from anyarray_linear import (
    SGD,
    Adam,
    AdamW,
    CheckpointError,
    Dropout,
    EarlyStopping,
    LayerNorm,
    Linear,
    LossScale,
    MeanSquaredError,
    NonFiniteError,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    TrainingStep,
    evaluate,
    fit,
    lanes,
    load_checkpoint,
    load_model,
    restore,
    save_checkpoint,
    save_model,
    snapshot,
)
from anyarray_linear.arrays.place import computing_on, dtype_name
from anyarray_linear.datasets import load_digits
from anyarray_linear.distributed.group import Group
from anyarray_linear.files import sealed
from anyarray_linear.guard import Guard
from anyarray_linear.protocol import parameters
from anyarray_linear.training.parts import divided, in_parts

load_file = pytest.importorskip("safetensors.numpy").load_file
half = pytest.mark.parametrize("backend", ["torch", "cupy:0", "cupy:1"], indirect=True)
RULES = {
    "sgd": lambda: SGD(0.05, momentum=0.9, weight_decay=1e-3),
    "adam": lambda: Adam(1e-2),
    "adamw clipped": lambda: AdamW(1e-2, clip_norm=0.5),
}
every_rule = pytest.mark.parametrize("rule", RULES)


def network(backend, dtype="float16"):
    return Sequential(Linear(6, 16, seed=0), ReLU(), Linear(16, 3, seed=1)).to(backend.device, dtype)


def batch(backend, seed=0, rows=8, dtype="float16"):
    rng = np.random.default_rng(seed)
    return backend.asarray(rng.standard_normal((rows, 6)), dtype), backend.asarray(rng.integers(0, 3, rows))


def state(backend, model, optimizer, scale=None):
    """Everything that training goes on from, as bytes."""
    kept = {(name, m): x for name, own in optimizer.moments().items() for m, x in own.items()}
    found = {key: backend.to_numpy(x).tobytes() for key, x in {**parameters(model), **kept}.items()}
    return found if scale is None else {**found, "scale": scale.read()}


def masters(backend, optimizer):
    return {name: backend.to_numpy(own["master"]) for name, own in optimizer.moments().items()}


def half_of(backend, x):
    return backend.to_numpy(x).astype(np.float16)


# ----------------------------------------------------------------------------------------------------------------------
# what scaling is for


def tiny(backend):
    """A layer of zeros, and a batch whose `dZ` is 2^-25 everywhere: half of the smallest float16, which rounds to 0."""
    layer = Linear(2, 512, bias=False, init="zeros", dtype="float16", device=backend.device)
    X, y = np.ones((256, 2)), np.full((256, 512), -(2.0**-9))  # dZ = 2 * 2^-9 / (256 * 512)
    return layer, backend.asarray(X, "float16"), backend.asarray(y, "float16")


@half
@pytest.mark.parametrize("by", ["a training step", "fit", "microbatches", "hand"])
def test_a_gradient_that_is_0_in_float16_is_right_when_scaled(backend, by):
    layer, X, y = tiny(backend)
    loss, optimizer = MeanSquaredError(), SGD(2.0**10)
    options = {"loss": loss, "optimizer": optimizer, "epochs": 1, "batch_size": 256, "progress": False}
    if by == "a training step":
        TrainingStep(layer, loss, optimizer)(X, y)
    elif by == "hand":
        scale = LossScale()
        Z, cache = layer.forward(X)
        value, dZ = scale.scaled(loss, Z, y)
        assert (dtype_name(dZ.dtype), dtype_name(value.dtype)) == ("float16", "float32")
        layer.backward(dZ, cache)
        scale.step(optimizer, layer)
    else:
        fit(layer, X, y, microbatches=2 if by == "microbatches" else 1, **options)
    # dW is the sum of 256 times 2^-25, all exact
    np.testing.assert_array_equal(half_of(backend, layer.W), np.full((512, 2), -(2.0**-7)))


@half
def test_without_a_scale_or_with_one_that_comes_too_late_that_gradient_is_0(backend):
    layer, X, y = tiny(backend)
    Z, cache = layer.forward(X)
    _, kept = MeanSquaredError().forward(Z, y)
    dZ = MeanSquaredError().backward(kept)
    with backend.computing():
        late = dZ * backend.asarray(2.0**15, "float16")
    for each in (dZ, late):
        _, gradients = layer.gradients(each, cache)
        assert not np.any(backend.to_numpy(gradients["W"]))


@half
def test_updates_that_are_too_small_for_float16_add_up(backend):
    layer, optimizer = Linear.from_arrays(backend.asarray([[1.0]], "float16")), SGD(1.0)
    dW = backend.asarray([[2.0**-14]], "float16")
    for _ in range(32):  # 1 - 2^-14 is 1 in float16
        optimizer.step(layer, {"W": dW})
    assert float(backend.to_numpy(layer.W)[0, 0]) == 1 - 32 * 2.0**-14


# ----------------------------------------------------------------------------------------------------------------------
# overflow, recovery, floor, growth


@half
@every_rule
def test_a_step_that_overflows_changes_nothing_and_halves_the_scale(backend, rule):
    model, optimizer, scale = network(backend), RULES[rule](), LossScale(2.0**40)
    guard = Guard(backend.device, None, 0)
    step = TrainingStep(model, SoftmaxCrossEntropy(), optimizer, guard=guard, loss_scale=scale)
    X, y = batch(backend)
    before = {name: half_of(backend, W) for name, W in parameters(model).items()}
    overflows = 0
    while True:
        value = step(X, y)
        if scale.read()[1]:
            break
        overflows += 1
        assert scale.read() == (2.0 ** (40 - overflows), 0)
        for name, W in parameters(model).items():
            np.testing.assert_array_equal(half_of(backend, W), before[name])
            for m, moment in optimizer.moments()[name].items():
                expected = before[name].astype(np.float32) if m == "master" else np.zeros_like(before[name])
                np.testing.assert_array_equal(backend.to_numpy(moment), expected)
    assert 15 < overflows < 40
    assert scale.read() == (2.0 ** (40 - overflows), 1)
    assert any(np.any(half_of(backend, W) != before[name]) for name, W in parameters(model).items())
    total, rows, bad, fatal = guard.read()  # an overflow is no bad step, and its loss counts
    assert (rows, bad, fatal) == (8 * (overflows + 1), 0, 0)
    assert total == pytest.approx(8 * (overflows + 1) * float(backend.to_numpy(value)))


@half
def test_training_that_overflowed_at_first_is_that_with_the_right_scale_from_the_start(backend):
    # with SGD, steps that are called off leave no trace, and scales are powers of two
    def trained(scale, steps):
        model, optimizer = network(backend), SGD(0.1, momentum=0.9)
        step = TrainingStep(model, SoftmaxCrossEntropy(), optimizer, loss_scale=scale)
        for i in range(steps):
            step(*batch(backend, seed=max(0, i + 10 - steps)))
        return state(backend, model, optimizer)

    first = LossScale(2.0**30)
    probe = TrainingStep(network(backend), SoftmaxCrossEntropy(), SGD(0.1), loss_scale=first)
    called_off = -1
    while not first.read()[1]:
        probe(*batch(backend))
        called_off += 1
    assert called_off > 5
    assert trained(LossScale(2.0**30), 10 + called_off) == trained(LossScale(2.0 ** (30 - called_off)), 10)


def hopeless(backend):
    """A layer and a batch with a finite loss whose gradient is beyond float16 even unscaled: 2 * 60,000 * 2."""
    layer = Linear.from_arrays(backend.asarray([[1.0]], "float16"))
    return layer, backend.asarray([[60000.0]], "float16"), backend.asarray([[0.0]], "float16")


@half
@pytest.mark.parametrize("allowed", [0, 2])
def test_gradients_that_overflow_at_the_floor_are_bad(backend, allowed):
    layer, X, y = hopeless(backend)
    scale = LossScale(8.0)  # 8, 4 and 2 can be halved, 1 is the floor
    with pytest.raises(NonFiniteError, match=r"gradients that are not finite for W") as error:
        fit(layer, X, y, loss=MeanSquaredError(), optimizer=SGD(1e-9), epochs=1000, skip_nonfinite=allowed, progress=False,
            batch_size=1, loss_scale=scale)  # fmt: skip
    assert error.value.step == 4 + allowed
    assert scale.read()[0] == 1.0
    assert float(backend.to_numpy(layer.W)[0, 0]) == 1.0


@half
def test_a_floor_of_ones_own_is_reached_by_any_backoff(backend):
    layer, X, y = hopeless(backend)
    scale = LossScale(2.0**5, backoff=2.0**-3, floor=2.0**-1)
    step = TrainingStep(layer, MeanSquaredError(), SGD(1.0), loss_scale=scale)
    seen = []
    for _ in range(4):
        step(X, y)
        seen.append(scale.read()[0])
    assert seen == [4.0, 0.5, 0.5, 0.5]
    assert float(backend.to_numpy(layer.W)[0, 0]) == 1.0


@half
def test_a_loss_that_is_nan_is_bad_whatever_the_scale_and_leaves_the_scale(backend):
    model, scale, guard = network(backend), LossScale(), Guard(backend.device, None, 0)
    step = TrainingStep(model, SoftmaxCrossEntropy(), Adam(), guard=guard, loss_scale=scale)
    _, y = batch(backend)
    step(backend.asarray(np.full((8, 6), math.nan), "float16"), y)
    assert guard.read()[2:] == (1, 1)
    assert scale.read() == (2.0**16, 0)


@half
def test_the_scale_grows_after_so_many_good_steps_in_a_row(backend):
    model, scale = network(backend), LossScale(2.0, interval=3)
    step = TrainingStep(model, SoftmaxCrossEntropy(), SGD(1e-3), loss_scale=scale)
    seen = []
    for i in range(7):
        step(*batch(backend, seed=i))
        seen.append(scale.read())
    assert seen == [(2.0, 1), (2.0, 2), (4.0, 0), (4.0, 1), (4.0, 2), (8.0, 0), (8.0, 1)]
    scale.judge(None, [backend.asarray([math.inf], "float16")])
    assert scale.read() == (4.0, 0)  # the run of good steps begins anew


@half
def test_the_scale_is_that_of_pytorch(backend):
    torch = pytest.importorskip("torch")
    found = [True] * 5 + [False] + [True] * 3 + [False, False] + [True] * 7
    ours, theirs = LossScale(interval=3), torch.amp.GradScaler("cpu", growth_interval=3)
    p = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([p], lr=0.0)
    for good in found:
        assert ours.read()[0] == theirs.get_scale()
        theirs.scale(torch.ones(1))  # without which it does nothing
        p.grad = torch.ones(1) if good else torch.full((1,), math.inf)
        theirs.step(optimizer)
        theirs.update()
        ours.judge(None, [backend.asarray([1.0 if good else math.inf], "float16")])
    assert ours.read()[0] == theirs.get_scale()


@pytest.mark.parametrize("wrong", [{"initial": 3.0}, {"initial": 0.5}, {"growth": 1.0}, {"backoff": 1.0}, {"backoff": 0.3}, {"interval": 0}, {"floor": 0.0}])
def test_constants_that_no_scale_can_have_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossScale(**wrong)


def test_a_state_that_no_scale_can_have_is_refused():
    scale = LossScale(floor=4.0)
    for wrong in ({}, {"scale": 8.0}, {"scale": 3.0, "good": 0}, {"scale": 2.0, "good": 0}, {"scale": 8.0, "good": -1}, {"scale": 8.0, "good": 1.5}):
        with pytest.raises(ValueError, match=r"loaded|state"):
            scale.load_state_dict(wrong)
    assert scale.read() == (2.0**16, 0)


@pytest.mark.parametrize("wrong", [1024.0, "dynamic", True, LossScale], ids=str)
def test_what_is_no_scale_is_told_before_training(wrong):
    model, X, y = Linear(6, 3, seed=0), np.zeros((8, 6)), np.zeros(8, int)
    with pytest.raises(TypeError, match="give a LossScale, such as"):
        TrainingStep(model, SoftmaxCrossEntropy(), SGD(0.1), loss_scale=wrong)
    with pytest.raises(TypeError, match="give a LossScale, such as"):
        fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=SGD(0.1), loss_scale=wrong, progress=False)


def test_float32_models_have_no_scale_and_the_same_bits():
    model = Sequential(Linear(6, 3, seed=0)).to(dtype="float32")
    step = TrainingStep(model, SoftmaxCrossEntropy(), SGD(0.1), loss_scale=LossScale(4.0))
    assert step.loss_scale is None
    X = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    assert "loss_scale" not in fit(model, X, np.arange(8) % 3, loss=SoftmaxCrossEntropy(), optimizer=Adam(), epochs=1, progress=False).rows[0]
    assert all("master" not in own for own in step.optimizer.moments().values())


# ----------------------------------------------------------------------------------------------------------------------
# masters


@half
@every_rule
def test_lanes_and_the_portable_definition_give_the_same_bits(backend, rule):
    def trained():
        model, optimizer, scale = network(backend), RULES[rule](), LossScale(2.0**22, interval=4)
        if "clipped" in rule:
            optimizer.clip_norm = None  # the norm is summed in another order
        step = TrainingStep(model, SoftmaxCrossEntropy(), optimizer, guard=Guard(backend.device, None, 0), loss_scale=scale)
        for i in range(20):
            step(*batch(backend, seed=i))
        return state(backend, model, optimizer, scale)

    # the layers and losses of lanes sum in other orders, so only what comes after the gradients is compared
    gradients = [{name: backend.asarray(np.random.default_rng([i, W.shape[0]]).standard_normal(W.shape), "float16")
                  for name, W in parameters(network(backend)).items()} for i in range(20)]  # fmt: skip
    gradients[7]["0.W"] = backend.asarray(np.full((16, 6), math.inf), "float16")

    def updated():
        model, optimizer, scale = network(backend), RULES[rule](), LossScale(2.0**4, interval=4)
        optimizer.clip_norm = None
        for own in gradients:
            scale.step(optimizer, model, own)
        return state(backend, model, optimizer, scale)

    fast = updated()
    with lanes.off():
        assert updated() == fast
    assert trained() == trained()
    with lanes.off():
        assert trained()["scale"][0] < 2.0**22


@half
@pytest.mark.parametrize("how", ["assigned", "written in place", "restored", "one element"])
def test_weights_that_somebody_changed_are_the_new_masters(backend, how):
    model, optimizer = Linear(3, 2, seed=0).to(backend.device, "float16"), SGD(2.0**-12)
    kept = snapshot(model)
    dW = {"W": backend.asarray(np.ones((2, 3)), "float16"), "b": backend.asarray(np.ones((1, 2)), "float16")}
    for _ in range(3):
        optimizer.step(model, dW)
    new = np.asarray([[1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]], np.float32)
    before = masters(backend, optimizer)["W"].copy()
    if how == "assigned":
        model.W = backend.asarray(new, "float16")
    elif how == "written in place":
        with backend.computing():
            model.W[...] = backend.asarray(new, "float16")
    elif how == "one element":
        with backend.computing():
            model.W[0, 1] = 2.0
        new = np.where(np.arange(6).reshape(2, 3) == 1, 2.0, before)
    else:
        restore(model, kept)
        new = backend.to_numpy(kept["W"]).astype(np.float32)
    optimizer.step(model, dW)
    now = masters(backend, optimizer)
    if how == "restored":  # what agrees with its master was as good as not assigned
        agrees = backend.to_numpy(kept["W"]) == before.astype(np.float16)
        new = np.where(agrees, before, new)
    np.testing.assert_array_equal(now["W"], new - np.float32(2.0**-12))
    np.testing.assert_array_equal(half_of(backend, model.W), now["W"].astype(np.float16))
    assert now["b"][0, 0] == (-4 if how != "restored" else -1) * np.float32(2.0**-12)


@pytest.mark.parametrize(("scale", "dtype", "found"), [(4.0, "float64", "float64 of shape ()"), (4, "int64", "int64 of shape ()"),
                                                    ([4.0], "float32", "float32 of shape (1,)")])  # fmt: skip
def test_a_scale_of_another_dtype_or_shape_is_refused(backend, scale, dtype, found):
    layer, optimizer = Linear(2, 2, bias=False, seed=0).to(backend.device, "float32"), SGD(1.0)
    before = backend.to_numpy(layer.W).copy()
    with pytest.raises(ValueError, match=re.escape(f"scale is {found}; it must be a 0-d float32")):
        optimizer.step(layer, {"W": backend.asarray(np.ones((2, 2)), "float32")}, scale=backend.asarray(scale, dtype))
    assert optimizer.steps == 0
    np.testing.assert_array_equal(backend.to_numpy(layer.W), before)


@half
def test_parameters_of_another_shape_or_dtype_have_masters_of_their_own(backend):
    model, optimizer = Linear(3, 2, bias=False, seed=0).to(backend.device, "float16"), SGD(2.0**-3)
    for shape, dtype in (((2, 3), "float16"), ((4, 5), "float16"), ((4, 5), "float32"), ((2, 3), "float16")):
        model.W = backend.asarray(np.ones(shape), dtype)
        for _ in range(2):
            optimizer.step(model, {"W": backend.asarray(np.ones(shape), dtype)})
        np.testing.assert_array_equal(backend.to_numpy(model.W), np.full(shape, 0.75, dtype))
        assert ("master" in optimizer.moments()["W"]) == (dtype == "float16")


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@every_rule
def test_a_loop_by_hand_with_a_scale_is_one_without_in_every_dtype_and_skips_what_overflows(backend, rule, dtype):
    if dtype not in backend.dtypes:
        pytest.skip("layers do not compute in it here")

    def trained(scale):
        model, optimizer = network(backend, dtype), RULES[rule]()
        for i in range(6):
            X, y = batch(backend, seed=i, dtype=dtype)
            if i == 3:
                X = backend.asarray(np.full((8, 6), np.inf), dtype)
                if scale is None:
                    optimizer.steps += 1
                    continue
            Z, caches = model.forward(X)
            if scale is None:
                _, cache = SoftmaxCrossEntropy().forward(Z, y)
                _, gradients = model.gradients(SoftmaxCrossEntropy().backward(cache), caches)
                optimizer.step(model, gradients)
            else:
                _, dZ = scale.scaled(SoftmaxCrossEntropy(), Z, y)
                _, gradients = model.gradients(dZ, caches)
                scale.step(optimizer, model, gradients)
        return {name: backend.to_numpy(W) for name, W in parameters(model).items()}

    scale = LossScale(2.0**10)
    with np.errstate(all="ignore"):
        ours, theirs = trained(scale), trained(None)
    assert scale.read() == (2.0**9, 2)
    for name, W in ours.items():
        assert np.all(np.isfinite(W))
        if dtype != "float16" and "clipped" not in rule:  # powers of two change no bit, but in float16, and lanes clip otherwise
            np.testing.assert_array_equal(W, theirs[name])


@half
@pytest.mark.parametrize("by", ["a training step", "fit", "hand"])
def test_a_model_that_is_frozen_altogether_is_told_in_words(backend, by):
    model, (X, y), loss, scale = network(backend), batch(backend), SoftmaxCrossEntropy(), LossScale()
    for layer in model:
        layer.trainable = False
    train = {
        "a training step": lambda: TrainingStep(model, loss, SGD(0.1), loss_scale=scale)(X, y),
        "fit": lambda: fit(model, X, y, loss=loss, optimizer=SGD(0.1), loss_scale=scale, epochs=1, progress=False),
        "hand": lambda: scale.step(SGD(0.1), model),
    }[by]
    with pytest.raises(ValueError, match="no parameters to update"):
        train()
    assert scale.read() == (65536.0, 0)


class Counting:
    """An optimizer with what `Optimizer` asks for, and no more."""

    steps = 0

    def step(self, model, grads=None, *, where=None, scale=None):
        self.steps += bool(where)
        self.scale = float(scale)


@half
def test_a_loop_by_hand_takes_an_optimizer_of_ones_own(backend):
    model, (X, y), scale, optimizer = network(backend), batch(backend), LossScale(), Counting()
    Z, caches = model.forward(X)
    _, dZ = scale.scaled(SoftmaxCrossEntropy(), Z, y)
    scale.step(optimizer, model, model.gradients(dZ, caches, needs_dX=False)[1])
    assert (optimizer.steps, optimizer.scale, scale.read()) == (1, 65536.0, (65536.0, 1))


@half
@every_rule
def test_state_dicts_pickles_and_copies_keep_masters(backend, rule):
    def go_on(model, optimizer):
        scale = LossScale(2.0**10)
        step = TrainingStep(model, SoftmaxCrossEntropy(), optimizer, loss_scale=scale)
        for i in range(5):
            step(*batch(backend, seed=i))
        return state(backend, model, optimizer)

    model, optimizer = network(backend), RULES[rule]()
    go_on(model, optimizer)
    by_state, other = RULES[rule](), network(backend)
    by_state.load_state_dict(optimizer.state_dict())
    restore(other, snapshot(model))
    pickled, copied = pickle.loads(pickle.dumps((model, optimizer))), copy.deepcopy((model, optimizer))
    expected = go_on(model, optimizer)
    assert go_on(other, by_state) == go_on(*pickled) == go_on(*copied) == expected


@half
def test_a_state_without_masters_makes_them_of_the_weights(backend):
    model, optimizer = network(backend), Adam(1e-2)
    TrainingStep(model, SoftmaxCrossEntropy(), optimizer)(*batch(backend))
    old = optimizer.state_dict()
    for own in old["moments"].values():
        del own["master"]
    new = Adam(1e-2)
    new.load_state_dict(old)
    new.step(model, {name: backend.asarray(np.zeros(W.shape), "float16") for name, W in parameters(model).items()})
    assert {dtype_name(own["master"].dtype) for own in new.moments().values()} == {"float32"}


@half
def test_float32_takes_the_state_of_float16_without_its_masters(backend):
    model, optimizer = network(backend), Adam(1e-2)
    TrainingStep(model, SoftmaxCrossEntropy(), optimizer)(*batch(backend))
    wide, new = model.to(dtype="float32"), Adam(1e-2)
    new.load_state_dict(optimizer.state_dict())
    TrainingStep(wide, SoftmaxCrossEntropy(), new)(*batch(backend, dtype="float32"))
    assert {tuple(own) for own in new.moments().values()} == {("M", "V")}


@half
def test_memory_is_half_of_float32s_plus_masters(backend):
    def sizes(dtype):
        model, optimizer = network(backend, dtype), Adam(1e-2)
        Z, caches = model.forward(batch(backend, dtype=dtype)[0])
        _, gradients = model.gradients(Z, caches, needs_dX=False)
        optimizer.step(model, gradients)
        kept = [x for cache in caches for x in cache.values()]
        moments = [x for own in optimizer.moments().values() for x in own.values()]
        return [sum(x.nbytes for x in arrays) for arrays in (parameters(model).values(), gradients.values(), kept, moments)]

    (weights, gradients, activations, moments), wide = sizes("float16"), sizes("float32")
    assert [2 * weights, 2 * gradients, 2 * activations] == wide[:3]
    assert moments == wide[3] + wide[0]  # the masters


@half
@pytest.mark.parametrize("switch", [lanes.off, contextlib.nullcontext])
def test_it_is_the_unscaled_gradients_that_are_clipped_in_float32(backend, switch):
    layer = Linear.from_arrays(backend.asarray([[0.0, 0.0]], "float16"))
    dW, scale = backend.asarray([[3 * 2.0**12, 4 * 2.0**12]], "float16"), backend.asarray(2.0**12, "float32")
    optimizer = SGD(1.0, clip_norm=1.0)
    with switch():
        optimizer.step(layer, {"W": dW}, scale=scale)  # their norm is 5, and 20,480 before, whose square float16 has not
    off = masters(backend, optimizer)["W"] + np.asarray([[3.0, 4.0]]) / (5 + 1e-6)
    assert np.abs(off).max() <= 8 * 2.0**-24


# ----------------------------------------------------------------------------------------------------------------------
# parts and layers


@half
def test_parts_of_a_batch_are_summed_in_float32(backend):
    # 4,096 parts with a gradient of 1 each: in float16 the sum stays at 2,048
    layer = Linear(1, 1, bias=False, init="zeros", dtype="float16", device=backend.device)
    X, y = backend.asarray(np.ones((4096, 1)), "float16"), backend.asarray(np.full((4096, 1), -0.5), "float32")
    value, gradients = in_parts(layer, MeanSquaredError(), X, y, None, 4096, 1, LossScale(1.0))
    assert {dtype_name(x.dtype) for x in (value, gradients["W"])} == {"float32"}
    assert float(backend.to_numpy(gradients["W"])[0, 0]) == 4096


def gradient_of_squares(X, y, W, scale=2.0**16, weights=None):
    """`dW` of the mean squared error of float16 `X W^T`, times `scale`, with what float16 may make it be off by."""
    counts = np.ones((len(X), 1)) if weights is None else np.asarray(weights, np.float64)[:, None]
    factor = np.broadcast_to(2 * scale * counts / counts.sum() / y.shape[1], y.shape)
    Z = Rounded(X, dtype="float16") @ Rounded(W.T, dtype="float16")
    D = Rounded(Z.value, Z.error) - Rounded(y)  # in float32 from here on
    scaled = D * Rounded(factor, 16 * 2.0**-24 * factor)  # the sum of the weights, a quotient, the share of a part
    dZ = Rounded(scaled.value, scaled.error + 2.0**-11 * scaled.most, "float16")
    return dZ.T @ Rounded(X, dtype="float16")


@half
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("parts", [1, 3, 24])
def test_gradients_of_parts_are_those_of_the_batch_to_rounding(backend, weighted, parts):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((24, 6)).astype(np.float16), rng.standard_normal((24, 3)).astype(np.float32)
    w = rng.uniform(0.5, 2, 24).astype(np.float32) if weighted else None
    layer = Linear(6, 3, bias=False, seed=0).to(backend.device, "float16")
    given = backend.asarray(X), backend.asarray(y), None if w is None else backend.asarray(w)
    _, gradients = divided(*in_parts(layer, MeanSquaredError(), *given, parts, 24, LossScale(2.0**10)))
    exact = gradient_of_squares(X, y, half_of(backend, layer.W).astype(np.float64), 2.0**10, w)
    # what each part rounds is its share of what the batch would, and their sum rounds in float32
    assert exact.share(backend.to_numpy(gradients["W"])) <= 1
    assert dtype_name(gradients["W"].dtype) == "float32"


@half
def test_layer_norm_has_masters_and_dropout_trains(backend):
    layers = Linear(6, 16, seed=0), LayerNorm(16), ReLU(), Dropout(0.5, seed=3), Linear(16, 3, seed=1)
    model = Sequential(*layers).to(backend.device, "float16")
    optimizer = Adam(1e-2)
    step = TrainingStep(model, SoftmaxCrossEntropy(), optimizer)
    for i in range(3):
        step(*batch(backend, seed=i))
    assert {dtype_name(own["master"].dtype) for own in optimizer.moments().values()} == {"float32"}
    assert "1.W" in optimizer.moments()


@half
def test_targets_beyond_float16_are_targets(backend):
    X = backend.asarray(np.ones((4, 6)), "float16")
    y = backend.asarray(np.full((4, 1), 70000.0), "float32")
    model = Linear(6, 1, seed=0).to(backend.device, "float16")
    history = fit(model, X, y, loss=MeanSquaredError(), optimizer=SGD(0.0), epochs=1, progress=False)
    Z = backend.to_numpy(model(X)).astype(np.float64)
    assert history.rows[0]["loss"] == pytest.approx(((Z - 70000.0) ** 2).mean(), rel=1e-6)
    assert evaluate(model, X, y, loss=MeanSquaredError())["rmse"] == pytest.approx(abs(Z - 70000.0).mean(), rel=1e-6)


@half
def test_restored_weights_of_early_stopping_are_trained_on(backend):
    X, y = (backend.to_numpy(x) for x in batch(backend, rows=32))
    model = network(backend)
    options = {"loss": SoftmaxCrossEntropy(), "batch_size": 8, "progress": False, "validation": 0.25}
    fit(model, X, y, optimizer=Adam(0.1), epochs=30, callbacks=[EarlyStopping(2)], **options)
    history = fit(model, X, y, optimizer=Adam(1e-3), epochs=2, **options)
    assert np.isfinite(history.rows[-1]["loss"])


class Twins(Group):
    """Two ranks as two threads."""

    size = 2

    def __init__(self, rank, slots, barrier):
        self.rank = self.local_rank = rank
        self.slots, self.barrier, self.dtypes = slots, barrier, set()

    def exchange(self, value):
        self.slots[self.rank] = value
        self.barrier.wait(60)
        found = list(self.slots)
        self.barrier.wait(60)
        return found

    def average(self, value, gradients, wants_stop):
        everyone = self.exchange((value, gradients, wants_stop))
        self.dtypes |= {dtype_name(dW.dtype) for dW in gradients.values()}
        with computing_on(value):
            (one, ours, a), (other, theirs, b) = everyone
            return one + other, {name: dW + theirs[name] for name, dW in ours.items()}, a or b


@half
def test_ranks_agree_on_scale_and_steps_where_only_one_of_them_overflows(backend):
    X, y = (backend.to_numpy(x) for x in batch(backend, rows=32))
    X[1::2] *= 64  # so that gradients differ
    groups = [Twins(rank, slots, barrier) for slots, barrier in [([None, None], threading.Barrier(2))] for rank in range(2)]

    def train(group):
        model, optimizer, scale = network(backend), Adam(1e-2), LossScale(2.0**20, interval=3)
        fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=optimizer, epochs=3, batch_size=4, progress=False,
            loss_scale=scale, group=group)  # fmt: skip
        return state(backend, model, optimizer, scale), scale.read()[0]

    with ThreadPoolExecutor(2) as pool:
        (one, scale), (other, _) = pool.map(train, groups)
    assert one == other
    assert scale < 2.0**20
    assert groups[0].dtypes == {"float32"}


# ----------------------------------------------------------------------------------------------------------------------
# resuming


class StopAfter:
    def __init__(self, steps):
        self.steps = steps

    def is_set(self):
        self.steps -= 1
        return self.steps <= 0


@half
@pytest.mark.parametrize("stop", [1, 3, 5, 8])
@every_rule
def test_resume_in_the_midst_of_a_scale_change_gives_the_same_bits(backend, tmp_path, rule, stop):
    X, y = (backend.to_numpy(x) for x in batch(backend, rows=40, dtype="float32"))

    def train(**more):
        model, optimizer, scale = network(backend), RULES[rule](), LossScale(2.0**24, interval=2)
        history = fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=optimizer, epochs=2, batch_size=4, progress=False,
                      loss_scale=scale, **more)  # fmt: skip
        return state(backend, model, optimizer, scale), [row["loss"] for row in history.rows], scale.read()

    whole = train()
    first = train(checkpoint=tmp_path, stop=StopAfter(stop))
    assert first[2][0] != 2.0**24
    with pytest.raises(CheckpointError, match=r"its loss_scale is LossScale\(.*interval=2\), here it is LossScale\(\)"):
        fit(network(backend), X, y, loss=SoftmaxCrossEntropy(), optimizer=RULES[rule](), epochs=2, batch_size=4, progress=False,
            checkpoint=tmp_path, resume=True)  # fmt: skip
    assert train(checkpoint=tmp_path, resume=True) == whole
    assert whole[2][0] < 2.0**23


@half
def test_a_checkpoint_from_before_masters_goes_on_from_its_weights_and_says_so(backend, tmp_path):
    model, optimizer = network(backend), Adam(1e-2)
    TrainingStep(model, SoftmaxCrossEntropy(), optimizer)(*batch(backend))
    path = save_checkpoint(tmp_path, model, optimizer, state={})

    def as_it_was(tensors):
        for name in [name for name in tensors if name.endswith("/master")]:
            del tensors[name]
        tensors.update({name: x.astype(np.float16) for name, x in tensors.items()})

    path.write_bytes(resealed(path.read_bytes(), change_tensors=as_it_was))
    other, new = network(backend), Adam(1e-2)
    with pytest.warns(RuntimeWarning, match="before float16 models had float32 master weights"):
        load_checkpoint(tmp_path, other, new)
    for name, W in parameters(model).items():
        np.testing.assert_array_equal(half_of(backend, parameters(other)[name]), half_of(backend, W))
    TrainingStep(other, SoftmaxCrossEntropy(), new)(*batch(backend, seed=1))
    assert {dtype_name(x.dtype) for own in new.moments().values() for x in own.values()} == {"float32"}


@half
@pytest.mark.parametrize("rule", [lambda: SGD(0.1), lambda: Adam(1e-2)])
def test_a_checkpoint_holds_masters_and_moments_in_float32_and_weights_in_float16(backend, tmp_path, rule):
    model, optimizer = network(backend), rule()
    TrainingStep(model, SoftmaxCrossEntropy(), optimizer)(*batch(backend))
    path = save_checkpoint(tmp_path, model, optimizer, state={})
    tensors = load_file(path)
    kept = {name.rpartition("/")[2] for name in tensors if "/" in name}
    assert kept == {"master", *optimizer.moment_names}
    assert {name: x.dtype for name, x in tensors.items()} == {name: np.dtype("float32" if "/" in name else "float16") for name in tensors}
    other, new = network(backend), rule()
    load_checkpoint(tmp_path, other, new)
    assert state(backend, other, new) == state(backend, model, optimizer)


@half
def test_a_checkpoint_is_not_too_large_for_its_model(backend, tmp_path, monkeypatch):
    monkeypatch.setattr(sealed, "_SLACK", 0)  # as if the model were of many MB
    model, optimizer = network(backend), Adam(1e-2)
    optimizer.step(model, dict(parameters(model)))
    save_checkpoint(tmp_path, model, optimizer, state={})
    load_checkpoint(tmp_path, network(backend), Adam(1e-2))
    load_model(next(tmp_path.glob("*.safetensors")), into=network(backend))


@half
@pytest.mark.parametrize("dtype", [None, "float16", "float32", "float64"])
def test_a_file_of_weights_holds_the_dtype_that_was_chosen(backend, tmp_path, dtype):
    model = network(backend)
    save_model(model, tmp_path / "m", dtype=dtype)
    tensors = load_file(tmp_path / "m")
    assert {x.dtype.name for x in tensors.values()} == {dtype or "float16"}
    np.testing.assert_array_equal(tensors["0.weight"].astype(np.float16), half_of(backend, model[0].W))
    there = backend.device if backend.name.startswith("cupy") else None
    if there is not None or dtype in ("float32", "float64"):  # NumPy's layers do not compute in float16
        assert dtype_name(load_model(tmp_path / "m", device=there)[0].W.dtype) == (dtype or "float16")


def test_a_file_in_a_dtype_that_loses_numbers_or_is_none_is_refused(tmp_path):
    model = Linear.from_arrays(np.asarray([[1e6]]))
    with pytest.raises(ValueError, match="weight has numbers that are beyond float16"):
        save_model(model, tmp_path / "m", dtype="float16")
    with pytest.raises(ValueError, match=r'dtype is .*bfloat16.*"float16", "float32" or "float64"'):
        save_model(model, tmp_path / "m", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------------------------------
# against PyTorch: a float16 model, float32 copies of its weights, and a `GradScaler`

STEPS = 200
TORCH_RULES = {
    "sgd": (lambda: SGD(0.05, momentum=0.9, weight_decay=1e-3), lambda torch, p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=1e-3)),
    "adam": (lambda: Adam(1e-3), lambda torch, p: torch.optim.Adam(p, 1e-3)),
    "adamw": (lambda: AdamW(1e-3), lambda torch, p: torch.optim.AdamW(p, 1e-3)),
}


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
@pytest.mark.parametrize("rule", TORCH_RULES)
def test_200_steps_are_those_of_pytorchs_recipe_with_its_gradients(backend, rule):
    """Both take the float16 gradients that autograd forms at our weights; scale, called-off steps and masters are their own."""
    torch = pytest.importorskip("torch")
    model, optimizer, scale = network(backend), TORCH_RULES[rule][0](), LossScale(2.0**20, interval=50)
    twin = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3)).half()
    own = [model[0], model[2]]
    copies = [torch.nn.Parameter(x.detach().float().reshape(p.shape).clone()) for x, p in zip((y for layer in own for y in (layer.W, layer.b)), twin.parameters(), strict=True)]
    theirs = TORCH_RULES[rule][1](torch, copies)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=50)
    largest, called_off = 0.0, 0
    for i in range(STEPS):
        with torch.no_grad():
            for p, x in zip(twin.parameters(), (y for layer in own for y in (layer.W, layer.b)), strict=True):
                p.copy_(x.reshape(p.shape))
        X, y = batch(backend, seed=i)
        twin.zero_grad()
        scaler.scale(torch.nn.functional.cross_entropy(twin(X).float(), y)).backward()
        gradients = [p.grad.clone() for p in twin.parameters()]
        finite = all(bool(torch.isfinite(g).all()) for g in gradients)
        assert scale.read()[0] == scaler.get_scale()
        for p, g in zip(copies, gradients, strict=True):
            p.grad = g.float()
        if finite:
            largest = max(largest, *(float(g.float().abs().max()) / scaler.get_scale() for g in gradients))
        else:
            called_off += 1
        scaler.step(theirs)
        scaler.update()
        names = ("0.W", "0.b", "2.W", "2.b")
        shapes = [W.shape for layer in own for W in (layer.W, layer.b)]
        scale.step(optimizer, model, {name: g.reshape(shape) for name, g, shape in zip(names, gradients, shapes, strict=True)})
        if not finite:  # a step that is called off counts here, for PyTorch it does not
            optimizer.steps -= 1
    assert called_off > 1
    u, size = 2.0**-24, max(float(p.detach().abs().max()) for p in copies)
    if rule == "sgd":
        # V is a geometric sum with 3 roundings a step, of at most V <= 10 (g + decay W); W adds one of its own and one of lr V
        V = 10 * (largest + 1e-3 * size)
        bound = STEPS * (u * size + 0.05 * V * u * (3 * 10 + 2))
    else:
        # |M| <= C sqrt(V) (Cauchy-Schwarz); 3 roundings a step of M, remembered for 1 / (1 - beta1 / sqrt(beta2)) steps, and
        # 3 of V for all of them, half of which the root keeps; 10 more of the quotient, the corrections and the rate
        C = 0.1 / math.sqrt(0.001) / math.sqrt(1 - 0.9**2 / 0.999)
        bound = STEPS * (2 * u * size + 1e-3 * C * u * (3 / (1 - 0.9 / math.sqrt(0.999)) + 1.5 * STEPS + 10))
    for name, p in zip(("0.W", "0.b", "2.W", "2.b"), copies, strict=True):
        ours = masters(backend, optimizer)[name]
        off = np.abs(ours.reshape(p.shape) - p.detach().numpy()).max()
        assert off <= 2 * bound, name  # twice: each has such errors
        assert np.abs(ours - half_of(backend, parameters(model)[name])).max() <= 2.0**-11 * size
    assert 2 * bound < 2.0**-11 * size  # far below the steps that float16 has; or it would say nothing


@pytest.mark.parametrize("backend", ["torch"], indirect=True)
def test_200_free_steps_stay_as_near_to_pytorchs_as_contraction_says(backend):
    """A linear model and gradient descent, where a step brings two trainings nearer: what is between them is what rounding adds.

    With `H` the second derivative and `lr < 2 / L`, `|W - V|` after a step is at most `rho |W - V|` and `lr` times what each
    gradient is off from the exact one at the masters: its own rounding, and `L` times what the float16 copy is off.
    """
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((32, 6)).astype(np.float16), rng.standard_normal((32, 3)).astype(np.float16)
    layer, optimizer, lr = Linear(6, 3, bias=False, seed=0).to(backend.device, "float16"), SGD(0.2), 0.2
    step = TrainingStep(layer, MeanSquaredError(), optimizer)
    twin = torch.nn.Linear(6, 3, bias=False).half()
    with torch.no_grad():
        twin.weight.copy_(layer.W)
    copy_ = torch.nn.Parameter(twin.weight.detach().float().clone())
    theirs, scaler = torch.optim.SGD([copy_], lr), torch.amp.GradScaler("cpu")
    H = 2 * X.T.astype(np.float64) @ X.astype(np.float64) / y.size
    curvature = np.linalg.eigvalsh(H)
    rho, L = np.abs(1 - lr * curvature).max(), curvature.max()
    assert rho < 1

    between = 0.0
    for _ in range(STEPS):
        before = [half_of(backend, layer.W), twin.weight.detach().numpy()]
        exact = [before[0] if not optimizer.moments() else masters(backend, optimizer)["W"].copy(), copy_.detach().numpy().copy()]
        step(backend.asarray(X), backend.asarray(y))
        twin.zero_grad()
        scaler.scale(torch.nn.functional.mse_loss(twin(torch.from_numpy(X)).float(), torch.from_numpy(y).float())).backward()
        copy_.grad = twin.weight.grad.float()
        errors = [np.linalg.norm(gradient_of_squares(X, y, W.astype(np.float64)).error) / 2.0**16 + L * np.linalg.norm(W.astype(np.float64) - V) for W, V in zip(before, exact, strict=True)]
        scaler.step(theirs)
        scaler.update()
        with torch.no_grad():
            twin.weight.copy_(copy_)
        updates = 4 * 2.0**-24 * sum(map(np.linalg.norm, exact))
        between = rho * between + lr * sum(errors) + updates
        off = np.linalg.norm(masters(backend, optimizer)["W"].astype(np.float64) - copy_.detach().numpy())
        assert off <= between
    assert step.loss_scale.read() == (2.0**16, STEPS)
    assert between < 0.1 * np.linalg.norm(copy_.detach().numpy())  # or it would say nothing


@pytest.mark.slow
@half
@every_rule
def test_digits_are_learnt_as_well_as_in_float32(backend, rule):
    X, y = load_digits()

    def accuracy(dtype, seed):
        order = np.random.default_rng(seed).permutation(len(y))
        train, test = order[:1437], order[1437:]
        model = Sequential(Linear(64, 128, seed=seed), ReLU(), Linear(128, 10, seed=seed + 100)).to(backend.device, dtype)
        optimizer = {"sgd": lambda: SGD(0.05, momentum=0.9), "adam": Adam, "adamw clipped": lambda: AdamW(clip_norm=1.0)}[rule]()
        fit(model, X[train], y[train], loss=SoftmaxCrossEntropy(), optimizer=optimizer, epochs=20, batch_size=32, seed=seed, progress=False)
        return evaluate(model, X[test], y[test], loss=SoftmaxCrossEntropy())["accuracy"]

    found = {dtype: np.mean([accuracy(dtype, seed) for seed in range(5)]) for dtype in ("float16", "float32")}
    print(rule, backend.name, found)
    assert found["float16"] > found["float32"] - 0.005
    assert found["float16"] > 0.95
