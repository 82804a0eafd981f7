"""The layer: its values against the derivation, what it refuses, and what it promises never to touch."""

from __future__ import annotations

import copy
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from anyarray_linear import Layer, Linear, LinearGradients, linear_backward, linear_forward
from anyarray_linear.testing import linear_error_bounds, linear_reference

LAYOUTS = ("C", "Fortran", "strided", "reversed", "broadcast")


def spread(x, layout):
    """The values that `laid_out` gives: those of `x`, but for a broadcast one its first row repeated."""
    return np.array(np.broadcast_to(x[:1], x.shape)) if layout == "broadcast" and x.ndim else x


def laid_out(backend, x, layout):
    """`spread(x, layout)` as an array of the backend, with the strides that the layout's name says."""
    axes = tuple(reversed(range(x.ndim)))
    with backend.computing():
        if layout == "Fortran":
            return backend.xp.permute_dims(backend.asarray(np.transpose(x).copy()), axes)
        if layout == "strided":
            return backend.asarray(np.repeat(x, 2, axis=-1))[..., ::2]
        if layout == "reversed" and backend.name != "torch":  # torch has no negative strides
            return backend.asarray(x[..., ::-1].copy())[..., ::-1]
        if layout == "broadcast":
            return backend.xp.broadcast_to(backend.asarray(x[:1]), x.shape)
        return backend.asarray(x)


@st.composite
def problems(draw):
    """Host arrays X, W, b (or None) and dZ, a layout for each of X, W and dZ, and a dtype."""
    batch = tuple(draw(st.lists(st.integers(0, 3), max_size=3)))
    in_features, out_features = draw(st.integers(1, 6)), draw(st.integers(1, 5))
    dtype = draw(st.sampled_from(["float16", "float32", "float64"]))
    layouts = [draw(st.sampled_from(LAYOUTS)) for _ in range(3)]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    scale = 0 if dtype == "float16" else draw(st.integers(-6, 6))

    def values(*shape):
        return (rng.standard_normal(shape) * 10.0 ** (scale * rng.standard_normal(shape))).astype(dtype)

    X, W, dZ = values(*batch, in_features), values(out_features, in_features), values(*batch, out_features)
    b = values(1, out_features) if draw(st.booleans()) else None
    X, W, dZ = (spread(x, layout) for x, layout in zip((X, W, dZ), layouts, strict=True))
    return X, W, b, dZ, layouts, dtype


@given(problems())
def test_every_shape_layout_and_dtype_is_right_to_rounding(backend, problem):
    X, W, b, dZ, layouts, dtype = problem
    assume(dtype in backend.dtypes)
    expected, bounds = linear_reference(X, W, b, dZ), linear_error_bounds(X, W, b, dZ)
    inputs = [laid_out(backend, x, layout) for x, layout in zip((X, W, dZ), layouts, strict=True)]
    X_, W_, dZ_ = inputs
    b_ = None if b is None else backend.asarray(b)

    found = {"Z": linear_forward(X_, W_, b_), **linear_backward(dZ_, X_, W_, bias=b is not None)._asdict()}

    if b is None:
        assert found.pop("db") is None
    for name, x in found.items():
        assert backend.owns(x), name
        assert x.dtype == W_.dtype, name
        assert tuple(x.shape) == expected[name].shape, name
        error = np.abs(backend.to_numpy(x).astype(np.float64) - expected[name])
        assert np.all(error <= bounds[name]), f"{name} is off by {error.max()}"
    for given_, host in zip([*inputs, b_], [X, W, dZ, b], strict=True):
        assert host is None or np.array_equal(backend.to_numpy(given_), host), "an input was written to"


