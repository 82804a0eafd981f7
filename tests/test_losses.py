"""Losses: their values and gradients against the definition, their edges, and the shapes that they must not broadcast."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anyarray_linear import MeanSquaredError, SoftmaxCrossEntropy

INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64")
SHAPES = st.sampled_from([(5,), (3, 4), (1, 1), (2, 1, 2, 3)])  # few, as JAX compiles for each; empty ones: see below


def cross_entropy(z, target):
    """Loss, dZ and the logarithms of the probabilities, in extended precision, as the definition says."""
    z = z.astype(np.longdouble)
    rows = np.prod(z.shape[:-1], dtype=int)
    shifted = z - z.max(axis=-1, keepdims=True)
    log_P = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    T = target.astype(np.longdouble) if target.shape == z.shape else (np.arange(z.shape[-1]) == target[..., None])
    return -np.sum(np.where(T == 0, 0, T * log_P)) / rows, (np.exp(log_P) * T.sum(-1, keepdims=True) - T) / rows, log_P


def check_place(backend, Z, loss, dZ, shape):
    assert backend.owns(loss)
    assert type(loss) is type(Z)  # a 0-d array, not a scalar
    assert loss.shape == ()
    assert loss.dtype == Z.dtype
    assert backend.owns(dZ)
    assert tuple(dZ.shape) == shape
    assert dZ.dtype == Z.dtype


@given(
    shape=SHAPES,
    dtype=st.sampled_from(["float16", "float32", "float64"]),
    kind=st.sampled_from(["ids", "one-hot", "one-hot integers", "probabilities", "sums to 3"]),
    spread=st.sampled_from([0.1, 3.0, 100.0]),
    seed=st.integers(0, 2**32),
)
def test_cross_entropy_is_right_to_rounding(backend, shape, dtype, kind, spread, seed):
    assume(dtype in backend.dtypes)
    rng = np.random.default_rng(seed)
    z = (spread * rng.standard_normal(shape)).astype(dtype)
    target = rng.integers(0, shape[-1], shape[:-1])
    if kind.startswith("one-hot"):
        target = np.eye(shape[-1])[target].astype(dtype if kind == "one-hot" else "int64")
    elif kind != "ids":
        target = rng.random(shape) + 0.1
        target = (target / target.sum(-1, keepdims=True) * (3 if kind == "sums to 3" else 1)).astype(dtype)
    Z, loss_function = backend.asarray(z), SoftmaxCrossEntropy()

    loss, cache = loss_function.forward(Z, backend.asarray(target))
    dZ = loss_function.backward(cache)

    check_place(backend, Z, loss, dZ, shape)
    expected, expected_dZ, log_P = cross_entropy(z, np.asarray(target))
    # roundings: each shifted logit to u (|z| + max|z|), the sum of K exponentials, its logarithm, and the mean over rows;
    # the weights are at most 3
    u, (rows, classes) = np.finfo(dtype).eps / 2, (np.prod(shape[:-1], dtype=int), shape[-1])
    size = 1 + 2 * np.abs(z).max().astype(np.float64) + np.abs(log_P).max()
    assert abs(backend.to_numpy(loss).astype(np.longdouble) - expected) <= 3 * (rows + 2 * classes + 16) * u * size
    assert np.all(np.abs(backend.to_numpy(dZ) - expected_dZ) <= 3 * (2 * classes + 16) * u * size / rows)
    assert np.array_equal(backend.to_numpy(Z), z), "Z was written to"


@given(shape=SHAPES, dtype=st.sampled_from(["float16", "float32", "float64"]), seed=st.integers(0, 2**32))
def test_squared_error_is_right_to_rounding(backend, shape, dtype, seed):
    assume(dtype in backend.dtypes)
    rng = np.random.default_rng(seed)
    z, target = rng.standard_normal(shape).astype(dtype), rng.standard_normal(shape).astype(dtype)
    Z, T, loss_function = backend.asarray(z), backend.asarray(target), MeanSquaredError()
    loss, cache = loss_function.forward(Z, T)
    dZ = loss_function.backward(cache)
    check_place(backend, Z, loss, dZ, shape)
    D, u = z.astype(np.longdouble) - target, np.finfo(dtype).eps / 2
    assert abs(backend.to_numpy(loss) - np.mean(D**2)) <= (z.size + 8) * u * np.mean(D**2)
    assert np.all(np.abs(backend.to_numpy(dZ) - 2 * D / z.size) <= 4 * u * np.abs(2 * D / z.size) + 1e-7 * (dtype == "float16"))
    assert np.array_equal(backend.to_numpy(Z), z)
    assert np.array_equal(backend.to_numpy(T), target)


def run(backend, z, target, dtype="float32", target_dtype=None):
    """Loss and dZ on the host."""
    loss, cache = SoftmaxCrossEntropy().forward(backend.asarray(z, dtype), backend.asarray(target, target_dtype))
    return backend.to_numpy(loss).astype(np.float64).item(), backend.to_numpy(SoftmaxCrossEntropy().backward(cache))


def test_the_loss_of_equal_logits_is_the_logarithm_of_their_number(backend):
    for classes in (1, 2, 1000):
        loss, dZ = run(backend, np.full((3, classes), 7.0), [0, 0, classes - 1])
        assert loss == pytest.approx(np.log(classes), rel=1e-6, abs=1e-7)
        assert dZ.sum() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_huge_logits_overflow_nothing(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"layers do not compute in {dtype} here")
    large = {"float16": 3e4, "float32": 1e38, "float64": 1e307}[dtype]
    loss, dZ = run(backend, [[large, -large, 0.0], [large, large, -large]], [0, 1], dtype)
    assert loss == pytest.approx(np.log(2) / 2, rel=2e-3)
    assert np.allclose(dZ, [[0, 0, 0], [0.25, -0.25, 0]], atol=1e-3)
    loss, _ = run(backend, [[large / 2, -large / 2]], [1], dtype)
    assert loss == pytest.approx(large, rel=1e-3)


def test_a_logit_of_minus_infinity_is_a_class_that_cannot_be(backend):
    z = [[-np.inf, 0.0, 0.0], [1.0, -np.inf, 1.0]]
    for target in ([1, 2], [[0.0, 0.5, 0.5], [0.5, 0.0, 0.5]]):
        loss, dZ = run(backend, z, target, target_dtype="float32" if isinstance(target[0], list) else None)
        assert loss == pytest.approx(np.log(2))
        assert np.all(np.isfinite(dZ))
        assert dZ[0, 0] == dZ[1, 1] == 0
    loss, _ = run(backend, z, [0, 0])
    assert loss == np.inf, "a target that cannot be costs infinitely much"


@pytest.mark.parametrize("target_dtype", INTEGERS)
def test_class_ids_of_every_integer_dtype_mean_the_same(backend, target_dtype):
    z = np.random.default_rng(0).standard_normal((6, 300))
    ids = [0, 1, 127, 44, 100, 2]
    assert run(backend, z, ids, target_dtype=target_dtype)[0] == run(backend, z, ids, target_dtype="int64")[0]
    if target_dtype not in ("int8",):  # 300 classes are more than a byte has: nothing may wrap around at 256
        ids = [200, 255, 128, 44, 0, 129] if target_dtype == "uint8" else [299, 256, 255, 44, 0, 257]
        loss, dZ = run(backend, z, ids, "float64", target_dtype)
        expected, expected_dZ, _ = cross_entropy(z, np.asarray(ids))
        assert loss == pytest.approx(float(expected), rel=1e-14)
        assert np.allclose(dZ, expected_dZ.astype(float), rtol=1e-12, atol=1e-16)


READS_FREELY = ("numpy", "numpy-readonly", "torch")
OUT_OF_RANGE = [-1, -3, 3, 100, np.iinfo("int64").max, np.iinfo("int64").min]


@pytest.mark.parametrize("bad", OUT_OF_RANGE)
def test_a_class_id_out_of_range_is_refused_where_looking_is_free_and_NaN_elsewhere(backend, bad):
    z, ids = np.zeros((3, 3)), [0, bad, 2]
    if backend.name in READS_FREELY:
        with pytest.raises(ValueError, match=r"^target has class ids from .* Z has 3 classes, numbered 0 to 2"):
            run(backend, z, ids)
        return
    loss, dZ = run(backend, z, ids)
    assert np.isnan(loss)
    assert np.all(np.isnan(dZ[1]))
    assert np.all(np.isfinite(dZ[[0, 2]])), "NaN spread to other rows"
    with pytest.raises(ValueError, match="class ids"):
        SoftmaxCrossEntropy.check_ids(backend.asarray(ids), 3)


@pytest.mark.parametrize("target_dtype", ["uint8", "uint16", "uint32", "uint64"])
def test_an_unsigned_id_out_of_range_does_not_wrap_around_into_it(backend, target_dtype):
    largest = np.iinfo(target_dtype).max
    for bad in (largest, largest - 1, largest // 2 + 1, 3):
        ids = np.asarray([bad], dtype=target_dtype)
        if backend.name in READS_FREELY:
            with pytest.raises(ValueError, match=r"class ids from .* Z has 3 classes"):
                run(backend, np.zeros((1, 3)), ids)
        else:
            assert np.isnan(run(backend, np.zeros((1, 3)), ids)[0]), bad


def test_a_1D_Z_takes_a_0D_id(backend):
    z = np.asarray([1.0, 2.0, 3.0])
    expected, expected_dZ, _ = cross_entropy(z, np.asarray(1))
    loss, dZ = run(backend, z, np.asarray(1))
    assert loss == pytest.approx(float(expected), rel=1e-6)
    assert np.allclose(dZ, expected_dZ.astype(float), rtol=1e-6)


def test_an_element_of_a_NumPy_array_is_a_0D_id():
    Z, ids = np.asarray([1.0, 2.0, 3.0]), np.asarray([2, 1], dtype="uint8")
    loss, cache = SoftmaxCrossEntropy().forward(Z, ids[1])  # a NumPy scalar, not an array
    expected, expected_dZ, _ = cross_entropy(Z, np.asarray(1))
    assert loss == pytest.approx(float(expected), rel=1e-14)
    assert np.allclose(SoftmaxCrossEntropy().backward(cache), expected_dZ.astype(float), rtol=1e-13)
    with pytest.raises(ValueError, match="class ids"):
        SoftmaxCrossEntropy().forward(Z, np.int64(3))


@pytest.mark.parametrize("shape", [(0, 3), (2, 0, 3)])
def test_the_mean_of_an_empty_batch_is_NaN_and_its_gradient_empty(backend, shape):
    for target in (np.zeros(shape[:-1], dtype="int64"), np.zeros(shape, dtype="float32")):
        loss, dZ = run(backend, np.zeros(shape), target)
        assert np.isnan(loss)
        assert dZ.shape == shape
    Z = backend.asarray(np.zeros(shape), "float32")
    loss, cache = MeanSquaredError().forward(Z, Z)
    assert np.isnan(backend.to_numpy(loss))
    assert tuple(MeanSquaredError().backward(cache).shape) == shape


def test_a_mean_over_many_rows_does_not_overflow_on_the_way(backend):
    if "float16" not in backend.dtypes:
        pytest.skip("layers do not compute in float16 here")
    # the sum of 65,536 losses of log 4 is beyond float16, their mean is not
    loss, dZ = run(backend, np.zeros((2**16, 4)), np.zeros(2**16, dtype="int64"), "float16")
    assert loss == pytest.approx(np.log(4), rel=1e-2)
    assert np.all(np.isfinite(dZ))
    Z, T = (backend.asarray(np.full(2**16, value), "float16") for value in (2.0, 0.0))
    assert float(backend.to_numpy(MeanSquaredError().forward(Z, T)[0])) == pytest.approx(4, rel=1e-2)


@pytest.mark.parametrize(
    ("target", "dtype", "error", "words"),
    [
        ([0, 1], None, TypeError, r"target is a list, not an array"),
        (1, None, TypeError, r"target is a int, not an array"),
        ([0.0, 1.0], "float32", TypeError, r"target is float32, but class ids are integers.*astype\(target"),
        (np.ones((2, 3)), "float64", TypeError, r"target is float64 but Z is float32.*astype\(target"),
        ([[0], [1]], "int64", ValueError, r"target has shape \(2, 1\) .*ids of shape \(2,\)"),
        ([0, 1, 2], "int64", ValueError, r"target has shape \(3,\)"),
        ([0], "int64", ValueError, r"target has shape \(1,\)"),
        (0, "int64", ValueError, r"target has shape \(\)"),
        (np.ones((1, 3)), "float32", ValueError, r"target has shape \(1, 3\)"),
        (np.ones((2, 4)), "float32", ValueError, r"target has shape \(2, 4\)"),
    ],
)
def test_a_target_that_does_not_fit_is_refused(backend, target, dtype, error, words):
    Z = backend.asarray(np.zeros((2, 3)), "float32")
    target = target if dtype is None else backend.asarray(target, dtype)
    with pytest.raises(error, match=f"^{words}"):
        SoftmaxCrossEntropy().forward(Z, target)


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), MeanSquaredError()])
def test_a_Z_that_is_no_float_array_is_refused(backend, loss):
    for Z in ([[1.0]], 1.0, backend.asarray([[1]], "int64"), backend.asarray([[1]], "complex64")):
        with pytest.raises(TypeError, match=r"^Z is "):
            loss.forward(Z, Z)


@pytest.mark.parametrize("loss", [SoftmaxCrossEntropy(), MeanSquaredError()])
def test_a_target_of_another_namespace_is_refused(backend, loss):
    Z, target = backend.asarray([[1.0, 2.0]]), np.asarray([[1.0, 0.0]])
    if backend.name.startswith("numpy"):
        target = pytest.importorskip("array_api_strict").asarray(target)
    with pytest.raises(TypeError, match=r"^target is .* but Z is .*asarray\(target\)"):
        loss.forward(Z, target)


def test_a_target_on_another_device_is_refused(backend):
    if backend.name not in ("strict-device1", "cupy:1"):
        pytest.skip("the other device is tried from these")
    Z = backend.asarray([[1.0, 2.0]])
    if backend.name == "cupy:1":
        cupy = pytest.importorskip("cupy")
        ids, rows = cupy.asarray([0]), cupy.asarray([[0.0, 1.0]])  # on the current device, 0
    else:
        ids, rows = backend.xp.asarray([0]), backend.xp.asarray([[0.0, 1.0]])
    for loss, target in ((SoftmaxCrossEntropy(), ids), (SoftmaxCrossEntropy(), rows), (MeanSquaredError(), rows)):
        with pytest.raises(ValueError, match=r"^target is .* on .* but Z is .* on "):
            loss.forward(Z, target)


def test_a_Z_without_classes_is_refused(backend):
    for shape in ((), (3, 0), (0,)):
        with pytest.raises(ValueError, match=r"^Z has shape .*at least one class"):
            SoftmaxCrossEntropy().forward(backend.asarray(np.zeros(shape), "float32"), backend.asarray(0))


def test_squared_error_takes_a_vector_for_a_column(backend):
    z, target = np.asarray([[1.0], [2.0], [4.0]]), np.asarray([1.0, 1.0, 1.0])
    loss, cache = MeanSquaredError().forward(backend.asarray(z), backend.asarray(target))
    assert float(backend.to_numpy(loss)) == pytest.approx((0 + 1 + 9) / 3)
    assert np.allclose(backend.to_numpy(MeanSquaredError().backward(cache)), [[0], [2 / 3], [2]])


@pytest.mark.parametrize(
    ("Z_shape", "shape"),
    [((3,), (3, 1)), ((3, 1), (1,)), ((3, 1), (1, 3)), ((3, 1), ()), ((3, 3), (3,)), ((1, 3), (3,)), ((3, 1), (2,)), ((3, 1, 1), (3,)),
     ((), (1,)), ((3, 2), (3, 1)), ((1, 1), ())],
)  # fmt: skip
def test_squared_error_never_broadcasts(backend, Z_shape, shape):
    Z, target = backend.asarray(np.ones(Z_shape), "float32"), backend.asarray(np.ones(shape), "float32")
    with pytest.raises(ValueError, match=r"^target has shape .* must have .*the shape of Z"):
        MeanSquaredError().forward(Z, target)


def test_squared_error_refuses_another_float_dtype(backend):
    Z = backend.asarray(np.ones((3, 1)), "float32")
    with pytest.raises(TypeError, match=r"^target is float64 but Z is float32.*astype\(target"):
        MeanSquaredError().forward(Z, backend.asarray(np.ones((3, 1)), "float64"))


def test_backward_of_a_loss_may_be_asked_twice(backend):
    Z = backend.asarray([[1.0, 2.0]], "float32")
    for loss, target in ((SoftmaxCrossEntropy(), backend.asarray([0])), (MeanSquaredError(), Z)):
        _, cache = loss.forward(Z, target)
        first = backend.to_numpy(loss.backward(cache)).copy()
        assert np.array_equal(backend.to_numpy(loss.backward(cache)), first)
        assert repr(loss) == f"{type(loss).__name__}()"
