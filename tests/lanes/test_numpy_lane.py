"""Each fast lane is equal to the portable definition that it stands in for."""

from __future__ import annotations

import copy
import itertools
import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest

from anyarray_linear import (
    SGD,
    Adam,
    AdamW,
    Linear,
    ReLU,
    Sequential,
    SoftmaxCrossEntropy,
    lanes,
    linear_backward,
    linear_forward,
)
from anyarray_linear.lanes import numpy as numpy_lane
from anyarray_linear.schedules import cosine

OPTIMIZERS = {
    "sgd": lambda: SGD(0.1),
    "sgd-decay": lambda: SGD(0.1, weight_decay=0.01),
    "momentum": lambda: SGD(0.1, momentum=0.9),
    "nesterov": lambda: SGD(cosine(0.1, 20), momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda: Adam(1e-2),
    "adam-decay": lambda: Adam(1e-2, weight_decay=0.1),
    "adamw-clipped": lambda: AdamW(cosine(1e-2, 20, warmup=5), clip_norm=0.5),
}


def random(*shape, dtype="float32", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("shape", [(20_000, 16, 8), (9_001, 64, 64), (5_000, 1, 1), (7, 64, 64), (0, 3, 2)])
def test_row_blocks_give_the_same_products(shape, dtype, monkeypatch):
    monkeypatch.setattr(numpy_lane, "BLOCK_BYTES", 1 << 16)
    N, I, O = shape
    X, W, b, dZ = random(N, I, dtype=dtype), random(O, I, dtype=dtype), random(1, O, dtype=dtype), random(N, O, dtype=dtype)
    Z, (dX, dW, db) = linear_forward(X, W, b), linear_backward(dZ, X, W)
    with lanes.off():
        Z_, (dX_, dW_, db_) = linear_forward(X, W, b), linear_backward(dZ, X, W)
    u = np.finfo(dtype).eps / 2
    # both are within the bound for any order of summation, so they differ by at most twice that (Higham, ch. 3)
    for mine, theirs, n, scale in [
        (Z, Z_, I + 1, abs(X) @ abs(W).T + abs(b)),
        (dX, dX_, O, abs(dZ) @ abs(W)),
        (dW, dW_, N + 8, abs(dZ).T @ abs(X)),
        (db, db_, N + 8, abs(dZ).sum(axis=0, keepdims=True)),
    ]:
        assert mine.dtype == theirs.dtype
        assert mine.shape == theirs.shape
        assert (abs(mine - theirs) <= 2 * 1.1 * n * u * scale).all()


def test_blocks_are_used_for_tall_inputs_only():
    W = np.ones((64, 64), np.float32)
    assert numpy_lane.block_rows(np.ones((65_536, 64), np.float32), W) == 2048
    assert numpy_lane.block_rows(np.ones((4_096, 64), np.float32), W) == 0
    assert numpy_lane.block_rows(np.ones((65_536, 1024), np.float32), np.ones((1024, 1024), np.float32)) == 0


def train(optimizer, dtype, steps=20, where=None, hidden=300):
    """A few steps."""
    model = Sequential(Linear(64, hidden, seed=0, dtype=dtype), ReLU(), Linear(hidden, 10, seed=1, dtype=dtype))
    X, y, loss = random(32, 64, dtype=dtype), np.arange(32) % 10, SoftmaxCrossEntropy()
    for _ in range(steps):
        Z, caches = model.forward(X)
        model.backward(loss.backward(loss.forward(Z, y)[1]), caches)
        optimizer.step(model, where=where)
    return model


@pytest.mark.parametrize(("pack", "block"), [(1 << 20, 1 << 20), (1000, 1000), (1, 1 << 17)], ids=["one", "many", "each"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_update_in_place_to_the_same_bits(name, dtype, pack, block, monkeypatch):
    monkeypatch.setattr(numpy_lane, "PACK", pack)
    monkeypatch.setattr(numpy_lane, "BLOCK", block)
    mine, theirs = OPTIMIZERS[name](), OPTIMIZERS[name]()
    fast = train(mine, dtype)
    with lanes.off():
        slow = train(theirs, dtype)
    for key, W in fast.parameters().items():
        assert W.dtype == np.dtype(dtype)
        np.testing.assert_array_equal(W, slow.parameters()[key], err_msg=key)
    assert (mine.bound.flat is not None)
    assert not (theirs.bound.flat is not None)
    for key, moments in mine.state_dict()["moments"].items():
        for m, moment in moments.items():
            np.testing.assert_array_equal(moment, theirs.state_dict()["moments"][key][m])


@pytest.mark.parametrize(("sizes", "batch"), [((784, 256, 10), 128), ((784, 1024, 1024, 10), 256), ((1024, 4096, 1024), 64)])
def test_a_training_step_needs_little_memory_beside_what_it_works_on(sizes, batch):
    X, y = random(batch, sizes[0]), np.arange(batch) % 10
    pairs = list(itertools.pairwise(sizes))
    model = Sequential(*[each for n, m in pairs for each in (Linear(n, m, dtype="float32", seed=0), ReLU())][:-1])
    loss, optimizer = SoftmaxCrossEntropy(), Adam()

    def step():
        Z, caches = model.forward(X)
        _, cache = loss.forward(Z, y)
        _, gradients = model.gradients(loss.backward(cache), caches, needs_dX=False)
        optimizer.step(model, gradients)

    step()  # parameters move into the optimizer's buffers
    parameters = sum(p.nbytes for p in model.parameters().values())
    tracemalloc.start()
    try:
        step()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    activations = 4 * batch * sum(sizes[1:])
    # parameters and two moments were there before; the step itself adds gradients and activations
    assert 3 * parameters + peak <= 1.15 * (4 * parameters + activations)


def test_an_error_of_a_rule_is_not_taken_for_the_end_of_the_work(monkeypatch):
    def faulty(*arguments):
        raise IndexError("of the rule")

    monkeypatch.setattr(numpy_lane, "BLOCK", 1000)
    monkeypatch.setitem(numpy_lane._RULES, SGD, faulty)
    layer = Linear(100, 100, dtype="float32", seed=0)
    with pytest.raises(IndexError, match="of the rule"):
        SGD(0.1).step(layer, {name: np.ones_like(p) for name, p in layer.parameters().items()})


SPECIAL = [0.0, -0.0, np.inf, -np.inf, np.nan, 5e-324, -5e-324, 1e-45, -1e-45, 1.5, -1.5]


@pytest.mark.filterwarnings("ignore:invalid value")
def test_relu_has_the_bits_of_the_portable_definition_for_special_values_too(dtype):
    Z, dZ = (x.astype(dtype) for x in np.meshgrid(SPECIAL, SPECIAL))
    layer = ReLU()
    for Z, dZ in [(Z, dZ), (Z.T, dZ), (Z[::2, ::-1], dZ[::2, ::-1]), (Z[:0], dZ[:0]), (Z[0, 0, ...], dZ[0, 0, ...])]:  # noqa: B020
        dX, _ = layer.gradients(dZ, {"Z": Z})
        with lanes.off():
            dX_, _ = layer.gradients(dZ, {"Z": Z})
        assert dX.dtype == dX_.dtype == np.dtype(dtype)
        assert dX.shape == dX_.shape
        np.testing.assert_array_equal(np.signbit(dX), np.signbit(dX_))
        np.testing.assert_array_equal(dX, dX_)


def test_an_assigned_parameter_is_noticed_and_copied_in():
    optimizer, by_hand = Adam(), Adam()
    models = train(optimizer, "float32", 3), None
    model = models[0]
    with lanes.off():
        other = train(by_hand, "float32", 3)
    mine = np.full((300, 64), 0.25, np.float32)
    model[0].W, other[0].W = mine, mine
    gradients = {name: np.ones_like(p) for name, p in model.parameters().items()}
    optimizer.step(model, gradients)
    with lanes.off():
        by_hand.step(other, gradients)
    assert (mine == 0.25).all()
    assert model[0].W is not mine
    for name, p in model.parameters().items():
        np.testing.assert_array_equal(p, other.parameters()[name])


def test_a_step_called_off_changes_nothing():
    optimizer = Adam()
    model = train(optimizer, "float32", 3)
    before, moments = copy.deepcopy(model.parameters()), optimizer.state_dict()["moments"]
    optimizer.step(model, where=np.asarray(False))
    for name, p in model.parameters().items():
        np.testing.assert_array_equal(p, before[name])
        np.testing.assert_array_equal(optimizer.state_dict()["moments"][name]["V"], moments[name]["V"])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copied_model_and_optimizer_go_on_by_themselves(duplicate):
    optimizer = Adam()
    model = train(optimizer, "float32", 3)
    twin, twin_optimizer = duplicate((model, optimizer))
    gradients = {name: np.ones_like(p) for name, p in model.parameters().items()}
    before = copy.deepcopy(model.parameters())
    twin_optimizer.step(twin, gradients)
    for name, p in model.parameters().items():
        np.testing.assert_array_equal(p, before[name])
    optimizer.step(model, gradients)
    for name, p in model.parameters().items():
        assert (p != before[name]).any()
        np.testing.assert_array_equal(p, twin.parameters()[name])


def test_gradients_given_to_the_optimizer_are_never_written():
    optimizer = AdamW(clip_norm=1e-3)
    model = train(optimizer, "float32", 1)
    gradients = {name: np.ones_like(p) for name, p in model.parameters().items()}
    for gradient in gradients.values():
        gradient.flags.writeable = False
    optimizer.step(model, gradients)
    assert all((gradient == 1).all() for gradient in gradients.values())


def test_lanes_can_be_switched_off_by_the_environment(monkeypatch):

    code = "from anyarray_linear import lanes, linear; from array_api_compat import numpy; from anyarray_linear.arrays.place import place_of; place = place_of(numpy.ones(1)); print(place.operation(linear.affine) is linear.affine)"
    for value, expected in (("0", "True"), ("1", "False")):
        monkeypatch.setenv("ANYARRAY_LANES", value)
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == expected


@pytest.mark.parametrize("shape", [(1, 2), (7, 1), (32, 10), (300, 1000)])
def test_cross_entropy_of_class_ids_is_the_portable_one(shape, dtype):
    N, classes = shape
    Z = 5 * random(N, classes, dtype=dtype)
    ids = np.random.default_rng(1).integers(0, classes, N)
    loss = SoftmaxCrossEntropy()
    value, cache = loss.forward(Z, ids)
    dZ = loss.backward(cache)
    with lanes.off():
        value_, cache_ = loss.forward(Z, ids)
        dZ_ = loss.backward(cache_)
    assert cache["T"] is ids
    assert value.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(dZ, dZ_)
    # N terms are added in one order or another, each with the same few roundings before
    terms = np.log(np.exp(Z.astype(float)).sum(axis=1)) - Z[np.arange(N), ids]
    u = np.finfo(dtype).eps / 2
    assert abs(float(value) - float(value_)) <= 2 * (N + 8) * u * np.mean(abs(terms) + abs(Z).max())


def test_cross_entropy_with_a_masked_class_and_small_ids_is_the_portable_one():
    Z = random(3, 300)
    Z[:, 7] = -np.inf
    ids = np.asarray([0, 1, 255], np.uint8)
    loss = SoftmaxCrossEntropy()
    value, cache = loss.forward(Z, ids)
    with lanes.off():
        value_, cache_ = loss.forward(Z, ids)
        dZ_ = loss.backward(cache_)
    assert float(value) == pytest.approx(float(value_), rel=1e-6)
    np.testing.assert_array_equal(loss.backward(cache), dZ_)


def test_training_a_layer_leaves_the_one_it_was_moved_from_and_to_alone():
    layer = Linear(4, 3, seed=0)
    optimizer = SGD(0.5)
    gradients = {name: np.ones_like(p) for name, p in layer.parameters().items()}
    early = layer.to()
    assert early.W is layer.W  # nothing to copy yet: the first step copies
    optimizer.step(layer, gradients)
    late = layer.to()
    before = copy.deepcopy((early.W, late.W))
    optimizer.step(layer, gradients)
    np.testing.assert_array_equal(early.W, before[0])
    np.testing.assert_array_equal(late.W, before[1])
    assert (layer.W != late.W).all()
    SGD(0.5).step(late, gradients)
    np.testing.assert_array_equal(layer.W, late.W)


def test_errstate_of_the_caller_counts_on_all_cores(monkeypatch):
    monkeypatch.setattr(numpy_lane, "BLOCK", 1000)
    layer = Linear(300, 300, seed=0, dtype="float32")
    with np.errstate(over="ignore"):  # warnings are errors in this suite
        SGD(2.0).step(layer, {name: np.full_like(p, 3e38) for name, p in layer.parameters().items()})
    assert np.isinf(layer.W).all()