@given(st.lists(st.integers(0, 3), max_size=3), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
def test_small_integers_give_exactly_the_sums_of_the_derivation(backend, batch, in_features, out_features, seed):
    # sums of products of small integers are exact in any order: no tolerance hides anything
    rng = np.random.default_rng(seed)
    X, dZ = rng.integers(-9, 10, (*batch, in_features)), rng.integers(-9, 10, (*batch, out_features))
    W, b = rng.integers(-9, 10, (out_features, in_features)), rng.integers(-9, 10, (1, out_features))
    layer = Linear.from_arrays(backend.asarray(W, "float32"), backend.asarray(b, "float32"))

    Z, cache = layer.forward(backend.asarray(X, "float32"))
    dX, gradients = layer.gradients(backend.asarray(dZ, "float32"), cache)

    def check(x, expected):
        assert tuple(x.shape) == expected.shape
        assert np.array_equal(backend.to_numpy(x), expected)

    check(Z, np.einsum("...k,jk->...j", X, W) + b[0])
    check(dX, np.einsum("...j,jk->...k", dZ, W))
    check(gradients["W"], np.einsum("nj,nk->jk", dZ.reshape(-1, out_features), X.reshape(-1, in_features)))
    check(gradients["b"], dZ.reshape(-1, out_features).sum(0, keepdims=True))


def test_the_usage_of_the_note_that_this_grew_from():
    layer = Linear(3, 4)
    Z, cache = layer.forward(np.ones((5, 3)))
    dX = layer.backward(np.ones((5, 4)), cache)
    assert (Z.shape, dX.shape, layer.dW.shape, layer.db.shape) == ((5, 4), (5, 3), (4, 3), (1, 4))
    assert all(type(x) is np.ndarray and x.dtype == np.float64 for x in (Z, dX, layer.W, layer.b, layer.dW, layer.db))


def made(backend, dtype="float32", *, bias=True, batch=(2,), in_features=3, out_features=4):
    """A layer of the backend, an X and a dZ."""
    rng = np.random.default_rng(0)
    layer = Linear(in_features, out_features, bias=bias, dtype=dtype, device=backend.device, seed=1)
    X = backend.asarray(rng.standard_normal((*batch, in_features)), dtype)
    return layer, X, backend.asarray(rng.standard_normal((*batch, out_features)), dtype)


def host(backend, *arrays):
    return [backend.to_numpy(x).copy() for x in arrays]


def same(backend, x, y):
    return np.array_equal(*host(backend, x, y))


def test_a_layer_lives_where_it_was_asked_to(backend):
    layer = Linear(3, 4, device=backend.device)
    default = backend.xp.__array_namespace_info__().default_dtypes()["real floating"]
    assert isinstance(layer, Layer)
    assert (layer.in_features, layer.out_features) == (3, 4)
    assert tuple(layer.W.shape) == (4, 3)
    assert tuple(layer.b.shape) == (1, 4)
    assert backend.owns(layer.W)
    assert backend.owns(layer.b)
    assert layer.dtype == layer.W.dtype == layer.b.dtype == default
    assert layer.device == backend.device
    assert layer.dW is None
    assert layer.db is None
    assert not np.any(backend.to_numpy(layer.b))


@pytest.mark.parametrize("how", ["name", "dtype", "NumPy's"])
def test_a_dtype_may_be_a_name_or_a_dtype_of_any_namespace(backend, how):
    for name in ("float32", "float64"):
        spec = {"name": name, "dtype": getattr(backend.xp, name), "NumPy's": np.dtype(name)}[how]
        layer = Linear(3, 4, dtype=spec, device=backend.device)
        assert layer.W.dtype == layer.b.dtype == getattr(backend.xp, name)


def test_the_cache_holds_X_itself(backend):
    layer, X, _ = made(backend)
    Z, cache = layer.forward(X)
    assert isinstance(cache, dict)
    assert cache["X"] is X
    assert same(backend, layer(X), Z)


def test_gradients_store_nothing_and_backward_stores_them(backend):
    layer, X, dZ = made(backend)
    _, cache = layer.forward(X)
    before = dict(vars(layer))
    dX, gradients = layer.gradients(dZ, cache)
    after = dict(vars(layer))
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)
    assert cache.keys() == {"X"}
    assert gradients.keys() == {"W", "b"}

    assert same(backend, layer.backward(dZ, cache), dX)
    assert same(backend, layer.dW, gradients["W"])
    assert same(backend, layer.db, gradients["b"])
    assert layer.W is before["W"]
    assert layer.b is before["b"]


