"""The CuPy lane gives what the portable definition gives, with as few kernels as are promised."""

from __future__ import annotations

import copy
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from anyarray_linear import (
    GELU,
    SGD,
    Adam,
    AdamW,
    Linear,
    LossScale,
    MeanSquaredError,
    ReLU,
    Sequential,
    Sigmoid,
    SiLU,
    SoftmaxCrossEntropy,
    Tanh,
    fit,
    lanes,
    linear_backward,
    linear_forward,
    select_device,
)
from anyarray_linear.arrays.tf32 import restored
from anyarray_linear.guard import Guard
from anyarray_linear.schedules import cosine

on_cuda = pytest.mark.parametrize("backend", ["cupy:0", "cupy:1"], indirect=True)
dtypes = pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
counted = pytest.mark.stand_in  # which counts launches
UNIT = {"float16": 2.0**-11, "float32": 2.0**-24, "float64": 2.0**-53}
TINY = {"float16": 2.0**-24, "float32": 2.0**-126, "float64": 2.0**-1022}  # below it, results may be flushed to zero


def random(*shape, dtype="float32", seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(dtype)


def wide(dtype):
    """The unit roundoff of what kernels compute in for arrays of a dtype."""
    return max(UNIT["float64"], UNIT["float32"] if dtype != "float64" else 0)


def close(backend, mine, reference, bound):
    """Whether an array of the backend is within `bound`, element by element, of a float64 reference."""
    assert backend.owns(mine)
    host = backend.to_numpy(mine).astype(np.float64)
    assert host.shape == np.shape(reference)
    np.testing.assert_array_equal(np.isnan(host), np.isnan(reference))
    finite = np.isfinite(reference)
    np.testing.assert_array_equal(host[~finite], np.asarray(reference)[~finite])
    error = np.abs(np.where(finite, host, 0) - np.where(finite, reference, 0))
    bound = np.broadcast_to(np.nan_to_num(bound), error.shape)
    assert (error <= bound)[finite].all(), f"{(error - bound)[finite].max()} above the bound"


def same(backend, mine, theirs):
    """Whether two arrays of the backend have the same bits (a NaN is a NaN, and -0 is 0)."""
    assert backend.owns(mine)
    assert mine.dtype == theirs.dtype
    np.testing.assert_array_equal(backend.to_numpy(mine), backend.to_numpy(theirs))


# the layer


@on_cuda
@dtypes
@pytest.mark.parametrize("shape", [(64, 7, 5), (1, 3, 2), (0, 3, 2), (3000, 5, 4), (300, 4, 1)])
def test_the_layer_has_the_bits_of_the_portable_products(backend, dtype, shape):
    N, I, O = shape
    X, W, b, dZ = (
        backend.asarray(random(*s, dtype=dtype)) for s in ((N, I), (O, I), (1, O), (N, O))
    )
    Z, (dX, dW, db) = linear_forward(X, W, b), linear_backward(dZ, X, W)
    with lanes.off():
        Z_, (dX_, dW_, _) = linear_forward(X, W, b), linear_backward(dZ, X, W)
    for mine, theirs in ((Z, Z_), (dX, dX_), (dW, dW_)):
        same(backend, mine, theirs)
    exact = backend.to_numpy(dZ).astype(np.float64)
    # N additions of the widest kind, and one rounding to the dtype (Higham, ch. 4)
    bound = 1.1 * N * wide(dtype) * np.abs(exact).sum(axis=0, keepdims=True) + UNIT[dtype] * abs(exact.sum(axis=0)) + TINY[dtype]
    close(backend, db, exact.sum(axis=0, keepdims=True), bound)
    assert linear_backward(dZ, X, W, bias=False, needs_dX=False)[::2] == (None, None)


@on_cuda
@dtypes
@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("O", [1, 3])
def test_many_equal_terms_add_up(backend, dtype, tf32, O):
    """5,000 ones are 5,000, which a float16 sum never reaches: from 2,048 on, one more changes nothing."""
    dZ, X, W = (backend.asarray(np.ones(s, dtype)) for s in ((5000, O), (5000, 2), (O, 2)))
    with restored():
        select_device(backend.device, tf32=tf32)
        assert (backend.to_numpy(linear_backward(dZ, X, W).db) == 5000).all()


def laid_out(cupy, M, how):
    """A copy of `M`, laid out in memory in one of the ways that slicing and transposing make."""
    rows, columns = M.shape
    spaced = cupy.zeros((2 * rows + 1, 3 * columns + 2), M.dtype)
    view = {
        "rows": lambda: cupy.empty((rows, columns), M.dtype),
        "columns": lambda: cupy.empty((columns, rows), M.dtype).T,
        "wide rows": lambda: spaced[:rows, 1 : columns + 1],
        "every other row": lambda: spaced[: 2 * rows : 2, :columns],
        "every other column": lambda: spaced[:rows, : 2 * columns : 2],
        "from behind": lambda: spaced[:rows, :columns][::-1, ::-1],
        "wide columns": lambda: cupy.zeros((columns, rows + 3), M.dtype)[:, 2 : rows + 2].T,
        "one row, repeated": lambda: cupy.broadcast_to(M[:1], M.shape),
    }[how]()
    if how != "one row, repeated":
        view[...] = M
    return view


LAYOUTS = ("rows", "columns", "wide rows", "every other row", "every other column", "from behind", "wide columns", "one row, repeated")


@on_cuda
@dtypes
@pytest.mark.parametrize("shape", [(3, 4, 5), (1, 4, 5), (3, 1, 5), (3, 4, 1), (1, 1, 5), (1, 4, 1), (3, 1, 1), (0, 4, 5), (3, 0, 5), (3, 4, 0)], ids=str)
def test_products_of_any_strides_are_products(backend, dtype, shape):
    products, cupy = pytest.importorskip("anyarray_linear.lanes.cupy.products"), pytest.importorskip("cupy")
    m, k, n = shape
    with backend.computing():
        for how_A in LAYOUTS:
            for how_B in LAYOUTS:
                if 0 in shape and "repeated" in how_A + how_B:
                    continue
                A = laid_out(cupy, backend.asarray(random(m, k, dtype=dtype)), how_A)
                B = laid_out(cupy, backend.asarray(random(k, n, dtype=dtype, seed=1)), how_B)
                a, b = (backend.to_numpy(x).astype(np.float64) for x in (A, B))
                C = products.gemm(A, B)
                assert C.flags.c_contiguous
                close(backend, C, a @ b, 1.1 * (k + 1) * wide(dtype) * (abs(a) @ abs(b)) + UNIT[dtype] * abs(a @ b) + TINY[dtype])
                assert C.dtype == A.dtype


@on_cuda
@dtypes
def test_captured_products_have_the_bits_of_eager_ones(backend, dtype):
    products, cupy = pytest.importorskip("anyarray_linear.lanes.cupy.products"), pytest.importorskip("cupy")
    A, B = backend.asarray(random(33, 65, dtype=dtype)), backend.asarray(random(65, 7, dtype=dtype))
    with backend.computing():
        eager, memory = products.gemm(A, B), products.workspace()
        C = products.gemm(A, B)
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            products.gemm(A, B)
            with products.capturable(stream, memory):
                stream.begin_capture()
                try:
                    C = products.gemm(A, B)
                finally:
                    graph = stream.end_capture()
            C[...] = 0
            graph.launch(stream)
            stream.synchronize()
    same(backend, C, eager)
    same(backend, products.gemm(A, B) if backend.native.id == 0 else eager, eager)  # and the eager way is as it was


def test_a_product_that_is_one_number_does_not_overflow_in_float16():
    cupy = pytest.importorskip("cupy")
    X, W = cupy.asarray([[300.0, 300.0]], "e"), cupy.asarray([[300.0, -300.0]], "e")
    assert float(linear_forward(X, W)[0, 0]) == 0  # of 90,000, which no float16 is


def test_parts_of_a_split_product_are_not_added_up_in_float16():
    products = pytest.importorskip("anyarray_linear.lanes.cupy.products")
    cublas = pytest.importorskip("cupy_backends.cuda.libs.cublas")
    with pytest.importorskip("cupy").cuda.Device(0):
        handle = products._handle(0)
    disallow_reduced_precision_reduction = 16  # of cublasMath_t
    assert cublas.getMathMode(handle.ptr) & disallow_reduced_precision_reduction


@on_cuda
def test_threads_that_make_the_row_of_ones_at_once_share_one(backend, monkeypatch):
    products, cupy = pytest.importorskip("anyarray_linear.lanes.cupy.products"), pytest.importorskip("cupy")
    monkeypatch.setattr(products, "_ones", {})
    monkeypatch.setattr(products, "_rows_of_ones", {})
    made, ones = [], cupy.ones

    def overtaken(*arguments):
        if not made:  # another thread wants the same row, and has it first
            made.append(None)
            made.append(products.ones_row(5, np.dtype("f")))
        return ones(*arguments)

    monkeypatch.setattr(cupy, "ones", overtaken)
    with backend.computing():
        mine = products.ones_row(5, np.dtype("f"))
        assert mine.data.ptr == made[1].data.ptr == products.ones_row(7, np.dtype("f")).data.ptr


# activations

ACTIVATIONS = [ReLU(), Tanh(), Sigmoid(), SiLU(), GELU(), GELU("tanh")]


def values(shape, dtype):
    X = 4 * random(*shape, dtype="float64")
    special = [0.0, -0.0, math.nan, 1e-3, -30.0, 30.0, 200.0, -200.0]
    X.reshape(-1)[: len(special)] = special[: X.size]
    return X.astype(dtype)


@on_cuda
@dtypes
@pytest.mark.parametrize("shape", [(), (0, 3), (40,), (5, 7, 9)], ids=str)
@pytest.mark.parametrize("layer", ACTIVATIONS, ids=repr)
def test_activations_are_those_of_the_formula(backend, dtype, shape, layer):
    X, dZ = values(shape, dtype), random(*shape, dtype=dtype, seed=1)
    if len(shape) == 3:  # any strides
        X, dZ = X[::2, ::-1], dZ[::2, ::-1]
    x, dz = X.astype(np.float64), dZ.astype(np.float64)
    Z, cache = layer.forward(backend.asarray(X))
    dX, _ = layer.gradients(backend.asarray(dZ), cache)
    reference, kept = layer.forward(x)
    if layer._kept == "Z":  # the derivative is a function of the rounded output
        kept = {"Z": backend.to_numpy(Z).astype(np.float64)}
    dreference, _ = layer.gradients(dz, kept)
    # a few roundings of each factor, of which the largest is the square of X; then one to the dtype
    bound = 16 * wide(dtype) * (1 + abs(x)) ** 2
    close(backend, Z, reference, bound + UNIT[dtype] * abs(reference) + TINY[dtype])
    close(backend, dX, dreference, abs(dz) * bound + UNIT[dtype] * abs(dreference) + TINY[dtype])
    assert Z.dtype == dX.dtype == np.dtype(dtype)


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("layer", ACTIVATIONS, ids=repr)
def test_activations_are_those_of_the_portable_definition(backend, dtype, layer):
    X, dZ = values((5, 7, 9), dtype), random(5, 7, 9, dtype=dtype, seed=1)
    dZ[0, 0, 0] = math.inf
    X, dZ = backend.asarray(X), backend.asarray(dZ)
    Z, cache = layer.forward(X)
    dX, _ = layer.gradients(dZ, cache)
    with lanes.off():
        Z_, _ = layer.forward(X)
        dX_, _ = layer.gradients(dZ, cache)
    x, dz = (backend.to_numpy(a).astype(np.float64) for a in (X, dZ))
    bound = 32 * UNIT[dtype] * (1 + abs(x)) ** 2 + TINY[dtype]
    close(backend, Z, backend.to_numpy(Z_).astype(np.float64), bound)
    close(backend, dX, backend.to_numpy(dX_).astype(np.float64), bound * (1 + abs(dz)))
    if isinstance(layer, ReLU):
        same(backend, dX, dX_)


def test_an_activation_of_the_users_own_keeps_its_own_formula():
    cupy = pytest.importorskip("cupy")

    class Own(Sigmoid):
        def _function(self, xp, X):
            return X * 0.25

        def _derivative(self, xp, dZ, Z):
            return dZ * 0.5

    layer, X = Own(), cupy.ones(3)
    Z, cache = layer.forward(X)
    assert (Z == 0.25).all()
    assert (layer.gradients(X, cache)[0] == 0.5).all()


# losses

LOGITS = [(3,), (1, 1), (64, 10), (5, 7, 33), (200, 100), (3, 9000)]  # the last but one is more than one block


def defined(loss, Z, target):
    """What the portable definition gives for NumPy's arrays."""
    with lanes.off():
        return loss.forward(Z, target)


def targets(shape, kind):
    rng = np.random.default_rng([len(kind), *shape])
    if kind == "probabilities":
        T = rng.random(shape)
        return T / T.sum(axis=-1, keepdims=True)
    if kind == "weights":  # rows that sum to anything
        return rng.random(shape)
    ids = rng.integers(0, min(shape[-1], 100), shape[:-1])
    return (np.arange(shape[-1]) == ids[..., None]).astype(np.int32) if kind == "integer rows" else ids.astype(kind)


@on_cuda
@dtypes
@pytest.mark.parametrize("kind", ["int64", "uint8", "int32", "probabilities", "weights", "integer rows"])
@pytest.mark.parametrize("shape", LOGITS, ids=str)
def test_cross_entropy_is_that_of_the_definition(backend, dtype, kind, shape):
    loss = SoftmaxCrossEntropy()
    Z, target = (3 * random(*shape, dtype="float64")).astype(dtype), targets(shape, kind)
    if target.dtype.kind == "f":
        target = target.astype(dtype)
    device_Z, device_target = backend.asarray(Z), backend.asarray(target)
    value, cache = loss.forward(device_Z, device_target)
    dZ = loss.backward(cache)
    assert value.shape == ()
    assert value.dtype == dZ.dtype == device_Z.dtype

    z = Z.astype(np.float64)
    reference, kept = defined(loss, z, target.astype(np.float64) if target.dtype.kind == "f" else target)
    dreference = loss.backward(kept)
    C, N = shape[-1], math.prod(shape[:-1])
    spread, T = np.ptp(z, axis=-1).max(), kept["T"] if kept["T"].ndim == z.ndim else np.eye(C)[kept["T"]]
    # relative error of a softmax: that of the exponentials' arguments, and of at most C/8 additions in a thread and a tree
    relative = (2 * spread + C / 8 + 20) * wide(dtype)
    scale = (T * (spread + math.log(C) + 1)).sum() / N
    close(backend, value, reference, (relative + (N / 8 + 30) * wide(dtype)) * scale + UNIT[dtype] * abs(reference))
    rounding = relative + (UNIT[dtype] if dtype == "float16" else 0)  # P is kept in the dtype
    rows = T.sum(axis=-1, keepdims=True)
    bound = ((rounding + C / 8 * wide(dtype)) * (kept["P"] * rows + T) + TINY[dtype] * (rows + 1)) / N
    close(backend, dZ, dreference, bound + 2 * UNIT[dtype] * abs(dreference) + TINY[dtype])

    again, cache_again = loss.forward(device_Z, device_target)
    same(backend, again, value)
    same(backend, loss.backward(cache_again), dZ)
    if dtype != "float16":  # whose portable definition rounds at every operation
        with lanes.off():
            theirs, their_cache = loss.forward(device_Z, device_target)
            close(backend, theirs, backend.to_numpy(value).astype(float), 4 * (relative + (N + 30) * wide(dtype)) * scale)
            mixed = loss.backward(cache)  # the lane's cache, and the other way round
        mine = backend.to_numpy(dZ).astype(float)
        close(backend, mixed, mine, 4 * bound + TINY[dtype])
        close(backend, loss.backward(their_cache), mine, 4 * bound + TINY[dtype])


@on_cuda
@dtypes
@pytest.mark.parametrize(
    ("kind", "wrong"),
    [("int64", -1), ("int64", 10), ("int8", -128), ("uint8", 255), ("uint64", 2**63 + 3), ("int64", 2**32)],
)
def test_a_class_id_out_of_range_is_nan_in_its_row_only(backend, dtype, kind, wrong):
    loss, ids = SoftmaxCrossEntropy(), np.arange(10).astype(kind)
    ids[3] = wrong
    value, cache = loss.forward(backend.asarray(random(10, 10, dtype=dtype)), backend.asarray(ids))
    dZ = backend.to_numpy(loss.backward(cache))
    assert np.isnan(backend.to_numpy(value))
    assert np.isnan(dZ[3]).all()
    assert np.isfinite(np.delete(dZ, 3, axis=0)).all()


@on_cuda
@dtypes
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("position", [0, 5, 32])
def test_special_logits_are_as_in_the_definition(backend, dtype, rows, position):
    loss, ids = SoftmaxCrossEntropy(), np.arange(4)
    target = (np.arange(33) == ids[:, None]).astype(dtype) if rows else ids
    for special in (math.nan, math.inf, -math.inf):
        Z = random(4, 33, dtype=dtype)
        Z[1, position] = special
        value, cache = loss.forward(backend.asarray(Z), backend.asarray(target))
        with np.errstate(all="ignore"):
            reference, kept = defined(loss, Z.astype(np.float64), target.astype(np.float64) if rows else target)
            dreference = loss.backward(kept)
        assert np.isfinite(backend.to_numpy(value)) == np.isfinite(reference) == (special == -math.inf)
        np.testing.assert_array_equal(np.isnan(backend.to_numpy(loss.backward(cache))), np.isnan(dreference))


@on_cuda
@dtypes
def test_large_logits_neither_overflow_nor_lose_a_class_of_probability_zero(backend, dtype):
    loss = SoftmaxCrossEntropy()
    Z = np.asarray([[30000.0, 0.0], [-30000.0, 30000.0]], dtype)
    value, _ = loss.forward(backend.asarray(Z), backend.asarray(np.asarray([0, 1])))
    assert backend.to_numpy(value) == 0
    Z[1, 0] = -math.inf
    value, _ = loss.forward(backend.asarray(Z), backend.asarray(np.asarray([[1, 0], [0, 1]])))
    assert backend.to_numpy(value) == 0


@on_cuda
def test_losses_of_strided_and_of_empty_batches(backend):
    cross, squared = SoftmaxCrossEntropy(), MeanSquaredError()
    Z, T, ids = backend.asarray(random(20, 6)), backend.asarray(targets((20, 6), "probabilities").astype("f")), backend.asarray(np.arange(20) % 6)
    with backend.computing():
        views = [(Z[::2, ::-1], T[::2, ::-1], ids[::-2]), (Z.T.copy().T, T.T.copy().T, ids)]
        copies = [tuple(x.copy(order="C") for x in view) for view in views]
    for (z, t, i), (z_, t_, i_) in zip(views, copies, strict=True):
        for loss, target, target_ in ((cross, t, t_), (cross, i, i_), (squared, t, t_)):
            (value, cache), (value_, cache_) = loss.forward(z, target), loss.forward(z_, target_)
            same(backend, value, value_)
            same(backend, loss.backward(cache), loss.backward(cache_))
    empty = backend.asarray(np.zeros((0, 6), "f"))
    for loss, target in ((cross, ids[:0]), (cross, empty), (squared, empty)):
        value, cache = loss.forward(empty, target)
        assert np.isnan(backend.to_numpy(value))
        assert loss.backward(cache).shape == (0, 6)


@on_cuda
@dtypes
@pytest.mark.parametrize("shape", [(), (7,), (64, 10), (200, 100), (600, 1000)], ids=str)
def test_squared_error_is_that_of_the_definition(backend, dtype, shape):
    loss = MeanSquaredError()
    Z, target = random(*shape, dtype=dtype), random(*shape, dtype=dtype, seed=1)
    value, cache = loss.forward(backend.asarray(Z), backend.asarray(target))
    D = Z.astype(np.float64) - target.astype(np.float64)
    n = D.size / 256 + 20  # additions in a thread, and in the trees
    assert value.dtype == np.dtype(dtype)
    close(backend, value, (D * D).mean(), (n * wide(dtype) + 4 * UNIT[dtype]) * (D * D).mean())
    close(backend, loss.backward(cache), 2 * D / D.size, 4 * UNIT[dtype] * abs(2 * D / D.size) + 2 * TINY[dtype])
    same(backend, loss.forward(backend.asarray(Z), backend.asarray(target))[0], value)
    if dtype != "float16":
        with lanes.off():
            theirs, _ = loss.forward(backend.asarray(Z), backend.asarray(target))
        close(backend, theirs, backend.to_numpy(value).astype(float), (D.size + 20) * UNIT[dtype] * (D * D).mean())


# optimizers

OPTIMIZERS = {
    "sgd": lambda **k: SGD(0.1, **k),
    "sgd-decay": lambda **k: SGD(cosine(0.1, 20), weight_decay=0.01, **k),
    "momentum": lambda **k: SGD(0.1, momentum=0.9, **k),
    "nesterov": lambda **k: SGD(cosine(0.1, 20), momentum=0.9, nesterov=True, weight_decay=0.01, **k),
    "adam": lambda **k: Adam(1e-2, **k),
    "adam-decay": lambda **k: Adam(cosine(1e-2, 20, warmup=5), weight_decay=0.1, eps=1e-4, **k),
    "adamw": lambda **k: AdamW(1e-2, betas=(0.8, 0.99), **k),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


def a_model(backend, dtype, hidden=300):
    return Sequential(Linear(64, hidden, seed=0), ReLU(), Linear(hidden, 10, seed=1, bias=False)).to(backend.device, dtype)


def some_gradients(backend, model, dtype, step):
    return {name: backend.asarray(random(*p.shape, dtype=dtype, seed=step)) for name, p in model.parameters().items()}


def stepped(backend, optimizer, dtype, steps=20, **layout):
    model = a_model(backend, dtype, **layout)
    for step in range(steps):
        optimizer.step(model, some_gradients(backend, model, dtype, step))
    return model


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_optimizer
def test_optimizers_update_in_place_to_the_same_bits(backend, dtype, name):
    mine, theirs = OPTIMIZERS[name](), OPTIMIZERS[name]()
    fast = stepped(backend, mine, dtype)
    with lanes.off():
        slow = stepped(backend, theirs, dtype)
    for key, W in fast.parameters().items():
        same(backend, W, slow.parameters()[key])
    for key, moments in mine.state_dict()["moments"].items():
        for m, moment in moments.items():
            same(backend, moment, theirs.state_dict()["moments"][key][m])
    assert fast[0].W.base is not None  # a view of the buffer
    assert slow[0].W.base is None


@on_cuda
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@every_optimizer
def test_clipping_is_that_of_the_portable_definition(backend, dtype, name):
    mine, theirs = OPTIMIZERS[name](clip_norm=0.5), OPTIMIZERS[name](clip_norm=0.5)
    fast = stepped(backend, mine, dtype)
    with lanes.off():
        slow = stepped(backend, theirs, dtype)
    # the two norms differ by the rounding of their sums, of some hundred additions in a row; a step is no longer than lr
    # times the gradient (at most clip_norm, some of it ten times over by momentum) or, in Adam, lr
    for key, W in fast.parameters().items():
        reference = backend.to_numpy(slow.parameters()[key]).astype(np.float64)
        close(backend, W, reference, 20 * 0.1 * 10 * 0.5 * 200 * UNIT[dtype])


@on_cuda
@pytest.mark.parametrize("clip_norm", [1e-3, 1.0, 1e9])
@dtypes
def test_the_norm_is_over_all_gradients_together(backend, dtype, clip_norm):
    model = a_model(backend, dtype)
    gradients = some_gradients(backend, model, dtype, 0)
    before = {name: backend.to_numpy(p).astype(float) for name, p in model.parameters().items()}
    exact = {name: backend.to_numpy(g).astype(float) for name, g in gradients.items()}
    norm = math.sqrt(sum((g * g).sum() for g in exact.values()))
    scale = min(clip_norm / (norm + 1e-6), 1.0)
    SGD(1.0, clip_norm=clip_norm).step(model, gradients)
    for name, p in model.parameters().items():
        step = scale * exact[name]
        close(backend, p, before[name] - step, 60 * wide(dtype) * abs(step) + 2 * UNIT[dtype] * (abs(before[name]) + abs(step)) + TINY[dtype])


@on_cuda
@every_optimizer
def test_float16_has_masters_and_moments_in_float32(backend, name):
    optimizer, by_hand = OPTIMIZERS[name](), OPTIMIZERS[name]()
    model = a_model(backend, "float16")
    W = {key: backend.to_numpy(p).astype(np.float32) for key, p in model.parameters().items()}
    moments = {key: {m: np.zeros_like(p) for m in by_hand.moment_names} for key, p in W.items()}
    for step in range(20):
        gradients = some_gradients(backend, model, "float16", step)
        optimizer.step(model, gradients)
        by_hand.steps += 1
        for key in W:
            g = backend.to_numpy(gradients[key]).astype(np.float32)
            scalars = by_hand.scalars(by_hand.learning_rate(step), by_hand.steps)
            W[key], moments[key] = by_hand.update(np, W[key], g, moments[key], scalars)
    for key, p in model.parameters().items():
        assert p.dtype == np.float16
        np.testing.assert_array_equal(backend.to_numpy(p), W[key].astype(np.float16))
        for m, x in {**moments[key], "master": W[key]}.items():
            np.testing.assert_array_equal(backend.to_numpy(optimizer.moments()[key][m]), x)


@on_cuda
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_model_of_more_parameters_than_a_table_holds(backend, clip_norm):
    def trained():
        model = Sequential(*(Linear(3, 3, seed=i) for i in range(70))).to(backend.device, "float64")
        optimizer = Adam(1e-2, clip_norm=clip_norm)
        for step in range(3):
            optimizer.step(model, some_gradients(backend, model, "float64", step))
        return model

    fast = trained()
    with lanes.off():
        slow = trained()
    assert len(fast.parameters()) == 140
    for name, p in fast.parameters().items():
        close(backend, p, backend.to_numpy(slow.parameters()[name]), 1e-14)


@on_cuda
@dtypes
@pytest.mark.parametrize("clip_norm", [None, 0.5])
def test_a_step_called_off_on_the_device_changes_nothing(backend, dtype, clip_norm):
    optimizer = Adam(clip_norm=clip_norm)
    model = stepped(backend, optimizer, dtype, 2)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    gradients = some_gradients(backend, model, dtype, 3)
    broken = {name: backend.asarray(np.full(g.shape, math.nan, dtype)) for name, g in gradients.items()}
    optimizer.step(model, broken, where=backend.asarray(np.asarray(False)))
    for name, p in model.parameters().items():
        same(backend, p, twin.parameters()[name])
    optimizer.step(model, gradients, where=backend.asarray(np.asarray(True)))
    twin_optimizer.steps += 1
    twin_optimizer.step(twin, gradients)
    for name, p in model.parameters().items():
        same(backend, p, twin.parameters()[name])
        assert np.isfinite(backend.to_numpy(p)).all()


@on_cuda
def test_a_flag_on_another_device_is_refused(backend):
    cupy = pytest.importorskip("cupy")
    if cupy.cuda.runtime.getDeviceCount() < 2:
        pytest.skip("there is one device only")
    optimizer = SGD(0.1)
    model = stepped(backend, optimizer, "float32", 1)
    with cupy.cuda.Device(1 - backend.native.id):
        elsewhere = cupy.asarray(True)
    with pytest.raises(ValueError, match="where is a cupy array on cuda"):
        optimizer.step(model, some_gradients(backend, model, "float32", 1), where=elsewhere)


@pytest.mark.parametrize("backend", ["numpy", "cupy:0", "cupy:1"], indirect=True)
def test_lanes_may_be_switched_on_and_off_between_steps(backend):
    mixed, portable = Adam(), Adam()
    model, other = a_model(backend, "float32"), a_model(backend, "float32")
    for step in range(6):
        gradients = some_gradients(backend, model, "float32", step)
        with lanes.off():
            portable.step(other, gradients)
            if step % 2:
                mixed.step(model, gradients)
        if not step % 2:
            mixed.step(model, gradients)
    for name, p in model.parameters().items():
        same(backend, p, other.parameters()[name])
        same(backend, mixed.moments()[name]["V"], portable.moments()[name]["V"])


@on_cuda
def test_an_assigned_parameter_is_noticed_and_copied_in(backend):
    mine, theirs = Adam(), Adam()
    model = stepped(backend, mine, "float32", 3)
    with lanes.off():
        other = stepped(backend, theirs, "float32", 3)
    assigned = backend.asarray(np.full((300, 64), 0.25, np.float32))
    model[0].W = other[0].W = assigned
    gradients = some_gradients(backend, model, "float32", 9)
    mine.step(model, gradients)
    with lanes.off():
        theirs.step(other, gradients)
    assert (backend.to_numpy(assigned) == 0.25).all()
    for name, p in model.parameters().items():
        same(backend, p, other.parameters()[name])
    # a part of the buffer itself
    with backend.computing():
        model[0].W = model[0].W[::-1]
    reversed_W = backend.to_numpy(model[0].W).copy()
    mine.step(model, gradients, where=backend.asarray(np.asarray(False)))
    np.testing.assert_array_equal(backend.to_numpy(model[0].W), reversed_W)


@pytest.mark.parametrize("backend", ["numpy", "cupy:0", "cupy:1"], indirect=True)
def test_parameters_may_be_swapped(backend):
    model, optimizer = Sequential(Linear(3, 3, seed=0), Linear(3, 3, seed=1)).to(backend.device, "float32"), SGD(1.0)
    nothing = {name: backend.asarray(np.zeros(p.shape, "f")) for name, p in model.parameters().items()}
    optimizer.step(model, nothing)
    first, second = (backend.to_numpy(layer.W).copy() for layer in model)
    model[0].W, model[1].W = model[1].W, model[0].W
    optimizer.step(model, nothing)
    np.testing.assert_array_equal(backend.to_numpy(model[0].W), second)
    np.testing.assert_array_equal(backend.to_numpy(model[1].W), first)


@on_cuda
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["deepcopy", "pickle"])
def test_a_copied_model_and_optimizer_go_on_by_themselves(backend, duplicate):
    optimizer = Adam()
    model = stepped(backend, optimizer, "float32", 3)
    twin, twin_optimizer = duplicate((model, optimizer))
    gradients = some_gradients(backend, model, "float32", 5)
    before = {name: backend.to_numpy(p).copy() for name, p in model.parameters().items()}
    twin_optimizer.step(twin, gradients)
    for name, p in model.parameters().items():
        np.testing.assert_array_equal(backend.to_numpy(p), before[name])
    optimizer.step(model, gradients)
    for name, p in model.parameters().items():
        assert (backend.to_numpy(p) != before[name]).any()
        same(backend, p, twin.parameters()[name])


@on_cuda
def test_arrays_of_the_user_are_never_written(backend):
    W, b = backend.asarray(random(4, 3)), backend.asarray(random(1, 4))
    layer, optimizer = Linear.from_arrays(W, b), AdamW(clip_norm=1e-3)
    X, dZ = backend.asarray(random(5, 3)), backend.asarray(random(5, 4))
    layer.backward(dZ, layer.forward(X)[1])
    held = layer.dW, layer.db, X, dZ, W, b
    before = [backend.to_numpy(x).copy() for x in held]
    optimizer.step(layer)
    layer.backward(dZ, layer.forward(X)[1], accumulate=True)
    optimizer.step(layer)
    for x, host in zip(held, before, strict=True):
        np.testing.assert_array_equal(backend.to_numpy(x), host)
    assert layer.dW is not held[0]


@on_cuda
def test_gradients_of_any_strides_are_taken(backend):
    model, other = a_model(backend, "float32"), a_model(backend, "float32")
    gradients = some_gradients(backend, model, "float32", 0)
    with backend.computing():
        strided = {name: g.T.copy().T for name, g in gradients.items()}
    SGD(0.1, clip_norm=1.0).step(model, strided)
    SGD(0.1, clip_norm=1.0).step(other, gradients)
    for name, p in model.parameters().items():
        same(backend, p, other.parameters()[name])


def test_a_rule_of_the_users_own_keeps_its_own_formula():
    cupy = pytest.importorskip("cupy")

    class Signs(SGD):
        def update(self, xp, W, dW, moments, by):
            return W - by.lr * xp.sign(dW), {}

    layer = Linear.from_arrays(cupy.ones((1, 1)))
    Signs(0.25).step(layer, {"W": cupy.full((1, 1), 7.0)})
    assert layer.W == 0.75


# what `fit` does around a step


@on_cuda
@dtypes
@pytest.mark.parametrize("allowed", [0, 1, 2])
def test_the_guard_keeps_the_books_of_the_portable_definition(backend, dtype, allowed):
    def judged():
        guard, answers = Guard(backend.device, np.dtype(dtype), allowed), []
        for step in range(1, 9):
            value, gradients = np.asarray(step, dtype), [random(4, 3, dtype=dtype), random(600, 700, dtype=dtype)]
            if step == 2:
                gradients[1][-1, -1] = math.nan
            if step == 4:
                value = np.asarray(math.inf, dtype)
            if step == 6:
                gradients[0][2, 1] = -math.inf
            if step == 5:
                guard.start_epoch()
            apply = guard.judge(step, backend.asarray(value), map(backend.asarray, gradients), 10 + step)
            assert apply.shape == ()
            answers.append(bool(backend.to_numpy(apply)))
        return answers, guard.read()

    mine = judged()
    with lanes.off():
        assert mine == judged()
    assert mine[1][3] == {0: 2, 1: 4, 2: 6}[allowed]


@on_cuda
@pytest.mark.parametrize("wide", [False, True], ids=["float16 gradients", "float32 gradients"])
@pytest.mark.parametrize("with_loss", [False, True])
def test_a_scale_is_judged_as_the_portable_definition_does(backend, wide, with_loss):
    dtype = "float32" if wide else "float16"

    def judged():
        scale, found = LossScale(2.0**3, growth=4.0, backoff=0.25, interval=3, floor=2.0), []
        guard = Guard(backend.device, np.dtype("float32"), 2)
        for i in range(1, 18):
            value, gradients = np.float32(i), [random(4, 3, dtype=dtype), random(600, 70, dtype=dtype)]
            if i in (2, 12, 13, 14):
                gradients[i % 2][-1, -1] = math.inf
            if i in (9, 16):
                value = np.float32(math.nan)
            loss = backend.asarray(value)
            verdict = scale.judge(loss if with_loss else None, map(backend.asarray, gradients))
            found.append([float(backend.to_numpy(x)) for x in verdict])
            if with_loss:
                found.append(bool(backend.to_numpy(guard.judge(i, loss, [], 7, verdict))))
            found.append(scale.read())
        return found, guard.read()

    mine = judged()
    with lanes.off():
        assert mine == judged()
    assert {state[0] for state in mine[0] if isinstance(state, tuple)} == {2.0, 8.0, 32.0, *([] if with_loss else [128.0])}


def a_step(backend, optimizer, layers=None, dtype="float32", batch=64):
    model = Sequential(*(layers or (Linear(64, 128, seed=0), ReLU(), Linear(128, 64, seed=1), ReLU(), Linear(64, 10, seed=2))))
    model = model.to(backend.device, dtype)
    X, y, loss = backend.asarray(random(batch, 64, dtype=dtype)), backend.asarray(np.arange(batch) % 10), SoftmaxCrossEntropy()

    def step():
        Z, caches = model.forward(X)
        value, cache = loss.forward(Z, y)
        model.backward(loss.backward(cache), caches, needs_dX=False)
        optimizer.step(model)
        return value

    return step


def counts_of(work, warm=3):
    from cupy_backends.cpu_counters import count

    for _ in range(warm):
        work()
    with count() as c:
        work()
    return vars(c)


@counted
@on_cuda
@dtypes
@pytest.mark.parametrize(("optimizer", "launches"), [(SGD(0.1), 10), (Adam(), 10), (AdamW(clip_norm=1.0), 11)], ids=repr)
def test_a_warm_training_step_asks_for_so_little(backend, dtype, optimizer, launches):
    counts = counts_of(a_step(backend, copy.deepcopy(optimizer), dtype=dtype))
    # per layer a bias; two ReLUs each way; the loss each way; the optimizer, whose clipping is one more
    assert counts.pop("launches") == launches
    assert counts.pop("library_calls") == 11  # Z of three layers; dW and db of three, dX of two
    assert set(counts.values()) == {0}, counts


@counted
@on_cuda
@pytest.mark.parametrize("activation", [Tanh, Sigmoid, SiLU, GELU])
def test_an_activation_is_one_kernel_each_way(backend, activation):
    layer, X = activation(), backend.asarray(random(64, 128))
    assert counts_of(lambda: layer.forward(X))["launches"] == 1
    _, cache = layer.forward(X)
    assert counts_of(lambda: layer.gradients(X, cache))["launches"] == 1


@counted
@on_cuda
@pytest.mark.parametrize(("N", "forward"), [(64, 1), (200, 1), (1024, 2)])
def test_a_loss_is_one_kernel_each_way(backend, N, forward):
    """Forward, over more than `ONE_BLOCK` elements, it is two: nothing beside the time that so many elements take."""
    Z = backend.asarray(random(N, 10))
    for loss, target in (
        (SoftmaxCrossEntropy(), np.arange(N) % 10),
        (SoftmaxCrossEntropy(), targets((N, 10), "probabilities").astype("f")),
        (MeanSquaredError(), random(N, 10, seed=1)),
    ):
        y = backend.asarray(target)
        _, cache = loss.forward(Z, y)
        for work, launches in ((lambda loss=loss, y=y: loss.forward(Z, y), forward), (lambda loss=loss, c=cache: loss.backward(c), 1)):
            counts = counts_of(work)
            assert counts.pop("launches") == launches
            assert set(counts.values()) == {0}, counts


@counted
@on_cuda
def test_fit_adds_four_kernels_to_a_step_that_is_not_captured(backend, monkeypatch):
    from cupy_backends.cpu_counters import counters

    monkeypatch.setattr("anyarray_linear.lanes.cupy.captured.ON", False)

    device, seen = backend.device, []
    model = Sequential(Linear(64, 16, seed=0), ReLU(), Linear(16, 10, seed=1)).to(device, "float32")
    X, y = backend.asarray(random(640, 64)), backend.asarray(np.arange(640) % 10)

    class Watch:
        def is_set(self):
            seen.append(counters())
            return False

    fit(model, X, y, loss=SoftmaxCrossEntropy(), optimizer=Adam(), epochs=2, batch_size=64, progress=False, stop=Watch())
    *_, before, after, _ = seen  # fit asks once more when it is done
    warm = {name: after[name] - before[name] for name in after}
    # two layers' biases, ReLU twice, the loss twice, Adam: 7. Then the batch of X and of y, and the guard's two
    assert warm.pop("launches") == 7 + 4
    assert warm.pop("library_calls") == 2 + 2 + 2 + 1
    assert set(warm.values()) == {0}, warm


@on_cuda
def test_many_threads_and_streams_share_the_lane(backend):
    cupy = pytest.importorskip("cupy")

    def work(number):
        with backend.computing(), cupy.cuda.Stream(non_blocking=True) as stream:
            step = a_step(backend, AdamW(clip_norm=1.0), batch=32 + number % 3)
            losses = [step() for _ in range(4)]
            stream.synchronize()
            return [float(value) for value in losses]

    alone = [work(number) for number in range(3)]
    with ThreadPoolExecutor(6) as pool:
        for number, losses in enumerate(pool.map(work, range(12))):
            assert losses == alone[number % 3]