def test_backward_replaces_and_accumulate_adds_in_a_new_array(backend):
    layer, X, dZ = made(backend)
    _, cache = layer.forward(X)
    layer.backward(dZ, cache, accumulate=True)  # with nothing stored yet
    dW, db = layer.dW, layer.db
    first_dW, first_db = host(backend, dW, db)
    layer.backward(dZ, cache)
    assert np.array_equal(backend.to_numpy(layer.dW), first_dW), "backward must replace"
    dW = layer.dW
    layer.backward(dZ, cache, accumulate=True)
    assert np.array_equal(backend.to_numpy(layer.dW), 2 * first_dW)
    assert np.array_equal(backend.to_numpy(layer.db), 2 * first_db)
    assert layer.dW is not dW
    assert np.array_equal(backend.to_numpy(dW), first_dW), "the old gradient changed under its holder"


def test_accumulate_refuses_a_stored_gradient_that_does_not_fit(backend):
    layer, X, dZ = made(backend)
    _, cache = layer.forward(X)
    for shape, dtype, error in (((1, 5), "float32", ValueError), ((1, 1), "float32", ValueError), ((1, 4), "float64", TypeError)):
        layer.db = stored = backend.asarray(np.zeros(shape), dtype)
        with pytest.raises(error, match="db"):
            layer.backward(dZ, cache, accumulate=True)
        assert layer.dW is None, "half of it was stored"
        assert layer.db is stored


def test_what_is_not_asked_for_is_None(backend):
    layer, X, dZ = made(backend)
    _, cache = layer.forward(X)
    full = linear_backward(dZ, X, layer.W)
    assert isinstance(full, LinearGradients)
    lean = linear_backward(dZ, X, layer.W, bias=False, needs_dX=False)
    assert lean.dX is None
    assert lean.db is None
    assert same(backend, lean.dW, full.dW)
    assert layer.gradients(dZ, cache, needs_dX=False)[0] is None
    assert layer.backward(dZ, cache, needs_dX=False) is None
    assert same(backend, layer.dW, full.dW)
    assert same(backend, layer.db, full.db)


def test_a_layer_without_bias_has_it_nowhere(backend):
    layer, X, dZ = made(backend, bias=False)
    Z, cache = layer.forward(X)
    layer.backward(dZ, cache)
    assert layer.b is None
    assert layer.db is None
    assert layer.parameters().keys() == layer.gradients(dZ, cache)[1].keys() == {"W"}
    assert same(backend, Z, linear_forward(X, layer.W))


def test_parameters_are_the_arrays_themselves(backend):
    layer, X, _ = made(backend)
    assert list(layer.parameters()) == ["W", "b"]
    assert layer.parameters()["W"] is layer.W
    assert layer.parameters()["b"] is layer.b
    other = Linear(3, 2, dtype="float32", device=backend.device, seed=2)
    layer.W, layer.b = other.W, other.b
    assert same(backend, layer(X), other(X))
    assert (layer.in_features, layer.out_features) == (3, 2)


def test_eight_threads_get_what_serial_calls_get(backend):
    rng = np.random.default_rng(3)

    def integers(*shape):  # whose sums are exact: MKL adds in an order that depends on where its operands lie in memory
        return backend.asarray(rng.integers(-99, 100, shape), "float32")

    layer = Linear.from_arrays(integers(16, 32), integers(1, 16))
    work = [(integers(n, 32), integers(n, 16)) for n in range(1, 9)]

    def run(X, dZ):
        Z, cache = layer.forward(X)
        dX, gradients = layer.gradients(dZ, cache)
        return host(backend, Z, dX, gradients["W"], gradients["b"])

    serial = [run(*pair) for pair in work]
    start = threading.Barrier(8)

    def thread(pair):
        start.wait()
        return [run(*pair) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        for one, repeated in zip(serial, pool.map(thread, work), strict=True):
            for many in repeated:
                assert all(np.array_equal(x, y) for x, y in zip(one, many, strict=True))
    assert layer.dW is None


def test_float16_sums_the_bias_gradient_in_more_than_float16(backend):
    if "float16" not in backend.dtypes:
        pytest.skip("this namespace does not accumulate float16 in float32")
    layer, X, dZ = made(backend, "float16", batch=(4096,))
    ones = backend.asarray(np.ones(dZ.shape), "float16")  # a sum in float16 stalls at 2,048
    _, gradients = layer.gradients(ones, {"X": backend.asarray(np.ones(X.shape), "float16")})
    assert np.all(backend.to_numpy(gradients["b"]) == 4096)
    assert np.all(backend.to_numpy(gradients["W"]) == 4096)


# ---------------------------------------------------------------------------------------------------------------------
# what is refused


def other_namespace(backend, x):
    if backend.name.startswith("numpy"):
        return pytest.importorskip("array_api_strict").asarray(x)
    return np.asarray(x)


def other_device(backend, x):
    if backend.name.startswith("strict"):
        strict = pytest.importorskip("array_api_strict")
        return strict.asarray(x, device=strict.Device("CPU_DEVICE" if backend.name == "strict-device1" else "device1"))
    if backend.name.startswith("cupy"):
        cupy = pytest.importorskip("cupy")
        other = 1 - int(backend.name[-1])
        if cupy.cuda.runtime.getDeviceCount() < 2:
            pytest.skip("there is one CUDA device")
        with cupy.cuda.Device(other):
            return cupy.asarray(x)
    return pytest.skip("this namespace has one device")


def bfloat16(backend, x):
    if backend.name not in ("torch", "jax"):
        pytest.skip("this namespace has no bfloat16")
    return backend.xp.astype(backend.asarray(x), backend.xp.bfloat16)


def float16(backend, x):
    if backend.name.startswith("strict"):
        pytest.skip("this namespace has no float16")
    return backend.asarray(x, "float16")


def foreign_bytes(backend, x):
    if not backend.name.startswith("numpy"):
        pytest.skip("only NumPy has foreign byte orders")
    return np.asarray(x).astype(np.dtype("float32").newbyteorder())


WRONG_ARRAYS = {
    "list": (lambda backend, x: x.tolist(), TypeError, r"list, not an array.*asarray\({name}"),
    "Python number": (lambda backend, x: 1.0, TypeError, r"float, not an array.*asarray\({name}"),
    "None": (lambda backend, x: None, TypeError, r"NoneType, not an array.*asarray\({name}"),
    "integers": (lambda backend, x: backend.asarray(x, "int32"), TypeError, r"int32.*float32.*astype\({name}"),
    "booleans": (lambda backend, x: backend.asarray(x, "bool"), TypeError, r"bool.*float32.*astype\({name}"),
    "complex": (lambda backend, x: backend.asarray(x, "complex64"), TypeError, r"complex64.*float32.*astype\({name}"),
    "float64": (lambda backend, x: backend.asarray(x, "float64"), TypeError, r"float64.*float32.*astype\({name}"),
    "float16": (float16, TypeError, r"float16.*float32.*astype\({name}"),
    "bfloat16": (bfloat16, TypeError, r"bfloat16.*float32.*astype\({name}"),
    "foreign bytes": (foreign_bytes, TypeError, r"f4.*float32.*astype\({name}"),
    "another namespace": (other_namespace, TypeError, r"array on .* array on .*asarray\({name}\)"),
    "another device": (other_device, ValueError, r"array on .* array on .*asarray\({name}\)"),
}


def refused(case, name):
    _, error, words = WRONG_ARRAYS[case]
    return pytest.raises(error, match=rf"^{name} is .*{words.format(name=name)}")


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_an_X_that_does_not_belong_is_refused_by_name(backend, case):
    layer, _, dZ = made(backend)
    wrong = WRONG_ARRAYS[case][0](backend, np.ones((2, 3), dtype="float32"))
    for call in (layer, layer.forward, lambda X: linear_forward(X, layer.W), lambda X: layer.gradients(dZ, {"X": X})):
        with refused(case, "X"):
            call(wrong)


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_a_dZ_that_does_not_belong_is_refused_and_nothing_stored(backend, case):
    layer, X, dZ = made(backend)
    _, cache = layer.forward(X)
    layer.backward(dZ, cache)
    before = dict(vars(layer))
    stored = host(backend, layer.dW, layer.db)
    wrong = WRONG_ARRAYS[case][0](backend, np.ones((2, 4), dtype="float32"))
    for accumulate in (False, True):
        with refused(case, "dZ"):
            layer.backward(wrong, cache, accumulate=accumulate)
    with refused(case, "dZ"):
        layer.gradients(wrong, cache)
    assert all(before[name] is value for name, value in vars(layer).items())
    assert all(map(np.array_equal, stored, host(backend, layer.dW, layer.db)))


@pytest.mark.parametrize("case", WRONG_ARRAYS)
def test_parameters_that_do_not_belong_are_refused_by_name(backend, case):
    ones = np.ones((2, 3), dtype="float32")
    W, wrong_b = backend.asarray(ones), WRONG_ARRAYS[case][0](backend, np.ones((1, 2), dtype="float32"))
    for call in (Linear.from_arrays, lambda W, b: linear_forward(W, W, b)):
        if case == "None":  # which is no bias at all
            call(W, wrong_b)
            continue
        with refused(case, "b"):
            call(W, wrong_b)


@pytest.mark.parametrize("case", ["list", "Python number", "None", "integers", "booleans", "complex", "bfloat16", "foreign bytes"])
def test_weights_that_no_layer_computes_in_are_refused(backend, case):
    wrong = WRONG_ARRAYS[case][0](backend, np.ones((2, 3), dtype="float32"))
    for call in (Linear.from_arrays, lambda W: linear_forward(backend.asarray(np.ones((2, 3))), W)):
        with pytest.raises(TypeError, match=r"^W is .*(asarray\(W|astype\(W)"):
            call(wrong)


def test_float16_arrays_are_refused_where_sums_of_them_would_stall(backend):
    if "float16" in backend.dtypes or backend.name.startswith("strict"):
        pytest.skip("float16 is taken here, or unknown")
    half = backend.asarray(np.ones((2, 3)), "float16")
    for call in (Linear.from_arrays, lambda W: linear_forward(W, W), lambda W: linear_backward(half[:, :2], W, W)):
        with pytest.raises(TypeError, match=r"^W is float16.*float32 accumulation.*astype\(W, xp\.float32\)"):
            call(half)


def test_a_torch_tensor_that_requires_grad_is_refused():
    torch = pytest.importorskip("torch")
    W, b = torch.ones((2, 3)), torch.ones(2)
    with pytest.raises(ValueError, match=r"^W is .*requires grad.*W\.detach\(\)"):
        Linear.from_arrays(torch.nn.Parameter(W), b)
    with pytest.raises(ValueError, match=r"^b is .*requires grad.*b\.detach\(\)"):
        Linear.from_arrays(W, torch.nn.Parameter(b))


@pytest.mark.parametrize("shape", [(), (4,), (2, 4), (3, 2), (2, 3, 1), (0,), (3, 0)])
def test_an_X_whose_last_axis_is_not_in_features_is_refused(backend, shape):
    layer, _, _ = made(backend)
    for call in (layer, layer.forward):
        with pytest.raises(ValueError, match=r"^X has shape .*in_features = 3"):
            call(backend.asarray(np.ones(shape), "float32"))


@pytest.mark.parametrize("shape", [(), (4,), (2, 3), (1, 4), (2, 1), (3, 4), (2, 4, 1), (1, 2, 4), (0, 4), (8,)])
def test_a_dZ_of_another_shape_than_Z_is_refused(backend, shape):
    layer, X, _ = made(backend)
    _, cache = layer.forward(X)
    with pytest.raises(ValueError, match=r"^dZ has shape .*must have \(2, 4\)"):
        layer.backward(backend.asarray(np.ones(shape), "float32"), cache)
    assert layer.dW is None


def test_a_cache_of_something_else_is_refused(backend):
    layer, X, dZ = made(backend)
    other, _, _ = made(backend, in_features=5)
    _, cache_of_another_shape = other.forward(backend.asarray(np.ones((2, 5)), "float32"))
    with pytest.raises(ValueError, match="in_features = 3"):
        layer.backward(dZ, cache_of_another_shape)
    _, cache_of_another_batch = layer.forward(backend.asarray(np.ones((7, 3)), "float32"))
    with pytest.raises(ValueError, match=r"dZ has shape \(2, 4\) but must have \(7, 4\)"):
        layer.backward(dZ, cache_of_another_batch)
    for no_cache in ({}, {"Z": X}, [X], X, None, (dZ, {"X": X})):
        with pytest.raises(TypeError, match=r"^cache is .*second result of .*forward"):
            layer.backward(dZ, no_cache)
    assert layer.dW is None
    assert layer.db is None


@pytest.mark.parametrize("shape", [(3,), (2, 3, 1), (0, 3), (2, 0), ()])
def test_weights_of_no_layer_are_refused(backend, shape):
    W = backend.asarray(np.ones(shape), "float32")
    with pytest.raises(ValueError, match=r"^W has shape .*\(out_features, in_features\)"):
        Linear.from_arrays(W)
    with pytest.raises(ValueError, match=r"^W has shape"):
        linear_forward(backend.asarray(np.ones((2, 3)), "float32"), W)


@pytest.mark.parametrize("shape", [(), (3,), (1, 3), (2, 1), (2, 2), (1, 1, 2), (0, 2)])
def test_a_bias_of_another_shape_is_refused(backend, shape):
    with pytest.raises(ValueError, match=r"^b has shape"):
        Linear.from_arrays(backend.asarray(np.ones((2, 3)), "float32"), backend.asarray(np.ones(shape), "float32"))


def test_linear_forward_takes_the_bias_only_as_a_row(backend):
    W, X = backend.asarray(np.ones((2, 3)), "float32"), backend.asarray(np.ones((5, 3)), "float32")
    with pytest.raises(ValueError, match=r"^b has shape \(2,\) but must have \(1, 2\)"):
        linear_forward(X, W, backend.asarray(np.ones(2), "float32"))


@pytest.mark.parametrize(
    ("size", "error"),
    [(0, ValueError), (-1, ValueError), (np.int64(0), ValueError)]
    + [(size, TypeError) for size in (2.0, np.float64(2), "2", True, np.True_, None, (2,), [2])],
    ids=repr,
)
def test_a_size_that_is_no_int_of_at_least_1_is_refused(size, error):
    for name, sizes in (("in_features", (size, 2)), ("out_features", (2, size))):
        with pytest.raises(error, match=rf"^{name} is .*must be an int >= 1"):
            Linear(*sizes)


def test_any_integer_type_is_a_size():
    assert Linear(np.int64(3), np.uint8(4)).W.shape == (4, 3)


@pytest.mark.parametrize("dtype", ["int32", "bfloat16", "complex64", "float", "nonsense", ">f4", int, bool, np.dtype("int8")])
def test_a_dtype_that_layers_do_not_compute_in_is_refused(backend, dtype):
    layer, _, _ = made(backend)
    for call in (lambda: Linear(3, 4, dtype=dtype, device=backend.device), lambda: layer.to(dtype=dtype)):
        with pytest.raises(TypeError, match=r"dtype is .*float32"):
            call()


def test_float16_is_for_namespaces_that_accumulate_in_float32(backend):
    layer, X, _ = made(backend)
    makers = (lambda: Linear(3, 4, dtype="float16", device=backend.device), lambda: layer.to(dtype="float16"))
    for make in makers:
        if "float16" in backend.dtypes:
            half = make()
            assert half(backend.asarray(backend.to_numpy(X), "float16")).dtype == backend.xp.float16
        else:
            with pytest.raises(TypeError, match="float16"):
                make()


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cuda:x", "", 0, None.__class__])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ValueError, match="device is"):
        Linear(3, 4, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# wrapping, moving, copying


@pytest.mark.parametrize("b_shape", [(2,), (1, 2), None])
def test_from_arrays_wraps_without_copying(backend, b_shape):
    W = backend.asarray(np.arange(6.0).reshape(2, 3))
    b = None if b_shape is None else backend.asarray(np.asarray([5.0, 7.0]).reshape(b_shape))
    layer = Linear.from_arrays(W, b)
    assert layer.W is W
    assert layer.dW is None
    assert layer.db is None
    if b is None:
        assert layer.b is None
    else:
        assert tuple(layer.b.shape) == (1, 2)
        assert np.array_equal(backend.to_numpy(layer.b), [[5.0, 7.0]])
    if b_shape == (1, 2):
        assert layer.b is b
    elif b_shape and backend.name == "numpy":
        assert np.shares_memory(layer.b, b)
    assert np.array_equal(
        backend.to_numpy(layer(backend.asarray([1.0, 1.0, 1.0]))), np.asarray([3.0, 12.0]) + (0 if b is None else [5, 7])
    )


def test_a_subclass_wraps_and_moves_as_itself():
    class Named(Linear):
        name = "nobody"

    layer = Named.from_arrays(np.eye(2))
    layer.name = "encoder"
    for other in (layer, layer.to(dtype="float32"), copy.deepcopy(layer), copy.copy(layer)):
        assert type(other) is Named
        assert other.name == "encoder"


def test_to_gives_a_new_layer_without_gradients(backend):
    layer, X, dZ = made(backend)
    _, cache = layer.forward(X)
    layer.backward(dZ, cache)
    before = dict(vars(layer))
    for moved in (layer.to(), layer.to(backend.device), layer.to(dtype="float32"), layer.to("cpu").to(backend.device)):
        assert moved is not layer
        assert backend.owns(moved.W)
        assert moved.dW is None
        assert moved.db is None
        assert same(backend, moved(X), layer(X))
    double = layer.to(dtype="float64")
    assert double.W.dtype == double.b.dtype == backend.xp.float64
    on_host = layer.to("cpu")
    assert type(on_host.W) is type(on_host.b) is np.ndarray
    assert np.array_equal(on_host.W, backend.to_numpy(layer.W))
    assert all(before[name] is value for name, value in vars(layer).items())
    assert made(backend, bias=False)[0].to(dtype="float64").b is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["deepcopy", "pickle"])
def test_copies_stay_on_their_device(backend, copied):
    # CuPy's own pickling puts arrays on whatever device is current; the current one here is 0, also for cupy:1
    if backend.name.startswith("strict"):
        pytest.skip("array-api-strict's arrays can be neither copied nor pickled")
    layer, X, dZ = made(backend)
    _, cache = layer.forward(X)
    layer.backward(dZ, cache)
    twin = copied(layer)
    for name in ("W", "b", "dW", "db"):
        assert backend.owns(getattr(twin, name)), name
        assert getattr(twin, name) is not getattr(layer, name), name
        assert same(backend, getattr(twin, name), getattr(layer, name)), name
    assert same(backend, twin(X), layer(X))


def test_a_layer_says_what_it_is(backend):
    layer, _, _ = made(backend)
    assert repr(layer) == f"Linear(3, 4, dtype={layer.dtype}, device={backend.device})"
    assert "bias=False" in repr(made(backend, bias=False)[0])


class Scaled(Linear):
    """`Z = (X W^T + b) s`: a layer with one more parameter."""

    def __init__(self, *sizes):
        super().__init__(*sizes, seed=0)
        self.s, self.ds = np.asarray(2.0), None

    def parameters(self):
        return {**super().parameters(), "s": self.s}

    def gradients(self, dZ, cache, *, needs_dX=True):
        dX, gradients = super().gradients(dZ * self.s, cache, needs_dX=needs_dX)
        return dX, {**gradients, "s": np.sum(dZ * linear_forward(cache["X"], self.W, self.b))}


def test_a_subclass_may_have_parameters_of_its_own():
    layer, X, dZ = Scaled(3, 2), np.ones((4, 3)), np.ones((4, 2))
    _, gradients = layer.gradients(dZ, {"X": X})
    for times, accumulate in ((1, False), (2, True)):
        layer.backward(dZ, {"X": X}, accumulate=accumulate)
        for p in ("W", "b", "s"):
            np.testing.assert_array_equal(getattr(layer, f"d{p}"), times * gradients[p])
